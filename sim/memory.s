    .section .text
    # The C library's, which the compiler calls. Included by each program that has no C library.
    .globl memcpy, memmove, memset, memcmp, bcmp
memcpy:
    mov rax, rdi
    mov rcx, rdx
    rep movsb
    ret
    # Downwards where the target begins inside of the source.
memmove:
    mov rcx, rdi
    sub rcx, rsi
    cmp rcx, rdx
    jae memcpy
    mov rax, rdi
    mov rcx, rdx
    lea rsi, [rsi + rdx - 1]
    lea rdi, [rdi + rdx - 1]
    std
    rep movsb
    cld
    ret
memset:
    mov r8, rdi
    mov eax, esi
    mov rcx, rdx
    rep stosb
    mov rax, r8
    ret
memcmp:
bcmp:
    xor eax, eax
    xor r8d, r8d
3:  cmp r8, rdx
    je 4f
    movzx eax, byte ptr [rdi + r8]
    movzx ecx, byte ptr [rsi + r8]
    inc r8
    sub eax, ecx
    je 3b
4:  ret
