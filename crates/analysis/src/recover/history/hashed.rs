//! Commands that bash remembers where it found: its table of hashed programs (bash's hashlib.h and hashcmd.h; held against bash 5.2).
//! An entry has its key's hash in it, so it proves itself.

use serde::Serialize;
use vmsight_arch::Gva;
use vmsight_linux::listing::address;
use vmsight_linux::text::guest_text;
use vmsight_linux::{Kernel, LinuxError, Listing, Problem};

use super::{in_heaps, room};
use crate::recover::heap::Heap;

/// The longest name of a command that is believed: NAME_MAX.
const MAX_NAME: usize = 256;
/// The longest path: PATH_MAX.
const MAX_PATH: usize = 4096;
/// Entries of one process.
const MAX_ENTRIES: usize = 1 << 16;
/// Uses of one command that are believed.
const MAX_USES: u64 = 1 << 24;

/// A command, and where a shell found it.
#[derive(Clone, Debug, Serialize)]
pub struct HashedCommand {
    /// The shell's process.
    pub pid: i32,
    /// That process's name.
    pub name: String,
    /// What was typed as the command's name.
    pub command: String,
    /// The file that was executed for it.
    pub path: String,
    /// How often it was executed since it was found.
    pub uses: u32,
    /// Where its entry lies in the process.
    #[serde(serialize_with = "address::gva")]
    pub address: Gva,
    /// What could not be read.
    pub problems: Vec<Problem>,
}

/// What the shells of all processes, or of one, remember of where commands are: what was executed by name, whatever their history says.
///
/// # Errors
/// If processes cannot be listed, or the one that was asked for is not there.
pub fn hashed_commands(kernel: &Kernel, pid: Option<i32>) -> Result<Listing<HashedCommand>, LinuxError> {
    in_heaps(kernel, pid, "commands", |process, heap, out| {
        for entry in entries(heap) {
            room(out)?;
            out.rows.push(HashedCommand {
                pid: process.pid,
                name: process.name.clone(),
                command: guest_text(entry.command),
                path: guest_text(entry.path),
                uses: entry.uses,
                address: entry.at,
                problems: Vec::new(),
            });
        }
        Some(())
    })
}

#[derive(Debug, PartialEq, Eq)]
struct Entry<'h> {
    at: Gva,
    command: &'h [u8],
    path: &'h [u8],
    uses: u32,
}

/// The entries in a process's memory, by name.
fn entries(heap: &Heap) -> Vec<Entry<'_>> {
    let mut out = Vec::new();
    // The last words: of `next`, `key`, `data` and, of 32 bits each, the hash and how often it was asked for.
    let mut last = [(Gva(0), 0); 3];
    for (at, word) in heap.words() {
        let [(start, next), (_, key), (_, data)] = last;
        last = [last[1], last[2], (at, word)];
        // Most words are no small number behind two pointers.
        if word >> 32 == 0 || word >> 32 > MAX_USES || key == 0 || data == 0 || at != start.wrapping_add(24) {
            continue;
        }
        if let Some(entry) = entry(heap, start, [next, key, data, word]) {
            out.push(entry);
            if out.len() >= MAX_ENTRIES {
                break;
            }
        }
    }
    out.sort_by_key(|entry| (entry.command, entry.at.0));
    out
}

/// The entry at an address, if what lies there is one.
fn entry(heap: &Heap, at: Gva, [next, key, data, word]: [u64; 4]) -> Option<Entry<'_>> {
    if next != 0 {
        heap.from(Gva(next))?;
    }
    let command = heap.text(Gva(key), MAX_NAME)?;
    if command.is_empty() || hash(command) != word as u32 {
        return None;
    }
    // Other tables of bash's (variables, aliases, functions) have other data.
    let path = heap.text(Gva(heap.word(Gva(data))?), MAX_PATH)?;
    let folder = path.strip_suffix(command)?;
    folder.ends_with(b"/").then_some(Entry {
        at,
        command,
        path,
        uses: (word >> 32) as u32,
    })
}

/// FNV-1 of 32 bits, of characters that have signs.
fn hash(text: &[u8]) -> u32 {
    text.iter().fold(0x811c_9dc5, |hash: u32, &byte| {
        hash.wrapping_mul(0x0100_0193) ^ i32::from(byte as i8) as u32
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Memory with one entry: `ls`, found in /bin and used three times.
    fn memory() -> Vec<u8> {
        let mut bytes = vec![0; 0x400];
        let mut put = |at: usize, new: &[u8]| bytes[at..at + new.len()].copy_from_slice(new);
        put(0x08, &0x1100u64.to_le_bytes());
        put(0x10, &0x1200u64.to_le_bytes());
        put(0x18, &hash(b"ls").to_le_bytes());
        put(0x1c, &3u32.to_le_bytes());
        put(0x100, b"ls\0");
        put(0x200, &0x1300u64.to_le_bytes());
        put(0x300, b"/bin/ls\0");
        bytes
    }

    fn found(bytes: Vec<u8>) -> Vec<(String, String, u32)> {
        let heap = Heap::of(vec![(Gva(0x1000), bytes)]);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        entries(&heap)
            .iter()
            .map(|e| (text(e.command), text(e.path), e.uses))
            .collect()
    }

    #[test]
    fn the_hash_is_that_of_the_published_test_values() {
        // FNV's own table of test vectors.
        assert_eq!(hash(b""), 0x811c_9dc5);
        assert_eq!(hash(b"a"), 0x050c_5d7e);
        assert_eq!(hash(b"foobar"), 0x31f0_b262);
    }

    #[test]
    fn an_entry_proves_itself_by_its_hash_and_its_path() {
        assert_eq!(found(memory()), [("ls".to_owned(), "/bin/ls".to_owned(), 3)]);
        // Another hash, name, path or neighbour, and it is none.
        for (at, byte) in [
            (0x18, 1),
            (0x100, b'm'),
            (0x306, b'm'),
            (0x304, b'x'),
            (0x01, 0x90),
            (0x1c, 0),
        ] {
            let mut bytes = memory();
            bytes[at] = byte;
            assert_eq!(found(bytes), [], "{at:#x}");
        }
        assert_eq!(found(Vec::new()), []);
    }
}
