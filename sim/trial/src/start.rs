//! The begin, exceptions, and single instructions.

use core::arch::{asm, global_asm};
use core::sync::atomic::AtomicU64;

global_asm!(
    r#"
    # The header of Linux's boot protocol 2.15: as much of it as a loader needs.
    .section .setup, "a"
    .org 0x1f1
    .byte 1
    .org 0x200
    .byte 0xeb, 0x66
    .ascii "HdrS"
    .short 0x20f
    .org 0x211
    .byte 1
    .org 0x230
    .long 0x200000
    .byte 0, 0
    .short 1
    .long 2047
    .org 0x258
    .quad 0x1000000
    .long memory_size
    .org 0x290

    .section .entry, "ax"
    .org 0x200
    .globl entry_64
entry_64:
    mov rbx, rsi
    mov rdi, offset bss_start
    mov rcx, offset bss_end
    sub rcx, rdi
    xor eax, eax
    rep stosb
    mov rsp, offset stack_end
    # What the compiler needs: FXSAVE and SSE.
    mov rax, cr4
    or eax, 0x600
    mov cr4, rax
    mov rdi, rbx
    call start
    ud2

    .section .text
    # attempt(function, argument): 0, or 1 + the vector of the exception that it ended in.
    .globl attempt
attempt:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    pushfq
    # The task registers of the two processors are 0x30 and 0x40.
    str eax
    shr eax
    mov [attempt_rsp + rax - 24], rsp
    mov rax, rdi
    mov rdi, rsi
    call rax
    xor eax, eax
attempt_end:
    str ecx
    shr ecx
    mov rsp, [attempt_rsp + rcx - 24]
    mov qword ptr [attempt_rsp + rcx - 24], 0
    popfq
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    cld
    ret

    .balign 16
    .globl exception_entries
exception_entries:
    .set vector, 0
    .rept 32
    .balign 16
    .if vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21
    .else
    push 0
    .endif
    push vector
    jmp exception_common
    .set vector, vector + 1
    .endr
exception_common:
    str ecx
    shr ecx
    cmp qword ptr [attempt_rsp + rcx - 24], 0
    je 1f
    mov eax, [rsp]
    inc eax
    xor ecx, ecx
    mov ds, cx
    mov es, cx
    jmp attempt_end
1:  mov rdi, rsp
    and rsp, -16
    call unexpected
    ud2

    # The timer: counted, and the interrupt controller told.
    .globl timer_entry
timer_entry:
    inc qword ptr [timer_ticks]
    push rax
    mov al, 0x20
    out 0x20, al
    pop rax
    iretq

    # NMIs: counted.
    .globl nmi_entry
nmi_entry:
    lock inc qword ptr [nmi_count]
    iretq

    # Another processor, after what stands in startup.s.
    .set startup_tables, trial_tables
    .set startup_table, trial_gdt
    .set startup_limit, 79
    .set startup_selector, 0x10
startup_64:
    mov ax, 0x18
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov rsp, offset second_stack_end
    call second
    ud2

    # call_at(stub, registers): calls an address as the head of a hooked function does.
    .globl hook_call, hook_site, stranger_call
hook_call:
    call rdi
hook_site:
    ret
stranger_call:
    call rdi
    ret

    # flags_call(address, flags): the same with flags of its own; what they are afterwards.
    .globl flags_call, flags_site
    .balign 32
flags_call:
    pushfq
    push rsi
    popfq
    call rdi
flags_site:
    pushfq
    pop rax
    popfq
    ret

    # copy_call(address, from, to): a hooked function with two arguments.
    .globl copy_call, copy_site
    .balign 32
copy_call:
    mov rax, rdi
    mov rdi, rsi
    mov rsi, rdx
    call rax
copy_site:
    ret

    # kept_call(address, argument): a hooked function with other registers than the compiler's; 0 if all are as they were.
    .globl kept_call, kept_site
    .balign 32
kept_call:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    push rsi
    mov rax, rdi
    mov rdi, rsi
    mov rbx, 0x0123456789abcdef
    movq xmm0, rbx
    movq xmm15, rbx
    mov esi, 0x21
    mov edx, 0x22
    mov r8d, 0x23
    mov r9d, 0x24
    mov ebp, 0x25
    mov r12d, 0x26
    mov r13d, 0x27
    mov r14d, 0x28
    mov r15d, 0x29
    call rax
kept_site:
    cmp rdi, [rsp]
    jne 2f
    movq rax, xmm0
    cmp rax, rbx
    jne 2f
    movq rax, xmm15
    cmp rax, rbx
    jne 2f
    mov rax, 0x0123456789abcdef
    cmp rbx, rax
    jne 2f
    cmp rsi, 0x21
    jne 2f
    cmp rdx, 0x22
    jne 2f
    cmp r8, 0x23
    jne 2f
    cmp r9, 0x24
    jne 2f
    cmp rbp, 0x25
    jne 2f
    cmp r12, 0x26
    jne 2f
    cmp r13, 0x27
    jne 2f
    cmp r14, 0x28
    jne 2f
    cmp r15, 0x29
    jne 2f
    xor eax, eax
    jmp 3f
2:  mov eax, 1
3:  pop rsi
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

    # jump_with(registers): jumps to registers[0] with the rest loaded; what comes back by RET comes back here.
    .globl jump_with, jump_back
jump_with:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov [jump_rsp], rsp
    mov rax, rdi
    push qword ptr [rax]
    mov rbx, [rax + 8]
    mov rcx, [rax + 16]
    mov rdx, [rax + 24]
    mov rsi, [rax + 32]
    mov rdi, [rax + 40]
    mov rbp, [rax + 48]
    mov r8, [rax + 56]
    mov r9, [rax + 64]
    mov r10, [rax + 72]
    mov r11, [rax + 80]
    mov r12, [rax + 88]
    push qword ptr [rax + 96]
    mov rax, [rax + 104]
    popfq
    ret
jump_back:
    mov rsp, [jump_rsp]
    push 2
    popfq
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

    # user_call(address): runs it in user mode, which ends in an exception.
    .globl user_call
user_call:
    push 0x23
    push offset user_stack_end
    push 2
    push 0x2b
    push rdi
    xor eax, eax
    mov ecx, 1
    iretq

    # compat_vmfunc(): VMFUNC(1) in code of 32 bits, at the same privilege.
    .globl compat_vmfunc
compat_vmfunc:
    push 8
    push offset compat_code
    xor eax, eax
    mov ecx, 1
    retfq
    .code32
compat_code:
    vmfunc
    ud2
    .code64

    # What user mode runs.
    .globl user_vmfunc, user_vmcall, user_report, user_cpuid
user_vmfunc:
    vmfunc
    ud2
user_cpuid:
    cpuid
    hlt
user_vmcall:
    mov eax, 0x73696d06
    vmcall
    hlt
user_report:
    mov eax, 0x73696d02
    vmcall
    hlt

    .section .bss
    .balign 16
    .globl timer_ticks, nmi_count
attempt_rsp:
    .skip 16
timer_ticks:
    .skip 8
nmi_count:
    .skip 8
jump_rsp:
    .skip 8
    .balign 4096
    .skip 0x10000
    # Exceptions, interrupts and NMIs have a stack each on each processor, in the order of their numbers in the task state
    # segment.
    .globl exception_stacks
stack_end:
    .skip 0x8000
second_stack_end:
exception_stacks:
    .skip 0x6000
    .skip 0x1000
user_stack_end:
    .skip 16
"#
);

global_asm!(include_str!("../../memory.s"), include_str!("../../startup.s"));

/// Registers for [`jump_with`]: where to, RBX, RCX, RDX, RSI, RDI, RBP, R8 to R12, RFLAGS, RAX.
pub(crate) type Jump = [u64; 14];

unsafe extern "C" {
    /// Calls a function with an argument; 0, or 1 + the vector of the exception in which it ended.
    pub(crate) fn attempt(function: unsafe extern "C" fn(u64), argument: u64) -> u64;
    /// Calls the address as the head of a hooked function would.
    pub(crate) fn hook_call(address: u64);
    /// The same from a place that is no registered hook.
    pub(crate) fn stranger_call(address: u64);
    /// Calls the address with RFLAGS of its own, and gives what they are afterwards.
    pub(crate) fn flags_call(address: u64, flags: u64) -> u64;
    /// See [`Jump`]; the argument is the address of one.
    pub(crate) fn jump_with(registers: u64);
    /// Runs code in user mode, with EAX = 0 and ECX = 1.
    pub(crate) fn user_call(address: u64);
    pub(crate) safe static hook_site: u8;
    /// Calls the address as the head of a hooked function of two arguments would.
    pub(crate) fn copy_call(address: u64, first: u64, second: u64);
    /// Calls the address with that argument and registers of its own: 0 if they are the same afterwards.
    pub(crate) fn kept_call(address: u64, argument: u64) -> u64;
    pub(crate) safe static kept_site: u8;
    /// VMFUNC in compatibility mode; the argument is of no use.
    pub(crate) fn compat_vmfunc(nothing: u64);
    pub(crate) safe static copy_site: u8;
    pub(crate) safe static flags_site: u8;
    pub(crate) safe static user_vmfunc: u8;
    pub(crate) safe static user_vmcall: u8;
    pub(crate) safe static user_report: u8;
    pub(crate) safe static user_cpuid: u8;
    pub(crate) safe static jump_back: u8;
    pub(crate) safe static exception_entries: u8;
    pub(crate) safe static timer_entry: u8;
    pub(crate) safe static exception_stacks: u8;
    pub(crate) safe static nmi_entry: u8;
    pub(crate) safe static startup: u8;
    pub(crate) safe static startup_end: u8;
    pub(crate) safe static nmi_count: AtomicU64;
    pub(crate) static timer_ticks: u64;
}

macro_rules! register {
    (read $function:ident, $name:literal) => {
        #[doc = concat!("Reads ", $name, ".")]
        pub(crate) fn $function() -> u64 {
            let value;
            // SAFETY: reading it changes nothing.
            unsafe { asm!(concat!("mov {}, ", $name), out(reg) value, options(nomem, nostack)) };
            value
        }
    };
    (write $function:ident, $name:literal) => {
        #[doc = concat!("Writes ", $name, ".")]
        pub(crate) unsafe extern "C" fn $function(value: u64) {
            // SAFETY: what is wrong about it ends in an exception.
            unsafe { asm!(concat!("mov ", $name, ", {}"), in(reg) value, options(nostack)) };
        }
    };
}

register!(read cr0, "cr0");
register!(write set_cr0, "cr0");
register!(read cr3, "cr3");
register!(write set_cr3, "cr3");
register!(read cr4, "cr4");
register!(write set_cr4, "cr4");
register!(write set_dr0, "dr0");
register!(write set_dr7, "dr7");

/// Reads an MSR.
pub(crate) fn rdmsr(number: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: what is wrong about it ends in an exception.
    unsafe { asm!("rdmsr", in("ecx") number, out("eax") low, out("edx") high, options(nomem, nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

/// Writes an MSR.
pub(crate) fn wrmsr(number: u32, value: u64) {
    let (low, high) = (value as u32, (value >> 32) as u32);
    // SAFETY: what is wrong about it ends in an exception.
    unsafe { asm!("wrmsr", in("ecx") number, in("eax") low, in("edx") high, options(nostack)) };
}

/// VMFUNC with a function and an index.
pub(crate) fn vmfunc(function: u32, index: u32) {
    // SAFETY: an attack: it ends in an exception.
    unsafe { asm!("vmfunc", in("eax") function, in("ecx") index, options(nostack)) };
}

/// A call of the hypervisor: status and value.
pub(crate) fn vmcall(call: u64, argument: u64) -> (u64, u64) {
    vmcall_with(call, argument, 0)
}

/// The same with a second argument.
pub(crate) fn vmcall_with(call: u64, argument: u64, second: u64) -> (u64, u64) {
    let (status, value);
    // SAFETY: the calls change nothing that the compiler knows of.
    unsafe {
        asm!("vmcall", inlateout("rax") call => status, lateout("rdx") value, in("rdi") argument, in("rsi") second,
            options(nostack));
    }
    (status, value)
}

/// The time-stamp counter, which under Bochs counts instructions.
pub(crate) fn ticks() -> u64 {
    // SAFETY: always there in long mode.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Writes a byte to a port.
pub(crate) fn outb(port: u16, value: u8) {
    // SAFETY: devices of a machine that is nobody else's.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) };
}

/// Reads a byte from a port.
pub(crate) fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) };
    value
}
