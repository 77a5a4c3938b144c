//! VMCOREINFO: what a kernel keeps ready about itself for a crash, as lines of `KEY=value` (kernel/vmcore_info.c, before 6.9
//! kernel/crash_core.c).

use rustc_hash::FxHashSet;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use vmsight_arch::{Gpa, Gva};

use crate::text::guest_text;
use crate::{Kernel, LinuxError};

/// The name of the note.
const NAME: &[u8] = b"VMCOREINFO\0";
/// Bytes of text: a page is reserved, of 64 KiB where pages are that large.
const MAX_TEXT: u32 = 64 << 10;

/// The note, as it stands in memory. Serialised as an object of its keys; of a key that is there twice, the first.
#[derive(Clone, Debug, Default)]
pub struct Vmcoreinfo {
    /// Where the note begins: with the sizes of its name and its text.
    pub note: Gva,
    /// The same in physical memory, which the kernel tells in `/sys/kernel/vmcoreinfo`.
    pub physical: Gpa,
    /// Its lines in order: the key, and what stands behind the first `=`. A line without one is a key with nothing.
    pub lines: Vec<(String, String)>,
}

impl Serialize for Vmcoreinfo {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        let mut seen = FxHashSet::default();
        for (key, value) in self.lines.iter().filter(|(key, _)| seen.insert(key.as_str())) {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }
}

impl Kernel {
    /// The kernel's VMCOREINFO. What it says is the guest's own word, and nothing else here relies on it.
    ///
    /// # Errors
    /// [`LinuxError::NoSymbol`] and [`LinuxError::NotFound`] where the kernel keeps none; others if it cannot be read or is no such
    /// note.
    pub fn vmcoreinfo(&self) -> Result<Vmcoreinfo, LinuxError> {
        let note = self.symbol_pointer("vmcoreinfo_note")?;
        if note.is_null() {
            return Err(LinuxError::NotFound(
                "the kernel has made no VMCOREINFO yet".to_owned(),
            ));
        }
        let read = || LinuxError::read("VMCOREINFO", note);
        let bad = |reason: String| LinuxError::Implausible {
            what: format!("VMCOREINFO at {note}"),
            reason,
        };
        // Elf64_Nhdr: bytes of the name, bytes of the text, kind; then both, each padded to words of 4 bytes.
        let space = self.space();
        let (name_size, size) = (
            space.read_u32(note).map_err(read())?,
            space.read_u32(note.wrapping_add(4)).map_err(read())?,
        );
        let mut name = [0; NAME.len()];
        space.read(note.wrapping_add(12), &mut name).map_err(read())?;
        if name_size as usize != NAME.len() || name != NAME {
            return Err(bad("it is no note of that name".to_owned()));
        }
        if size > MAX_TEXT {
            return Err(bad(format!("it claims {size} bytes")));
        }
        let mut text = vec![0; size as usize];
        let from = note.wrapping_add(12 + NAME.len().next_multiple_of(4) as u64);
        space.read(from, &mut text).map_err(read())?;
        let lines = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        Ok(Vmcoreinfo {
            note,
            physical: space
                .translate(note)
                .map_err(|_| bad("it is not mapped".to_owned()))?
                .gpa,
            lines: lines
                .map(|line| {
                    let line = guest_text(line);
                    match line.split_once('=') {
                        Some((key, value)) => (key.to_owned(), value.to_owned()),
                        None => (line, String::new()),
                    }
                })
                .collect(),
        })
    }
}
