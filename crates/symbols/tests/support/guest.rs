//! A guest's memory with a kernel in it: image, page tables, symbols and types, as small as can be.

use vmsight_arch::paging::PagingMode;
use vmsight_arch::{Dtb, Gpa, Registers};
use vmsight_memory::GuestMemory;
use vmsight_symbols::TypeId;
use vmsight_symbols::types::{Builder, Def, MemberDef};

use super::tables::{LAYOUTS, Layout, Sym, encode, kernel_symbols, sym};

pub const MIB: u64 = 1 << 20;
const LARGE: u64 = 2 * MIB;
const PAGE: u64 = 0x1000;
pub const LINK: u64 = 0xffff_ffff_8100_0000;
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;

/// Where things lie in the image: 2 MiB of text, of read-only data, of data, of bss.
pub const RODATA: u64 = LARGE;
pub const DATA: u64 = 2 * LARGE;
pub const IMAGE: u64 = 4 * LARGE;
const INIT_TOP: u64 = DATA + 0x4000;
const LEVEL4: u64 = DATA + 0x6000;
const LEVEL3: u64 = DATA + 0x7000;
const LEVEL2: u64 = DATA + 0x8000;
const FIXMAP: u64 = DATA + 0x9000;
const ROPAGES: u64 = DATA + 0xa000;
const BOOT_PARAMS: u64 = DATA + 0x1_0000;
const TK_CORE: u64 = DATA + 0x1_2000;
pub const EARLY_TOP: u64 = DATA + 0x10_0000;
const BANNER: u64 = RODATA + 0x340;
const NOTES: u64 = RODATA + 0x1f_0000;
const BTF: u64 = RODATA + 0x10_0000;
const KSYMTAB: u64 = RODATA + 0x18_0000;
const KALLSYMS: u64 = RODATA + 0x4000;

const TABLE: u64 = 0x63;
const USER_TABLE: u64 = 0x67;
const NX: u64 = 1 << 63;

/// One kernel to be put into memory.
#[derive(Clone, Debug)]
pub struct Kernel {
    pub phys: u64,
    pub text: u64,
    pub levels: u8,
    pub direct_map: u64,
    pub release: String,
    pub build_id: Vec<u8>,
    pub layout: Layout,
    pub symbols: usize,
    /// Seconds since 1970 on its clock.
    pub clock: u64,
    /// A name and address that differ from what a kernel of this build-id should have.
    pub extra: Option<(String, u64)>,
    pub with_btf: bool,
    /// With as many types as a kernel has, so that they are believed without a symbol that says where they lie.
    pub many_types: bool,
    pub percpu: bool,
    /// Built without CONFIG_KALLSYMS_ALL: functions only, and what is exported to modules, in entries of so many bytes.
    pub exports: Option<u64>,
    pub preferred: u64,
    /// With page-table isolation: behind the data are 2 MiB of init code that are no longer mapped, then 2 MiB more.
    pub isolated: bool,
}

impl Kernel {
    pub fn new(phys: u64, slide: u64) -> Self {
        Self {
            phys,
            text: LINK + slide,
            levels: 4,
            direct_map: 0xffff_9b0b_8000_0000,
            release: "6.1.0-test".to_owned(),
            build_id: (1..=20).collect(),
            layout: LAYOUTS[5].1,
            symbols: 1500,
            clock: 1_700_000_000,
            extra: None,
            with_btf: true,
            many_types: false,
            percpu: true,
            exports: None,
            preferred: 0x100_0000,
            isolated: false,
        }
    }

    pub fn five_levels(mut self) -> Self {
        self.levels = 5;
        self.direct_map = 0xff11_0000_4000_0000;
        self
    }

    /// Bytes from `_text` to the end of the image.
    pub fn len(&self) -> u64 {
        if self.isolated { IMAGE + 2 * LARGE } else { IMAGE }
    }

    pub fn mode(&self) -> PagingMode {
        if self.levels == 5 {
            PagingMode::X86Level5
        } else {
            PagingMode::X86Level4
        }
    }

    pub fn dtb(&self) -> Dtb {
        Dtb(self.phys + INIT_TOP)
    }

    pub fn banner(&self) -> String {
        format!(
            "Linux version {} (somebody@somewhere) (gcc 12.2) #1 SMP Debian",
            self.release
        )
    }

    /// Registers of a vCPU that runs on the page table at `root`.
    pub fn registers(&self, root: u64) -> Registers {
        Registers {
            cr0: 0x8005_0033,
            cr3: root,
            cr4: if self.levels == 5 { 0x10f0 | 1 << 12 } else { 0x6f0 },
            efer: 0xd01,
            ..Registers::default()
        }
    }

    pub fn symbol_list(&self) -> Vec<Sym> {
        let mut all = kernel_symbols(self.text, self.text + self.len(), self.symbols, self.percpu);
        let at = |offset: u64, kind: char, name: &str| sym(self.text + offset, kind, name);
        all.extend([
            at(BANNER, 'D', "linux_banner"),
            at(BTF, 'R', "__start_BTF"),
            at(BTF + btf(self.many_types).len() as u64, 'R', "__stop_BTF"),
            at(NOTES, 'R', "__start_notes"),
            at(NOTES + 0x24, 'R', "__stop_notes"),
            at(INIT_TOP, 'D', "init_top_pgt"),
            at(BOOT_PARAMS, 'D', "boot_params"),
            at(TK_CORE, 'd', "tk_core"),
            at(DATA + 0x2_0000, 'D', "init_task"),
        ]);
        if !self.with_btf {
            all.retain(|s| !s.name.ends_with("_BTF"));
        }
        if self.exports.is_some() {
            all.retain(|s| s.kind.eq_ignore_ascii_case(&b't'));
        }
        if let Some((name, offset)) = &self.extra {
            all.push(at(*offset, 'T', name));
        }
        all.sort_by_key(|s| s.address);
        all
    }
}

/// Types that the tests ask for.
pub fn btf(many: bool) -> Vec<u8> {
    let mut b = Builder::new();
    let int = |name| Def::int(name, 8, false);
    let long = b.add(&int("long unsigned int"));
    let member = |name, type_id: TypeId, bytes: u64| MemberDef {
        name,
        type_id,
        bit_offset: bytes * 8,
        bit_size: None,
    };
    b.add(&Def::Struct {
        name: "task_struct",
        size: 64,
        members: &[member("state", long, 0), member("pid", long, 40)],
    });
    let keeper = b.add(&Def::Struct {
        name: "timekeeper",
        size: 64,
        members: &[member("xtime_sec", long, 24)],
    });
    b.add(&Def::Struct {
        name: "tk_data",
        size: 80,
        members: &[member("seq", long, 0), member("timekeeper", keeper, 8)],
    });
    for i in 0..if many { 5000 } else { 0 } {
        b.add(&Def::Typedef {
            name: &format!("type_{i}_t"),
            target: long,
        });
    }
    b.into_bytes().unwrap()
}

/// What the kernel exports to modules.
pub fn exported(k: &Kernel) -> Vec<(String, u64)> {
    let mut all: Vec<(String, u64)> = (0..200)
        .map(|i| (format!("exported_{i:03}"), k.text + DATA + 0x4_0000 + i * 16))
        .collect();
    all.push(("init_task".to_owned(), k.text + DATA + 0x2_0000));
    all.push(("phys_base".to_owned(), k.text + DATA + 0x2_1000));
    all.push(("task".to_owned(), k.text + DATA + 0x2_2000));
    all.push(("d_100".to_owned(), k.text + DATA + 0x2_3000));
    all.push(("this_cpu_off".to_owned(), 0x30000));
    all.sort();
    all
}

/// Guest-physical memory from 0.
pub struct Ram(pub Vec<u8>);

impl Ram {
    pub fn new(mib: u64) -> Self {
        Self(vec![0; (mib * MIB) as usize])
    }

    pub fn put(&mut self, gpa: u64, bytes: &[u8]) {
        self.0[gpa as usize..gpa as usize + bytes.len()].copy_from_slice(bytes);
    }

    pub fn entry(&mut self, table: u64, index: u64, value: u64) {
        self.put(table + 8 * index, &value.to_le_bytes());
    }

    pub fn frozen(&self) -> GuestMemory {
        GuestMemory::from_bytes(vec![(Gpa(0), self.0.clone())]).unwrap()
    }

    pub fn live(&self) -> GuestMemory {
        GuestMemory::live_from_bytes(vec![(Gpa(0), self.0.clone())]).unwrap()
    }

    /// Only what lies from `start` on, as in a dump that lacks low memory.
    pub fn from(&self, start: u64) -> GuestMemory {
        GuestMemory::from_bytes(vec![(Gpa(start), self.0[start as usize..].to_vec())]).unwrap()
    }

    /// Puts a whole kernel into memory. No trampoline: see [`Ram::trampoline`].
    pub fn install(&mut self, k: &Kernel) {
        let at = |offset: u64| k.phys + offset;
        self.put(at(0), &[0x48, 0x8d, 0x25, 0x51, 0x3f, 0xc0, 0x01]);
        self.put(
            at(BANNER - 0x100),
            b"Linux version 6.1.0-test (somebody) # SMP without number\n\0",
        );
        self.put(at(BANNER), format!("{}\n\0", k.banner()).as_bytes());
        let mut tables = Vec::new();
        encode(&mut tables, k.text + KALLSYMS, &k.symbol_list(), k.layout);
        assert!((KALLSYMS + tables.len() as u64) < BTF, "room for the tables");
        self.put(at(KALLSYMS), &tables);
        if k.with_btf {
            self.put(at(BTF), &btf(k.many_types));
        }
        if let Some(stride) = k.exports {
            self.install_exports(k, stride);
        }
        // A vDSO with a note of its own, before the kernel's.
        let note = |id: &[u8]| {
            let head = [
                4_u32.to_le_bytes(),
                (id.len() as u32).to_le_bytes(),
                3_u32.to_le_bytes(),
            ]
            .concat();
            [head, b"GNU\0".to_vec(), id.to_vec()].concat()
        };
        self.put(at(RODATA + 0x1e_0000), b"\x7fELF");
        self.put(at(RODATA + 0x1e_0200), &note(&[0xdd; 20]));
        self.put(at(NOTES), &note(&k.build_id));
        self.put(at(BOOT_PARAMS + 0x202), b"HdrS");
        self.put(at(BOOT_PARAMS + 0x206), &0x20f_u16.to_le_bytes());
        self.put(at(BOOT_PARAMS + 0x258), &k.preferred.to_le_bytes());
        self.put(at(TK_CORE + 8 + 24), &k.clock.to_le_bytes());
        self.install_tables(k);
    }

    /// `__ksymtab` and its strings, sorted by name.
    fn install_exports(&mut self, k: &Kernel, stride: u64) {
        let strings = KSYMTAB + 0x8000;
        let mut end = strings;
        let mut placed: Vec<(String, u64)> = Vec::new();
        let mut all = exported(k);
        // Names that another ends with have no string of their own.
        all.sort_by_key(|(name, _)| std::cmp::Reverse(name.len()));
        for (name, _) in all {
            let shared = placed.iter().find(|(other, _)| other.ends_with(&name));
            match shared.map(|(other, at)| at + (other.len() - name.len()) as u64) {
                Some(at) => placed.push((name, at)),
                None => {
                    self.put(k.phys + end, &[name.as_bytes(), b"\0"].concat());
                    placed.push((name.clone(), end));
                    end += name.len() as u64 + 1;
                }
            }
        }
        for (i, (name, address)) in exported(k).into_iter().enumerate() {
            let at = KSYMTAB + i as u64 * stride;
            // Each field counts from its own place.
            let relative = |to: u64, field: u64| (to.wrapping_sub(k.text + at + field) as u32).to_le_bytes();
            self.put(k.phys + at, &relative(address, 0));
            let string = placed.iter().find(|(n, _)| *n == name).unwrap().1;
            self.put(k.phys + at + 4, &relative(k.text + string, 4));
            if stride == 12 {
                self.put(k.phys + at + 8, &relative(k.text + strings - 1, 8));
            }
        }
    }

    fn install_tables(&mut self, k: &Kernel) {
        let at = |offset: u64| k.phys + offset;
        let first = (k.text - KERNEL_MAP) / LARGE;
        self.entry(at(LEVEL2), first, k.phys | 0x1e1);
        // The read-only data in small pages, as where its end is not a multiple of 2 MiB.
        self.entry(at(LEVEL2), first + 1, at(ROPAGES) | TABLE);
        for i in 0..512 {
            self.entry(at(ROPAGES), i, (at(RODATA) + i * PAGE) | 0x161 | NX);
        }
        self.entry(at(LEVEL2), first + 2, at(DATA) | 0x1e3 | NX);
        self.entry(at(LEVEL2), first + 3, at(3 * LARGE) | 0x1e3 | NX);
        if k.isolated {
            // What Linux leaves of an entry that is no longer present, as seen on 6.12.
            self.entry(at(LEVEL2), first + 4, 0x800f_fffc_cbff_f062);
            self.entry(at(LEVEL2), first + 5, at(5 * LARGE) | 0x1e3 | NX);
        }
        // A module, unloaded, and another: behind a hole, but not where the image would go on.
        self.entry(at(LEVEL2), first + 40, at(ROPAGES + PAGE) | TABLE);
        self.entry(at(LEVEL2), first + 41, (k.phys + 50 * LARGE) | 0x1e3 | NX);
        self.entry(at(LEVEL3), 510, at(LEVEL2) | TABLE);
        self.entry(at(LEVEL3), 511, at(FIXMAP) | USER_TABLE);
        let above = if k.levels == 5 { LEVEL4 } else { LEVEL3 };
        // With 4 levels and no KASLR this is a page like the top-level table.
        self.entry(at(LEVEL4), 511, at(LEVEL3) | TABLE);
        self.entry(at(INIT_TOP), 511, at(above) | TABLE);
        self.entry(at(EARLY_TOP), 511, at(above) | TABLE);
        self.direct_map(k, at(INIT_TOP), at(DATA + 0xc000));
    }

    /// The direct map of 1 GiB, in `root`, with tables from `free` on.
    fn direct_map(&mut self, k: &Kernel, root: u64, mut free: u64) {
        let mut table = root;
        let shifts: &[u32] = if k.levels == 5 { &[48, 39, 30] } else { &[39, 30] };
        for shift in shifts {
            let index = k.direct_map >> shift & 0x1ff;
            self.entry(table, index, free | TABLE);
            table = free;
            free += PAGE;
        }
        for i in 0..512 {
            self.entry(table, i, (i * LARGE) | 0x1e3 | NX);
        }
    }

    /// `trampoline_pgd` of this kernel, at `gpa` below 1 MiB.
    pub fn trampoline(&mut self, k: &Kernel, gpa: u64) {
        let last = self.read(k.dtb().0 + 0xff8);
        self.entry(gpa, 511, last);
        self.entry(gpa, 0, 0x9_0063);
    }

    /// Overwrites the kernel's own symbol table, as smeared or forged memory would.
    pub fn wipe_kallsyms(&mut self, k: &Kernel) {
        self.put(k.phys + KALLSYMS, &vec![0; (BTF - KALLSYMS) as usize]);
    }

    /// An interrupt descriptor table in the kernel's data whose page-fault gate leads to `handler`; gives its address.
    pub fn interrupts(&mut self, k: &Kernel, handler: u64) -> u64 {
        let offset = DATA + 0x5_0000;
        let [a, b, c, d, e, f, g, h] = handler.to_le_bytes();
        let gate = [a, b, 0x10, 0, 0, 0x8e, c, d, e, f, g, h, 0, 0, 0, 0];
        self.put(k.phys + offset + 14 * 16, &gate);
        k.text + offset
    }

    /// The top-level table of a process at `gpa`.
    pub fn process(&mut self, k: &Kernel, gpa: u64) {
        for i in 256..512 {
            let entry = self.read(k.dtb().0 + 8 * i);
            self.entry(gpa, i, entry);
        }
        self.entry(gpa, 0, 0x12_3067);
        self.entry(gpa, 255, 0x12_4067);
    }

    pub fn read(&self, gpa: u64) -> u64 {
        u64::from_le_bytes(self.0[gpa as usize..gpa as usize + 8].try_into().unwrap())
    }
}
