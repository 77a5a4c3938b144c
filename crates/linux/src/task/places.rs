//! Where a process is in the file tree: executable, working directory, root.

use std::sync::Arc;

use rustc_hash::FxHashMap;
use vmsight_arch::Gva;
use vmsight_memory::{AddressSpace, ReadError};

use crate::layout::{Field, Place, layout};
use crate::path::{DentryLayout, GuestPath, Location, PathResolver};
use crate::{Kernel, LinuxError};

layout! {
    /// `struct fs_struct`.
    struct FsLayout = "fs_struct" {
        root: Place = "root",
        pwd: Place = "pwd",
    }
}

layout! {
    /// `struct file`.
    struct FileLayout = "file" {
        path: Place = "f_path",
        inode: Field<Gva> = "f_inode",
    }
}

/// Resolves the paths of processes, each place once: most processes share their directories and many their executable.
#[derive(Debug)]
pub(crate) struct PlaceReader {
    resolver: PathResolver,
    fs: Arc<FsLayout>,
    file: Arc<FileLayout>,
    dentry: Arc<DentryLayout>,
    space: AddressSpace,
}

/// Places that are kept, and how long their paths may be.
const MAX_KEPT: usize = 1 << 14;
const PATH_MAX: usize = 4096;

/// What a [`PlaceReader`] has resolved already, by mount and dentry.
pub(crate) type PlaceCache = FxHashMap<(u64, u64), GuestPath>;

impl PlaceReader {
    pub(crate) fn new(kernel: &Kernel) -> Result<Self, LinuxError> {
        Ok(Self {
            resolver: PathResolver::new(kernel)?,
            fs: kernel.layout()?,
            file: kernel.layout()?,
            dentry: kernel.layout()?,
            space: kernel.space().clone(),
        })
    }

    /// The path of the `struct file` at `file`, as /proc/PID/exe and /proc/PID/maps show it.
    pub(crate) fn file(&self, file: Gva, cache: &mut PlaceCache) -> Result<GuestPath, ReadError> {
        self.cached(self.resolver.file_location(file)?, cache)
    }

    /// The inode of the `struct file` at `file`, as /proc/PID/maps shows it: of what the user opened, where a stacked file system
    /// opened another file underneath on its behalf (6.8 on).
    pub(crate) fn shown_inode(&self, file: Gva) -> Result<Gva, ReadError> {
        let (own, shown) = (
            self.resolver.location(self.file.path.at(file))?,
            self.resolver.file_location(file)?,
        );
        if own == shown {
            self.file.inode.read(&self.space, file)
        } else {
            self.dentry.inode.read(&self.space, shown.dentry)
        }
    }

    /// The working directory of the `fs_struct` at `fs`, seen from outside of any chroot, as /proc/PID/cwd shows it.
    pub(crate) fn cwd(&self, fs: Gva, cache: &mut PlaceCache) -> Result<GuestPath, ReadError> {
        self.cached(self.resolver.location(self.fs.pwd.at(fs))?, cache)
    }

    /// Its root directory.
    pub(crate) fn root(&self, fs: Gva, cache: &mut PlaceCache) -> Result<GuestPath, ReadError> {
        self.cached(self.resolver.location(self.fs.root.at(fs))?, cache)
    }

    fn cached(&self, at: Location, cache: &mut PlaceCache) -> Result<GuestPath, ReadError> {
        let key = (at.mnt.0, at.dentry.0);
        if let Some(known) = cache.get(&key) {
            return Ok(known.clone());
        }
        let path = self.resolver.resolve_at(at, None)?;
        if cache.len() < MAX_KEPT && path.path.len() <= PATH_MAX {
            cache.insert(key, path.clone());
        }
        Ok(path)
    }
}
