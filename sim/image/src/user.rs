//! A program of a few instructions for a Linux guest, whose only user land is busybox.

/// An ELF file that makes one call of the hypervisor, VMCALL with RAX = `call`, and ends with what RAX is then.
pub fn vmcall(call: u32) -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let mut code = vec![0xb8];
    code.extend(call.to_le_bytes()); // mov eax, …
    code.extend([0x31, 0xff, 0x0f, 0x01, 0xc1]); // xor edi, edi; vmcall
    code.extend([0x89, 0xc7, 0xb8, 0x3c, 0, 0, 0, 0x0f, 0x05]); // mov edi, eax; mov eax, 60 (exit); syscall
    let size = HEADERS + code.len() as u64;
    // e_ident, then ET_EXEC, EM_X86_64, version, entry, program headers at 64, sections, flags, sizes and counts.
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [BASE + HEADERS, 64, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    // PT_LOAD, readable and executable; offset, addresses, sizes, alignment.
    file.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    for word in [0, BASE, BASE, size, size, 0x1000] {
        file.extend(word.to_le_bytes());
    }
    file.extend(code);
    file
}
