//! The guest kernel's VMCOREINFO note, found in its memory.
//!
//! Linux keeps it ready for a crash (`kernel/vmcore_info.c`, before 6.9 `kernel/crash_core.c`): an ELF note with the name
//! `VMCOREINFO`, whose text begins with `OSRELEASE=`. Crash tools want it in a dump.

use std::sync::atomic::{AtomicBool, Ordering};

use memchr::memmem::Finder;
use vmsight_arch::Gpa;

use crate::{GuestMemory, ScanOptions};

/// The name as it stands in the note, padded, and the first words of the text.
const BEGIN: &[u8] = b"VMCOREINFO\0\0OSRELEASE=";
/// What such a text says, always.
const ALWAYS: &str = "SYMBOL(swapper_pg_dir)=";
/// The name behind which the text begins.
const NAME: usize = 12;
/// Bytes that the kernel reserves for the text: a page.
const LONGEST: usize = 4096;

/// A VMCOREINFO text and where it was found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Vmcoreinfo {
    /// Where the text begins.
    pub gpa: Gpa,
    /// The text.
    pub text: String,
}

/// Looks for the note in all of memory; of several, the one at the lowest address. The guest's root can have written it: it is
/// for tools that ask for it, nothing here believes it. `stop` ends the search.
pub fn find_vmcoreinfo(memory: &GuestMemory, stop: &AtomicBool) -> Option<Vmcoreinfo> {
    let finder = Finder::new(BEGIN);
    let options = ScanOptions {
        overlap: NAME + LONGEST,
        ..ScanOptions::default()
    };
    let ended = AtomicBool::new(false);
    let scan = memory.scan(&options, &ended, |chunk, bytes| {
        if stop.load(Ordering::Relaxed) {
            ended.store(true, Ordering::Relaxed);
        }
        let places = finder.find_iter(bytes).filter(|at| *at < chunk.own);
        let found: Vec<Vmcoreinfo> = places
            .filter_map(|at| {
                let rest = bytes.get(at + NAME..)?;
                let text = rest.get(..LONGEST.min(rest.len()))?.split(|b| *b == 0).next()?;
                let text = std::str::from_utf8(text)
                    .ok()
                    .filter(|text| text.contains(ALWAYS))?;
                Some(Vmcoreinfo {
                    gpa: chunk.gpa.wrapping_add((at + NAME) as u64),
                    text: text.to_owned(),
                })
            })
            .collect();
        // Chunks are begun in order: those before are being looked at already.
        if !found.is_empty() {
            ended.store(true, Ordering::Relaxed);
        }
        found
    });
    scan.found.into_iter().next()
}
