//! The monitor's image: where the gate goes on. See `vmsight_sim_hypervisor::gate` for the way here and back.
#![no_std]
#![no_main]

use core::arch::global_asm;
use core::panic::PanicInfo;
use core::ptr::{addr_of, addr_of_mut};

use vmsight_sim_abi::{Frame, MAGIC, State, VERSION, WINDOW};
use vmsight_sim_monitor::{Context, Memory};

// Header, entry, and a stack of its own. The order of pushes is that of `Frame`, from its end. Until RFLAGS are loaded
// nothing depends on the guest's: interrupts are masked already.
global_asm!(
    r#"
    .section .header, "a"
    .quad {magic}, {version}
    .quad text_start, text_size, data_size, monitor_entry, monitor_state

    .section .text
    .globl monitor_entry
monitor_entry:
    xchg [rip + monitor_state + {stack}], rsp
    push r11
    push r10
    sidt [rip + monitor_state + {idtr}]
    lidt [rip + monitor_state + {no_idt}]
    push 2
    popfq
    push rdi
    push rsi
    push rdx
    push r8
    push r9
    movzx eax, r10w
    cmp r10, [monitor_state + {sites} + rax]
    jne 1f
    cmp byte ptr [monitor_state + {sites} + 8 + rax], 0
    mov rdi, rsp
    jne 2f
    call monitor_null
1:  pop r9
    pop r8
    pop rdx
    pop rsi
    pop rdi
    pop r10
    pop r11
    lidt [rip + monitor_state + {idtr}]
    xchg [rip + monitor_state + {stack}], rsp
    jmp [rip + monitor_state + {leave}]
2:  call monitor_other
    jmp 1b
"#,
    magic = const MAGIC,
    version = const VERSION,
    stack = const core::mem::offset_of!(State, stack),
    idtr = const core::mem::offset_of!(State, idtr),
    no_idt = const core::mem::offset_of!(State, no_idt),
    sites = const core::mem::offset_of!(State, sites),
    leave = const core::mem::offset_of!(State, leave),
);

#[unsafe(no_mangle)]
#[unsafe(link_section = ".bss.state")]
static mut monitor_state: State = State::EMPTY;

/// # Safety
/// Called by the entry code alone, which is not entered twice: interrupts are masked and there is one list to each
/// processor.
#[unsafe(no_mangle)]
unsafe extern "C" fn monitor_null(frame: &Frame) {
    // SAFETY: the caller's promise: no other reference is alive.
    let handled = unsafe { &mut *addr_of_mut!(monitor_state.handled) };
    vmsight_sim_monitor::null(frame, handled);
}

/// # Safety
/// As for [`monitor_null`].
#[unsafe(no_mangle)]
unsafe extern "C" fn monitor_other(frame: &Frame) {
    // SAFETY: as above; the window looks at other fields.
    let handled = unsafe { &mut *addr_of_mut!(monitor_state.handled) };
    vmsight_sim_monitor::copy(&mut Context::new(frame, Window), handled);
}

/// The guest's memory, as it is mapped into the monitor's address space. It looks at the state anew each time: a copy of it
/// would be made with vector registers.
struct Window;

impl Window {
    /// Where a guest-physical address is, if it is one of the guest's.
    fn at(&self, gpa: u64) -> Option<*mut u64> {
        // SAFETY: fields that the hypervisor set before the monitor ran.
        let [end, own_start, own_end] = unsafe {
            [
                addr_of!(monitor_state.memory_end).read_volatile(),
                addr_of!(monitor_state.own_start).read_volatile(),
                addr_of!(monitor_state.own_end).read_volatile(),
            ]
        };
        let theirs = gpa < end && (gpa < own_start || gpa >= own_end) && gpa & 7 == 0;
        theirs.then_some((WINDOW + gpa) as *mut u64)
    }
}

impl Memory for Window {
    fn read(&self, gpa: u64) -> Option<u64> {
        // SAFETY: mapped; where the guest has a hole, the access leaves to the hypervisor, which ends this call.
        self.at(gpa).map(|at| unsafe { at.read_volatile() })
    }

    fn write(&mut self, gpa: u64, word: u64) -> bool {
        // SAFETY: as above; nothing of the monitor's is in the window.
        self.at(gpa)
            .map(|at| unsafe { at.write_volatile(word) })
            .is_some()
    }
}

/// With no IDT, this leaves the guest, and the hypervisor goes on at the hook.
#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    // SAFETY: raises an exception.
    unsafe { core::arch::asm!("ud2", options(noreturn)) }
}
