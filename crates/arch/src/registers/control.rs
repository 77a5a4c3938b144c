//! Bits of the control registers, EFER and RFLAGS, and their names (Intel SDM vol. 3A 2.3, 2.5, vol. 1 3.4.3;
//! AMD APM vol. 2 3.1).

/// CR0.PE: protected mode.
pub const CR0_PE: u64 = 1 << 0;
/// CR0.WP: supervisor code obeys read-only pages.
pub const CR0_WP: u64 = 1 << 16;
/// CR0.PG: paging is on.
pub const CR0_PG: u64 = 1 << 31;

/// CR4.PSE: 4 MiB pages in 32-bit paging.
pub const CR4_PSE: u64 = 1 << 4;
/// CR4.PAE: entries of 8 bytes.
pub const CR4_PAE: u64 = 1 << 5;
/// CR4.PGE: global pages.
pub const CR4_PGE: u64 = 1 << 7;
/// CR4.UMIP: SGDT, SIDT and their like fault in user mode.
pub const CR4_UMIP: u64 = 1 << 11;
/// CR4.LA57: five levels of tables.
pub const CR4_LA57: u64 = 1 << 12;
/// CR4.PCIDE: CR3 bits 11:0 are a process-context identifier.
pub const CR4_PCIDE: u64 = 1 << 17;
/// CR4.SMEP: supervisor code does not run on user pages.
pub const CR4_SMEP: u64 = 1 << 20;
/// CR4.SMAP: supervisor code does not touch user pages unless RFLAGS.AC says so.
pub const CR4_SMAP: u64 = 1 << 21;
/// CR4.PKE: protection keys for user pages.
pub const CR4_PKE: u64 = 1 << 22;
/// CR4.CET: control-flow enforcement.
pub const CR4_CET: u64 = 1 << 23;

/// EFER.SCE: SYSCALL and SYSRET work.
pub const EFER_SCE: u64 = 1 << 0;
/// EFER.LME: IA-32e mode is asked for.
pub const EFER_LME: u64 = 1 << 8;
/// EFER.LMA: IA-32e mode is on.
pub const EFER_LMA: u64 = 1 << 10;
/// EFER.NXE: bit 63 of an entry forbids execution.
pub const EFER_NXE: u64 = 1 << 11;
/// EFER.SVME: SVM instructions work (AMD).
pub const EFER_SVME: u64 = 1 << 12;

/// RFLAGS.TF: single step.
pub const RFLAGS_TF: u64 = 1 << 8;
/// RFLAGS.IF: interrupts are let through.
pub const RFLAGS_IF: u64 = 1 << 9;
/// RFLAGS.AC: alignment check, and with SMAP: user pages may be touched.
pub const RFLAGS_AC: u64 = 1 << 18;

/// Names of single bits of CR0.
pub const CR0_FLAGS: &[(u8, &str)] = &[
    (0, "PE"),
    (1, "MP"),
    (2, "EM"),
    (3, "TS"),
    (4, "ET"),
    (5, "NE"),
    (16, "WP"),
    (18, "AM"),
    (29, "NW"),
    (30, "CD"),
    (31, "PG"),
];

/// Names of single bits of CR4.
pub const CR4_FLAGS: &[(u8, &str)] = &[
    (0, "VME"),
    (1, "PVI"),
    (2, "TSD"),
    (3, "DE"),
    (4, "PSE"),
    (5, "PAE"),
    (6, "MCE"),
    (7, "PGE"),
    (8, "PCE"),
    (9, "OSFXSR"),
    (10, "OSXMMEXCPT"),
    (11, "UMIP"),
    (12, "LA57"),
    (13, "VMXE"),
    (14, "SMXE"),
    (16, "FSGSBASE"),
    (17, "PCIDE"),
    (18, "OSXSAVE"),
    (19, "KL"),
    (20, "SMEP"),
    (21, "SMAP"),
    (22, "PKE"),
    (23, "CET"),
    (24, "PKS"),
    (25, "UINTR"),
    (28, "LAM_SUP"),
    (32, "FRED"),
];

/// Names of single bits of EFER.
pub const EFER_FLAGS: &[(u8, &str)] = &[
    (0, "SCE"),
    (8, "LME"),
    (10, "LMA"),
    (11, "NXE"),
    (12, "SVME"),
    (13, "LMSLE"),
    (14, "FFXSR"),
    (15, "TCE"),
    (17, "MCOMMIT"),
    (18, "INTWB"),
    (20, "UAIE"),
    (21, "AIBRSE"),
];

/// Names of single bits of RFLAGS (IOPL, bits 13:12, is a number and not here).
pub const RFLAGS_FLAGS: &[(u8, &str)] = &[
    (0, "CF"),
    (2, "PF"),
    (4, "AF"),
    (6, "ZF"),
    (7, "SF"),
    (8, "TF"),
    (9, "IF"),
    (10, "DF"),
    (11, "OF"),
    (14, "NT"),
    (16, "RF"),
    (17, "VM"),
    (18, "AC"),
    (19, "VIF"),
    (20, "VIP"),
    (21, "ID"),
];

/// Names of the bits of CR3 outside the root's address (LAM: SDM vol. 3A 4.4; PCIDs are a number and not here).
pub const CR3_FLAGS: &[(u8, &str)] = &[(61, "LAM_U57"), (62, "LAM_U48"), (63, "NOFLUSH")];

/// A register value that prints as the names of its set bits, lowest first, and the rest as a number:
/// `PE MP ET NE WP AM PG`, `-` where none is set.
#[derive(Clone, Copy, Debug)]
pub struct Flags {
    value: u64,
    names: &'static [(u8, &'static str)],
}

impl Flags {
    /// `value` with the names of its bits.
    pub const fn new(value: u64, names: &'static [(u8, &'static str)]) -> Self {
        Self { value, names }
    }

    /// The names of the bits that are set, lowest first.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        self.names
            .iter()
            .filter(move |(bit, _)| self.value >> (bit & 63) & 1 != 0)
            .map(|&(_, name)| name)
    }

    /// The bits that are set and have no name.
    pub fn unnamed(self) -> u64 {
        self.names
            .iter()
            .fold(self.value, |v, (bit, _)| v & !(1 << (bit & 63)))
    }
}

impl core::fmt::Display for Flags {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let mut first = true;
        for name in self.names() {
            if !first {
                f.write_str(" ")?;
            }
            f.write_str(name)?;
            first = false;
        }
        match (self.unnamed(), first) {
            (0, true) => f.write_str("-"),
            (0, false) => Ok(()),
            (rest, true) => write!(f, "{rest:#x}"),
            (rest, false) => write!(f, " {rest:#x}"),
        }
    }
}
