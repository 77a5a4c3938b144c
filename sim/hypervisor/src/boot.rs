//! From the loader to Rust, into the guest, and out of it: what cannot be said in Rust.

use core::arch::global_asm;

global_asm!(
    r#"
    .section .multiboot, "a"
    .balign 8
multiboot_header:
    .long 0xe85250d6, 0, multiboot_end - multiboot_header
    .long -(0xe85250d6 + (multiboot_end - multiboot_header))
    .short 0, 0
    .long 8
multiboot_end:

    .section .text
    .code32
    .globl _start
_start:
    cli
    cld
    mov esp, offset boot_stack_end
    mov edi, eax
    mov esi, ebx
    mov eax, offset boot_tables + 0x1000
    or eax, 3
    mov [boot_tables], eax
    mov eax, offset boot_tables + 0x2000
    or eax, 3
    xor ecx, ecx
1:  mov [boot_tables + 0x1000 + ecx * 8], eax
    add eax, 0x1000
    inc ecx
    cmp ecx, 4
    jne 1b
    mov eax, 0x83
    xor ecx, ecx
2:  mov [boot_tables + 0x2000 + ecx * 8], eax
    add eax, 0x200000
    inc ecx
    cmp ecx, 2048
    jne 2b
    mov eax, offset boot_tables
    mov cr3, eax
    mov eax, cr4
    or eax, 0x620
    mov cr4, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x900
    wrmsr
    mov eax, cr0
    and eax, 0xfffffff3
    or eax, 0x80010023
    mov cr0, eax
    lgdt [boot_gdtr]
    .byte 0xea
    .long start_64
    .short 8

    .code64
start_64:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    xor eax, eax
    mov fs, ax
    mov gs, ax
    mov rsp, offset boot_stack_end
    call start
    ud2

    # extern "C" fn enter_guest(rsi: u64) -> u8: comes back only where VMLAUNCH fails.
    .globl enter_guest
enter_guest:
    mov rsi, rdi
    xor edi, edi
    vmlaunch
    setc al
    ret

    # Where VM exits go, on the processor's own stack. GS is at what the processor has of its own, which begins with its
    # own address.
    .globl exit_entry
exit_entry:
    push rax
    push rcx
    push rdx
    push rbx
    push rbp
    push rsi
    push rdi
    push r8
    push r9
    push r10
    push r11
    push r12
    push r13
    push r14
    push r15
    sub rsp, 520
    fxsave64 [rsp]
    mov rdi, rsp
    mov rsi, gs:[0]
    call handle_exit
    fxrstor64 [rsp]
    add rsp, 520
    pop r15
    pop r14
    pop r13
    pop r12
    pop r11
    pop r10
    pop r9
    pop r8
    pop rdi
    pop rsi
    pop rbp
    pop rbx
    pop rdx
    pop rcx
    pop rax
    vmresume
    call resume_failed
    ud2

    # Exceptions of the hypervisor itself: vector and error code, 16 bytes of code each.
    .balign 16
    .globl exception_entries
exception_entries:
    .set vector, 0
    .rept 32
    .balign 16
    .if vector == 2
    jmp nmi_entry
    .else
    .if vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21
    .else
    push 0
    .endif
    push vector
    jmp exception_common
    .endif
    .set vector, vector + 1
    .endr
exception_common:
    mov rdi, rsp
    and rsp, -16
    call host_exception
    ud2
    # An NMI while the hypervisor runs.
nmi_entry:
    push rax
    push rcx
    push rdx
    push rsi
    push rdi
    push r8
    push r9
    push r10
    push r11
    push rbp
    mov rbp, rsp
    sub rsp, 512
    and rsp, -16
    fxsave64 [rsp]
    cld
    mov rdi, gs:[0]
    call host_nmi
    fxrstor64 [rsp]
    mov rsp, rbp
    pop rbp
    pop r11
    pop r10
    pop r9
    pop r8
    pop rdi
    pop rsi
    pop rdx
    pop rcx
    pop rax
    iretq

    # Another processor, after what stands in startup.s.
    .set startup_tables, boot_tables
    .set startup_table, boot_gdt
    .set startup_limit, 39
    .set startup_selector, 8
startup_64:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    xor eax, eax
    mov fs, ax
    mov gs, ax
    mov rdi, [starting]
    mov rsp, [starting_stack]
    call start_processor
    ud2

    .section .data
    .balign 16
    .globl boot_gdt, boot_gdtr
boot_gdt:
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0, 0
boot_gdtr:
    .short 39
    .quad boot_gdt

    .section .bss
    .balign 4096
    .globl boot_tables, boot_stack_end, starting, starting_stack
boot_tables:
    .skip 0x6000
    .skip 0x10000
boot_stack_end:
starting:
    .skip 8
starting_stack:
    .skip 8
"#
);

global_asm!(include_str!("../../memory.s"), include_str!("../../startup.s"));

/// The guest's general registers, as the exit's entry pushes them.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Registers {
    /// What FXSAVE64 stores.
    pub(crate) vectors: [u64; 64],
    /// Nothing: the stack is aligned.
    gap: u64,
    pub(crate) r15: u64,
    pub(crate) r14: u64,
    pub(crate) r13: u64,
    pub(crate) r12: u64,
    pub(crate) r11: u64,
    pub(crate) r10: u64,
    pub(crate) r9: u64,
    pub(crate) r8: u64,
    pub(crate) rdi: u64,
    pub(crate) rsi: u64,
    pub(crate) rbp: u64,
    pub(crate) rbx: u64,
    pub(crate) rdx: u64,
    pub(crate) rcx: u64,
    pub(crate) rax: u64,
}

impl Registers {
    /// The register of this number in an instruction's encoding. RSP is not among them.
    pub(crate) fn get(&self, number: u8) -> Option<u64> {
        Some(match number {
            0 => self.rax,
            1 => self.rcx,
            2 => self.rdx,
            3 => self.rbx,
            5 => self.rbp,
            6 => self.rsi,
            7 => self.rdi,
            8 => self.r8,
            9 => self.r9,
            10 => self.r10,
            11 => self.r11,
            12 => self.r12,
            13 => self.r13,
            14 => self.r14,
            15 => self.r15,
            _ => return None,
        })
    }

    /// The general registers as an INIT leaves them.
    pub(crate) fn clear(&mut self) {
        let Self { vectors, gap, .. } = *self;
        *self = Self {
            vectors,
            gap,
            r15: 0,
            r14: 0,
            r13: 0,
            r12: 0,
            r11: 0,
            r10: 0,
            r9: 0,
            r8: 0,
            rdi: 0,
            rsi: 0,
            rbp: 0,
            rbx: 0,
            rdx: 0,
            rcx: 0,
            rax: 0,
        };
    }
}

/// Addresses of what the code above defines; never called or read as what they are declared.
pub(crate) mod symbols {
    use core::sync::atomic::AtomicU64;

    unsafe extern "C" {
        pub(crate) safe static boot_gdt: [u64; 5];
        pub(crate) safe static boot_tables: u8;
        pub(crate) safe static image_start: u8;
        pub(crate) safe static image_end: u8;
        pub(crate) safe static exit_entry: u8;
        pub(crate) safe static exception_entries: u8;
        pub(crate) safe static startup: u8;
        pub(crate) safe static startup_end: u8;
        pub(crate) static starting: AtomicU64;
        pub(crate) static starting_stack: AtomicU64;
        pub(crate) fn enter_guest(rsi: u64) -> u8;
    }
}

/// The address of one of the [`symbols`].
pub(crate) fn address<T>(symbol: &'static T) -> u64 {
    core::ptr::from_ref(symbol) as u64
}
