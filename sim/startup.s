    # From real mode to long mode in one step: what another processor begins with. A page of the first megabyte gets a copy,
    # and a SIPI its number. Whoever includes this says what `startup_tables`, `startup_table` (a GDT), `startup_limit` and
    # `startup_selector` are, all below 4 GiB, and goes on at `startup_64`.
    .section .text
    .globl startup, startup_end
    .code16
startup:
    cli
    cld
    mov eax, cr4
    or eax, 0x620
    mov cr4, eax
    mov eax, offset startup_tables
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x900
    wrmsr
    # lgdt cs:[startup_gdtr - startup], with a base of 32 bits
    .byte 0x2e, 0x66, 0x0f, 0x01, 0x16
    .short startup_gdtr - startup
    mov eax, cr0
    and eax, 0x9ffffff3
    or eax, 0x80010023
    mov cr0, eax
    # jmp startup_selector:startup_64
    .byte 0x66, 0xea
    .long startup_64
    .short startup_selector
startup_gdtr:
    .short startup_limit
    .long startup_table
startup_end:
    .code64
