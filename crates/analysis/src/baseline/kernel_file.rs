//! A baseline out of the kernel's own file, as its distribution ships it: `vmlinuz` (a bzImage), or the `vmlinux` in it.
//!
//! What the kernel changes in its code as it boots is known from the file's own tables: alternatives, calls of paravirtualisation, returns
//! and indirect calls that mitigations replace, ENDBR64 that is sealed, LOCK prefixes, and constants that are known at boot. Those places
//! are taken as they are. What it changes later, and what moved with KASLR, the check `golden` knows.

use std::io::Read;

use flate2::read::GzDecoder;
use liblzma::read::XzDecoder;
use object::{Object as _, ObjectSection as _};
use vmsight_arch::Gva;
use vmsight_linux::LinuxError;

use super::{Baseline, Part};
use crate::{Context, text};

/// The longest kernel that is unpacked.
const MAX_KERNEL: u64 = 512 << 20;
/// `HdrS`, and where the header has it (Documentation/arch/x86/boot.rst).
const HEADER: (usize, &[u8]) = (0x202, b"HdrS");
const SETUP_SECTORS: usize = 0x1f1;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const SECTOR: usize = 512;

/// Why a file is of no use as a trusted copy of a kernel's code.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelFileError {
    /// It is neither a bzImage nor an ELF file, or cut.
    #[error("the file is no kernel (bzImage or ELF): {0}")]
    Foreign(String),
    /// It cannot be unpacked.
    #[error("the kernel in the file cannot be unpacked: {0}")]
    Packed(#[from] std::io::Error),
    /// It is packed in a form that is not read.
    #[error("the kernel in the file is packed otherwise than by gzip, xz, zstd or LZ4")]
    Form,
    /// It is not of this guest.
    #[error("it is of another kernel: {0}")]
    Other(String),
    /// The guest's kernel cannot be read.
    #[error(transparent)]
    Guest(#[from] LinuxError),
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

/// The ELF file in a bzImage.
fn unpacked(file: &[u8]) -> Result<Vec<u8>, KernelFileError> {
    let foreign = || KernelFileError::Foreign("its header is cut".to_owned());
    let sectors = match file.get(SETUP_SECTORS).copied().ok_or_else(foreign)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let number = |at| word(file, at).map(|n| n as usize).ok_or_else(foreign);
    let start = (sectors + 1) * SECTOR + number(PAYLOAD_OFFSET)?;
    let end = start.checked_add(number(PAYLOAD_LENGTH)?).ok_or_else(foreign)?;
    let payload = file.get(start..end).ok_or_else(foreign)?;
    // Behind it stands its length, which is none of the packed stream's.
    let mut kernel = Vec::new();
    match payload {
        [0x1f, 0x8b, ..] => GzDecoder::new(payload)
            .take(MAX_KERNEL)
            .read_to_end(&mut kernel)?,
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => XzDecoder::new(payload)
            .take(MAX_KERNEL)
            .read_to_end(&mut kernel)?,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => zstd::stream::read::Decoder::new(payload)?
            .single_frame()
            .take(MAX_KERNEL)
            .read_to_end(&mut kernel)?,
        [0x02, 0x21, 0x4c, 0x18, blocks @ ..] => {
            kernel =
                lz4(blocks).ok_or_else(|| KernelFileError::Foreign("its LZ4 stream is cut".to_owned()))?;
            kernel.len()
        }
        _ => return Err(KernelFileError::Form),
    };
    Ok(kernel)
}

/// The blocks of LZ4's old form, each behind its length (doc/lz4_Frame_format.md of LZ4). What stands behind the last is the kernel's
/// length, which is longer than any block that could follow.
fn lz4(mut stream: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    while let Some(length) = word(stream, 0) {
        let Some(block) = stream.get(4..).and_then(|rest| rest.get(..length as usize)) else {
            break;
        };
        lz4_block(block, &mut out)?;
        stream = stream.get(4 + block.len()..)?;
    }
    Some(out)
}

/// One block: runs of bytes, each followed by a repetition of bytes before (doc/lz4_Block_format.md of LZ4).
fn lz4_block(mut block: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let begin = out.len();
    while let Some((token, rest)) = block.split_first() {
        block = rest;
        let run = lz4_length(usize::from(token >> 4), &mut block)?;
        out.extend_from_slice(block.get(..run)?);
        block = block.get(run..)?;
        // The last run has no repetition.
        let Some((distance, rest)) = block.split_first_chunk::<2>() else {
            break;
        };
        block = rest;
        let distance = usize::from(u16::from_le_bytes(*distance));
        let length = lz4_length(usize::from(token & 15), &mut block)?.checked_add(4)?;
        if distance == 0 || distance > out.len() - begin || (out.len() + length) as u64 > MAX_KERNEL {
            return None;
        }
        // It may repeat what it makes itself.
        for _ in 0..length {
            out.push(*out.get(out.len() - distance)?);
        }
    }
    Some(())
}

/// A length of which four bits are known: 15 is followed by bytes to be added, up to one that is not 255.
fn lz4_length(known: usize, block: &mut &[u8]) -> Option<usize> {
    let mut length = known;
    if known == 15 {
        loop {
            let (byte, rest) = block.split_first()?;
            *block = rest;
            length = length.checked_add(usize::from(*byte))?;
            if *byte != 255 {
                break;
            }
        }
    }
    Some(length)
}

/// The code of the file, and what the kernel makes of it.
struct Code<'f> {
    file: object::File<'f>,
    /// As linked.
    start: u64,
    bytes: Vec<u8>,
    now: Vec<u8>,
}

impl Code<'_> {
    /// Takes what stands at a place now.
    fn take(&mut self, at: u64, length: usize) {
        let Some(offset) = at.checked_sub(self.start).and_then(|o| usize::try_from(o).ok()) else {
            return;
        };
        let range = offset..offset.saturating_add(length).min(self.bytes.len());
        if let (Some(to), Some(from)) = (self.bytes.get_mut(range.clone()), self.now.get(range)) {
            to.copy_from_slice(from);
        }
    }

    fn section(&self, name: &str) -> Option<(u64, Vec<u8>)> {
        let section = self.file.section_by_name(name)?;
        Some((section.address(), section.data().ok()?.to_vec()))
    }

    /// A table of distances to places, each from where it stands itself.
    fn relative(&mut self, name: &str, length: usize) {
        let Some((address, table)) = self.section(name) else {
            return;
        };
        for (index, distance) in table.as_chunks::<4>().0.iter().enumerate() {
            let at = address.wrapping_add(index as u64 * 4);
            self.take(
                at.wrapping_add(i64::from(i32::from_le_bytes(*distance)) as u64),
                length,
            );
        }
    }

    /// `struct alt_instr` (arch/x86/include/asm/alternative.h), whose size and members differ.
    fn alternatives(&mut self, size: usize, length_at: usize) {
        let Some((address, table)) = self.section(".altinstructions") else {
            return;
        };
        for (index, entry) in table.chunks_exact(size.max(4)).enumerate() {
            let at = address.wrapping_add((index * size) as u64);
            let distance = word(entry, 0).unwrap_or(0) as i32;
            let length = entry.get(length_at).copied().unwrap_or(0);
            self.take(at.wrapping_add(i64::from(distance) as u64), length.into());
        }
    }

    /// `struct paravirt_patch_site` (up to 6.7): where, which one, how long.
    fn paravirtualised(&mut self) {
        let Some((_, table)) = self.section(".parainstructions") else {
            return;
        };
        // The last has nothing behind it that would fill it up.
        for entry in table.chunks(16) {
            let [a, b, c, d, e, f, g, h, _, length, ..] = *entry else {
                continue;
            };
            self.take(u64::from_le_bytes([a, b, c, d, e, f, g, h]), length.into());
        }
    }

    /// `runtime_const_ptr` and its like (6.11): a constant in an instruction of at most ten bytes.
    fn constants(&mut self) {
        let names: Vec<String> = self
            .file
            .sections()
            .filter_map(|s| s.name().ok().map(str::to_owned))
            .filter(|name| name.starts_with("runtime_"))
            .collect();
        for name in names {
            self.relative(&name, 10);
        }
    }
}

fn is_packed(file: &[u8]) -> bool {
    file.get(HEADER.0..HEADER.0 + HEADER.1.len()) == Some(HEADER.1)
}

impl Baseline {
    /// Whether a file begins as one that [`Self::of_kernel_file`] reads.
    pub fn is_kernel_file(file: &[u8]) -> bool {
        is_packed(file) || file.starts_with(b"\x7fELF")
    }

    /// The code of the kernel that the guest runs, out of its file: a bzImage (`vmlinuz`) or an ELF file (`vmlinux`). Modules are not
    /// in it.
    ///
    /// # Errors
    /// If the file is no kernel, or another one's by its build-id, or the guest's text cannot be read.
    pub fn of_kernel_file(context: &Context, file: &[u8]) -> Result<Self, KernelFileError> {
        let elf = match is_packed(file) {
            true => unpacked(file)?,
            false => file.to_vec(),
        };
        let file =
            object::File::parse(elf.as_slice()).map_err(|e| KernelFileError::Foreign(e.to_string()))?;
        let id = file.build_id().ok().flatten().map(|id| id.to_vec());
        // A stripped kernel has its notes in a section that is called otherwise.
        let id = id.or_else(|| build_id(file.section_by_name(".notes")?.data().ok()?));
        let id = super::hex(&id.unwrap_or_default());
        let own = super::kernel_id(context);
        if id != own || id.is_empty() {
            return Err(KernelFileError::Other(format!(
                "its build-id is {id}, the guest's {own}"
            )));
        }
        let region = text::kernel(context)?;
        let start = context.kernel().image().link_time(Gva(region.start));
        let section = file.section_by_name(".text");
        let bytes = section.and_then(|section| {
            let offset = usize::try_from(start.checked_sub(section.address())?).ok()?;
            let data = section.data().ok()?;
            Some(
                data.get(offset..offset.checked_add(region.bytes.len())?)?
                    .to_vec(),
            )
        });
        let Some(bytes) = bytes else {
            return Err(KernelFileError::Foreign(
                "its code is not as long as the guest's".to_owned(),
            ));
        };
        let alternative = context.object("alt_instr", Gva(0))?;
        let (size, length_at) = (alternative.size(), alternative.member("instrlen")?.0);
        let mut code = Code {
            file,
            start,
            bytes,
            now: region.bytes,
        };
        code.alternatives(size as usize, length_at as usize);
        code.paravirtualised();
        // A conditional jump is the longest.
        code.relative(".retpoline_sites", 7);
        code.relative(".return_sites", 5);
        code.relative(".ibt_endbr_seal", 4);
        code.relative(".smp_locks", 1);
        code.constants();
        Ok(Self {
            release: context.kernel().release().to_owned(),
            build_id: own.clone(),
            parts: vec![Part {
                module: String::new(),
                build_id: own,
                base: Gva(start),
                areas: Vec::new(),
                bytes: code.bytes,
            }],
        })
    }
}

/// The description of the note of type 3 of GNU (`NT_GNU_BUILD_ID`).
pub(super) fn build_id(mut notes: &[u8]) -> Option<Vec<u8>> {
    const BUILD_ID: u32 = 3;
    loop {
        let (name, length) = (word(notes, 0)? as usize, word(notes, 4)? as usize);
        let kind = word(notes, 8)?;
        let start = 12usize.checked_add(name.checked_next_multiple_of(4)?)?;
        let end = start.checked_add(length)?;
        if kind == BUILD_ID && notes.get(12..16) == Some(b"GNU\0") {
            return notes.get(start..end).map(<[u8]>::to_vec);
        }
        notes = notes.get(end.checked_next_multiple_of(4)?..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_build_id_is_found_among_other_notes() {
        let note = |name: &[u8; 4], kind: u32, text: &[u8]| {
            let mut bytes = 4u32.to_le_bytes().to_vec();
            bytes.extend((text.len() as u32).to_le_bytes());
            bytes.extend(kind.to_le_bytes());
            bytes.extend(name);
            bytes.extend(text);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes
        };
        let notes = [note(b"Xen\0", 3, b"other"), note(b"GNU\0", 3, b"12345")].concat();
        assert_eq!(build_id(&notes).as_deref(), Some(&b"12345"[..]));
        assert_eq!(build_id(&notes[..40]), None);
        assert_eq!(build_id(&[0xff; 64]), None);
    }

    #[test]
    fn lz4_repeats_what_was_before() {
        // "abc", then four bytes from three before; a run of 16 bytes, which needs a byte more for its length.
        let mut block = vec![0x30, b'a', b'b', b'c', 3, 0];
        block.extend([0xf0, 1]);
        block.extend([b'x'; 16]);
        let mut stream = (block.len() as u32).to_le_bytes().to_vec();
        stream.extend(&block);
        stream.extend(23u32.to_le_bytes());
        assert_eq!(lz4(&stream).as_deref(), Some(&b"abcabcaxxxxxxxxxxxxxxxx"[..]));
        let mut out = Vec::new();
        assert_eq!(lz4_block(&[0x10, b'a', 2, 0], &mut out), None);
        assert_eq!(lz4_block(&[0xf0, 255], &mut out), None);
    }

    #[test]
    fn what_is_no_kernel_is_said_to_be_none() {
        assert!(matches!(unpacked(b"MZ"), Err(KernelFileError::Foreign(_))));
        let mut file = vec![0; 8192];
        file[PAYLOAD_LENGTH] = 64;
        assert!(matches!(unpacked(&file), Err(KernelFileError::Form)));
        file[PAYLOAD_LENGTH + 3] = 0xff;
        assert!(matches!(unpacked(&file), Err(KernelFileError::Foreign(_))));
    }
}
