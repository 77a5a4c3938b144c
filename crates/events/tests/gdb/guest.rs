//! A guest that is its own firmware: up to four vCPUs in 64-bit mode that do rounds of work on demand and count
//! what they do.
//!
//! Each vCPU has a page of its own from [`PAGES`] on. It waits until the number of rounds there is not zero. A
//! round calls a function with the number of rounds left, adds up what the function returns, and stores the number
//! of rounds left.

use iced_x86::code_asm::*;
use iced_x86::{BlockEncoderOptions, IcedError};

/// Size of the image: QEMU takes multiples of 64 KiB.
const IMAGE: usize = 64 * 1024;
/// Where the image lies below 1 MiB.
const BASE: u64 = 0xf_0000;
/// Where its 64-bit code begins.
const CODE: u64 = BASE + 0x100;
/// Page tables, in the image: every entry has its A and D bits, so nobody needs to write to it. Two roots that say
/// the same.
const ROOTS: [u64; 2] = [BASE + 0x4000, BASE + 0x6000];
const DIRECTORY: u64 = BASE + 0x5000;
const GDT: u64 = BASE + 0x3000;

/// Where the vCPUs' pages begin, in memory that is there before any firmware cares for it.
pub(crate) const PAGES: u64 = 0x1_0000;
/// Rounds to be done: the guest waits for it, counts it down, and is through at zero.
pub(crate) const ROUNDS: u64 = 0;
/// How often the function was called: it counts itself.
pub(crate) const CALLS: u64 = 8;
/// Sum of what the function returned.
pub(crate) const SUM: u64 = 16;
/// How often the rounds were through.
pub(crate) const DONE: u64 = 24;
/// Where the number of rounds left is stored.
pub(crate) const STORED: u64 = 32;
/// Counts for as long as the vCPU waits: it lives. In another page.
pub(crate) const IDLE: u64 = 0x8000;
/// Where this is not zero the vCPU sleeps instead of waiting, and nothing wakes it.
pub(crate) const SLEEP: u64 = 0x8008;
/// What address the whole memory is mapped at once more, in the upper half.
pub(crate) const UPPER: u64 = 0xffff_ff80_0000_0000;

/// The image, and where in it what is.
pub(crate) struct Guest {
    pub(crate) image: Vec<u8>,
    /// The function, by its address in the upper half.
    pub(crate) function: u64,
    /// The instruction behind its first one.
    pub(crate) second: u64,
    /// Where the function's call returns to.
    pub(crate) returns: u64,
    /// A string instruction of several repetitions that each round executes once.
    pub(crate) fill: u64,
}

/// Where a member of a vCPU's page is, as guest-physical address.
pub(crate) fn physical(vcpu: u32, member: u64) -> u64 {
    PAGES + u64::from(vcpu) * 0x1000 + member
}

/// The same in the upper half.
pub(crate) fn upper(vcpu: u32, member: u64) -> u64 {
    UPPER + physical(vcpu, member)
}

/// CR3 of a vCPU.
pub(crate) fn root(vcpu: u32) -> u64 {
    ROOTS[(vcpu & 1) as usize]
}

impl Guest {
    pub(crate) fn new() -> Self {
        let mut image = vec![0x90; IMAGE];
        let mut put = |at: u64, bytes: &[u8]| {
            let at = (at - BASE) as usize;
            image[at..at + bytes.len()].copy_from_slice(bytes);
        };
        // The reset vector: 16 bytes below the end. A jump to offset 0, where woken vCPUs begin too.
        put(BASE + 0xfff0, &[0xe9, 0x0d, 0x00]);
        put(
            BASE,
            &[
                0xfa, // cli
                0xfc, // cld
                0x66, 0x2e, 0x0f, 0x01, 0x16, 0x20, 0x30, // lgdt cs:[0x3020]
                0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0, // CR0.PE
                0x66, 0xea, 0x40, 0x00, 0x0f, 0x00, 0x08, 0x00, // jmp 0x08:0xf0040
            ],
        );
        put(
            BASE + 0x40,
            &[
                0x66, 0xb8, 0x10, 0x00, 0x8e, 0xd8, 0x8e, 0xd0, 0x8e, 0xc0, // mov ds, ss, es
                0x0f, 0x20, 0xe0, 0x0c, 0x20, 0x0f, 0x22, 0xe0, // CR4.PAE
                0xb8, 0x00, 0x40, 0x0f, 0x00, 0x0f, 0x22, 0xd8, // CR3
                0xb9, 0x80, 0x00, 0x00, 0xc0, 0x0f, 0x32, 0x80, 0xcc, 0x01, 0x0f, 0x30, // EFER.LME
                0x0f, 0x20, 0xc0, 0x0d, 0x00, 0x00, 0x00, 0x80, 0x0f, 0x22, 0xc0, // CR0.PG
                0xea, 0x00, 0x01, 0x0f, 0x00, 0x18, 0x00, // jmp 0x18:0xf0100
            ],
        );
        // Null, 32-bit code, data, 64-bit code; then the GDTR.
        for (i, descriptor) in [
            0_u64,
            0x00cf_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00af_9b00_0000_ffff,
        ]
        .into_iter()
        .enumerate()
        {
            put(GDT + 8 * i as u64, &descriptor.to_le_bytes());
        }
        put(GDT + 0x20, &[0x1f, 0x00]);
        put(GDT + 0x22, &(GDT as u32).to_le_bytes());
        put(DIRECTORY, &[0; 4096]);
        for gib in 0..4_u64 {
            put(DIRECTORY + 8 * gib, &(gib << 30 | 0xe3).to_le_bytes());
        }
        for root in ROOTS {
            put(root, &[0; 4096]);
            for entry in [0, 511] {
                put(root + 8 * entry, &(DIRECTORY | 0x23).to_le_bytes());
            }
        }
        let (code, [function, second, returns, fill]) = code().unwrap();
        put(CODE, &code);
        Self {
            image,
            function: UPPER + function,
            second: UPPER + second,
            returns: UPPER + returns,
            fill: UPPER + fill,
        }
    }
}

fn code() -> Result<(Vec<u8>, [u64; 4]), IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let mut function = a.create_label();
    let mut second = a.create_label();
    let mut returns = a.create_label();
    let mut fill = a.create_label();
    let mut high = a.create_label();
    let mut wait = a.create_label();
    let mut awake = a.create_label();
    let mut round = a.create_label();
    let mut root = a.create_label();
    // Into the upper half.
    a.lea(rax, ptr(high))?;
    a.mov(rcx, UPPER)?;
    a.add(rax, rcx)?;
    a.jmp(rax)?;
    a.set_label(&mut high)?;
    // r12: our number, from the local APIC; r13: our page.
    a.mov(rax, 0xfee0_0020_u64)?;
    a.mov(r12d, dword_ptr(rax))?;
    a.shr(r12d, 24)?;
    a.mov(r13, r12)?;
    a.shl(r13, 12)?;
    a.add(r13, PAGES as i32)?;
    a.mov(rax, UPPER)?;
    a.add(r13, rax)?;
    a.lea(rsp, r13 + 0x1000)?;
    a.test(r12, 1)?;
    a.jz(root)?;
    a.mov(rax, ROOTS[1])?;
    a.mov(cr3, rax)?;
    a.set_label(&mut root)?;
    // The first one wakes the others: INIT and SIPI to all but itself.
    a.test(r12, r12)?;
    a.jnz(wait)?;
    a.mov(rax, 0xfee0_0300_u64)?;
    a.mov(dword_ptr(rax), 0xc_4500)?;
    a.mov(dword_ptr(rax), 0xc_4600 | (BASE >> 12) as u32)?;
    a.set_label(&mut wait)?;
    a.inc(qword_ptr(r13 + IDLE as i32))?;
    a.pause()?;
    a.cmp(qword_ptr(r13 + SLEEP as i32), 0)?;
    a.jz(awake)?;
    a.hlt()?;
    a.set_label(&mut awake)?;
    a.mov(rbx, qword_ptr(r13 + ROUNDS))?;
    a.test(rbx, rbx)?;
    a.jz(wait)?;
    a.set_label(&mut round)?;
    a.mov(rdi, rbx)?;
    a.call(function)?;
    a.set_label(&mut returns)?;
    a.add(qword_ptr(r13 + SUM), rax)?;
    a.dec(rbx)?;
    a.mov(qword_ptr(r13 + STORED), rbx)?;
    a.lea(rdi, r13 + 0x100)?;
    a.mov(ecx, 8)?;
    a.set_label(&mut fill)?;
    a.rep().stosb()?;
    a.test(rbx, rbx)?;
    a.jnz(round)?;
    a.mov(qword_ptr(r13 + ROUNDS), rbx)?;
    a.inc(qword_ptr(r13 + DONE))?;
    a.jmp(wait)?;
    a.set_label(&mut function)?;
    a.inc(qword_ptr(r13 + CALLS))?;
    a.set_label(&mut second)?;
    a.mov(rax, rdi)?;
    a.ret()?;
    let result = a.assemble_options(CODE, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
    let at = |label: &CodeLabel| result.label_ip(label);
    let labels = [at(&function)?, at(&second)?, at(&returns)?, at(&fill)?];
    Ok((result.inner.code_buffer, labels))
}
