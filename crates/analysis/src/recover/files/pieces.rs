//! The bytes of a file that are in memory, for those who look into it here.

use vmsight_arch::Gpa;
use vmsight_linux::{Kernel, LinuxError};

use super::CachedFile;
use super::inode::MappingReader;
use super::page_cache::PageCache;
use crate::recover::frames::PAGE;

/// Bytes of a file that follow one another and are in memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Piece {
    /// Where in the file they begin.
    pub(crate) offset: u64,
    pub(crate) bytes: Vec<u8>,
}

/// The pieces of a file that are in memory, the first `limit` bytes of them, and whether those are all. What cannot be read, or became
/// another file's meanwhile, is left out as if it were not there.
pub(crate) fn pieces(
    kernel: &Kernel,
    file: &CachedFile,
    limit: u64,
) -> Result<(Vec<Piece>, bool), LinuxError> {
    let cache = PageCache::new(kernel)?;
    let mapping = MappingReader::new(kernel)?.of(file.content)?;
    let entries = usize::try_from(kernel.memory().size() / PAGE).unwrap_or(usize::MAX);
    let size = file.size.unwrap_or(0);
    let mut left = limit;
    let mut out: Vec<Piece> = Vec::new();
    for stretch in cache.pages(mapping, entries)?.stretches {
        let offset = stretch.index.saturating_mul(PAGE);
        let length = stretch
            .count
            .saturating_mul(PAGE)
            .min(size.saturating_sub(offset));
        let taken = length.min(left);
        let mut bytes = vec![0; usize::try_from(taken).unwrap_or(0)];
        let read = kernel.memory().read(Gpa(stretch.gpa.0), &mut bytes).is_ok();
        if read && (!kernel.memory().is_live() || cache.holds(mapping, &stretch)) {
            match out.last_mut() {
                Some(last) if last.offset + last.bytes.len() as u64 == offset => {
                    last.bytes.append(&mut bytes)
                }
                _ => out.push(Piece { offset, bytes }),
            }
        }
        left -= taken;
        if taken < length {
            return Ok((out, false));
        }
    }
    Ok((out, true))
}
