//! A process's own memory, read from outside: its arguments and its environment lie there.

use std::borrow::Cow;
use std::sync::Arc;

use compact_str::CompactString;
use rustc_hash::FxHashMap;
use vmsight_arch::paging::{self, Absent, PageFault, PagingMode};
use vmsight_arch::{Dtb, Gpa, Gva};
use vmsight_memory::{AddressSpace, GuestMemory, ReadCause, ReadError};

use super::ahead::STRETCH;
use super::layouts::{MmLayout, TaskLayout};
use crate::budget::{NO_ROOM, Share};
use crate::layout::Buffer;
use crate::listing::Problem;
use crate::{Kernel, LinuxError};

/// The most that is read of one process's arguments or environment: what execve takes in all (ARG_MAX) with the usual stack limit.
pub(crate) const MAX_STRINGS: u64 = 2 << 20;

/// What one byte of arguments or environment costs of a listing's budget. As a list of strings it takes more room than in the guest:
/// each string has a header, and a byte that is no UTF-8 is spelt out.
fn weight(byte: u8) -> usize {
    match byte {
        0 => 32,
        0x80.. => 4,
        _ => 1,
    }
}

/// [`weight`] of all of them: counted many at a time.
fn weights(bytes: &[u8]) -> usize {
    bytes.len() + 31 * count(bytes, |b| b == 0) + 3 * count(bytes, |b| b >= 0x80)
}

/// How many bytes are so.
fn count(bytes: &[u8], is: impl Fn(u8) -> bool) -> usize {
    // So many fit in a byte, and a processor adds up bytes sixteen at a time.
    let of = |chunk: &[u8]| chunk.iter().fold(0u8, |n, &b| n.wrapping_add(u8::from(is(b))));
    bytes.chunks(255).map(|chunk| usize::from(of(chunk))).sum()
}

/// One look into a process's memory. Unlike an [`AddressSpace`] it owns nothing and remembers no walk: what a listing reads of each
/// process lies in a page or two, and making a cache for it would cost more than the walks that it saves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct UserMemory<'k> {
    memory: &'k GuestMemory,
    mode: PagingMode,
    dtb: Dtb,
    /// What was read of it before, and from where.
    ahead: (Gva, &'k [u8]),
}

impl<'k> UserMemory<'k> {
    /// The `len` bytes at `gva`, if they were read before.
    fn known(&self, gva: Gva, len: usize) -> Option<&'k [u8]> {
        let (start, ahead) = self.ahead;
        let from = usize::try_from(gva.0.wrapping_sub(start.0)).ok()?;
        ahead.get(from..from.checked_add(len)?)
    }

    /// Reads `buf.len()` bytes at `gva`. Pages that the process has taken its own rights to away are read like others.
    pub(crate) fn read(&self, gva: Gva, buf: &mut [u8]) -> Result<(), ReadError> {
        if let Some(known) = self.known(gva, buf.len()) {
            buf.copy_from_slice(known);
            return Ok(());
        }
        let mut at = gva;
        let mut rest = buf;
        while !rest.is_empty() {
            let fail = |cause| ReadError { gva: at, cause };
            let step = (4096 - at.page_offset()).min(rest.len());
            let (piece, after) = rest.split_at_mut(step);
            let found = paging::walk(self.mode, self.memory, self.dtb, at)
                .or_else(|fault| Absent::Linux.translation(self.mode, &fault).ok_or(fault))
                .map_err(|fault| fail(ReadCause::Fault(Box::new(fault))))?;
            self.memory
                .read(found.gpa, piece)
                .map_err(|error| fail(ReadCause::Memory(error)))?;
            at = at.wrapping_add(step as u64);
            rest = after;
        }
        Ok(())
    }
}

impl Kernel {
    /// The root of the page tables that the kernel maps at `pgd` (`mm_struct.pgd`).
    ///
    /// With page-table isolation the kernel's half of the pair is meant, which maps user memory too.
    fn user_root(&self, pgd: Gva) -> Result<Dtb, PageFault> {
        Ok(Dtb(self.space().translate(pgd)?.gpa.0 & !0xfff))
    }

    /// A look into the memory below `pgd`, whose root is `root` if that is known, and of which the bytes in `ahead` were read already.
    pub(crate) fn user_memory<'k>(
        &'k self,
        pgd: Gva,
        root: Option<Dtb>,
        ahead: (Gva, &'k [u8]),
    ) -> Result<UserMemory<'k>, PageFault> {
        Ok(UserMemory {
            memory: self.memory(),
            mode: self.space().mode(),
            dtb: root.map_or_else(|| self.user_root(pgd), Ok)?,
            ahead,
        })
    }

    /// [`Self::user_root`], with what `stretches` remembers of the kernel's large pages.
    pub(crate) fn known_user_root(&self, pgd: Gva, stretches: &mut FxHashMap<u64, Gpa>) -> Option<Dtb> {
        let within = (1 << STRETCH) - 1;
        if let Some(start) = stretches.get(&(pgd.0 >> STRETCH)) {
            return Some(Dtb((start.0 | (pgd.0 & within)) & !0xfff));
        }
        let page = self.space().translate(pgd).ok()?;
        if u32::from(page.page_shift) >= STRETCH {
            stretches.insert(pgd.0 >> STRETCH, Gpa(page.gpa.0 & !within));
        }
        Some(Dtb(page.gpa.0 & !0xfff))
    }
}

impl Kernel {
    /// The address space of the process `pid` (root namespace); `None` for a kernel thread, and for a process that
    /// has given its memory back. Pages that are there and without rights (`PROT_NONE`) can be read in it.
    ///
    /// # Errors
    /// If there is no such process, or its `mm_struct` or top-level table cannot be read.
    pub fn process_space(&self, pid: i32) -> Result<Option<AddressSpace>, LinuxError> {
        let task = self.task(pid)?;
        let layout: Arc<TaskLayout> = self.layout()?;
        let mm = layout
            .mm
            .read(self.space(), task)
            .map_err(LinuxError::read("task_struct.mm", task))?;
        if mm.is_null() {
            return Ok(None);
        }
        let pgd = self.offset("mm_struct", "pgd")?;
        let pgd = self
            .pointer(mm.wrapping_add(pgd))
            .map_err(LinuxError::read("mm_struct.pgd", mm))?;
        let root = self.user_root(pgd).map_err(|fault| LinuxError::Implausible {
            what: format!("the page tables of process {pid}"),
            reason: fault.to_string(),
        })?;
        Ok(Some(self.space().with_absent(root, Absent::Linux)))
    }
}

/// NUL-separated strings out of user memory.
#[derive(Debug, Default)]
pub(crate) struct Strings<'k> {
    /// The bytes that could be read, from the start; `None` where not even the first could.
    pub(crate) bytes: Option<Cow<'k, [u8]>>,
    /// Why they are not all.
    pub(crate) problem: Option<Problem>,
}

impl Strings<'_> {
    /// The strings as a list.
    pub(crate) fn split(&self) -> Option<Vec<CompactString>> {
        self.bytes.as_deref().map(split)
    }
}

/// Reads `start..end`, at most as much as `share` has room for. What follows an unreadable page is left out and said.
pub(crate) fn strings<'k>(
    space: &UserMemory<'k>,
    start: u64,
    end: u64,
    field: &'static str,
    share: &mut Share<'_>,
) -> Strings<'k> {
    let claimed = if start == 0 { 0 } else { end.saturating_sub(start) };
    // No byte costs less than one, so more than is left need not be read.
    let room = share.bytes_left() as u64;
    let wanted = claimed.min(MAX_STRINGS).min(room) as usize;
    let (mut bytes, hole) = read_to_hole(space, Gva(start), wanted);
    if let (0, Some(error)) = (bytes.len(), &hole) {
        return Strings {
            bytes: None,
            problem: Some(Problem::read(field, error)),
        };
    }
    let read = bytes.len();
    let kept = affordable(&bytes, share);
    truncate(&mut bytes, kept);
    let reason = match hole {
        _ if kept == 0 && claimed > 0 => Some(NO_ROOM.to_owned()),
        _ if kept < read => Some(format!(
            "cut after {kept} of {claimed} bytes, the listing holds too many already"
        )),
        Some(error) => Some(format!(
            "cut after {kept} of {claimed} bytes: {}",
            Problem::read(field, &error).reason
        )),
        None if claimed > MAX_STRINGS && kept as u64 == MAX_STRINGS => {
            Some(format!("{claimed} bytes long, cut after {MAX_STRINGS}"))
        }
        None if (kept as u64) < claimed => Some(format!(
            "cut after {kept} of {claimed} bytes, the listing holds too many already"
        )),
        None => None,
    };
    Strings {
        bytes: (kept > 0 || claimed == 0).then_some(bytes),
        problem: reason.map(|reason| Problem::new(field, reason)),
    }
}

/// The bytes from `start` on up to the first that cannot be read, `len` at most, and why that could not.
fn read_to_hole<'k>(space: &UserMemory<'k>, start: Gva, len: usize) -> (Cow<'k, [u8]>, Option<ReadError>) {
    if let Some(known) = space.known(start, len) {
        return (Cow::Borrowed(known), None);
    }
    let mut bytes = vec![0; len];
    let Err(error) = space.read(start, &mut bytes) else {
        return (Cow::Owned(bytes), None);
    };
    // Pages are read in order: what comes before the hole is there.
    bytes.truncate(usize::try_from(error.gva.0.wrapping_sub(start.0)).map_or(0, |done| done.min(len)));
    (Cow::Owned(bytes), Some(error))
}

/// Leaves the first `len` of the bytes, or all.
fn truncate(bytes: &mut Cow<'_, [u8]>, len: usize) {
    match bytes {
        Cow::Borrowed(bytes) => *bytes = bytes.get(..len).unwrap_or(bytes),
        Cow::Owned(bytes) => bytes.truncate(len),
    }
}

/// How many of `bytes`, from the first on, `share` has room for; takes that much.
fn affordable(bytes: &[u8], share: &mut Share<'_>) -> usize {
    let cost = weights(bytes);
    let mut granted = share.some_bytes(cost);
    if granted == cost {
        return bytes.len();
    }
    let mut fits = |byte: u8| match granted.checked_sub(weight(byte)) {
        Some(left) => {
            granted = left;
            true
        }
        None => false,
    };
    bytes.iter().take_while(|&&byte| fits(byte)).count()
}

/// Reads what /proc/PID/cmdline shows of the process whose `mm_struct` is in `buffer`.
///
/// A process may write a title of its own over its arguments, and on over its environment (setproctitle). The kernel takes it for one
/// when the byte before `arg_end` is not NUL, and then shows the text up to the first NUL (`get_mm_cmdline` in fs/proc/base.c).
pub(crate) fn command_line<'k>(
    space: &UserMemory<'k>,
    mm: &MmLayout,
    buffer: &Buffer,
    share: &mut Share<'_>,
) -> Strings<'k> {
    let (start, end) = (mm.arg_start.of(buffer), mm.arg_end.of(buffer));
    let (env_start, env_end) = (mm.env_start.of(buffer), mm.env_end.of(buffer));
    let mut read = strings(space, start, end, "cmdline", share);
    if let Some(bytes) = &mut read.bytes
        && read.problem.is_none()
        && bytes.last().is_some_and(|&b| b != 0)
    {
        match bytes.iter().position(|&b| b == 0) {
            Some(nul) => truncate(bytes, nul),
            None if env_start == end && env_end > env_start => {
                let more = strings(space, end, env_end, "cmdline", share);
                let title = more.bytes.unwrap_or_default();
                bytes
                    .to_mut()
                    .extend_from_slice(title.split(|&b| b == 0).next().unwrap_or(&[]));
                read.problem = more.problem;
            }
            None => {}
        }
    }
    read
}

/// Splits NUL-terminated strings; the terminator of the last makes no empty one after it.
fn split(bytes: &[u8]) -> Vec<CompactString> {
    let bytes = bytes.strip_suffix(b"\0").unwrap_or(bytes);
    if bytes.is_empty() {
        return Vec::new();
    }
    // Counted first, for a list that grows costs more; and looked at as text all at once, for nearly always they are.
    let mut strings = Vec::with_capacity(1 + count(bytes, |b| b == 0));
    match std::str::from_utf8(bytes) {
        Ok(text) => text
            .split('\0')
            .for_each(|text| strings.push(CompactString::new(text))),
        Err(_) => bytes
            .split(|&b| b == 0)
            .for_each(|text| strings.push(crate::text::short_text(text))),
    }
    strings
}

/// The strings with a space between each two.
pub(crate) fn joined(strings: &[CompactString]) -> CompactString {
    let len = strings.iter().map(|text| text.len() + 1).sum::<usize>();
    let mut out = CompactString::with_capacity(len.saturating_sub(1));
    for (index, text) in strings.iter().enumerate() {
        if index > 0 {
            out.push(' ');
        }
        out.push_str(text);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_end_at_nul_whatever_else_is_in_them() {
        let all = |bytes: &[u8]| split(bytes);
        assert_eq!(all(b""), [""; 0]);
        assert_eq!(all(b"\0"), [""; 0]);
        assert_eq!(all(b"one"), ["one"]);
        assert_eq!(all(b"one\0\0two\0"), ["one", "", "two"]);
        assert_eq!(all("z\u{fc}g\0\u{1f427}\0".as_bytes()), ["z\u{fc}g", "\u{1f427}"]);
        assert_eq!(all(b"z\xc3\0\xbcg\0plain\0"), ["z\\xc3", "\\xbcg", "plain"]);
    }

    #[test]
    fn many_bytes_weigh_what_each_weighs() {
        for len in [0, 1, 15, 16, 254, 255, 256, 1000] {
            let bytes: Vec<u8> = (0..len).map(|i: usize| (i * 7 % 256) as u8).collect();
            assert_eq!(weights(&bytes), bytes.iter().map(|&b| weight(b)).sum::<usize>());
            assert_eq!(weights(&vec![0; len]), 32 * len);
        }
    }
}
