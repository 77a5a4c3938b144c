//! VMware's saved states: a `.vmss` (suspended) or `.vmsn` (snapshot), and the memory, which is in a `.vmem` of the same name or,
//! in older ones, in the state itself.
//!
//! The state is groups of tags. Of the group `memory` these count: `regionsCount`, and for each region where it is in the
//! guest (`regionPPN`), where in the `.vmem` (`regionPageNum`) and how long (`regionSize`), in pages; `Memory` is the memory.
//! Without regions it begins at address 0. Source: the format as volatility3 and LibVMI's forerunners describe it; VMware has not
//! published one.

use std::path::{Path, PathBuf};

use super::DumpError;
use super::bytes::{array, slice, u16_at, u32_at, u64_at};
use super::cover::Cover;

const MAGICS: [[u8; 4]; 4] = [
    *b"\xd0\xbe\xd2\xbe",
    *b"\xd1\xba\xd1\xba",
    *b"\xd2\xbe\xd2\xbe",
    *b"\xd3\xbe\xd3\xbe",
];

const HEADER: u64 = 12;
/// A group: its name (64 bytes), where its tags are, and another number.
const GROUP: u64 = 80;
const MAX_GROUPS: u64 = 1 << 12;
/// Tags of the group of memory read at most. There are three for each region, and some more.
const MAX_TAGS: usize = 1 << 16;
const PAGE: u64 = 4096;

/// What a state says of memory.
#[derive(Debug, Default)]
pub(super) struct State {
    /// Frame in the guest, page in the file, pages.
    regions: Vec<(u64, u64, u64)>,
    /// Where memory is in the state itself: offset and length.
    inside: Option<(u64, u64)>,
}

/// Whether a file begins as a state does.
pub(super) fn is_state(start: &[u8]) -> bool {
    start.first_chunk().is_some_and(|magic| MAGICS.contains(magic))
}

/// The memory file of a state, or the state of a memory file, if it is there.
pub(super) fn beside(path: &Path, extensions: &[&str]) -> Option<PathBuf> {
    let mut names = extensions.iter().map(|extension| path.with_extension(extension));
    names.find(|path| path.is_file())
}

/// Reads what a state says of memory.
pub(super) fn parse(data: &[u8], remarks: &mut Vec<String>) -> Result<State, DumpError> {
    if !is_state(data) {
        return Err(DumpError::broken("no header of a VMware state at the beginning"));
    }
    let wide = data.first().is_some_and(|byte| byte & 0xf != 0);
    let groups = u64::from(u32_at(data, 8).unwrap_or(0)).min(MAX_GROUPS);
    let place = (0..groups).find_map(|index| {
        let group = slice(data, HEADER + index * GROUP, GROUP);
        let name = group.get(..64)?.split(|b| *b == 0).next()?;
        (name == b"memory").then(|| u64_at(group, 64))?
    });
    let Some(place) = place else {
        return Err(DumpError::broken("this state of VMware has no group for memory"));
    };
    let mut state = State::default();
    let mut frames: [std::collections::BTreeMap<u32, u64>; 3] = Default::default();
    let mut count = None;
    let mut at = place;
    for _ in 0..MAX_TAGS {
        let Some(tag) = Tag::at(data, at, wide) else {
            remarks.push("the tags of VMware's state are cut".to_owned());
            break;
        };
        if tag.is_end {
            break;
        }
        let number = slice(data, tag.data, tag.len.min(8))
            .iter()
            .rev()
            .fold(0, |number, &byte| number << 8 | u64::from(byte));
        match (tag.name, tag.index) {
            (b"regionsCount", _) => count = Some(number),
            (b"regionPPN", Some(index)) => {
                frames[0].insert(index, number);
            }
            (b"regionPageNum", Some(index)) => {
                frames[1].insert(index, number);
            }
            (b"regionSize", Some(index)) => {
                frames[2].insert(index, number);
            }
            (b"Memory", _) if tag.len > PAGE => state.inside = Some((tag.data, tag.len)),
            _ => {}
        }
        at = tag.next;
    }
    let [starts, pages, sizes] = &frames;
    for (index, &frame) in starts {
        let (Some(&page), Some(&size)) = (pages.get(index), sizes.get(index)) else {
            remarks.push(format!(
                "region {index} of VMware's memory is not described whole: left out"
            ));
            continue;
        };
        state.regions.push((frame, page, size));
    }
    if count.is_some_and(|count| count != state.regions.len() as u64) {
        remarks.push(format!(
            "VMware's state speaks of {} regions and describes {}",
            count.unwrap_or(0),
            state.regions.len()
        ));
    }
    Ok(state)
}

/// A tag: its name, its first index, and where its data are.
struct Tag<'a> {
    name: &'a [u8],
    index: Option<u32>,
    data: u64,
    len: u64,
    next: u64,
    is_end: bool,
}

impl<'a> Tag<'a> {
    fn at(data: &'a [u8], at: u64, wide: bool) -> Option<Self> {
        let [flags, name_len] = array::<2>(data, at)?;
        let name = slice(data, at.checked_add(2)?, name_len.into());
        let mut next = at.checked_add(2 + u64::from(name_len))?;
        let indices = u64::from(flags >> 6 & 3);
        let index = (indices > 0).then(|| u32_at(data, next)).flatten();
        next = next.checked_add(4 * indices)?;
        let (len, start) = match flags & 0x3f {
            // Long data: the length twice (on disk, in memory), and how much padding comes before it.
            62 | 63 => {
                let (len, size) = match wide {
                    true => (u64_at(data, next)?, 8),
                    false => (u32_at(data, next)?.into(), 4),
                };
                let padding = u16_at(data, next.checked_add(2 * size)?)?;
                (len, next.checked_add(2 * size + 2 + u64::from(padding))?)
            }
            short => (short.into(), next),
        };
        Some(Self {
            name,
            index,
            data: start,
            len,
            next: start.checked_add(len)?,
            is_end: flags == 0 && name_len == 0,
        })
    }
}

impl State {
    /// Whether the memory is in the state itself.
    pub(super) fn has_memory(&self) -> bool {
        self.inside.is_some()
    }

    /// Adds the regions, of a memory file of `memory_len` bytes; `None` where memory is in the state.
    pub(super) fn cover(&self, memory_len: Option<u64>, cover: &mut Cover) {
        let (base, len) = match (memory_len, self.inside) {
            (Some(len), _) => (0, len),
            (None, Some(inside)) => inside,
            (None, None) => return,
        };
        if self.regions.is_empty() {
            cover.add(0, len, base, len);
        }
        for &(frame, page, size) in &self.regions {
            let (start, size) = (page.saturating_mul(PAGE), size.saturating_mul(PAGE));
            let stored = len.saturating_sub(start).min(size);
            cover.add(
                frame.saturating_mul(PAGE),
                size,
                base.saturating_add(start),
                stored,
            );
        }
    }
}
