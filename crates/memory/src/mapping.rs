//! Memory mapped into this process: the shared memory of a running VM, or a dump.

use crate::fault::Watch;
use memmap2::{MmapMut, MmapOptions, MmapRaw};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// Whether mapped bytes can change, and whether we may change them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MappingKind {
    /// Memory of a running VM. Never seen as `&[u8]`.
    Live {
        /// Writes go through to the guest.
        writable: bool,
    },
    /// A dump: whoever opens it relies on nobody rewriting the file meanwhile (as every program that maps a file
    /// does). A file that is cut is survived, see [`MemoryError::Lost`](crate::MemoryError::Lost).
    Frozen,
}

/// A mapped range of a file or memfd, or a private copy of some bytes.
#[derive(Debug)]
pub struct Mapping {
    // Fields drop in this order: the watch ends first, or a range that is unmapped and mapped anew by another thread
    // would be watched twice. Nobody touches the bytes while this is dropped.
    watch: Watch,
    raw: MmapRaw,
    kind: MappingKind,
    backing: Option<Backing>,
}

/// The file behind a mapping.
#[derive(Debug)]
struct Backing {
    file: File,
    offset: u64,
}

impl Mapping {
    /// Maps `len` bytes of a running VM's memory backend from `offset`. For `writable` the file must be open for
    /// writing.
    ///
    /// No huge pages are reserved for it: those that the VM has are mapped, and none is taken from what another VM has
    /// set aside. A page of a shared backend that nobody ever touched comes to be when it is read here, as when the
    /// guest reads it: on hugetlbfs out of the pool, and where that is empty the read fails
    /// ([`MemoryError::Lost`](crate::MemoryError::Lost)). Going over all memory ([`crate::GuestMemory::scan`]) reads the file
    /// instead, which touches nothing.
    ///
    /// Fails where the file is shorter than that.
    pub fn live(file: &File, offset: u64, len: u64, writable: bool) -> io::Result<Arc<Self>> {
        Self::of_file(file, offset, len, MappingKind::Live { writable })
    }

    /// Maps `len` bytes of a dump from `offset`, read-only.
    ///
    /// Fails where the file is shorter than that.
    pub fn frozen(file: &File, offset: u64, len: u64) -> io::Result<Arc<Self>> {
        Self::of_file(file, offset, len, MappingKind::Frozen)
    }

    fn of_file(file: &File, offset: u64, len: u64, kind: MappingKind) -> io::Result<Arc<Self>> {
        let metadata = file.metadata()?;
        let end = offset.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
        if metadata.is_file() && end > metadata.len() {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("the file has {:#x} bytes, {end:#x} are needed", metadata.len()),
            ));
        }
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        if len == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "nothing to map"));
        }
        let mut options = MmapOptions::new();
        // MAP_NORESERVE: see `live`.
        options.offset(offset).len(len).no_reserve_swap();
        let raw = match kind {
            MappingKind::Live { writable: true } => options.map_raw(file)?,
            MappingKind::Live { writable: false } | MappingKind::Frozen => options.map_raw_read_only(file)?,
        };
        let watch = Watch::new(raw.as_ptr(), raw.len())?;
        let backing = Some(Backing {
            file: reopen(file)?,
            offset,
        });
        Ok(Arc::new(Self {
            watch,
            raw,
            kind,
            backing,
        }))
    }

    /// A mapping of its own that starts with `bytes`. With [`MappingKind::Live`] it stands for a guest that runs.
    pub fn of_bytes(bytes: &[u8], kind: MappingKind) -> io::Result<Arc<Self>> {
        if bytes.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "nothing to map"));
        }
        let mut map = MmapMut::map_anon(bytes.len())?;
        map.copy_from_slice(bytes);
        let raw = MmapRaw::from(map);
        let watch = Watch::new(raw.as_ptr(), raw.len())?;
        Ok(Arc::new(Self {
            watch,
            raw,
            kind,
            backing: None,
        }))
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.raw.len() as u64
    }

    /// Never: an empty range cannot be mapped.
    pub fn is_empty(&self) -> bool {
        self.raw.len() == 0
    }

    /// Whether the bytes can change, and whether we may change them.
    pub fn kind(&self) -> MappingKind {
        self.kind
    }

    /// The first byte. What may be done with it is what [`kind`](Self::kind) says, and never by `&[u8]` for live
    /// memory.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.raw.as_mut_ptr()
    }

    pub(crate) fn watch(&self) -> &Watch {
        &self.watch
    }

    /// Gives the pages of `[offset, offset + len)` back; they are read again from the file when touched. Keeps the
    /// resident size of a scan of a big dump small. Nothing is lost: only done where a file holds the bytes.
    pub(crate) fn release(&self, offset: u64, len: u64) {
        if self.backing.is_none() {
            return;
        }
        const PAGE: usize = 4096;
        let (Ok(offset), Ok(len)) = (usize::try_from(offset), usize::try_from(len)) else {
            return;
        };
        let Some(end) = offset.checked_add(len).filter(|&end| end <= self.raw.len()) else {
            return;
        };
        let base = self.raw.as_ptr() as usize;
        let (first, last) = ((base + offset).next_multiple_of(PAGE), (base + end) & !(PAGE - 1));
        if first < last {
            // SAFETY: whole pages inside our mapping, which is either shared or a private one nobody ever wrote to;
            // MADV_DONTNEED drops them and the next access brings the file's bytes back.
            unsafe { libc::madvise(first as *mut libc::c_void, last - first, libc::MADV_DONTNEED) };
        }
    }

    /// The first offset at or after `from` that may hold data, as far as the file system can tell; what lies before it
    /// reads as zeros and was never written. `None` when nothing follows.
    ///
    /// Where that data ends is not asked: tmpfs would look at every page up to there, for each chunk again.
    pub(crate) fn next_data(&self, from: u64) -> Option<u64> {
        let at = self
            .backing
            .as_ref()
            .and_then(|backing| Some((backing, backing.offset.checked_add(from)?)));
        let Some((backing, at)) = at else {
            return Some(from);
        };
        match seek(&backing.file, at, libc::SEEK_DATA) {
            Ok(data) => Some(data.checked_sub(backing.offset)?.max(from)),
            // ENXIO: nothing but a hole up to the end of the file.
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => None,
            Err(_) => Some(from),
        }
    }

    /// Reads from the file instead of the mapping, and says whether that worked. For going over all memory: touching a
    /// page of shared memory that the guest never used would allocate it, reading it from the file does not; nor do the
    /// pages count for our own size.
    pub(crate) fn read_file(&self, offset: u64, buf: &mut [u8]) -> bool {
        let at = self
            .backing
            .as_ref()
            .and_then(|backing| Some((backing, backing.offset.checked_add(offset)?)));
        at.is_some_and(|(backing, at)| backing.file.read_exact_at(buf, at).is_ok())
    }
}

/// The same file with a position of its own, so that seeking does not move the position of whoever gave us the file.
fn reopen(file: &File) -> io::Result<File> {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).or_else(|_| file.try_clone())
}

fn seek(file: &File, offset: u64, whence: libc::c_int) -> io::Result<u64> {
    let offset = libc::off64_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: a plain system call on a descriptor we own.
    let at = unsafe { libc::lseek64(file.as_raw_fd(), offset, whence) };
    u64::try_from(at).map_err(|_| io::Error::last_os_error())
}
