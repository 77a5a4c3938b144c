//! What a vCPU holds, as far as a monitor needs it.

pub mod control;
pub mod msr;

use core::fmt;

use crate::paging::PagingMode;
use crate::{Dtb, Gva};
use control::Flags;

/// A segment register with its hidden part.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Segment {
    /// The selector that a program sees.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes, granularity applied.
    pub limit: u32,
    /// Access rights as in bytes 5 and 6 of the descriptor: type 3:0, S 4, DPL 6:5, P 7, AVL 12, L 13, D/B 14, G 15.
    pub attributes: u16,
}

impl Segment {
    /// The requested privilege level, the low two bits of the selector.
    pub const fn rpl(self) -> u8 {
        (self.selector & 3) as u8
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TableRegister {
    /// Where the table lies.
    pub base: Gva,
    /// Its size in bytes, less one.
    pub limit: u16,
}

/// The registers of one x86-64 vCPU. What a source does not give stays `None` or zero, as said at each.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Registers {
    /// Number of the vCPU.
    pub vcpu: u32,
    /// General-purpose registers in the order of their encoding: RAX RCX RDX RBX RSP RBP RSI RDI R8 … R15.
    pub gprs: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// Code segment.
    pub cs: Segment,
    /// Stack segment.
    pub ss: Segment,
    /// Data segment.
    pub ds: Segment,
    /// Extra segment.
    pub es: Segment,
    /// FS; its base is thread-local storage in user mode.
    pub fs: Segment,
    /// GS; its base is per-CPU data in Linux's kernel mode.
    pub gs: Segment,
    /// Local descriptor table.
    pub ldt: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table.
    pub gdt: TableRegister,
    /// Interrupt descriptor table.
    pub idt: TableRegister,
    /// CR0.
    pub cr0: u64,
    /// The address of the last page fault.
    pub cr2: u64,
    /// The root of the page tables, with flags and PCID.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// The base that SWAPGS brings in, where the source gives it.
    pub kernel_gs_base: Option<u64>,
    /// STAR, where the source gives it.
    pub star: Option<u64>,
    /// Entry point of 64-bit system calls, where the source gives it.
    pub lstar: Option<u64>,
    /// Entry point of compatibility-mode system calls, where the source gives it.
    pub cstar: Option<u64>,
    /// RFLAGS bits that SYSCALL clears, where the source gives it.
    pub sfmask: Option<u64>,
    /// SYSENTER's code segment, where the source gives it.
    pub sysenter_cs: Option<u64>,
    /// SYSENTER's stack pointer, where the source gives it.
    pub sysenter_esp: Option<u64>,
    /// SYSENTER's entry point, where the source gives it.
    pub sysenter_eip: Option<u64>,
}

/// Names of the general-purpose registers, in the order of [`Registers::gprs`].
pub const GPR_NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];

macro_rules! gprs {
    ($($name:ident = $index:literal),*) => {
        $(
            #[doc = concat!("The value of ", stringify!($name), ".")]
            pub const fn $name(&self) -> u64 {
                self.gprs[$index]
            }
        )*
    };
}

impl Registers {
    gprs!(
        rax = 0,
        rcx = 1,
        rdx = 2,
        rbx = 3,
        rsp = 4,
        rbp = 5,
        rsi = 6,
        rdi = 7,
        r8 = 8,
        r9 = 9,
        r10 = 10,
        r11 = 11,
        r12 = 12,
        r13 = 13,
        r14 = 14,
        r15 = 15
    );

    /// The value of the register called `name` (`rax`, `cr3`, `lstar` …, lower case), `None` where there is no
    /// such register or the source did not give it.
    pub fn by_name(&self, name: &str) -> Option<u64> {
        if let Some(i) = GPR_NAMES.iter().position(|&n| n == name) {
            return self.gprs.get(i).copied();
        }
        self.rows().find(|(n, _)| *n == name).map(|(_, v)| v)
    }

    /// Current privilege level: 0 kernel … 3 user.
    pub const fn cpl(&self) -> u8 {
        // SS.DPL is the CPL (SDM vol. 3A 5.5); sources without attributes leave the RPL of CS, which equals it
        // outside of real mode.
        self.cs.rpl()
    }

    /// The root of the page tables in CR3; `None` while paging is off.
    pub fn dtb(&self) -> Option<Dtb> {
        Some(PagingMode::from_registers(self)?.dtb(self.cr3))
    }

    /// Every register with a name and a value, in the order in which debuggers list them.
    pub fn rows(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        let fixed = [
            ("rip", self.rip),
            ("rflags", self.rflags),
            ("cs", u64::from(self.cs.selector)),
            ("ss", u64::from(self.ss.selector)),
            ("ds", u64::from(self.ds.selector)),
            ("es", u64::from(self.es.selector)),
            ("fs", u64::from(self.fs.selector)),
            ("gs", u64::from(self.gs.selector)),
            ("fs_base", self.fs.base),
            ("gs_base", self.gs.base),
            ("ldt", u64::from(self.ldt.selector)),
            ("ldt_base", self.ldt.base),
            ("tr", u64::from(self.tr.selector)),
            ("tr_base", self.tr.base),
            ("gdt_base", self.gdt.base.0),
            ("gdt_limit", u64::from(self.gdt.limit)),
            ("idt_base", self.idt.base.0),
            ("idt_limit", u64::from(self.idt.limit)),
            ("cr0", self.cr0),
            ("cr2", self.cr2),
            ("cr3", self.cr3),
            ("cr4", self.cr4),
            ("efer", self.efer),
        ];
        let optional = [
            ("kernel_gs_base", self.kernel_gs_base),
            ("star", self.star),
            ("lstar", self.lstar),
            ("cstar", self.cstar),
            ("sfmask", self.sfmask),
            ("sysenter_cs", self.sysenter_cs),
            ("sysenter_esp", self.sysenter_esp),
            ("sysenter_eip", self.sysenter_eip),
        ];
        GPR_NAMES
            .into_iter()
            .zip(self.gprs)
            .chain(fixed)
            .chain(optional.into_iter().filter_map(|(n, v)| v.map(|v| (n, v))))
    }

    /// The flags of a register of [`Self::rows`] by name, `None` for registers that are not flags.
    pub fn flags(name: &str, value: u64) -> Option<Flags> {
        let names = match name {
            "cr0" => control::CR0_FLAGS,
            "cr4" => control::CR4_FLAGS,
            "efer" => control::EFER_FLAGS,
            // IOPL is a number and bit 1 always set: neither is worth a name.
            "rflags" => return Some(Flags::new(value & !0x3002, control::RFLAGS_FLAGS)),
            "cr3" => return Some(Flags::new(value & (7 << 61), control::CR3_FLAGS)),
            _ => return None,
        };
        Some(Flags::new(value, names))
    }
}

impl fmt::Display for Registers {
    /// One register a line, flags by name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in self.rows() {
            write!(f, "{name:<14} {value:#018x}")?;
            if let Some(flags) = Self::flags(name, value) {
                write!(f, "  {flags}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

impl PagingMode {
    /// The mode that CR0, CR4 and EFER select (SDM vol. 3A 4.1.1), `None` while paging is off.
    pub const fn from_registers(registers: &Registers) -> Option<Self> {
        Self::from_control(registers.cr0, registers.cr4, registers.efer)
    }

    /// The mode that these values of CR0, CR4 and EFER select, `None` while paging is off.
    pub const fn from_control(cr0: u64, cr4: u64, efer: u64) -> Option<Self> {
        if cr0 & control::CR0_PG == 0 {
            return None;
        }
        Some(if cr4 & control::CR4_PAE == 0 {
            Self::X86_32 {
                pse: cr4 & control::CR4_PSE != 0,
            }
        } else if efer & (control::EFER_LMA | control::EFER_LME) == 0 {
            // With PG set LMA equals LME; a source may give only one of them.
            Self::X86Pae
        } else if cr4 & control::CR4_LA57 == 0 {
            Self::X86Level4
        } else {
            Self::X86Level5
        })
    }

    /// The root that a value of CR3 (or TTBR) names in this mode, flags, PCID or ASID cut off.
    pub const fn dtb(self, cr3: u64) -> Dtb {
        match self {
            // SDM vol. 3A tables 4-3, 4-7 and 4-12.
            Self::X86_32 { .. } => Dtb(cr3 & 0xffff_f000),
            Self::X86Pae => Dtb(cr3 & 0xffff_ffe0),
            Self::X86Level4 | Self::X86Level5 => Dtb::from_cr3(cr3),
            // TTBR: ASID in 63:48, CnP in bit 0, and with 52-bit addresses bits 51:48 in 5:2 (Arm ARM D19.2.155).
            Self::Arm64 { granule, lpa2, .. } => {
                let wide = lpa2 || matches!(granule, crate::paging::Granule::K64);
                let high = if wide { ((cr3 >> 2) & 0xf) << 48 } else { 0 };
                let low = if wide {
                    cr3 & 0x0000_ffff_ffff_ffc0
                } else {
                    cr3 & 0x0000_ffff_ffff_fffe
                };
                Dtb(low | high)
            }
        }
    }
}

impl Dtb {
    /// The root in a 64-bit guest's CR3: bits 51:12. PCID, cache flags, LAM and the no-flush bit are cut off.
    pub const fn from_cr3(cr3: u64) -> Self {
        Self(cr3 & 0x000f_ffff_ffff_f000)
    }
}
