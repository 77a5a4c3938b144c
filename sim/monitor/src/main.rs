//! The monitor's image: where the gate goes on. See `vmsight_sim_hypervisor::gate` for the way here and back.
#![no_std]
#![no_main]

use core::arch::{asm, global_asm};
use core::mem::offset_of;
use core::panic::PanicInfo;
use core::ptr::{addr_of, addr_of_mut};

use vmsight_sim_abi::{
    Call, FULL, Frame, Handler, KEPT_ALL, KEPT_GENERAL, MAGIC, State, VERSION, Verdict, WINDOW, site_offset,
};
use vmsight_sim_monitor::{Context, Memory, Rest};

// Header, entry, and a stack of its own. The order of pushes is that of `Frame`, from its end, and the hypervisor's, which
// puts back what is on the stack where a call ends on the way. Until RFLAGS are loaded nothing depends on the guest's:
// interrupts are masked already.
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
    push rdi
    push rsi
    push rdx
    push r8
    push r9
    push 2
    popfq
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

    # Another handler than the null one: first what looks at registers alone. For the rest, which uses vector registers,
    # the guest's are kept, too. If this ends on the way, the hypervisor puts back what is kept. The stack is as the ABI
    # wants it at a call.
2:  mov [monitor_state + {general}], rbx
    mov [monitor_state + {general} + 8], rbp
    mov [monitor_state + {general} + 16], r12
    mov [monitor_state + {general} + 24], r13
    mov [monitor_state + {general} + 32], r14
    mov [monitor_state + {general} + 40], r15
    mov qword ptr [monitor_state + {kept}], {kept_general}
    sub rsp, 8
    call monitor_count
    test al, al
    jz 3f
    fxsave64 [monitor_state + {vectors}]
    mov qword ptr [monitor_state + {kept}], {kept_all}
    lea rdi, [rsp + 8]
    call monitor_look
    fxrstor64 [monitor_state + {vectors}]
3:  add rsp, 8
    mov qword ptr [monitor_state + {kept}], 0
    jmp 1b
"#,
    magic = const MAGIC,
    version = const VERSION,
    stack = const offset_of!(State, stack),
    idtr = const offset_of!(State, idtr),
    no_idt = const offset_of!(State, no_idt),
    sites = const offset_of!(State, sites),
    leave = const offset_of!(State, leave),
    vectors = const offset_of!(State, vectors),
    kept = const offset_of!(State, kept),
    general = const offset_of!(State, general),
    kept_general = const KEPT_GENERAL,
    kept_all = const KEPT_ALL,
);

// Of general registers: the compiler may call these before the others are kept.
global_asm!(include_str!("../../memory.s"));

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
unsafe extern "C" fn monitor_count(frame: &Frame) -> bool {
    // SAFETY: as above.
    let (handled, watch) = unsafe {
        (
            &mut *addr_of_mut!(monitor_state.handled),
            &mut *addr_of_mut!(monitor_state.watch),
        )
    };
    if cfg!(feature = "endless") && frame.rdi == u64::MAX {
        *handled = handled.wrapping_add(1);
        loop {
            core::hint::spin_loop();
        }
    }
    called(frame).is_some_and(|handler| vmsight_sim_monitor::count(frame, handler, watch, handled))
}

/// # Safety
/// As for [`monitor_null`]; the guest's vector registers are kept.
#[unsafe(no_mangle)]
unsafe extern "C" fn monitor_look(frame: &mut Frame) {
    // SAFETY: as above; the window looks at other fields.
    let watch = unsafe { &mut *addr_of_mut!(monitor_state.watch) };
    let Some(handler) = called(frame) else { return };
    let guest = Context::new(frame, Rest::default(), Window);
    // The stub keeps RFLAGS and RCX on the guest's stack, below the site.
    let stack = state(offset_of!(State, stack));
    let rest = Rest {
        gs_base: gs_base(),
        rcx: guest.u64(stack.wrapping_add(8)),
    };
    let verdict = vmsight_sim_monitor::look(&mut Context::new(frame, rest, Window), handler, watch);
    if let Verdict::Refuse(value) = verdict {
        let refuse = state(offset_of!(State, refuse));
        let site = stack.wrapping_add(16);
        let mut guest = Context::new(frame, rest, Window);
        if refuse != 0 && guest.read(site) == Some(frame.site) && guest.write(site, refuse) {
            frame.site = value as u64;
        }
    }
    if watch.ring.waiting() >= FULL && state(offset_of!(State, doorbell)) == 1 {
        // SAFETY: the hypervisor takes events out of the ring, and nothing else is changed.
        unsafe { asm!("vmcall", inout("rax") Call::Drain as u64 => _, out("rdx") _) };
    }
}

/// What the hook calls: its site is a registered one.
fn called(frame: &Frame) -> Option<Handler> {
    // SAFETY: inside the state, which the hypervisor filled in before the monitor ran.
    let number = unsafe {
        addr_of!(monitor_state.sites)
            .cast::<u8>()
            .add(site_offset(frame.site) + 8)
            .read_volatile()
    };
    Handler::from_number(number.into())
}

/// A word of the state.
fn state(offset: usize) -> u64 {
    // SAFETY: those who call this name a field of 8 bytes; only the hypervisor and the entry code write it.
    unsafe {
        addr_of!(monitor_state)
            .byte_add(offset)
            .cast::<u64>()
            .read_volatile()
    }
}

/// The base of GS, by its MSR: RDGSBASE must be enabled.
fn gs_base() -> u64 {
    const GS_BASE: u32 = 0xc000_0101;
    let (low, high): (u32, u32);
    // SAFETY: reading it changes nothing; it does not leave.
    unsafe { asm!("rdmsr", in("ecx") GS_BASE, out("eax") low, out("edx") high, options(nomem, nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

/// The guest's memory, as it is mapped into the monitor's address space. It looks at the state anew each time: a copy of it
/// would be made with vector registers.
struct Window;

impl Window {
    /// Where a guest-physical address is, if it is one of the guest's.
    fn at(&self, gpa: u64) -> Option<*mut u64> {
        let end = state(offset_of!(State, memory_end));
        let own_start = state(offset_of!(State, own_start));
        let own_end = state(offset_of!(State, own_end));
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

    fn getting_on(&self) {
        let count = state(offset_of!(State, progress)).wrapping_add(1);
        // SAFETY: a field that nobody has a reference to; written each time, for it is read in between.
        unsafe { addr_of_mut!(monitor_state.progress).write_volatile(count) };
    }
}

/// With no IDT, this leaves the guest, and the hypervisor goes on at the hook.
#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    // SAFETY: raises an exception.
    unsafe { core::arch::asm!("ud2", options(noreturn)) }
}
