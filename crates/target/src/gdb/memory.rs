//! Guest memory through a stub, where the VM's process cannot be reached: slow, and with the VM paused throughout.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmsight_memory::Source;

use super::Gdb;
use super::error::GdbError;

/// What is asked for at once.
const CHUNK: u64 = 64 * 1024;
/// Most chunks kept (64 MiB). The VM does not run meanwhile, so they stay true.
const MAX_CHUNKS: usize = 1024;

/// A stub's memory from guest-physical address 0 on. Offsets of this source are guest-physical addresses; only those
/// that the machine has memory at may be asked for, as reading a device may change it.
pub(crate) struct StubMemory {
    stub: Arc<Mutex<Option<Gdb>>>,
    /// Where the machine has memory: start and end, in order.
    ranges: Vec<(u64, u64)>,
    write: bool,
    chunks: Mutex<HashMap<u64, Box<[u8]>>>,
}

impl StubMemory {
    pub(crate) fn new(stub: Arc<Mutex<Option<Gdb>>>, ranges: Vec<(u64, u64)>, write: bool) -> Self {
        Self {
            stub,
            ranges,
            write,
            chunks: Mutex::default(),
        }
    }

    fn with<T>(&self, ask: impl FnOnce(&mut Gdb) -> Result<T, GdbError>) -> Result<T, String> {
        let mut stub = lock(&self.stub);
        let stub = stub.as_mut().ok_or("the connection to the gdb stub is closed")?;
        ask(stub).map_err(|e| e.to_string())
    }
}

impl Source for StubMemory {
    fn len(&self) -> u64 {
        self.ranges.last().map_or(0, |(_, end)| *end)
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), String> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset.wrapping_add(done as u64);
            let (first, last) = self
                .ranges
                .iter()
                .copied()
                .find(|(first, last)| (*first..*last).contains(&at))
                .ok_or_else(|| format!("the machine has no memory at {at:#x}"))?;
            let start = (at / CHUNK * CHUNK).max(first);
            let skip = (at - start) as usize;
            let mut chunks = lock(&self.chunks);
            if !chunks.contains_key(&start) {
                let mut bytes = vec![
                    0;
                    (at / CHUNK * CHUNK)
                        .saturating_add(CHUNK)
                        .min(last)
                        .saturating_sub(start) as usize
                ]
                .into_boxed_slice();
                self.with(|stub| stub.read(start, &mut bytes))?;
                if chunks.len() >= MAX_CHUNKS {
                    chunks.clear();
                }
                chunks.insert(start, bytes);
            }
            let have = chunks.get(&start).and_then(|c| c.get(skip..)).unwrap_or_default();
            let part = buf.get_mut(done..).unwrap_or_default();
            let n = have.len().min(part.len());
            if n == 0 {
                return Err(format!("{at:#x} is past the memory of the machine"));
            }
            if let (Some(to), Some(from)) = (part.get_mut(..n), have.get(..n)) {
                to.copy_from_slice(from);
            }
            done += n;
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), String> {
        if !self.write {
            return Err("it was not opened for writing".to_owned());
        }
        self.with(|stub| stub.write(offset, data))?;
        lock(&self.chunks).clear();
        Ok(())
    }

    fn is_writable(&self) -> bool {
        self.write
    }

    fn is_live(&self) -> bool {
        true
    }
}

impl fmt::Debug for StubMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StubMemory")
            .field("ranges", &self.ranges)
            .field("write", &self.write)
            .finish()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
