//! A process's table of file descriptors: `files_struct` and its `fdtable` (include/linux/fdtable.h).

use std::sync::Arc;

use rustc_hash::FxHashMap;
use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use crate::layout::{Field, layout};
use crate::{Kernel, LinuxError};

/// Descriptors that are looked at in one table. `fs.nr_open` is 2^20 unless an administrator raised it.
const MAX_FDS: u32 = 1 << 21;

/// Descriptors that are read of all tables together.
const MAX_TOTAL: usize = 4 << 20;

/// Descriptors that are given out in all, where many share a table each time anew, and words of the tables' bitmaps.
const MAX_LOOKS: usize = 8 << 20;

/// Descriptors of every table that are read whatever others have.
const OWN: usize = 1024;

/// Tables up to this long are kept; of longer ones only the last.
const SMALL: usize = 1024;

/// Words of the bitmaps and pointers of the table that are read at once.
const CHUNK: usize = 512;

layout! {
    struct FilesLayout = "files_struct" {
        fdt: Field<Gva> = "fdt",
    }
}

layout! {
    struct FdTableLayout = "fdtable" {
        max_fds: Field<u32> = "max_fds",
        fd: Field<Gva> = "fd",
        close_on_exec: Field<Gva> = "close_on_exec",
        open_fds: Field<Gva> = "open_fds",
    }
}

/// An open descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OpenFd {
    pub(crate) fd: u32,
    /// The `struct file`.
    pub(crate) file: Gva,
    pub(crate) close_on_exec: bool,
}

/// The open descriptors of one table, and why there may be more.
#[derive(Debug, Default)]
pub(crate) struct OpenFds {
    pub(crate) fds: Vec<OpenFd>,
    pub(crate) cut: Option<String>,
}

/// Reads tables of descriptors, a shared one once: all kernel threads have the same.
pub(crate) struct FdReader {
    kernel: Kernel,
    files: Arc<FilesLayout>,
    table: Arc<FdTableLayout>,
    small: FxHashMap<Gva, Arc<OpenFds>>,
    last: Option<(Gva, Arc<OpenFds>)>,
    budget: usize,
    looks: usize,
    own: usize,
}

impl FdReader {
    /// For the tables of so many holders.
    pub(crate) fn new(kernel: &Kernel, holders: usize) -> Result<Self, LinuxError> {
        Ok(Self {
            kernel: kernel.clone(),
            files: kernel.layout()?,
            table: kernel.layout()?,
            small: FxHashMap::default(),
            last: None,
            budget: MAX_TOTAL,
            looks: MAX_LOOKS,
            own: OWN.min(MAX_TOTAL / holders.max(1)),
        })
    }

    /// The open descriptors of the `files_struct` at `files`.
    ///
    /// # Errors
    /// If the table itself cannot be read.
    pub(crate) fn open_fds(&mut self, files: Gva) -> Result<Arc<OpenFds>, ReadError> {
        let last = self
            .last
            .as_ref()
            .filter(|(at, _)| *at == files)
            .map(|(_, table)| table);
        let known = self.small.get(&files).or(last).cloned();
        if let Some(known) = known
            && (self.looks > 0 || known.fds.len() <= self.own)
        {
            self.looks = self.looks.saturating_sub(known.fds.len());
            return Ok(known);
        }
        let left = if self.looks == 0 { 0 } else { self.budget };
        let (fds, words, cut) = self.read(files, self.own.max(left))?;
        self.budget = self.budget.saturating_sub(fds.len());
        self.looks = self.looks.saturating_sub(fds.len() + words);
        let table = Arc::new(OpenFds { fds, cut });
        if table.fds.len() <= SMALL {
            self.small.insert(files, table.clone());
        } else {
            self.last = Some((files, table.clone()));
        }
        Ok(table)
    }

    /// The open descriptors, the words of bitmaps looked at, and why there may be more.
    fn read(&self, files: Gva, most: usize) -> Result<(Vec<OpenFd>, usize, Option<String>), ReadError> {
        let space = self.kernel.space();
        let table = self.files.fdt.read(space, files)?;
        let claimed = self.table.max_fds.read(space, table)?;
        let fd = self.table.fd.read(space, table)?;
        let open = self.table.open_fds.read(space, table)?;
        let exec = self.table.close_on_exec.read(space, table)?;
        // Where only few are wanted, not all of a table that claims to be large is looked through for them.
        let max = claimed
            .min(MAX_FDS)
            .min(most.saturating_mul(64).try_into().unwrap_or(u32::MAX)) as usize;
        let mut cut = (claimed > MAX_FDS)
            .then(|| format!("cut after {MAX_FDS} descriptors; the table claims {claimed}"));
        let mut out = Vec::new();
        let mut pointers = Words::new(fd, max);
        let mut execs = Words::new(exec, max.div_ceil(64));
        let mut opens = Words::new(open, max.div_ceil(64));
        'words: for word in 0..max.div_ceil(64) {
            let mut bits = match opens.get(&self.kernel, word) {
                Ok(bits) => bits,
                Err(error) => {
                    cut = Some(format!("cut at descriptor {}: {error}", word * 64));
                    break;
                }
            };
            if bits == 0 {
                continue;
            }
            let close = execs.get(&self.kernel, word).unwrap_or(0);
            while bits != 0 {
                let bit = bits.trailing_zeros();
                bits &= bits - 1;
                let number = word * 64 + bit as usize;
                if number >= max {
                    break 'words;
                }
                match pointers.get(&self.kernel, number) {
                    // A descriptor that is reserved and not yet filled.
                    Ok(0) => {}
                    Ok(_) if out.len() >= most => {
                        cut = Some(format!(
                            "cut at descriptor {number}, those of others are too many already"
                        ));
                        break 'words;
                    }
                    Ok(file) => {
                        out.push(OpenFd {
                            fd: number as u32,
                            file: Gva(file),
                            close_on_exec: close >> bit & 1 == 1,
                        });
                    }
                    Err(error) => {
                        cut = Some(format!("cut at descriptor {number}: {error}"));
                        break 'words;
                    }
                }
            }
        }
        Ok((out, max.div_ceil(64), cut))
    }
}

/// An array of words in the guest, read a chunk at a time.
struct Words {
    base: Gva,
    len: usize,
    chunk: Option<usize>,
    bytes: Vec<u8>,
}

impl Words {
    fn new(base: Gva, len: usize) -> Self {
        Self {
            base,
            len,
            chunk: None,
            bytes: Vec::new(),
        }
    }

    fn get(&mut self, kernel: &Kernel, index: usize) -> Result<u64, ReadError> {
        let chunk = index / CHUNK;
        if self.chunk != Some(chunk) {
            let many = self.len.saturating_sub(chunk * CHUNK).min(CHUNK);
            self.chunk = None;
            self.bytes.resize(many * 8, 0);
            kernel.space().read(
                self.base.wrapping_add((chunk * CHUNK * 8) as u64),
                &mut self.bytes,
            )?;
            self.chunk = Some(chunk);
        }
        let from = (index % CHUNK) * 8;
        Ok(self
            .bytes
            .get(from..from + 8)
            .map_or(0, |b| u64::from_le_bytes(b.try_into().unwrap_or_default())))
    }
}
