//! Extended page tables (SDM vol. 3, 29.3): four levels, pages of 4 KiB and 2 MiB.

use core::ops::Range;

use crate::{LARGE, PAGE};

/// Entries of a table.
pub const ENTRIES: usize = 512;
/// Guest-physical addresses that four levels reach.
pub const REACH: u64 = 1 << 48;

const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const IS_LARGE: u64 = 1 << 7;
/// What a table's entry allows: everything; the last level decides.
const TABLE: u64 = 7;

/// What the guest may do with a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permissions(u64);

impl Permissions {
    /// Nothing: the page is absent.
    pub const NONE: Self = Self(0);
    /// Read.
    pub const READ: Self = Self(1);
    /// Read and write.
    pub const READ_WRITE: Self = Self(3);
    /// Execute, not even read: needs a capability of the processor.
    pub const EXECUTE: Self = Self(4);
    /// Read and execute.
    pub const READ_EXECUTE: Self = Self(5);
    /// Everything.
    pub const ALL: Self = Self(7);
}

/// How memory is cached, as an entry of the last level has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryType {
    /// Devices.
    Uncacheable = 0,
    /// RAM.
    WriteBack = 6,
}

/// A table, or any other page that is handed out.
#[derive(Debug, Clone)]
#[repr(C, align(4096))]
pub struct Table(pub [u64; ENTRIES]);

impl Table {
    /// One of zeros.
    pub const EMPTY: Table = Table([0; ENTRIES]);
}

/// Pages that tables are made of, and where the first of them lies in physical memory.
#[derive(Debug)]
pub struct Pool<'a> {
    base: u64,
    tables: &'a mut [Table],
    used: usize,
}

/// There is no page left in the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exhausted;

impl<'a> Pool<'a> {
    /// A pool of `tables`, which lie at physical address `base`.
    pub fn new(base: u64, tables: &'a mut [Table]) -> Self {
        Self {
            base,
            tables,
            used: 0,
        }
    }

    /// A zeroed page: its physical address.
    pub fn allocate(&mut self) -> Result<u64, Exhausted> {
        let table = self.tables.get_mut(self.used).ok_or(Exhausted)?;
        *table = Table::EMPTY;
        let at = self.base + self.used as u64 * PAGE;
        self.used += 1;
        Ok(at)
    }

    /// The page at a physical address that [`Self::allocate`] gave.
    pub fn page(&mut self, at: u64) -> Option<&mut [u64; ENTRIES]> {
        let index = usize::try_from(at.checked_sub(self.base)? / PAGE).ok()?;
        self.tables.get_mut(..self.used)?.get_mut(index).map(|t| &mut t.0)
    }

    fn entry(&mut self, table: u64, index: usize) -> Result<&mut u64, Exhausted> {
        self.page(table).and_then(|t| t.get_mut(index)).ok_or(Exhausted)
    }
}

/// A set of extended page tables, known by its root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ept {
    root: u64,
}

/// Index into the table of a level, 4 (root) to 1.
fn index(gpa: u64, level: u32) -> usize {
    (gpa >> (12 + 9 * (level - 1)) & 511) as usize
}

fn leaf(hpa: u64, permissions: Permissions, kind: MemoryType) -> u64 {
    if permissions == Permissions::NONE {
        return 0;
    }
    hpa & ADDRESS | permissions.0 | (kind as u64) << 3
}

impl Ept {
    /// None yet: not to be entered.
    pub const NONE: Self = Self { root: 0 };

    /// Tables that map nothing.
    pub fn new(pool: &mut Pool<'_>) -> Result<Self, Exhausted> {
        Ok(Self {
            root: pool.allocate()?,
        })
    }

    /// Tables in which every page is the page at `hpa`, with `permissions`. Four pages of tables are enough for all.
    pub fn everywhere(pool: &mut Pool<'_>, hpa: u64, permissions: Permissions) -> Result<Self, Exhausted> {
        let mut entry = leaf(hpa, permissions, MemoryType::WriteBack);
        let mut at = 0;
        for _ in 0..4 {
            at = pool.allocate()?;
            pool.page(at).ok_or(Exhausted)?.fill(entry);
            entry = at | TABLE;
        }
        Ok(Self { root: at })
    }

    /// The EPT pointer: write-back tables of four levels, no accessed and dirty flags.
    pub fn pointer(self) -> u64 {
        self.root | 6 | 3 << 3
    }

    /// The table of level `to` for `gpa`; tables that are missing are made, large pages in the way split, and tables that
    /// others may share copied first when `isolate` is set.
    fn table(self, pool: &mut Pool<'_>, gpa: u64, to: u32, isolate: bool) -> Result<u64, Exhausted> {
        let mut table = self.root;
        for level in (to + 1..=4).rev() {
            let at = index(gpa, level);
            let entry = *pool.entry(table, at)?;
            let next = if entry == 0 {
                pool.allocate()?
            } else if entry & IS_LARGE != 0 {
                let next = pool.allocate()?;
                let small = entry & !IS_LARGE;
                for (n, slot) in pool.page(next).ok_or(Exhausted)?.iter_mut().enumerate() {
                    *slot = small + n as u64 * PAGE;
                }
                next
            } else if isolate {
                let shared = *pool.page(entry & ADDRESS).ok_or(Exhausted)?;
                let next = pool.allocate()?;
                *pool.page(next).ok_or(Exhausted)? = shared;
                next
            } else {
                entry & ADDRESS
            };
            *pool.entry(table, at)? = next | TABLE;
            table = next;
        }
        Ok(table)
    }

    /// Maps the 2 MiB page at `gpa` to itself.
    pub fn map_large(
        self,
        pool: &mut Pool<'_>,
        gpa: u64,
        permissions: Permissions,
        kind: MemoryType,
    ) -> Result<(), Exhausted> {
        let gpa = gpa & !(LARGE - 1);
        let table = self.table(pool, gpa, 2, false)?;
        *pool.entry(table, index(gpa, 2))? = leaf(gpa, permissions, kind) | IS_LARGE;
        Ok(())
    }

    /// Maps the 4 KiB page at `gpa` to `hpa`.
    pub fn map(
        self,
        pool: &mut Pool<'_>,
        gpa: u64,
        hpa: u64,
        permissions: Permissions,
        kind: MemoryType,
    ) -> Result<(), Exhausted> {
        let table = self.table(pool, gpa, 1, false)?;
        *pool.entry(table, index(gpa, 1))? = leaf(hpa, permissions, kind);
        Ok(())
    }

    /// Maps pages, guest and host address and permissions of each, of tables that [`Self::everywhere`] or
    /// [`Self::variant`] made; all other pages go on to share theirs. It costs least where those of one 2 MiB page follow
    /// each other.
    pub fn replace(self, pool: &mut Pool<'_>, pages: &[(u64, u64, Permissions)]) -> Result<(), Exhausted> {
        for group in pages.chunk_by(|(a, ..), (b, ..)| a / LARGE == b / LARGE) {
            let Some(&(first, ..)) = group.first() else {
                continue;
            };
            let table = self.table(pool, first, 1, true)?;
            for &(gpa, hpa, permissions) in group {
                *pool.entry(table, index(gpa, 1))? = leaf(hpa, permissions, MemoryType::WriteBack);
            }
        }
        Ok(())
    }

    /// Tables that differ in these pages, and share all others with these: what is changed there, changes in both.
    pub fn variant(self, pool: &mut Pool<'_>, pages: &[(u64, u64, Permissions)]) -> Result<Self, Exhausted> {
        let shared = *pool.page(self.root).ok_or(Exhausted)?;
        let variant = Self::new(pool)?;
        *pool.page(variant.root).ok_or(Exhausted)? = shared;
        variant.replace(pool, pages)?;
        Ok(variant)
    }

    /// Makes `range`, which must be whole pages, absent.
    pub fn remove(self, pool: &mut Pool<'_>, range: Range<u64>) -> Result<(), Exhausted> {
        let mut gpa = range.start;
        while gpa < range.end {
            self.map(pool, gpa, 0, Permissions::NONE, MemoryType::WriteBack)?;
            gpa += PAGE;
        }
        Ok(())
    }

    /// A copy of the tables in which every page has `permissions`.
    pub fn copy(self, pool: &mut Pool<'_>, permissions: Permissions) -> Result<Self, Exhausted> {
        let root = copy(pool, self.root, 4, permissions)?;
        Ok(Self { root })
    }

    /// Where a page is and what may be done with it; `None` where it is absent.
    pub fn translate(self, pool: &mut Pool<'_>, gpa: u64) -> Option<(u64, Permissions)> {
        if gpa >= REACH {
            return None;
        }
        let mut table = self.root;
        for level in (1..=4).rev() {
            let entry = *pool.entry(table, index(gpa, level)).ok()?;
            let permissions = Permissions(entry & 7);
            if permissions == Permissions::NONE {
                return None;
            }
            if level == 1 || entry & IS_LARGE != 0 {
                let inside = (PAGE << (9 * (level - 1))) - 1;
                return Some((entry & ADDRESS & !inside | gpa & inside, permissions));
            }
            table = entry & ADDRESS;
        }
        None
    }
}

fn copy(pool: &mut Pool<'_>, table: u64, level: u32, permissions: Permissions) -> Result<u64, Exhausted> {
    let copied = pool.allocate()?;
    for n in 0..ENTRIES {
        let entry = *pool.entry(table, n)?;
        *pool.entry(copied, n)? = if entry == 0 {
            0
        } else if level == 1 || entry & IS_LARGE != 0 {
            entry & !7 | permissions.0
        } else {
            copy(pool, entry & ADDRESS, level - 1, permissions)? | TABLE
        };
    }
    Ok(copied)
}

#[cfg(test)]
mod tests {
    use std::vec;
    use std::vec::Vec;

    use super::*;

    const BASE: u64 = 0x800_0000;

    fn tables() -> Vec<Table> {
        vec![Table::EMPTY; 64]
    }

    #[test]
    fn a_large_page_is_split_where_a_small_one_differs() {
        let mut tables = tables();
        let mut pool = Pool::new(BASE, &mut tables);
        let ept = Ept::new(&mut pool).unwrap();
        ept.map_large(&mut pool, 0x40_0000, Permissions::ALL, MemoryType::WriteBack)
            .unwrap();
        let at = 0x40_5000;
        ept.map(
            &mut pool,
            at,
            at,
            Permissions::READ_EXECUTE,
            MemoryType::WriteBack,
        )
        .unwrap();
        assert_eq!(
            ept.translate(&mut pool, at + 5),
            Some((at + 5, Permissions::READ_EXECUTE))
        );
        assert_eq!(
            ept.translate(&mut pool, 0x40_4fff),
            Some((0x40_4fff, Permissions::ALL))
        );
        assert_eq!(
            ept.translate(&mut pool, 0x5f_ffff),
            Some((0x5f_ffff, Permissions::ALL))
        );
        assert_eq!(ept.translate(&mut pool, 0x60_0000), None);
        assert_eq!(ept.translate(&mut pool, REACH + at), None);
        ept.remove(&mut pool, at..at + 2 * PAGE).unwrap();
        assert_eq!(ept.translate(&mut pool, at), None);
        assert_eq!(ept.translate(&mut pool, at + PAGE), None);
    }

    #[test]
    fn everywhere_is_one_page_but_where_it_is_replaced() {
        let mut tables = tables();
        let mut pool = Pool::new(BASE, &mut tables);
        let ept = Ept::everywhere(&mut pool, 0x1000, Permissions::READ).unwrap();
        let gate = 0x812_3000;
        ept.replace(
            &mut pool,
            &[
                (gate, gate, Permissions::EXECUTE),
                (gate + PAGE, gate, Permissions::READ_WRITE),
            ],
        )
        .unwrap();
        for gpa in [
            0,
            0x1000,
            gate - 1,
            gate + 2 * PAGE,
            gate + LARGE,
            gate + (1 << 30),
            gate + (1 << 39),
            REACH - 1,
        ] {
            assert_eq!(
                ept.translate(&mut pool, gpa),
                Some((0x1000 + gpa % PAGE, Permissions::READ)),
                "{gpa:#x}"
            );
        }
        assert_eq!(
            ept.translate(&mut pool, gate + 7),
            Some((gate + 7, Permissions::EXECUTE))
        );
        assert_eq!(
            ept.translate(&mut pool, gate + PAGE),
            Some((gate, Permissions::READ_WRITE))
        );
        // In another large page: both stand.
        ept.replace(&mut pool, &[(0, 0x5000, Permissions::READ)]).unwrap();
        for (gpa, hpa) in [(0, 0x5000), (0x1000, 0x1000), (gate, gate)] {
            assert_eq!(ept.translate(&mut pool, gpa).unwrap().0, hpa, "{gpa:#x}");
        }
    }

    #[test]
    fn a_variant_differs_where_it_is_to() {
        let mut tables = tables();
        let mut pool = Pool::new(BASE, &mut tables);
        let ept = Ept::new(&mut pool).unwrap();
        for gpa in [0, LARGE, 1 << 30] {
            ept.map_large(&mut pool, gpa, Permissions::READ_WRITE, MemoryType::WriteBack)
                .unwrap();
        }
        let pages = [
            (0x3000, 0x9000, Permissions::READ),
            (0x4000, 0xa000, Permissions::READ_WRITE),
            ((1 << 30) + 0x3000, 0xb000, Permissions::READ),
        ];
        let variant = ept.variant(&mut pool, &pages).unwrap();
        for (gpa, hpa, permissions) in pages {
            assert_eq!(variant.translate(&mut pool, gpa), Some((hpa, permissions)));
            assert_eq!(
                ept.translate(&mut pool, gpa),
                Some((gpa, Permissions::READ_WRITE))
            );
        }
        for gpa in [0x2000, 0x5000, LARGE, 1 << 30] {
            assert_eq!(variant.translate(&mut pool, gpa), ept.translate(&mut pool, gpa));
        }
    }

    #[test]
    fn a_copy_has_its_own_permissions() {
        let mut tables = tables();
        let mut pool = Pool::new(BASE, &mut tables);
        let ept = Ept::new(&mut pool).unwrap();
        ept.map_large(&mut pool, 0, Permissions::ALL, MemoryType::WriteBack)
            .unwrap();
        ept.map(
            &mut pool,
            0x3000,
            0x3000,
            Permissions::NONE,
            MemoryType::WriteBack,
        )
        .unwrap();
        let copy = ept.copy(&mut pool, Permissions::READ_WRITE).unwrap();
        assert_eq!(
            copy.translate(&mut pool, 0x2000),
            Some((0x2000, Permissions::READ_WRITE))
        );
        assert_eq!(copy.translate(&mut pool, 0x3000), None);
        assert_eq!(ept.translate(&mut pool, 0x2000), Some((0x2000, Permissions::ALL)));
    }

    #[test]
    fn an_exhausted_pool_says_so() {
        let mut tables = vec![Table::EMPTY; 2];
        let mut pool = Pool::new(BASE, &mut tables);
        let ept = Ept::new(&mut pool).unwrap();
        let mapped = ept.map(&mut pool, 0, 0, Permissions::ALL, MemoryType::WriteBack);
        assert_eq!(mapped, Err(Exhausted));
    }
}
