//! A writer of page tables, and the map that says what they must mean. Deliberately naive: one function per
//! family of formats, the bits spelled out from the manuals, nothing shared with the walkers.

use std::collections::{BTreeMap, HashMap};
use std::sync::LazyLock;

use vmsight_arch::Gpa;
use vmsight_arch::paging::{Access, Granule, PagingMode, TableMemory};

/// What a page allows, as the model has it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Rights {
    pub(crate) write: bool,
    pub(crate) user: bool,
    pub(crate) execute: bool,
    pub(crate) user_execute: bool,
    pub(crate) accessed: bool,
    pub(crate) dirty: bool,
    pub(crate) global: bool,
}

impl Rights {
    pub(crate) fn of(a: Access) -> Self {
        let Access {
            write,
            user,
            execute,
            user_execute,
            accessed,
            dirty,
            global,
        } = a;
        Self {
            write,
            user,
            execute,
            user_execute,
            accessed,
            dirty,
            global,
        }
    }
}

/// A page of the model.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Page {
    pub(crate) gpa: u64,
    pub(crate) shift: u32,
    pub(crate) rights: Rights,
}

/// One level: the log2 of what an entry spans, how many entries, and whether an entry can be a page.
pub(crate) struct Level {
    pub(crate) shift: u32,
    entries: u64,
    page: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Family {
    Legacy,
    Pae,
    Long,
    Arm { page_shift: u32, lpa2: bool },
}

/// A mode, spelled out.
pub(crate) struct Spec {
    pub(crate) mode: PagingMode,
    family: Family,
    pub(crate) va_bits: u32,
    /// Root first.
    pub(crate) levels: Vec<Level>,
}

impl Spec {
    pub(crate) fn page_shifts(&self) -> Vec<u32> {
        self.levels
            .iter()
            .rev()
            .filter(|l| l.page)
            .map(|l| l.shift)
            .collect()
    }
}

pub(crate) static MODES: LazyLock<Vec<Spec>> = LazyLock::new(|| {
    let spec = |mode, family, va_bits, levels: &[(u32, u64, bool)]| Spec {
        mode,
        family,
        va_bits,
        levels: levels
            .iter()
            .map(|&(shift, entries, page)| Level { shift, entries, page })
            .collect(),
    };
    let arm = |granule, page_shift, va_bits: u8, lpa2, levels: &[(u32, u64, bool)]| {
        let mode = PagingMode::Arm64 {
            granule,
            va_bits,
            lpa2,
        };
        spec(mode, Family::Arm { page_shift, lpa2 }, va_bits.into(), levels)
    };
    use Granule::{K4, K16, K64};
    const T: bool = true;
    const F: bool = false;
    vec![
        spec(
            PagingMode::X86_32 { pse: true },
            Family::Legacy,
            32,
            &[(22, 1024, T), (12, 1024, T)],
        ),
        spec(
            PagingMode::X86_32 { pse: false },
            Family::Legacy,
            32,
            &[(22, 1024, F), (12, 1024, T)],
        ),
        spec(
            PagingMode::X86Pae,
            Family::Pae,
            32,
            &[(30, 4, F), (21, 512, T), (12, 512, T)],
        ),
        spec(
            PagingMode::X86Level4,
            Family::Long,
            48,
            &[(39, 512, F), (30, 512, T), (21, 512, T), (12, 512, T)],
        ),
        spec(
            PagingMode::X86Level5,
            Family::Long,
            57,
            &[
                (48, 512, F),
                (39, 512, F),
                (30, 512, T),
                (21, 512, T),
                (12, 512, T),
            ],
        ),
        // Linux's usual 48- and 39-bit kernels, and the extremes of each granule.
        arm(
            K4,
            12,
            48,
            false,
            &[(39, 512, F), (30, 512, T), (21, 512, T), (12, 512, T)],
        ),
        arm(K4, 12, 39, false, &[(30, 512, T), (21, 512, T), (12, 512, T)]),
        arm(
            K4,
            12,
            52,
            true,
            &[
                (48, 16, F),
                (39, 512, T),
                (30, 512, T),
                (21, 512, T),
                (12, 512, T),
            ],
        ),
        arm(K4, 12, 16, false, &[(12, 16, T)]),
        arm(K4, 12, 33, false, &[(30, 8, T), (21, 512, T), (12, 512, T)]),
        arm(K16, 14, 47, false, &[(36, 2048, F), (25, 2048, T), (14, 2048, T)]),
        arm(
            K16,
            14,
            48,
            false,
            &[(47, 2, F), (36, 2048, F), (25, 2048, T), (14, 2048, T)],
        ),
        arm(
            K16,
            14,
            52,
            true,
            &[(47, 32, F), (36, 2048, T), (25, 2048, T), (14, 2048, T)],
        ),
        arm(K64, 16, 42, false, &[(29, 8192, T), (16, 8192, T)]),
        arm(K64, 16, 48, false, &[(42, 64, T), (29, 8192, T), (16, 8192, T)]),
        arm(K64, 16, 52, false, &[(42, 1024, T), (29, 8192, T), (16, 8192, T)]),
    ]
});

/// Tables in memory, and what they mean.
pub(crate) struct Space {
    pub(crate) spec: &'static Spec,
    pub(crate) root: u64,
    /// Every word of 4 bytes that is not zero.
    memory: HashMap<u64, u32>,
    /// Tables by level (index into the spec) and the address they begin at: their place and the rights on the way.
    tables: BTreeMap<(usize, u64), (u64, Rights)>,
    pages: BTreeMap<u64, Page>,
    next_table: u64,
}

impl TableMemory for Space {
    fn entry_u64(&self, gpa: Gpa) -> Option<u64> {
        let word = |at| u64::from(self.memory.get(&at).copied().unwrap_or(0));
        Some(word(gpa.0) | word(gpa.0 + 4) << 32)
    }

    fn entry_u32(&self, gpa: Gpa) -> Option<u32> {
        Some(self.memory.get(&gpa.0).copied().unwrap_or(0))
    }
}

const ALL: Rights = Rights {
    write: true,
    user: true,
    execute: true,
    user_execute: true,
    accessed: false,
    dirty: false,
    global: false,
};

impl Space {
    pub(crate) fn new(spec: &'static Spec) -> Self {
        // Tables lie where their format can point: low for 32-bit, far up for the others.
        let root = match spec.family {
            Family::Legacy | Family::Pae => 0x0234_0000,
            Family::Long => 0x000a_5000_0001_0000,
            Family::Arm { page_shift: 16, .. } | Family::Arm { lpa2: true, .. } => 0x000a_5000_0001_0000,
            Family::Arm { .. } => 0x0000_a500_0001_0000,
        };
        let mut tables = BTreeMap::new();
        tables.insert((0, 0), (root, ALL));
        Self {
            spec,
            root,
            memory: HashMap::new(),
            tables,
            pages: BTreeMap::new(),
            next_table: root + 0x1_0000,
        }
    }

    pub(crate) fn tables(&self) -> u64 {
        self.tables.len() as u64
    }

    fn is_arm(&self) -> bool {
        matches!(self.spec.family, Family::Arm { .. })
    }

    /// The address as the model keeps it: cut to the bits of the mode and, on x86-64, sign-extended. AArch64's
    /// two halves share the tables of one root, so the model keeps the lower.
    fn normal(&self, va: u64) -> u64 {
        let low = va & ((1 << self.spec.va_bits) - 1);
        let sign = low >> (self.spec.va_bits - 1) == 1;
        if self.spec.family == Family::Long && sign {
            low | !((1 << self.spec.va_bits) - 1)
        } else {
            low
        }
    }

    pub(crate) fn canonical(&self, va: u64) -> bool {
        let top = va >> self.spec.va_bits;
        let all = u64::MAX >> self.spec.va_bits;
        match self.spec.family {
            Family::Legacy | Family::Pae => top == 0,
            Family::Long => va == self.normal(va),
            Family::Arm { .. } => top == 0 || top == all,
        }
    }

    /// Maps a page unless something is there already.
    pub(crate) fn map(&mut self, va: u64, shift: u32, gpa: u64, rights: Rights, table_rights: Rights) {
        let size = 1u64 << shift;
        let va = self.normal(va) & !(size - 1);
        if self.touching(va, va + (size - 1)).next().is_some() {
            return;
        }
        let gpa_bits = match self.spec.family {
            Family::Legacy if shift == 22 => 40,
            Family::Legacy => 32,
            Family::Pae | Family::Long => 52,
            Family::Arm { page_shift: 16, .. } | Family::Arm { lpa2: true, .. } => 52,
            Family::Arm { .. } => 48,
        };
        let gpa = gpa & ((1 << gpa_bits) - 1) & !(size - 1);

        let spec = self.spec;
        let (mut table, mut above) = (self.root, ALL);
        for (i, level) in spec.levels.iter().enumerate() {
            let low = va & ((1 << spec.va_bits) - 1);
            let index = (low >> level.shift) % level.entries;
            if level.shift == shift {
                let entry_at = self.entry_at(table, index);
                let (value, rights) = self.leaf(i, gpa, rights, above);
                self.put(entry_at, value);
                self.pages.insert(va, Page { gpa, shift, rights });
                return;
            }
            let key = (i + 1, low >> level.shift << level.shift);
            if let Some(&(t, r)) = self.tables.get(&key) {
                (table, above) = (t, r);
                continue;
            }
            let next = self.next_table;
            self.next_table += 0x1_0000;
            let (value, rights) = self.table(i, next, table_rights, above);
            let entry_at = self.entry_at(table, index);
            self.put(entry_at, value);
            self.tables.insert(key, (next, rights));
            (table, above) = (next, rights);
        }
    }

    fn entry_at(&self, table: u64, index: u64) -> u64 {
        table + index * if self.spec.family == Family::Legacy { 4 } else { 8 }
    }

    fn put(&mut self, at: u64, value: u64) {
        self.memory.insert(at, value as u32);
        if self.spec.family != Family::Legacy {
            self.memory.insert(at + 4, (value >> 32) as u32);
        }
    }

    /// An entry for a table, and the rights it leaves.
    fn table(&self, level: usize, next: u64, want: Rights, above: Rights) -> (u64, Rights) {
        let mut v = match self.spec.family {
            Family::Pae if level == 0 => return (next | 1, above),
            Family::Arm { page_shift, lpa2 } => {
                let mut v = arm_address(next, page_shift, lpa2) | 0b11;
                v |= u64::from(!want.execute) << 59;
                v |= u64::from(!want.user_execute) << 60;
                v |= u64::from(!want.user) << 61;
                v |= u64::from(!want.write) << 62;
                let rights = Rights {
                    write: above.write && want.write,
                    user: above.user && want.user,
                    execute: above.execute && want.execute,
                    user_execute: above.user_execute && want.user_execute,
                    ..ALL
                };
                return (v, rights);
            }
            _ => next | 1,
        };
        v |= u64::from(want.write) << 1 | u64::from(want.user) << 2 | u64::from(want.accessed) << 5;
        let nx = !want.execute && self.spec.family != Family::Legacy;
        v |= u64::from(nx) << 63;
        let user = above.user && want.user;
        let execute = above.execute && !nx;
        (
            v,
            Rights {
                write: above.write && want.write,
                user,
                execute,
                user_execute: user && execute,
                ..ALL
            },
        )
    }

    /// An entry for a page, and the rights it gives.
    fn leaf(&self, level: usize, gpa: u64, want: Rights, above: Rights) -> (u64, Rights) {
        let last = level + 1 == self.spec.levels.len();
        if let Family::Arm { page_shift, lpa2 } = self.spec.family {
            let mut v = arm_address(gpa, page_shift, lpa2) | if last { 0b11 } else { 0b01 };
            v |= u64::from(want.user) << 6;
            v |= u64::from(want.accessed) << 10;
            v |= u64::from(!want.global) << 11;
            v |= u64::from(!want.execute) << 53;
            v |= u64::from(!want.user_execute) << 54;
            // Dirty: DBM set and not read-only. A writable clean page: DBM set, read-only.
            let dirty = want.write && want.dirty;
            if want.write {
                v |= 1 << 51 | u64::from(!dirty) << 7;
            } else {
                v |= 1 << 7;
            }
            let write = above.write && want.write;
            let user = above.user && want.user;
            let rights = Rights {
                write,
                user,
                execute: above.execute && want.execute && !(write && user),
                user_execute: above.user_execute && want.user_execute,
                accessed: want.accessed,
                dirty,
                global: want.global,
            };
            return (v, rights);
        }
        let legacy = self.spec.family == Family::Legacy;
        let mut v = if legacy && !last {
            gpa & 0xffff_ffff | (gpa >> 32) << 13
        } else {
            gpa
        };
        let nx = !want.execute && !legacy;
        v |= 1
            | u64::from(want.write) << 1
            | u64::from(want.user) << 2
            | u64::from(want.accessed) << 5
            | u64::from(want.dirty) << 6
            | u64::from(!last) << 7
            | u64::from(want.global) << 8
            | u64::from(nx) << 63;
        let user = above.user && want.user;
        let execute = above.execute && !nx;
        let write = above.write && want.write;
        (
            v,
            Rights {
                write,
                user,
                execute,
                user_execute: user && execute,
                ..want
            },
        )
    }

    /// What the model says of an address: the page's first address (in the half of `va`) and the page.
    pub(crate) fn expect(&self, va: u64) -> Option<(u64, Page)> {
        if !self.canonical(va) {
            return None;
        }
        let normal = self.normal(va);
        let (&start, &page) = self.pages.range(..=normal).next_back()?;
        (normal - start < 1 << page.shift).then_some((va - (normal - start), page))
    }

    /// The level (1 is the last) whose entry is missing for an unmapped address.
    pub(crate) fn absent_level(&self, va: u64) -> Option<u32> {
        let low = va & ((1 << self.spec.va_bits) - 1);
        let n = self.spec.levels.len();
        let missing = (1..n).find(|&i| {
            let above = &self.spec.levels[i - 1];
            !self.tables.contains_key(&(i, low >> above.shift << above.shift))
        });
        Some((n - missing.map_or(n - 1, |i| i - 1)) as u32)
    }

    /// Pages that share a byte with `start..=end`, ends inclusive.
    pub(crate) fn touching(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, Page)> + '_ {
        let high = self.is_arm() && start >> 63 == 1;
        let top = if high {
            !((1u64 << self.spec.va_bits) - 1)
        } else {
            0
        };
        self.pages
            .iter()
            .map(move |(&va, &p)| (va | top, p))
            .filter(move |(va, p)| *va <= end && va + ((1 << p.shift) - 1) >= start)
    }

    /// Ranges that between them hold every address: one, but for AArch64's two halves.
    pub(crate) fn halves(&self) -> Vec<(u64, u64)> {
        if self.is_arm() {
            vec![(0, u64::MAX >> 1), (1 << 63, u64::MAX)]
        } else {
            vec![(0, u64::MAX)]
        }
    }

    pub(crate) fn same_half(&self, start: u64, end: u64) -> bool {
        !self.is_arm() || (self.canonical(start) && self.canonical(end) && start >> 63 == end >> 63)
    }
}

fn arm_address(gpa: u64, page_shift: u32, lpa2: bool) -> u64 {
    if lpa2 {
        gpa & ((1 << 50) - 1) | (gpa >> 50 & 3) << 8
    } else if page_shift == 16 {
        gpa & ((1 << 48) - 1) | (gpa >> 48 & 15) << 12
    } else {
        gpa
    }
}
