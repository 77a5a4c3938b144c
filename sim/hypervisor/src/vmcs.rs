//! The virtual-machine control structure: its fields (SDM vol. 3, appendix B), reading and writing them.

use core::arch::asm;

use crate::stop;

macro_rules! fields {
    ($($name:ident = $number:literal;)*) => {
        $(pub(crate) const $name: u64 = $number;)*
    };
}

fields! {
    VPID = 0x0000;
    GUEST_ES = 0x0800;
    HOST_ES = 0x0c00;
    HOST_CS = 0x0c02;
    HOST_SS = 0x0c04;
    HOST_DS = 0x0c06;
    HOST_FS = 0x0c08;
    HOST_GS = 0x0c0a;
    HOST_TR = 0x0c0c;
    IO_BITMAP_LOW = 0x2000;
    IO_BITMAP_HIGH = 0x2002;
    MSR_BITMAPS = 0x2004;
    VM_FUNCTIONS = 0x2018;
    EPT_POINTER = 0x201a;
    EPTP_LIST = 0x2024;
    XSS_BITMAP = 0x202c;
    GUEST_PHYSICAL = 0x2400;
    LINK_POINTER = 0x2800;
    GUEST_DEBUGCTL = 0x2802;
    GUEST_PAT = 0x2804;
    GUEST_EFER = 0x2806;
    HOST_PAT = 0x2c00;
    HOST_EFER = 0x2c02;
    PIN_CONTROLS = 0x4000;
    PRIMARY_CONTROLS = 0x4002;
    EXCEPTION_BITMAP = 0x4004;
    PAGE_FAULT_MASK = 0x4006;
    PAGE_FAULT_MATCH = 0x4008;
    CR3_TARGETS = 0x400a;
    EXIT_CONTROLS = 0x400c;
    ENTRY_CONTROLS = 0x4012;
    ENTRY_EVENT = 0x4016;
    ENTRY_ERROR_CODE = 0x4018;
    ENTRY_INSTRUCTION_LENGTH = 0x401a;
    SECONDARY_CONTROLS = 0x401e;
    INSTRUCTION_ERROR = 0x4400;
    EXIT_REASON = 0x4402;
    EXIT_EVENT = 0x4404;
    EXIT_ERROR_CODE = 0x4406;
    VECTORING_EVENT = 0x4408;
    VECTORING_ERROR_CODE = 0x440a;
    INSTRUCTION_LENGTH = 0x440c;
    GUEST_ES_LIMIT = 0x4800;
    GUEST_GDTR_LIMIT = 0x4810;
    GUEST_IDTR_LIMIT = 0x4812;
    GUEST_ES_ACCESS = 0x4814;
    GUEST_CS_ACCESS = 0x4816;
    GUEST_SS_ACCESS = 0x4818;
    GUEST_INTERRUPTIBILITY = 0x4824;
    GUEST_ACTIVITY = 0x4826;
    PREEMPTION_TIMER = 0x482e;
    CR0_MASK = 0x6000;
    CR4_MASK = 0x6002;
    CR0_SHADOW = 0x6004;
    CR4_SHADOW = 0x6006;
    QUALIFICATION = 0x6400;
    GUEST_CR0 = 0x6800;
    GUEST_CR3 = 0x6802;
    GUEST_CR4 = 0x6804;
    GUEST_ES_BASE = 0x6806;
    GUEST_GS_BASE = 0x6810;
    GUEST_GDTR_BASE = 0x6816;
    GUEST_IDTR_BASE = 0x6818;
    GUEST_DR7 = 0x681a;
    GUEST_RSP = 0x681c;
    GUEST_RIP = 0x681e;
    GUEST_RFLAGS = 0x6820;
    GUEST_PENDING_DEBUG = 0x6822;
    HOST_CR0 = 0x6c00;
    HOST_CR3 = 0x6c02;
    HOST_CR4 = 0x6c04;
    HOST_GS_BASE = 0x6c08;
    HOST_TR_BASE = 0x6c0a;
    HOST_GDTR_BASE = 0x6c0c;
    HOST_IDTR_BASE = 0x6c0e;
    HOST_RSP = 0x6c14;
    HOST_RIP = 0x6c16;
}

/// Reads a field. Those above exist on every processor that [`vmsight_sim_hypervisor::vmx::controls`] accepts.
pub(crate) fn read(field: u64) -> u64 {
    let value;
    let failed: u8;
    // SAFETY: reads the current VMCS, which there is from the start of VMX operation on.
    unsafe {
        asm!("vmread {}, {}", "setna {}", out(reg) value, in(reg) field, out(reg_byte) failed, options(nostack))
    };
    if failed != 0 {
        stop(format_args!("VMREAD of field {field:#x} failed"));
    }
    value
}

/// Writes a field. What is wrong in it the processor says on the next VM entry.
pub(crate) fn write(field: u64, value: u64) {
    let failed: u8;
    // SAFETY: writes the current VMCS. The host's state in it is written once, by `guest`, and the guest cannot touch
    // what is not its own, whatever its state, since the extended page tables are made without it.
    unsafe {
        asm!("vmwrite {}, {}", "setna {}", in(reg) field, in(reg) value, out(reg_byte) failed, options(nostack))
    };
    if failed != 0 {
        stop(format_args!("VMWRITE of field {field:#x} failed"));
    }
}
