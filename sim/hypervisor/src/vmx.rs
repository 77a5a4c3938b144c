//! What the processor must be able to do, and the control fields made of it (SDM vol. 3, appendix A).

/// CR4.VMXE: VMX operation is possible.
pub const CR4_VMXE: u64 = 1 << 13;

/// Pin-based controls.
pub mod pin {
    /// NMIs leave the guest.
    pub const NMI_EXITING: u32 = 1 << 3;
    /// Whether the guest takes NMIs is kept apart from whether the processor does.
    pub const VIRTUAL_NMIS: u32 = 1 << 5;
    /// The guest leaves when a timer has run down.
    pub const PREEMPTION_TIMER: u32 = 1 << 6;
}

/// Primary processor-based controls.
pub mod primary {
    /// The guest leaves as soon as it takes an NMI; turned on only while there is one.
    pub const NMI_WINDOW: u32 = 1 << 22;
    /// The I/O bitmaps decide which accesses to ports leave the guest.
    pub const IO_BITMAPS: u32 = 1 << 25;
    /// The guest leaves after one instruction.
    pub const MONITOR_TRAP: u32 = 1 << 27;
    /// The MSR bitmap decides which MSR accesses leave the guest.
    pub const MSR_BITMAPS: u32 = 1 << 28;
    /// There are secondary controls.
    pub const SECONDARY: u32 = 1 << 31;
    /// MOV to and from CR3, which must not leave the guest.
    pub const CR3_EXITING: u32 = 3 << 15;
}

/// Secondary processor-based controls.
pub mod secondary {
    /// Extended page tables.
    pub const EPT: u32 = 1 << 1;
    /// The guest may use RDTSCP.
    pub const RDTSCP: u32 = 1 << 3;
    /// Translations of guest and host are told apart.
    pub const VPID: u32 = 1 << 5;
    /// Real mode and no paging run in the guest.
    pub const UNRESTRICTED: u32 = 1 << 7;
    /// The guest may use INVPCID.
    pub const INVPCID: u32 = 1 << 12;
    /// VMFUNC.
    pub const VM_FUNCTIONS: u32 = 1 << 13;
    /// The guest may use XSAVES.
    pub const XSAVES: u32 = 1 << 20;
}

/// VM-exit controls.
pub mod exit {
    /// DR7 and DEBUGCTL are kept.
    pub const SAVE_DEBUG: u32 = 1 << 2;
    /// The host runs in long mode.
    pub const HOST_64: u32 = 1 << 9;
    /// Saves and loads IA32_PAT and IA32_EFER.
    pub const PAT_AND_EFER: u32 = 0xf << 18;
    /// What is left of the preemption timer is kept.
    pub const SAVE_TIMER: u32 = 1 << 22;
}

/// VM-entry controls.
pub mod entry {
    /// DR7 and DEBUGCTL are loaded.
    pub const LOAD_DEBUG: u32 = 1 << 2;
    /// The guest is in long mode.
    pub const GUEST_64: u32 = 1 << 9;
    /// Loads IA32_PAT and IA32_EFER.
    pub const PAT_AND_EFER: u32 = 3 << 14;
}

/// MSRs that say what VMX can do.
pub mod msr {
    /// Revision of the VMCS, its size, and whether the true controls exist.
    pub const BASIC: u32 = 0x480;
    /// Among others, how slow the preemption timer is, and what activity states a guest may have.
    pub const MISC: u32 = 0x485;
    /// Bits of CR0 that must be set, then those that may be.
    pub const CR0_FIXED0: u32 = 0x486;
    /// See [`CR0_FIXED0`].
    pub const CR0_FIXED1: u32 = 0x487;
    /// Bits of CR4 that must be set, then those that may be.
    pub const CR4_FIXED0: u32 = 0x488;
    /// See [`CR4_FIXED0`].
    pub const CR4_FIXED1: u32 = 0x489;
    /// Secondary controls.
    pub const SECONDARY: u32 = 0x48b;
    /// EPT and VPID.
    pub const EPT_VPID: u32 = 0x48c;
    /// Pin-based controls, primary controls, VM-exit and VM-entry controls; the ones without default 1.
    pub const TRUE_PIN: u32 = 0x48d;
    /// See [`TRUE_PIN`].
    pub const TRUE_PRIMARY: u32 = 0x48e;
    /// See [`TRUE_PIN`].
    pub const TRUE_EXIT: u32 = 0x48f;
    /// See [`TRUE_PIN`].
    pub const TRUE_ENTRY: u32 = 0x490;
    /// Functions of VMFUNC.
    pub const FUNCTIONS: u32 = 0x491;
}

const TRUE_CONTROLS: u64 = 1 << 55;
const EXECUTE_ONLY: u64 = 1;
const FOUR_LEVELS: u64 = 1 << 6;
const WRITE_BACK: u64 = 1 << 14;
const LARGE_PAGES: u64 = 1 << 16;
const INVEPT_ALL: u64 = 1 << 20 | 1 << 26;
const EPTP_SWITCHING: u64 = 1;
const WAIT_FOR_SIPI: u64 = 1 << 8;

/// The control fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Controls {
    /// Pin-based.
    pub pin: u32,
    /// Primary processor-based.
    pub primary: u32,
    /// Secondary processor-based.
    pub secondary: u32,
    /// VM-exit.
    pub exit: u32,
    /// VM-entry.
    pub entry: u32,
}

/// A capability that the processor lacks, in the words of Intel's manual.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Missing(pub &'static str);

/// The controls for a processor whose MSRs `read` gives, or what it lacks.
pub fn controls(mut read: impl FnMut(u32) -> u64) -> Result<Controls, Missing> {
    if read(msr::BASIC) & TRUE_CONTROLS == 0 {
        return Err(Missing("true VMX controls"));
    }
    let wanted = [
        (primary::MSR_BITMAPS, "MSR bitmaps"),
        (primary::IO_BITMAPS, "I/O bitmaps"),
        (primary::SECONDARY, "secondary processor-based controls"),
    ];
    let value = read(msr::TRUE_PRIMARY);
    let primary = adjust(value, &wanted, 0)?;
    if primary & primary::CR3_EXITING != 0 {
        return Err(Missing("MOV CR3 without a VM exit"));
    }
    let wanted = [
        (secondary::EPT, "extended page tables"),
        (secondary::VPID, "virtual-processor identifiers"),
        (secondary::UNRESTRICTED, "unrestricted guest"),
        (secondary::VM_FUNCTIONS, "VM functions"),
    ];
    let optional = secondary::RDTSCP | secondary::INVPCID | secondary::XSAVES;
    let secondary = adjust(read(msr::SECONDARY), &wanted, optional)?;
    let wanted = [
        (pin::NMI_EXITING, "NMI exiting"),
        (pin::VIRTUAL_NMIS, "virtual NMIs"),
        (pin::PREEMPTION_TIMER, "the VMX-preemption timer"),
    ];
    let pin = adjust(read(msr::TRUE_PIN), &wanted, 0)?;
    let wanted = [
        (exit::SAVE_DEBUG, "saving the debug controls"),
        (exit::HOST_64, "a 64-bit host"),
        (exit::PAT_AND_EFER, "saving and loading PAT and EFER on VM exit"),
        (exit::SAVE_TIMER, "saving the VMX-preemption timer"),
    ];
    let exit = adjust(read(msr::TRUE_EXIT), &wanted, 0)?;
    let wanted = [
        (entry::LOAD_DEBUG, "loading the debug controls"),
        (entry::GUEST_64, "a 64-bit guest"),
        (entry::PAT_AND_EFER, "loading PAT and EFER on VM entry"),
    ];
    let entry = adjust(read(msr::TRUE_ENTRY), &wanted, 0)?;
    let ept = read(msr::EPT_VPID);
    for (bits, name) in [
        (EXECUTE_ONLY, "execute-only EPT pages"),
        (FOUR_LEVELS, "EPT of four levels"),
        (WRITE_BACK, "write-back EPT tables"),
        (LARGE_PAGES, "EPT pages of 2 MiB"),
        (INVEPT_ALL, "INVEPT of all contexts"),
    ] {
        if ept & bits != bits {
            return Err(Missing(name));
        }
    }
    if read(msr::MISC) & WAIT_FOR_SIPI == 0 {
        return Err(Missing("the activity state wait-for-SIPI"));
    }
    if read(msr::FUNCTIONS) & EPTP_SWITCHING == 0 {
        return Err(Missing("EPTP switching"));
    }
    Ok(Controls {
        pin,
        primary,
        secondary,
        exit,
        entry,
    })
}

/// A control field: bits that must be 1 are in the low half of the MSR, those that may be in the high half.
fn adjust(allowed: u64, wanted: &[(u32, &'static str)], optional: u32) -> Result<u32, Missing> {
    let (must, may) = (allowed as u32, (allowed >> 32) as u32);
    let mut value = must | optional & may;
    for &(bits, name) in wanted {
        if may & bits != bits {
            return Err(Missing(name));
        }
        value |= bits;
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn able(number: u32) -> u64 {
        match number {
            msr::BASIC => TRUE_CONTROLS,
            msr::EPT_VPID | msr::FUNCTIONS | msr::MISC => u64::MAX,
            msr::TRUE_PRIMARY => 0xffff_ffff_0000_0002,
            _ => 0xffff_ffff_0000_0000,
        }
    }

    #[test]
    fn only_what_is_wanted_and_what_must_be_is_on() {
        let controls = controls(able).unwrap();
        assert_eq!(
            controls.primary,
            primary::MSR_BITMAPS | primary::IO_BITMAPS | primary::SECONDARY | 2
        );
        assert_eq!(
            controls.pin,
            pin::NMI_EXITING | pin::VIRTUAL_NMIS | pin::PREEMPTION_TIMER
        );
        assert_eq!(
            controls.secondary & secondary::UNRESTRICTED,
            secondary::UNRESTRICTED
        );
    }

    #[test]
    fn what_is_missing_is_named() {
        let without =
            |at: u32, bits: u64| move |number| able(number) & !(if number == at { bits } else { 0 });
        // What may be 1 is in the high half of those that say so of controls.
        for (at, bit, name) in [
            (msr::BASIC, 55, "true VMX controls"),
            (msr::TRUE_PRIMARY, 32 + 28, "MSR bitmaps"),
            (msr::TRUE_PRIMARY, 32 + 25, "I/O bitmaps"),
            (msr::TRUE_PRIMARY, 32 + 31, "secondary processor-based controls"),
            (msr::SECONDARY, 32 + 1, "extended page tables"),
            (msr::SECONDARY, 32 + 5, "virtual-processor identifiers"),
            (msr::SECONDARY, 32 + 7, "unrestricted guest"),
            (msr::SECONDARY, 32 + 13, "VM functions"),
            (msr::TRUE_PIN, 32 + 3, "NMI exiting"),
            (msr::TRUE_PIN, 32 + 5, "virtual NMIs"),
            (msr::TRUE_PIN, 32 + 6, "the VMX-preemption timer"),
            (msr::TRUE_EXIT, 32 + 2, "saving the debug controls"),
            (msr::TRUE_EXIT, 32 + 9, "a 64-bit host"),
            (
                msr::TRUE_EXIT,
                32 + 18,
                "saving and loading PAT and EFER on VM exit",
            ),
            (
                msr::TRUE_EXIT,
                32 + 19,
                "saving and loading PAT and EFER on VM exit",
            ),
            (
                msr::TRUE_EXIT,
                32 + 20,
                "saving and loading PAT and EFER on VM exit",
            ),
            (
                msr::TRUE_EXIT,
                32 + 21,
                "saving and loading PAT and EFER on VM exit",
            ),
            (msr::TRUE_EXIT, 32 + 22, "saving the VMX-preemption timer"),
            (msr::TRUE_ENTRY, 32 + 2, "loading the debug controls"),
            (msr::TRUE_ENTRY, 32 + 9, "a 64-bit guest"),
            (msr::TRUE_ENTRY, 32 + 14, "loading PAT and EFER on VM entry"),
            (msr::TRUE_ENTRY, 32 + 15, "loading PAT and EFER on VM entry"),
            (msr::EPT_VPID, 0, "execute-only EPT pages"),
            (msr::EPT_VPID, 6, "EPT of four levels"),
            (msr::EPT_VPID, 14, "write-back EPT tables"),
            (msr::EPT_VPID, 16, "EPT pages of 2 MiB"),
            (msr::EPT_VPID, 20, "INVEPT of all contexts"),
            (msr::EPT_VPID, 26, "INVEPT of all contexts"),
            (msr::MISC, 8, "the activity state wait-for-SIPI"),
            (msr::FUNCTIONS, 0, "EPTP switching"),
        ] {
            let Missing(what) = controls(without(at, 1 << bit)).unwrap_err();
            assert_eq!(what, name, "bit {bit} of {at:#x}");
        }
        let cr3 = |number| able(number) | if number == msr::TRUE_PRIMARY { 1 << 15 } else { 0 };
        assert_eq!(controls(cr3).unwrap_err().0, "MOV CR3 without a VM exit");
        // What may be missing: an instruction that the guest then does not have.
        assert!(controls(without(msr::SECONDARY, 1 << 52)).is_ok());
    }
}
