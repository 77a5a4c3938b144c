//! The hypervisor's own processor state: VMX operation, descriptor tables, exceptions.

use core::arch::asm;
use core::ptr::addr_of_mut;

use vmsight_arch::registers::msr;
use vmsight_sim_hypervisor::vmx::{self, CR4_VMXE, Controls, Missing, controls};

use crate::boot::{address, symbols};
use crate::machine::{cr0, cr4, rdmsr, set_cr0, set_cr4, wrmsr};
use crate::processor::Processor;
use crate::{stop, vmcs};

/// Selectors in the table that [`crate::boot`] has, and each processor a copy of with its own task state segment.
const CODE: u64 = 0x08;
const DATA: u64 = 0x10;
const TASK: u16 = 0x18;
const TASK_LIMIT: u64 = 103;
const GS_BASE: u32 = 0xc000_0101;
const NMI: usize = 2;
/// In a gate of the IDT: the first stack of the task state segment's table of stacks.
const FIRST_STACK: u64 = 1 << 32;

const LOCKED: u64 = 1;
const VMX_OUTSIDE_SMX: u64 = 4;

static mut IDT: [[u64; 2]; 32] = [[0; 2]; 32];

/// What the processor can do, or the first thing that it cannot.
pub(crate) fn able() -> Result<Controls, Missing> {
    let leaf = core::arch::x86_64::__cpuid(1);
    if leaf.ecx & 1 << 5 == 0 {
        return Err(Missing("VT-x"));
    }
    let control = rdmsr(msr::FEATURE_CONTROL);
    if control & (LOCKED | VMX_OUTSIDE_SMX) == LOCKED {
        return Err(Missing("VT-x that the firmware has not turned off"));
    }
    controls(rdmsr)
}

/// Enters VMX operation with a VMCS that is empty but for the host's state.
///
/// # Safety
/// Called once on each processor, which is [`able`].
pub(crate) unsafe fn enter_vmx(processor: &'static Processor) {
    let memory = processor.memory();
    // SAFETY: once, before the memory is used by the processor; the caller's promise for the rest. Values of CR0 and CR4
    // are those that VMX operation requires.
    unsafe {
        descriptor_tables(processor);
        if rdmsr(msr::FEATURE_CONTROL) & LOCKED == 0 {
            wrmsr(msr::FEATURE_CONTROL, LOCKED | VMX_OUTSIDE_SMX);
        }
        set_cr0((cr0() | rdmsr(vmx::msr::CR0_FIXED0)) & rdmsr(vmx::msr::CR0_FIXED1));
        set_cr4((cr4() | CR4_VMXE | rdmsr(vmx::msr::CR4_FIXED0)) & rdmsr(vmx::msr::CR4_FIXED1));
        let revision = rdmsr(vmx::msr::BASIC) & 0x7fff_ffff;
        (*memory).vmxon.0[0] = revision;
        (*memory).vmcs.0[0] = revision;
        let (on, structure) = (
            addr_of_mut!((*memory).vmxon) as u64,
            addr_of_mut!((*memory).vmcs) as u64,
        );
        let failed: u8;
        asm!("vmxon [{}]", "setna {}", in(reg) &on, out(reg_byte) failed);
        if failed != 0 {
            stop(format_args!("VMXON failed"));
        }
        let failed: u8;
        asm!("vmclear [{0}]", "vmptrld [{0}]", "setna {1}", in(reg) &structure, out(reg_byte) failed);
        if failed != 0 {
            stop(format_args!("VMPTRLD failed"));
        }
    }
    // SAFETY: addresses inside of what there is.
    let (task, table) = unsafe {
        (
            addr_of_mut!((*memory).tss) as u64,
            addr_of_mut!((*memory).gdt) as u64,
        )
    };
    for (field, value) in [
        (vmcs::HOST_CR0, cr0()),
        (vmcs::HOST_CR3, address(&symbols::boot_tables)),
        (vmcs::HOST_CR4, cr4()),
        (vmcs::HOST_CS, CODE),
        (vmcs::HOST_SS, DATA),
        (vmcs::HOST_DS, DATA),
        (vmcs::HOST_ES, DATA),
        (vmcs::HOST_FS, 0),
        (vmcs::HOST_GS, 0),
        (vmcs::HOST_GS_BASE, core::ptr::from_ref(processor) as u64),
        (vmcs::HOST_TR, u64::from(TASK)),
        (vmcs::HOST_TR_BASE, task),
        (vmcs::HOST_GDTR_BASE, table),
        (vmcs::HOST_IDTR_BASE, addr_of_mut!(IDT) as u64),
        (vmcs::HOST_EFER, rdmsr(msr::EFER)),
        (vmcs::HOST_PAT, rdmsr(msr::PAT)),
        (vmcs::HOST_RSP, processor.stack()),
        (vmcs::HOST_RIP, address(&symbols::exit_entry)),
    ] {
        vmcs::write(field, value);
    }
}

/// # Safety
/// Called once on each processor, one after the other.
unsafe fn descriptor_tables(processor: &'static Processor) {
    let entries = address(&symbols::exception_entries);
    let memory = processor.memory();
    // SAFETY: nobody else uses the tables; an IDT of 32 gates to the entries of 16 bytes each, which is the same whoever
    // writes it, and a task state segment which is never switched to.
    unsafe {
        let idt = addr_of_mut!(IDT);
        for (vector, gate) in (*idt).iter_mut().enumerate() {
            let at = entries + vector as u64 * 16;
            let stack = if vector == NMI { FIRST_STACK } else { 0 };
            *gate = [
                at & 0xffff | CODE << 16 | stack | 0x8e00 << 32 | (at >> 16 & 0xffff) << 48,
                at >> 32,
            ];
        }
        let idtr = TableRegister::new(size_of::<[[u64; 2]; 32]>(), idt as u64);
        let nmi_stack = processor.nmi_stack();
        // IST1: below the stack pointer, the compiler may have something.
        (*memory).tss[9] = nmi_stack as u32;
        (*memory).tss[10] = (nmi_stack >> 32) as u32;
        let base = addr_of_mut!((*memory).tss) as u64;
        (*memory).gdt = (address(&symbols::boot_gdt) as *const [u64; 5]).read();
        (*memory).gdt[3] = TASK_LIMIT | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56;
        (*memory).gdt[4] = base >> 32;
        let gdtr = TableRegister::new(size_of::<[u64; 5]>(), addr_of_mut!((*memory).gdt) as u64);
        asm!("lgdt [{}]", "lidt [{}]", "ltr {:x}", in(reg) &gdtr, in(reg) &idtr, in(reg) TASK);
        wrmsr(GS_BASE, core::ptr::from_ref(processor) as u64);
    }
}

/// What LIDT reads.
#[repr(C, packed)]
struct TableRegister {
    limit: u16,
    base: u64,
}

impl TableRegister {
    fn new(bytes: usize, base: u64) -> Self {
        Self {
            limit: (bytes - 1) as u16,
            base,
        }
    }
}

/// An exception of the hypervisor: an error of ours.
#[unsafe(no_mangle)]
extern "C" fn host_exception(frame: &[u64; 4]) -> ! {
    let [vector, code, rip, _] = frame;
    stop(format_args!(
        "exception {vector} of its own at {rip:#x}, error code {code:#x}"
    ))
}
