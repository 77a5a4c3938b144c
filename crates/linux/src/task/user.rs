//! A process's own memory, read from outside: its arguments and its environment lie there.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use vmsight_arch::paging::{self, Absent, PageFault, PagingMode};
use vmsight_arch::{Dtb, Gva};
use vmsight_memory::{AddressSpace, GuestMemory, ReadCause, ReadError};

use super::layouts::{MmLayout, TaskLayout};
use crate::layout::Buffer;
use crate::listing::Problem;
use crate::{Kernel, LinuxError};

/// The most that is read of one process's arguments or environment: what execve takes in all (ARG_MAX) with the usual stack limit.
pub(crate) const MAX_STRINGS: u64 = 2 << 20;

/// How many bytes of arguments and environment one listing may hold: a hostile guest can have 4 Mi processes with 2 MiB each.
const LISTING_BUDGET: usize = 64 << 20;

/// What is left of a listing's allowance for strings, shared by the threads that make its rows.
#[derive(Debug)]
pub(crate) struct Budget(AtomicUsize);

impl Default for Budget {
    fn default() -> Self {
        Self(AtomicUsize::new(LISTING_BUDGET))
    }
}

impl Budget {
    fn take(&self, bytes: usize) -> bool {
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                left.checked_sub(bytes)
            })
            .is_ok()
    }
}

/// One look into a process's memory. Unlike an [`AddressSpace`] it owns nothing and remembers no walk: what a listing reads of each
/// process lies in a page or two, and making a cache for it would cost more than the walks that it saves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct UserMemory<'k> {
    memory: &'k GuestMemory,
    mode: PagingMode,
    dtb: Dtb,
}

impl UserMemory<'_> {
    /// Reads `buf.len()` bytes at `gva`. Pages that the process has taken its own rights to away are read like others.
    pub(crate) fn read(&self, gva: Gva, buf: &mut [u8]) -> Result<(), ReadError> {
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

    /// A look into the memory below `pgd`.
    pub(crate) fn user_memory(&self, pgd: Gva) -> Result<UserMemory<'_>, PageFault> {
        Ok(UserMemory {
            memory: self.memory(),
            mode: self.space().mode(),
            dtb: self.user_root(pgd)?,
        })
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
pub(crate) struct Strings {
    /// The bytes that could be read, from the start; `None` where not even the first could.
    pub(crate) bytes: Option<Vec<u8>>,
    /// Why they are not all.
    pub(crate) problem: Option<Problem>,
}

impl Strings {
    /// The strings as a list.
    pub(crate) fn split(&self) -> Option<Vec<String>> {
        self.bytes.as_deref().map(split)
    }
}

/// Reads `start..end`. What follows an unreadable page is left out and said.
pub(crate) fn strings(
    space: &UserMemory<'_>,
    start: u64,
    end: u64,
    field: &'static str,
    budget: &Budget,
) -> Strings {
    let mut problem = None;
    let mut len = if start == 0 { 0 } else { end.saturating_sub(start) };
    if len > MAX_STRINGS {
        problem = Some(Problem::new(
            field,
            format!("{len} bytes long, cut after {MAX_STRINGS}"),
        ));
        len = MAX_STRINGS;
    }
    let len = len as usize;
    if !budget.take(len) {
        let reason = "left out, the listing holds too many bytes already";
        return Strings {
            bytes: None,
            problem: Some(Problem::new(field, reason)),
        };
    }
    let mut bytes = vec![0; len];
    if len == 0 || space.read(Gva(start), &mut bytes).is_ok() {
        return Strings {
            bytes: Some(bytes),
            problem,
        };
    }
    // Page by page, to keep what comes before the hole.
    let mut done = 0;
    while done < len {
        let at = Gva(start.wrapping_add(done as u64));
        let step = (4096 - at.page_offset()).min(len - done);
        let Some(piece) = bytes.get_mut(done..done + step) else {
            break;
        };
        if let Err(error) = space.read(at, piece) {
            let why = Problem::read(field, &error);
            if done == 0 {
                return Strings {
                    bytes: None,
                    problem: Some(why),
                };
            }
            bytes.truncate(done);
            problem = Some(Problem::new(
                field,
                format!("cut after {done} of {len} bytes: {}", why.reason),
            ));
            break;
        }
        done += step;
    }
    Strings {
        bytes: Some(bytes),
        problem,
    }
}

/// Reads what /proc/PID/cmdline shows of the process whose `mm_struct` is in `buffer`.
///
/// A process may write a title of its own over its arguments, and on over its environment (setproctitle). The kernel takes it for one
/// when the byte before `arg_end` is not NUL, and then shows the text up to the first NUL (`get_mm_cmdline` in fs/proc/base.c).
pub(crate) fn command_line(
    space: &UserMemory<'_>,
    mm: &MmLayout,
    buffer: &Buffer,
    budget: &Budget,
) -> Strings {
    let (start, end) = (mm.arg_start.of(buffer), mm.arg_end.of(buffer));
    let (env_start, env_end) = (mm.env_start.of(buffer), mm.env_end.of(buffer));
    let mut read = strings(space, start, end, "cmdline", budget);
    if let Some(bytes) = &mut read.bytes
        && read.problem.is_none()
        && bytes.last().is_some_and(|&b| b != 0)
    {
        match bytes.iter().position(|&b| b == 0) {
            Some(nul) => bytes.truncate(nul),
            None if env_start == end && env_end > env_start => {
                let more = strings(space, end, env_end, "cmdline", budget);
                let title = more.bytes.unwrap_or_default();
                bytes.extend_from_slice(title.split(|&b| b == 0).next().unwrap_or(&[]));
                read.problem = more.problem;
            }
            None => {}
        }
    }
    read
}

/// Splits NUL-terminated strings; the terminator of the last makes no empty one after it.
fn split(bytes: &[u8]) -> Vec<String> {
    let bytes = bytes.strip_suffix(b"\0").unwrap_or(bytes);
    if bytes.is_empty() {
        return Vec::new();
    }
    bytes.split(|&b| b == 0).map(crate::text::guest_text).collect()
}
