//! Makes dump files of every format, whole or broken as asked.

#![allow(dead_code, reason = "each test binary uses some of it")]

/// A range in LiME form.
pub(crate) fn lime_range(first: u64, last: u64, bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend_from_slice(b"EMiL");
    out.extend_from_slice(&1u32.to_le_bytes());
    out.extend_from_slice(&first.to_le_bytes());
    out.extend_from_slice(&last.to_le_bytes());
    out.extend_from_slice(&[0; 8]);
    out.extend_from_slice(bytes);
    out
}

/// A LiME file of these ranges.
pub(crate) fn lime(parts: &[(u64, Vec<u8>)]) -> Vec<u8> {
    parts
        .iter()
        .flat_map(|(gpa, bytes)| lime_range(*gpa, gpa + bytes.len() as u64 - 1, bytes))
        .collect()
}

/// One PT_LOAD.
#[derive(Clone, Debug, Default)]
pub(crate) struct Load {
    pub(crate) vaddr: u64,
    pub(crate) paddr: u64,
    pub(crate) bytes: Vec<u8>,
    /// More memory than bytes, where not 0.
    pub(crate) memsz: u64,
}

impl Load {
    pub(crate) fn new(paddr: u64, bytes: Vec<u8>) -> Self {
        Self {
            paddr,
            bytes,
            ..Self::default()
        }
    }
}

/// An ELF core file.
#[derive(Clone, Debug)]
pub(crate) struct Core {
    pub(crate) wide: bool,
    pub(crate) machine: u16,
    pub(crate) kind: u16,
    pub(crate) notes: Vec<u8>,
    pub(crate) loads: Vec<Load>,
    /// Put the number of segments into section 0, as is done from 65,535 on.
    pub(crate) extended: bool,
}

impl Default for Core {
    fn default() -> Self {
        Self {
            wide: true,
            machine: 62,
            kind: 4,
            notes: Vec::new(),
            loads: Vec::new(),
            extended: false,
        }
    }
}

impl Core {
    pub(crate) fn build(&self) -> Vec<u8> {
        let word = |v: u64| {
            if self.wide {
                v.to_le_bytes().to_vec()
            } else {
                (v as u32).to_le_bytes().to_vec()
            }
        };
        let (head, entry, section) = if self.wide {
            (64u64, 56u64, 64u64)
        } else {
            (52, 32, 40)
        };
        let count = self.loads.len() as u64 + 1;
        let table = head + section;
        let mut data_at = table + entry * count;
        let mut headers = Vec::new();
        let mut body = Vec::new();
        let program = |kind: u32, offset: u64, vaddr: u64, paddr: u64, filesz: u64, memsz: u64| {
            let mut out = kind.to_le_bytes().to_vec();
            if self.wide {
                out.extend_from_slice(&7u32.to_le_bytes());
            }
            for v in [offset, vaddr, paddr, filesz, memsz] {
                out.extend_from_slice(&word(v));
            }
            if !self.wide {
                out.extend_from_slice(&7u32.to_le_bytes());
            }
            out.extend_from_slice(&word(0));
            out
        };
        headers.extend(program(
            4,
            data_at,
            0,
            0,
            self.notes.len() as u64,
            self.notes.len() as u64,
        ));
        body.extend_from_slice(&self.notes);
        data_at += self.notes.len() as u64;
        for load in &self.loads {
            let filesz = load.bytes.len() as u64;
            let memsz = if load.memsz == 0 { filesz } else { load.memsz };
            headers.extend(program(1, data_at, load.vaddr, load.paddr, filesz, memsz));
            body.extend_from_slice(&load.bytes);
            data_at += filesz;
        }
        let mut out = b"\x7fELF".to_vec();
        out.extend_from_slice(&[if self.wide { 2 } else { 1 }, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        out.extend_from_slice(&self.kind.to_le_bytes());
        out.extend_from_slice(&self.machine.to_le_bytes());
        out.extend_from_slice(&1u32.to_le_bytes());
        out.extend_from_slice(&word(0));
        out.extend_from_slice(&word(table));
        out.extend_from_slice(&word(head));
        out.extend_from_slice(&0u32.to_le_bytes());
        let shown = if self.extended { 0xffff } else { count as u16 };
        for v in [head as u16, entry as u16, shown, section as u16, 1, 0] {
            out.extend_from_slice(&v.to_le_bytes());
        }
        assert_eq!(out.len() as u64, head);
        let mut zero = vec![0; section as usize];
        let info = if self.wide { 44 } else { 28 };
        zero[info..info + 4].copy_from_slice(&(count as u32).to_le_bytes());
        out.extend_from_slice(&zero);
        out.extend_from_slice(&headers);
        out.extend_from_slice(&body);
        out
    }
}

/// One ELF note, sizes rounded up to four bytes. VirtualBox leaves the NUL out of the length.
pub(crate) fn note(name: &str, kind: u32, body: &[u8], count_nul: bool) -> Vec<u8> {
    let mut out = (name.len() as u32 + u32::from(count_nul)).to_le_bytes().to_vec();
    out.extend_from_slice(&(body.len() as u32).to_le_bytes());
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(name.as_bytes());
    out.push(0);
    while !out.len().is_multiple_of(4) {
        out.push(0);
    }
    out.extend_from_slice(body);
    while !out.len().is_multiple_of(4) {
        out.push(0);
    }
    out
}

/// Puts integers at offsets of a block.
pub(crate) fn block(len: usize, words: &[(usize, u64)]) -> Vec<u8> {
    let mut out = vec![0; len];
    for &(at, value) in words {
        out[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    out
}

/// QEMU's note for a vCPU in 64-bit kernel mode, with every field told apart by `tag`.
pub(crate) fn qemu_state(tag: u64, len: usize) -> Vec<u8> {
    let mut words: Vec<(usize, u64)> = (0..18).map(|i| (8 + i * 8, tag + i as u64)).collect();
    for segment in 0..10usize {
        let at = 152 + segment * 24;
        words.push((at, (0xffff_0000 + segment as u64) << 32 | (0x10 + segment as u64)));
        words.push((at + 8, 0x00af_9b00));
        words.push((at + 16, tag + 0x100 + segment as u64));
    }
    words.extend([
        (392, 0x8005_0033),
        (408, tag + 0x202),
        (416, tag + 0x203),
        (424, 0x6f0),
    ]);
    if len >= 440 {
        words.push((432, tag + 0x300));
    }
    let mut out = block(len, &words);
    out[0..4].copy_from_slice(&1u32.to_le_bytes());
    out[4..8].copy_from_slice(&(len as u32).to_le_bytes());
    out
}

/// VirtualBox's descriptor note and one CPU note.
pub(crate) fn virtualbox_notes(version: u32, cpu: &[u8]) -> Vec<u8> {
    let mut descriptor = Vec::new();
    for v in [0xc01a_c0deu32, version, 24, 0x0601_0000, 1, 1] {
        descriptor.extend_from_slice(&v.to_le_bytes());
    }
    let mut out = note("VBCORE", 0xb00, &descriptor, false);
    out.extend(note("VBCPU", 0xb01, cpu, false));
    out
}

/// Bytes that differ from page to page.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|i| ((i + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
        .collect()
}
