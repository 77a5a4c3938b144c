//! Makes a flat image of guest-physical memory out of an ELF core.
//!
//! QEMU's own way to a flat file, `pmemsave`, reads device registers where the range it is given has such, which a dump
//! must not do.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};

/// Where the firmware and the devices are that QEMU counts as memory: below 4 GiB, above where RAM can end there.
const FIRMWARE: std::ops::Range<u64> = 0xe000_0000..0x1_0000_0000;
/// Blocks of zeroes of this size stay holes in the file.
const BLOCK: usize = 64 << 10;

/// A loaded segment of an ELF core.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    offset: u64,
    address: u64,
    size: u64,
}

/// Writes the RAM in the core `elf` to `flat`, each byte at its guest-physical address.
pub(crate) fn from_elf(elf: &Path, flat: &Path) -> Result<()> {
    let mut core = File::open(elf).with_context(|| format!("open {}", elf.display()))?;
    let segments = segments(&mut core).with_context(|| format!("read {}", elf.display()))?;
    let mut out = File::create(flat).with_context(|| format!("make {}", flat.display()))?;
    let ram = segments.iter().filter(|s| !FIRMWARE.contains(&s.address));
    let mut end = 0;
    for segment in ram {
        copy(&mut core, segment, &mut out).with_context(|| format!("write {}", flat.display()))?;
        end = end.max(segment.address + segment.size);
    }
    out.set_len(end)
        .with_context(|| format!("write {}", flat.display()))
}

/// The loaded segments, by the offsets of ELF64 little-endian headers.
fn segments(core: &mut File) -> Result<Vec<Segment>> {
    let mut header = [0u8; 64];
    core.read_exact(&mut header)?;
    if header[..6] != *b"\x7fELF\x02\x01" {
        bail!("not a 64-bit little-endian ELF file");
    }
    let (table, size, count) = (word(&header, 32), half(&header, 54), half(&header, 56));
    if size != 56 {
        bail!("program headers of {size} bytes");
    }
    let mut found = Vec::new();
    core.seek(SeekFrom::Start(table))?;
    for _ in 0..count {
        let mut entry = [0u8; 56];
        core.read_exact(&mut entry)?;
        // Type 1 is PT_LOAD.
        if half(&entry, 0) == 1 {
            found.push(Segment {
                offset: word(&entry, 8),
                address: word(&entry, 24),
                size: word(&entry, 32),
            });
        }
    }
    Ok(found)
}

fn half(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8]
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn copy(core: &mut File, segment: &Segment, out: &mut File) -> Result<()> {
    core.seek(SeekFrom::Start(segment.offset))?;
    let mut block = vec![0u8; BLOCK];
    let mut done = 0;
    while done < segment.size {
        let length = usize::try_from(segment.size - done).unwrap_or(BLOCK).min(BLOCK);
        core.read_exact(&mut block[..length])?;
        if block[..length].iter().any(|byte| *byte != 0) {
            out.seek(SeekFrom::Start(segment.address + done))?;
            out.write_all(&block[..length])?;
        }
        done += length as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_goes_to_its_place_and_firmware_nowhere() {
        let folder = tempfile::tempdir().unwrap();
        let (elf, flat) = (folder.path().join("elf"), folder.path().join("flat"));
        let parts = [
            (1u16, 0x1000u64, b'a'),
            (4, 0x2000, b'n'),
            (1, 0xfffc_0000, b'f'),
            (1, 0x3000, b'b'),
        ];
        let mut bytes = vec![0u8; 64];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[32] = 64;
        bytes[54] = 56;
        bytes[56] = parts.len() as u8;
        let data = 64 + 56 * parts.len();
        for (at, (kind, address, _)) in parts.iter().enumerate() {
            let mut entry = [0u8; 56];
            entry[..2].copy_from_slice(&kind.to_le_bytes());
            entry[8..16].copy_from_slice(&((data + at * 16) as u64).to_le_bytes());
            entry[24..32].copy_from_slice(&address.to_le_bytes());
            entry[32..40].copy_from_slice(&16u64.to_le_bytes());
            bytes.extend(entry);
        }
        for (_, _, fill) in parts {
            bytes.extend([fill; 16]);
        }
        std::fs::write(&elf, bytes).unwrap();
        from_elf(&elf, &flat).unwrap();
        let flat = std::fs::read(&flat).unwrap();
        assert_eq!(flat.len(), 0x3010);
        assert_eq!(
            (&flat[0x1000..0x1010], &flat[0x3000..0x3010]),
            (&[b'a'; 16][..], &[b'b'; 16][..])
        );
        assert_eq!(flat.iter().filter(|byte| **byte != 0).count(), 32);
    }

    #[test]
    fn what_is_no_core_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (elf, flat) = (folder.path().join("elf"), folder.path().join("flat"));
        std::fs::write(&elf, [0u8; 100]).unwrap();
        assert!(from_elf(&elf, &flat).is_err() && !flat.exists());
    }
}
