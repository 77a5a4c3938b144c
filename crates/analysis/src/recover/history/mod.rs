//! What was typed: the histories that shells keep in memory, also those that were never or not yet written to a file.
//!
//! Nothing is looked up by symbols: the shells' structures point to each other, and that is looked for in every process, whatever it
//! is called.

mod hashed;
mod readline;
mod zsh;

use std::borrow::Cow;

use serde::Serialize;
use vmsight_arch::Gva;
use vmsight_linux::clock::rfc3339;
use vmsight_linux::listing::address;
use vmsight_linux::text::guest_text;
use vmsight_linux::{Kernel, LinuxError, Listing, Problem, ProcessMaps};

use super::heap::Heap;
pub use hashed::{HashedCommand, hashed_commands};

/// Entries of one process, for each form.
const MAX_ENTRIES: usize = 1 << 17;
/// Rows in all.
const MAX_ROWS: usize = 1 << 20;
/// Bytes of lines in all.
const MAX_BYTES: usize = 256 << 20;
/// No more of processes is looked at than so many times the guest's memory.
const MAX_COPIES: u64 = 4;
/// The longest line that is believed.
const MAX_LINE: usize = 64 << 10;
/// Times that are believed: from 1990 to 2100.
const TIMES: std::ops::Range<i64> = 631_152_000..4_102_444_800;

/// A line that somebody typed.
#[derive(Clone, Debug, Serialize)]
pub struct HistoryEntry {
    /// The process that has it in its memory.
    pub pid: i32,
    /// That process's name.
    pub name: String,
    /// Whose form of a history it is: `readline` (bash and others) or `zsh`.
    pub form: &'static str,
    /// readline's: its place in the process's list, from 1; `None` for one that is in no list any more. zsh's: the number that it has there.
    pub number: Option<u64>,
    /// When it was typed, or read from a file that has no times: RFC 3339.
    pub time: Option<String>,
    /// When what it started had ended, which zsh notes: RFC 3339.
    pub ended: Option<String>,
    /// The line.
    pub command: String,
    /// Where its entry lies in the process.
    #[serde(serialize_with = "address::gva")]
    pub address: Gva,
    /// What could not be read.
    pub problems: Vec<Problem>,
}

/// The histories of all processes, or of one, each in its own order; readline's entries that are in no list come last, by time.
///
/// # Errors
/// If processes cannot be listed, or the one that was asked for is not there.
pub fn history(kernel: &Kernel, pid: Option<i32>) -> Result<Listing<HistoryEntry>, LinuxError> {
    let mut bytes = MAX_BYTES;
    in_heaps(kernel, pid, "history", |process, heap, out| {
        let mut found = readline::entries(heap);
        found.extend(zsh::entries(heap));
        for entry in found {
            bytes = bytes.checked_sub(entry.line.len())?;
            room(out)?;
            out.rows.push(HistoryEntry {
                pid: process.pid,
                name: process.name.clone(),
                form: entry.form,
                number: entry.number,
                time: time(entry.time),
                ended: entry.ended.and_then(time),
                command: guest_text(&entry.line),
                address: entry.at,
                problems: Vec::new(),
            });
        }
        Some(())
    })
}

/// Nothing where a listing has as many rows as it may.
fn room<T>(listing: &Listing<T>) -> Option<()> {
    (listing.rows.len() < MAX_ROWS).then_some(())
}

/// Searches what each process allocated, or one. `search` adds rows, and gives nothing where there are too many; `what` is what
/// warnings call it.
fn in_heaps<T>(
    kernel: &Kernel,
    pid: Option<i32>,
    what: &str,
    mut search: impl FnMut(&ProcessMaps, &Heap, &mut Listing<T>) -> Option<()>,
) -> Result<Listing<T>, LinuxError> {
    let processes = kernel.all_maps()?;
    let mut out = Listing::new(Vec::new(), processes.warnings);
    let mut allowed = kernel.memory().size().saturating_mul(MAX_COPIES);
    let mut there = false;
    for process in processes.rows {
        if pid.is_some_and(|pid| pid != process.pid) {
            continue;
        }
        there = true;
        let heap = match Heap::read(kernel, process.pid, &process.maps.rows, &mut allowed) {
            Ok(Some(heap)) => heap,
            Ok(None) => continue,
            Err(error) => {
                out.warn(format!("{what} of process {}: {error}", process.pid));
                continue;
            }
        };
        if pid.is_some() {
            doubts(&heap, process.pid, what, &mut out);
        }
        if search(&process, &heap, &mut out).is_none() {
            out.warn(format!("{what}: cut, the listing holds too much already"));
            return Ok(out);
        }
    }
    if allowed == 0 {
        out.warn(format!(
            "{what}: cut, the processes have more memory than the guest can have"
        ));
    }
    match pid {
        Some(pid) if !there => Err(LinuxError::NotFound(format!(
            "no process {pid} with memory of its own"
        ))),
        _ => Ok(out),
    }
}

/// What of a process that was asked for could not be searched.
fn doubts<T>(heap: &Heap, pid: i32, what: &str, out: &mut Listing<T>) {
    if heap.absent > 0 {
        out.warn(format!(
            "{what} of process {pid}: {} KiB of its memory were never used or are paged out",
            heap.absent >> 10
        ));
    }
    if heap.left_out > 0 {
        out.warn(format!(
            "{what} of process {pid}: {} MiB in large mappings were not searched",
            heap.left_out >> 20
        ));
    }
}

/// A time in seconds since 1970.
fn time(seconds: i64) -> Option<String> {
    seconds.checked_mul(1_000_000_000).and_then(rfc3339)
}

/// One entry.
#[derive(Debug, PartialEq, Eq)]
struct Entry<'h> {
    form: &'static str,
    at: Gva,
    number: Option<u64>,
    time: i64,
    ended: Option<i64>,
    line: Cow<'h, [u8]>,
}

/// Whether these bytes can have been typed: that has no control characters but tabs and, in a command of several lines, line ends.
fn is_line(line: &[u8]) -> bool {
    let typed = |&b: &u8| b >= b' ' && b != 0x7f || matches!(b, b'\t' | b'\n' | 0x1b);
    !line.is_empty() && line.iter().all(typed)
}
