//! Memory of a running guest in which one word is another when it is read for the first time: what a guest that writes at the wrong
//! moment makes of it, without the chance.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmsight_arch::Gpa;
use vmsight_memory::{GuestMemory, Source};

#[derive(Debug)]
struct Flicker {
    bytes: Vec<u8>,
    at: u64,
    first: u64,
    seen: AtomicBool,
}

impl Source for Flicker {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), String> {
        let from = offset as usize;
        let bytes = self.bytes.get(from..from + buf.len()).ok_or("out of bounds")?;
        buf.copy_from_slice(bytes);
        let end = offset + buf.len() as u64;
        if offset <= self.at && self.at + 8 <= end && !self.seen.swap(true, Ordering::Relaxed) {
            let place = (self.at - offset) as usize;
            buf[place..place + 8].copy_from_slice(&self.first.to_le_bytes());
        }
        Ok(())
    }

    fn is_live(&self) -> bool {
        true
    }
}

/// `bytes` from address 0 on, but for the word at `at`, which is `first` at first.
pub(crate) fn memory(bytes: &[u8], at: u64, first: u64) -> GuestMemory {
    let source = Flicker {
        bytes: bytes.to_vec(),
        at,
        first,
        seen: AtomicBool::new(false),
    };
    GuestMemory::builder()
        .custom(Gpa(0), bytes.len() as u64, Arc::new(source), 0)
        .build()
        .unwrap()
}
