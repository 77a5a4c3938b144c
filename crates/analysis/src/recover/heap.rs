//! A copy of what a process allocated, to search for structures that point to one another.

use vmsight_arch::Gva;
use vmsight_linux::{Kernel, LinuxError, Mapping};
use vmsight_memory::AddressSpace;

use super::frames::PAGE;

/// Larger mappings are nobody's heap of small things.
const MAX_MAPPING: u64 = 64 << 20;
/// Bytes of one process that are copied.
const MAX_TOTAL: u64 = 256 << 20;
/// What a page that is not there costs of what may be looked at, in bytes: finding that out is quick.
const ABSENT_PAGE: u64 = 64;

/// Private writable memory of a process, without what is not there.
#[derive(Debug, Default)]
pub(crate) struct Heap {
    /// By rising address; none touches another.
    parts: Vec<(Gva, Vec<u8>)>,
    /// Bytes that are paged out or could not be read.
    pub(crate) absent: u64,
    /// Bytes that were left out because there are too many.
    pub(crate) left_out: u64,
}

impl Heap {
    /// The heap and the anonymous mappings of the process `pid`. `None` where it has no memory. `allowed` is how many bytes may still be
    /// looked at, of all processes: those of a guest that lies may all have the same ones.
    pub(crate) fn read(
        kernel: &Kernel,
        pid: i32,
        maps: &[Mapping],
        allowed: &mut u64,
    ) -> Result<Option<Self>, LinuxError> {
        let Some(space) = kernel.process_space(pid)? else {
            return Ok(None);
        };
        let mut heap = Self::default();
        let mut left = MAX_TOTAL.min(kernel.memory().size());
        for map in maps.iter().filter(|map| is_heap(map)) {
            let size = map.end.0.saturating_sub(map.start.0);
            if size > MAX_MAPPING || size > left || *allowed == 0 {
                heap.left_out = heap.left_out.saturating_add(size);
                continue;
            }
            left -= size;
            let absent = heap.absent;
            heap.add(&space, map.start, size);
            let absent = heap.absent - absent;
            let cost = size.saturating_sub(absent) + absent / PAGE * ABSENT_PAGE;
            *allowed = allowed.saturating_sub(cost);
        }
        heap.parts.sort_by_key(|(start, _)| start.0);
        Ok(Some(heap))
    }

    fn add(&mut self, space: &AddressSpace, start: Gva, size: u64) {
        let mut bytes = vec![0; size as usize];
        for (range, result) in space.read_partial(start, &mut bytes) {
            match (result, bytes.get(range.clone())) {
                (Ok(()), Some(part)) => {
                    let at = start.wrapping_add(range.start as u64);
                    self.parts.push((at, part.to_vec()));
                }
                _ => self.absent += range.len() as u64,
            }
        }
    }

    /// The pieces of memory there are.
    pub(crate) fn parts(&self) -> impl Iterator<Item = (Gva, &[u8])> {
        self.parts.iter().map(|(start, bytes)| (*start, bytes.as_slice()))
    }

    /// The bytes from an address on to the end of its piece.
    pub(crate) fn from(&self, at: Gva) -> Option<&[u8]> {
        let after = self.parts.partition_point(|(start, _)| start.0 <= at.0);
        let (start, bytes) = self.parts.get(after.checked_sub(1)?)?;
        let offset = usize::try_from(at.0 - start.0).ok()?;
        bytes.get(offset..).filter(|rest| !rest.is_empty())
    }

    /// The word at an address.
    pub(crate) fn word(&self, at: Gva) -> Option<u64> {
        let word = self.from(at)?.first_chunk()?;
        Some(u64::from_le_bytes(*word))
    }

    /// The text at an address up to its NUL, if that comes within `max` bytes.
    pub(crate) fn text(&self, at: Gva, max: usize) -> Option<&[u8]> {
        let bytes = self.from(at)?;
        let end = bytes.iter().take(max).position(|&b| b == 0)?;
        bytes.get(..end)
    }

    /// All aligned words with their addresses.
    pub(crate) fn words(&self) -> impl Iterator<Item = (Gva, u64)> {
        self.parts().flat_map(|(start, bytes)| {
            let skip = (start.0.wrapping_neg() % 8) as usize;
            let words = bytes.get(skip..).unwrap_or(&[]).chunks_exact(8).enumerate();
            words.map(move |(nth, word)| {
                let at = start.wrapping_add(skip as u64 + nth as u64 * 8);
                (at, u64::from_le_bytes(word.try_into().unwrap_or_default()))
            })
        })
    }

    #[cfg(test)]
    pub(crate) fn of(mut parts: Vec<(Gva, Vec<u8>)>) -> Self {
        parts.sort_by_key(|(start, _)| start.0);
        Self {
            parts,
            ..Self::default()
        }
    }
}

/// Whether a mapping is where a process allocates: private, writable, no file.
fn is_heap(map: &Mapping) -> bool {
    let nameless = match map.path.as_deref() {
        None => true,
        Some(path) => path == "[heap]" || path.starts_with("[anon:"),
    };
    nameless && map.inode == 0 && map.perms.starts_with("rw") && map.perms.ends_with('p')
}
