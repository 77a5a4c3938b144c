//! Which pages of another process were ever touched, from `/proc/PID/pagemap` and `/proc/PID/maps`.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::os::unix::fs::FileExt;

const PAGE: u64 = 4096;
/// Entries read at a time: 2 MiB of address space.
const BLOCK: u64 = 512;
/// Page is present (bit 63) or swapped out (bit 62): see the kernel's `Documentation/admin-guide/mm/pagemap.rst`.
const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;

/// What the kernel says about the pages of a process. Only private anonymous mappings are judged: a page of those
/// that is neither present nor swapped out was never written and reads as zeros. Of a shared or file mapping the page
/// tables say nothing, the data may lie in the page cache.
#[derive(Debug)]
pub(crate) struct PageMap {
    pagemap: File,
    /// Private anonymous mappings, sorted.
    anonymous: Vec<Range<u64>>,
    block: Vec<u8>,
}

impl PageMap {
    /// `None` where we may not look; then everything counts as touched.
    pub(crate) fn open(pid: u32) -> Option<Self> {
        if page_size() != PAGE {
            return None;
        }
        let maps = BufReader::new(File::open(format!("/proc/{pid}/maps")).ok()?);
        let mut anonymous: Vec<Range<u64>> = Vec::new();
        for line in maps.split(b'\n').map_while(Result::ok) {
            if let Some(range) = private_anonymous(&String::from_utf8_lossy(&line)) {
                match anonymous.last_mut() {
                    Some(last) if last.end == range.start => last.end = range.end,
                    _ => anonymous.push(range),
                }
            }
        }
        let pagemap = File::open(format!("/proc/{pid}/pagemap")).ok()?;
        Some(Self {
            pagemap,
            anonymous,
            block: Vec::new(),
        })
    }

    /// The first address of `range` that may hold something else than zeros.
    pub(crate) fn next_touched(&mut self, range: Range<u64>) -> Option<u64> {
        let mut at = range.start;
        while at < range.end {
            let after = self.anonymous.partition_point(|map| map.start <= at);
            let inside = after
                .checked_sub(1)
                .and_then(|i| self.anonymous.get(i))
                .filter(|map| at < map.end);
            let Some(map) = inside else {
                // Not ours to judge.
                return Some(at);
            };
            let end = map.end.min(range.end);
            match self.touched_in(at..end) {
                Ok(Some(found)) => return Some(found),
                Ok(None) => at = end,
                Err(()) => return Some(at),
            }
        }
        None
    }

    /// The first touched byte in a range of one private anonymous mapping.
    fn touched_in(&mut self, range: Range<u64>) -> Result<Option<u64>, ()> {
        let (mut page, last) = (range.start / PAGE, range.end.div_ceil(PAGE));
        while page < last {
            let count = BLOCK.min(last - page);
            self.block.resize(count as usize * 8, 0);
            self.pagemap
                .read_exact_at(&mut self.block, page * 8)
                .map_err(|_| ())?;
            let entries = self.block.as_chunks::<8>().0;
            if let Some(i) = entries
                .iter()
                .position(|entry| u64::from_ne_bytes(*entry) & PRESENT_OR_SWAPPED != 0)
            {
                return Ok(Some(((page + i as u64) * PAGE).max(range.start)));
            }
            page += count;
        }
        Ok(None)
    }
}

/// The range of a line of `/proc/PID/maps` that is private and has no file behind it.
fn private_anonymous(line: &str) -> Option<Range<u64>> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let (flags, _offset, device, inode) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    if !flags.ends_with('p') || device != "00:00" || inode != "0" {
        return None;
    }
    Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
}

fn page_size() -> u64 {
    // SAFETY: a plain query.
    u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_private_anonymous_lines_count() {
        let range = private_anonymous("7f0000000000-7f0020000000 rw-p 00000000 00:00 0 ");
        assert_eq!(range, Some(0x7f00_0000_0000..0x7f00_2000_0000));
        assert!(private_anonymous("7f0000000000-7f0020000000 rw-p 00000000 00:00 0   [heap]").is_some());
        assert!(
            private_anonymous("7f0000000000-7f0020000000 rw-s 00000000 00:01 7  /dev/zero (deleted)")
                .is_none()
        );
        assert!(private_anonymous("7f0000000000-7f0020000000 rw-p 00000000 fe:01 77  /a file").is_none());
        assert!(private_anonymous("nonsense").is_none());
    }
}
