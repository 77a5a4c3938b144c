//! The guest's code: from the reset vector to 64-bit mode, then rounds of one timed call.
//!
//! A round notes the time-stamp counter, calls the function that the host chose, and stores how much the counter has gone on.

use iced_x86::code_asm::*;
use iced_x86::{BlockEncoderOptions, IcedError};

/// Size of the image in bytes: QEMU takes multiples of 64 KiB as firmware.
pub const SIZE: usize = 64 << 10;
/// Guest-physical address of the image.
pub const BASE: u64 = 0xf_0000;
/// Where 64-bit code begins.
pub const CODE: u64 = BASE + 0x100;
/// Page tables that map all memory to itself, in pages of 2 MiB. All A and D bits are set: nobody writes there.
pub const ROOT: u64 = BASE + 0x4000;
const POINTERS: u64 = BASE + 0x5000;
const DIRECTORY: u64 = BASE + 0x6000;
pub(crate) const GDT: u64 = BASE + 0x3000;
/// What the GDT has behind the null descriptor: 32-bit code, data, 64-bit code.
const DESCRIPTORS: [u64; 4] = [
    0,
    0x00cf_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00af_9b00_0000_ffff,
];

/// Bytes of memory the guest needs.
pub const MEMORY: u64 = 16 << 20;
/// Rounds to be done: the guest waits for it, and makes it 0 when it is through.
pub const ROUNDS: u64 = 0x1_0000;
/// Address of the function to call.
pub const FUNCTION: u64 = 0x1_0008;
/// The guest's time-stamp counter while it waits.
pub const CLOCK: u64 = 0x1_0010;
/// Where the guest's stack ends.
pub(crate) const STACK: u64 = 0x1_f000;
/// The word that is written, alone in its page.
pub const WATCHED: u64 = 0x3_0000;
/// Where its page tables have nothing: behind its memory, in the reach of the same table.
pub const ROOM: u64 = MEMORY;
/// Where the samples lie, in ticks of the time-stamp counter, 8 bytes each.
pub const SAMPLES: u64 = 0x10_0000;
/// How many there is room for.
pub const MOST: u64 = (MEMORY - SAMPLES) / 8;
/// The port that is written. Nothing listens there: the PC uses it for codes of the power-on self test.
pub const PORT: u16 = 0x80;

/// The image, and where in it what is.
#[derive(Clone, Debug)]
pub struct Image {
    /// The bytes, for [`BASE`].
    pub bytes: Vec<u8>,
    /// Returns at once.
    pub nothing: u64,
    /// As `nothing`; it is the one that is hooked.
    pub function: u64,
    /// Writes to [`WATCHED`]; here is the instruction.
    pub write: u64,
    /// Writes 0 to LSTAR.
    pub msr: u64,
    /// Writes to [`PORT`].
    pub port: u64,
}

impl Image {
    /// Assembles it.
    ///
    /// # Errors
    /// None that depends on anything but this crate's own code.
    pub fn assemble() -> Result<Self, IcedError> {
        let mut bytes = vec![0x90; SIZE];
        let mut put = |at: u64, what: &[u8]| {
            let at = (at - BASE) as usize;
            bytes[at..at + what.len()].copy_from_slice(what);
        };
        // The reset vector is 16 bytes below the end: a jump to the image's begin.
        put(BASE + 0xfff0, &[0xe9, 0x0d, 0x00]);
        put(BASE, &real_mode(BASE as u32 + 0x40)?);
        put(BASE + 0x40, &protected_mode()?);
        for (place, descriptor) in (0..).zip(DESCRIPTORS) {
            put(GDT + 8 * place, &descriptor.to_le_bytes());
        }
        // What LGDT reads: the limit, then the base.
        put(GDT + 0x20, &[0x1f, 0x00]);
        put(GDT + 0x22, &(GDT as u32).to_le_bytes());
        for table in [ROOT, POINTERS, DIRECTORY] {
            put(table, &[0; 4096]);
        }
        // Present, writable, for programs too, accessed; and dirty, a large page.
        put(ROOT, &(POINTERS | 0x27).to_le_bytes());
        put(POINTERS, &(DIRECTORY | 0x27).to_le_bytes());
        for piece in 0..MEMORY >> 21 {
            put(DIRECTORY + 8 * piece, &(piece << 21 | 0xe7).to_le_bytes());
        }
        let (code, [nothing, function, write, msr, port]) = long_mode()?;
        put(CODE, &code);
        Ok(Self {
            bytes,
            nothing,
            function,
            write,
            msr,
            port,
        })
    }
}

/// 16-bit code: loads the GDT, and turns protection on.
fn real_mode(next: u32) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(16)?;
    a.cli()?;
    a.cld()?;
    // The segment's base is the image's: the offset alone is given. Operand size 32, so that all of the base is loaded.
    a.db(&[0x66, 0x2e, 0x0f, 0x01, 0x16, 0x20, 0x30])?;
    a.mov(eax, cr0)?;
    a.or(al, 1)?;
    a.mov(cr0, eax)?;
    // JMP FAR 8:next, of operand size 32.
    a.db(&[0x66, 0xea])?;
    a.dd(&[next])?;
    a.db(&[0x08, 0x00])?;
    a.assemble(0)
}

/// 32-bit code: paging and long mode.
fn protected_mode() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(32)?;
    a.mov(eax, 0x10)?;
    a.mov(ds, ax)?;
    a.mov(ss, ax)?;
    a.mov(es, ax)?;
    a.mov(eax, cr4)?;
    a.or(eax, 0x20)?;
    a.mov(cr4, eax)?;
    a.mov(eax, ROOT as u32)?;
    a.mov(cr3, eax)?;
    a.mov(ecx, 0xc000_0080_u32)?;
    a.rdmsr()?;
    a.or(eax, 0x100)?;
    a.wrmsr()?;
    a.mov(eax, cr0)?;
    a.or(eax, 0x8000_0000_u32)?;
    a.mov(cr0, eax)?;
    // JMP FAR 0x18:CODE.
    a.db(&[0xea])?;
    a.dd(&[CODE as u32])?;
    a.db(&[0x18, 0x00])?;
    a.assemble(BASE + 0x40)
}

/// The rounds, and the functions: the code, and where the functions lie.
fn long_mode() -> Result<(Vec<u8>, [u64; 5]), IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let mut wait = a.create_label();
    let mut round = a.create_label();
    let mut functions = [(); 5].map(|()| a.create_label());
    a.mov(rsp, STACK)?;
    a.mov(r13, ROUNDS)?;
    a.set_label(&mut wait)?;
    stamp(&mut a)?;
    a.mov(qword_ptr(r13 + (CLOCK - ROUNDS)), rax)?;
    a.pause()?;
    a.mov(rbx, qword_ptr(r13))?;
    a.test(rbx, rbx)?;
    a.jz(wait)?;
    a.mov(r12, qword_ptr(r13 + (FUNCTION - ROUNDS)))?;
    a.mov(r14, SAMPLES)?;
    a.set_label(&mut round)?;
    a.lfence()?;
    stamp(&mut a)?;
    a.mov(r8, rax)?;
    a.call(r12)?;
    a.lfence()?;
    stamp(&mut a)?;
    a.sub(rax, r8)?;
    a.mov(qword_ptr(r14), rax)?;
    a.add(r14, 8)?;
    a.dec(rbx)?;
    a.jnz(round)?;
    a.mov(qword_ptr(r13), rbx)?;
    a.jmp(wait)?;
    for (place, label) in functions.iter_mut().enumerate() {
        // Each in a cache line of its own.
        a.nops_with_size(64)?;
        a.set_label(label)?;
        match place {
            2 => a.mov(qword_ptr(WATCHED), rbx)?,
            3 => {
                a.mov(ecx, 0xc000_0082_u32)?;
                a.xor(eax, eax)?;
                a.xor(edx, edx)?;
                a.wrmsr()?;
            }
            4 => a.out(u32::from(PORT), al)?,
            // A hook is on this one: a NOP of 5 bytes, as functions of a kernel begin with.
            _ => a.db(&[0x0f, 0x1f, 0x44, 0x00, 0x00])?,
        }
        a.ret()?;
    }
    let result = a.assemble_options(CODE, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
    let mut places = [0; 5];
    for (place, label) in places.iter_mut().zip(&functions) {
        *place = result.label_ip(label)?;
    }
    Ok((result.inner.code_buffer, places))
}

/// The time-stamp counter in RAX; RDX is lost.
fn stamp(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.rdtsc()?;
    a.shl(rdx, 32)?;
    a.or(rax, rdx)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_functions_are_where_it_is_said() {
        let image = Image::assemble().unwrap();
        let at = |address: u64| &image.bytes[(address - BASE) as usize..];
        // MOV [disp32], RBX; OUT imm8, AL; RET.
        assert_eq!(at(image.write)[..4], [0x48, 0x89, 0x1c, 0x25]);
        assert_eq!(at(image.port)[..3], [0xe6, 0x80, 0xc3]);
        assert_eq!(at(image.msr)[0], 0xb9);
        assert_ne!(image.nothing, image.function);
        assert_eq!(at(image.function)[..8], at(image.nothing)[..8]);
        assert!(image.port + 3 < GDT, "the code ends before the tables begin");
    }
}
