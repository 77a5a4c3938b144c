//! The bytes of an image that was found: its parts, borrowed from a dump or copied from a running guest.

use std::borrow::Cow;

use rayon::prelude::*;
use vmsight_arch::Gpa;
use vmsight_memory::GuestMemory;

use super::KernelImage;
use super::x86::Segment;

/// No part of an image that is searched is larger: even an image with every debugging option stays below this.
const MAX_PART: u64 = 256 << 20;

/// A run of an image's bytes with the same rights.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    /// Bytes from `_text`.
    pub start: u64,
    /// How many bytes.
    pub len: u64,
    /// The kernel maps it writable.
    pub write: bool,
    /// The kernel maps it executable.
    pub execute: bool,
}

/// An image as bytes. Physically it is in one piece, which the page tables have been found to say.
#[derive(Debug)]
pub(crate) struct ImageBytes<'m> {
    memory: &'m GuestMemory,
    phys: Gpa,
    len: u64,
    parts: Vec<Part>,
}

impl<'m> ImageBytes<'m> {
    pub(super) fn new(memory: &'m GuestMemory, phys: Gpa, len: u64, segments: &[Segment]) -> Self {
        let parts = segments
            .iter()
            .map(|s| Part {
                start: s.start,
                len: s.len,
                write: s.write,
                execute: s.execute,
            })
            .collect();
        Self {
            memory,
            phys,
            len,
            parts,
        }
    }

    pub(crate) fn of(memory: &'m GuestMemory, image: &KernelImage) -> Self {
        Self {
            memory,
            phys: image.phys,
            len: image.len,
            parts: image.parts.clone(),
        }
    }

    pub(super) fn parts(&self) -> Vec<Part> {
        self.parts.clone()
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// What is worth searching for constant data: the read-only data, largest part first; and at last, for kernels that do not
    /// protect it, the whole image.
    pub(crate) fn constant_parts(&self) -> impl Iterator<Item = (u64, Cow<'m, [u8]>)> + '_ {
        let mut parts: Vec<(u64, u64)> = Vec::new();
        for p in self.parts.iter().filter(|p| !p.write && !p.execute) {
            match parts.last_mut() {
                Some((start, len)) if *start + *len == p.start => *len += p.len,
                _ => parts.push((p.start, p.len)),
            }
        }
        parts.sort_by_key(|&(_, len)| std::cmp::Reverse(len));
        parts.truncate(8);
        parts.push((0, self.len));
        parts
            .into_iter()
            .filter_map(|(start, len)| Some((start, self.read(start, len.min(MAX_PART))?)))
    }

    /// `len` bytes from `start` bytes behind `_text`. Bytes that memory lacks are zero; `None` if none is there or the range
    /// passes the image.
    pub(crate) fn read(&self, start: u64, len: u64) -> Option<Cow<'m, [u8]>> {
        if start.checked_add(len)? > self.len || len > MAX_PART {
            return None;
        }
        let gpa = self.phys.checked_add(start)?;
        if let Some(bytes) = self.memory.frozen(gpa, usize::try_from(len).ok()?) {
            return Some(Cow::Borrowed(bytes));
        }
        let mut bytes = vec![0; usize::try_from(len).ok()?];
        const PIECE: usize = 1 << 20;
        let piece = |(i, piece): (usize, &mut [u8])| {
            let at = gpa.wrapping_add((i * PIECE) as u64);
            if self.memory.read(at, piece).is_ok() {
                return 0;
            }
            let pages = piece.chunks_mut(0x1000).enumerate();
            pages
                .filter_map(|(j, p)| self.memory.read(at.wrapping_add(j as u64 * 0x1000), p).err())
                .count()
        };
        // A piece alone wakes no threads: the first who asks for them has to make them.
        let failed: usize = if bytes.len() <= PIECE {
            piece((0, &mut bytes))
        } else {
            bytes.par_chunks_mut(PIECE).enumerate().map(piece).sum()
        };
        (failed < bytes.len().div_ceil(0x1000)).then_some(Cow::Owned(bytes))
    }
}
