//! Memory that is neither mapped nor another process's: compressed or remote formats.

use std::fmt;

/// Bytes that must be asked for: a compressed dump, a remote host. Offsets are the source's own, from 0.
///
/// Calls come from many threads at once.
pub trait Source: Send + Sync + fmt::Debug {
    /// How many bytes it has.
    fn len(&self) -> u64;

    /// Whether it has none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buf` from `offset`. `offset + buf.len()` is at most [`len`](Self::len).
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), String>;

    /// Writes `data` at `offset`, for a source that says [`is_writable`](Self::is_writable).
    fn write(&self, offset: u64, data: &[u8]) -> Result<(), String> {
        let _ = (offset, data);
        Err("this source cannot be written".to_owned())
    }

    /// Whether [`write`](Self::write) works.
    fn is_writable(&self) -> bool {
        false
    }

    /// Whether the bytes can change between two reads.
    fn is_live(&self) -> bool {
        false
    }
}
