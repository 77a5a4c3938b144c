//! What a multiboot2 boot loader hands over (Multiboot2 specification, 3.6).

use core::ops::Range;

use crate::bytes::{u32_at, u64_at};
use crate::e820::{Kind, MemoryMap};

/// What EAX holds when a multiboot2 loader starts us.
pub const MAGIC: u32 = 0x36d7_6289;

const TAG_END: u32 = 0;
const TAG_MODULE: u32 = 3;
const TAG_MEMORY_MAP: u32 = 6;
const TAGS_RSDP: [u32; 2] = [14, 15];

/// The boot information: a list of tags after an 8-byte head.
#[derive(Debug, Clone, Copy)]
pub struct Information<'a> {
    bytes: &'a [u8],
}

/// A file that was loaded along.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module<'a> {
    /// Where it lies in physical memory.
    pub range: Range<u64>,
    /// Its command line: by our convention its purpose ("kernel", "initrd", "monitor"), a blank, and the rest.
    pub command_line: &'a str,
}

impl Module<'_> {
    /// Its purpose and the rest of the command line.
    pub fn purpose(&self) -> (&str, &str) {
        self.command_line
            .split_once(' ')
            .unwrap_or((self.command_line, ""))
    }
}

impl<'a> Information<'a> {
    /// The information in `bytes`, head included.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    /// The tags: type and what follows type and size. Ends where a tag is cut short.
    fn tags(self) -> impl Iterator<Item = (u32, &'a [u8])> {
        let mut rest = self.bytes.get(8..).unwrap_or_default();
        core::iter::from_fn(move || {
            let kind = u32_at(rest, 0)?;
            let size = u32_at(rest, 4)? as usize;
            let body = rest.get(8..size)?;
            if kind == TAG_END {
                return None;
            }
            // The next one begins at the next multiple of 8; that of the last may be missing.
            rest = rest.get(size.next_multiple_of(8)..).unwrap_or_default();
            Some((kind, body))
        })
    }

    /// The modules, in the order in which the loader's configuration names them.
    pub fn modules(self) -> impl Iterator<Item = Module<'a>> {
        self.tags()
            .filter(|&(kind, _)| kind == TAG_MODULE)
            .filter_map(|(_, body)| {
                let (start, end) = (u32_at(body, 0)?, u32_at(body, 4)?);
                let text = body.get(8..)?;
                let length = text.iter().position(|&b| b == 0).unwrap_or(text.len());
                Some(Module {
                    range: u64::from(start)..u64::from(end),
                    command_line: core::str::from_utf8(text.get(..length)?).ok()?,
                })
            })
    }

    /// Physical address of ACPI's RSDT, as the root pointer that the loader found has it.
    pub fn rsdt(self) -> Option<u64> {
        let (_, pointer) = self.tags().find(|(kind, _)| TAGS_RSDP.contains(kind))?;
        u32_at(pointer, 16).map(u64::from)
    }

    /// The firmware's memory map; what does not fit into ours is left out, and so not used by the guest.
    pub fn memory_map(self) -> MemoryMap {
        let mut map = MemoryMap::default();
        let Some((_, body)) = self.tags().find(|&(kind, _)| kind == TAG_MEMORY_MAP) else {
            return map;
        };
        let size = u32_at(body, 0).unwrap_or(0) as usize;
        if size < 20 {
            return map;
        }
        for entry in body.get(8..).unwrap_or_default().chunks_exact(size) {
            if let (Some(base), Some(length), Some(kind)) =
                (u64_at(entry, 0), u64_at(entry, 8), u32_at(entry, 16))
            {
                map.add(base..base.saturating_add(length), Kind(kind));
            }
        }
        map
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    fn tag(out: &mut Vec<u8>, kind: u32, body: &[u8]) {
        out.extend(kind.to_le_bytes());
        out.extend((body.len() as u32 + 8).to_le_bytes());
        out.extend(body);
        out.resize(out.len().next_multiple_of(8), 0);
    }

    fn information() -> Vec<u8> {
        let mut out = std::vec![0; 8];
        tag(&mut out, 1, b"a command line of three\0");
        let mut module = Vec::new();
        module.extend(0x10_0000u32.to_le_bytes());
        module.extend(0x10_0123u32.to_le_bytes());
        module.extend(b"kernel console=ttyS0 quiet\0");
        tag(&mut out, TAG_MODULE, &module);
        let mut map = Vec::new();
        map.extend(24u32.to_le_bytes());
        map.extend(0u32.to_le_bytes());
        for (base, length, kind) in [(0u64, 0x9_fc00u64, 1u32), (0x10_0000, 0x1ff0_0000, 1)] {
            map.extend(base.to_le_bytes());
            map.extend(length.to_le_bytes());
            map.extend(kind.to_le_bytes());
            map.extend([0; 4]);
        }
        tag(&mut out, TAG_MEMORY_MAP, &map);
        tag(&mut out, 14, b"RSD PTR \0OEMOEM\0\x00\x10\0\0");
        tag(&mut out, TAG_END, &[]);
        out
    }

    #[test]
    fn modules_and_memory_are_read() {
        let bytes = information();
        let info = Information::new(&bytes);
        let modules: Vec<_> = info.modules().collect();
        assert_eq!(modules.len(), 1);
        assert_eq!(modules[0].range, 0x10_0000..0x10_0123);
        assert_eq!(modules[0].purpose(), ("kernel", "console=ttyS0 quiet"));
        assert_eq!(info.rsdt(), Some(0x1000));
        let map = info.memory_map();
        assert_eq!(map.entries().len(), 2);
        assert_eq!(map.entries()[1].range, 0x10_0000..0x2000_0000);
    }

    #[test]
    fn cut_information_ends_early() {
        let bytes = information();
        for length in 0..bytes.len() {
            let info = Information::new(&bytes[..length]);
            assert!(info.modules().count() <= 1);
            assert!(info.memory_map().entries().len() <= 2);
        }
    }
}
