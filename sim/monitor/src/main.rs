//! The monitor's image: where the gate goes on. See `vmsight_sim_hypervisor::gate` for the way here and back.
#![no_std]
#![no_main]

use core::arch::global_asm;
use core::panic::PanicInfo;
use core::ptr::addr_of_mut;

use vmsight_sim_abi::{Frame, MAGIC, State, VERSION};

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
    movzx eax, r10b
    cmp r10, [monitor_state + {sites} + rax * 8]
    jne 1f
    mov rdi, rsp
    call monitor_handle
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
/// Called by the entry code alone, which is not entered twice: interrupts are masked and there is one list to each processor.
#[unsafe(no_mangle)]
unsafe extern "C" fn monitor_handle(frame: &Frame) -> u64 {
    // SAFETY: the caller's promise: no other reference is alive.
    let handled = unsafe { &mut *addr_of_mut!(monitor_state.handled) };
    vmsight_sim_monitor::handle(frame, handled) as u64
}

/// With no IDT, this leaves the guest, and the hypervisor goes on at the hook.
#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    // SAFETY: raises an exception.
    unsafe { core::arch::asm!("ud2", options(noreturn)) }
}
