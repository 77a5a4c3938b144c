//! Numbers and names of the model-specific registers that a monitor meets (Intel SDM vol. 4, table 2-2;
//! AMD APM vol. 2, appendix A).

macro_rules! msrs {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $text:literal;)*) => {
        $($(#[$doc])* pub const $name: u32 = $number;)*

        /// Every MSR that has a name here, by number.
        pub const NAMES: &[(u32, &str)] = &[$(($number, $text)),*];
    };
}

msrs! {
    /// Time-stamp counter.
    TSC = 0x10, "TSC";
    /// Base and state of the local APIC.
    APIC_BASE = 0x1b, "APIC_BASE";
    /// Locks and enables VMX and SGX.
    FEATURE_CONTROL = 0x3a, "FEATURE_CONTROL";
    /// Speculation control: IBRS, STIBP, SSBD.
    SPEC_CTRL = 0x48, "SPEC_CTRL";
    /// Code segment of SYSENTER.
    SYSENTER_CS = 0x174, "SYSENTER_CS";
    /// Stack pointer of SYSENTER.
    SYSENTER_ESP = 0x175, "SYSENTER_ESP";
    /// Entry point of SYSENTER.
    SYSENTER_EIP = 0x176, "SYSENTER_EIP";
    /// Miscellaneous features; bit 22 limits CPUID, bit 34 turns NX off.
    MISC_ENABLE = 0x1a0, "MISC_ENABLE";
    /// Branch trace, last-branch record and single step on branches.
    DEBUGCTL = 0x1d9, "DEBUGCTL";
    /// Page attribute table.
    PAT = 0x277, "PAT";
    /// User-mode control-flow enforcement.
    U_CET = 0x6a0, "U_CET";
    /// Supervisor control-flow enforcement.
    S_CET = 0x6a2, "S_CET";
    /// Extended feature enables: long mode, NX, SYSCALL.
    EFER = 0xc000_0080, "EFER";
    /// Segments of SYSCALL and SYSRET.
    STAR = 0xc000_0081, "STAR";
    /// Entry point of SYSCALL from 64-bit code.
    LSTAR = 0xc000_0082, "LSTAR";
    /// Entry point of SYSCALL from compatibility mode (AMD).
    CSTAR = 0xc000_0083, "CSTAR";
    /// RFLAGS bits that SYSCALL clears.
    SFMASK = 0xc000_0084, "SFMASK";
    /// Base of FS.
    FS_BASE = 0xc000_0100, "FS_BASE";
    /// Base of GS.
    GS_BASE = 0xc000_0101, "GS_BASE";
    /// The base that SWAPGS brings in.
    KERNEL_GS_BASE = 0xc000_0102, "KERNEL_GS_BASE";
    /// What RDTSCP and RDPID give.
    TSC_AUX = 0xc000_0103, "TSC_AUX";
    /// SVM's controls (AMD).
    VM_CR = 0xc001_0114, "VM_CR";
    /// Where the host's state is kept during VMRUN (AMD).
    VM_HSAVE_PA = 0xc001_0117, "VM_HSAVE_PA";
}

/// The name of an MSR, `None` for those not listed here.
pub fn name(number: u32) -> Option<&'static str> {
    NAMES
        .binary_search_by_key(&number, |&(n, _)| n)
        .ok()
        .and_then(|i| NAMES.get(i))
        .map(|&(_, name)| name)
}
