//! Open files of every process, as `lsof` and `/proc/PID/fd` show them.

mod facts;
pub(crate) mod fd;
pub(crate) mod holder;
mod peer;
pub(crate) mod private;

use std::sync::Arc;

use rustc_hash::{FxHashMap, FxHashSet};
use serde::Serialize;
use vmsight_arch::Gva;

use crate::budget::{Budget, Own};
use crate::layout::{Field, Place, layout};
use crate::listing::{Listing, Problem, address, settled};
use crate::maps::MapReader;
use crate::{Kernel, LinuxError};

use facts::{FactReader, Facts};
use holder::Holder;
pub use holder::Owner;

/// Descriptors of one process that lead to no file at all before the rest of its table is given up.
const MAX_BROKEN: usize = 256;

/// `O_CLOEXEC` as in `/proc/PID/fdinfo`: the descriptor's own flag, kept in its table.
const O_CLOEXEC: u32 = 0o2_000_000;

layout! {
    struct FsStructLayout = "fs_struct" {
        pwd: Place = "pwd",
        root: Place = "root",
    }
}

layout! {
    struct MmFilesLayout = "mm_struct" {
        exe_file: Option<Field<Gva>> = "exe_file",
    }
}

/// Which of a process's files are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileFilter {
    /// Only this process.
    pub pid: Option<i32>,
    /// Working directory, root directory and executable too.
    pub directories: bool,
    /// Files mapped into memory too.
    pub mapped: bool,
    /// The other ends of pipes and sockets, and what sockets are connected to.
    pub peers: bool,
}

impl Default for FileFilter {
    fn default() -> Self {
        Self {
            pid: None,
            directories: true,
            mapped: false,
            peers: true,
        }
    }
}

/// A file that a process has open.
#[derive(Clone, Debug, Serialize)]
pub struct OpenFile {
    /// Pid in the root namespace.
    pub pid: i32,
    /// The thread, where one has descriptors of its own.
    pub tid: Option<i32>,
    /// The process's name.
    pub name: Arc<str>,
    /// The descriptor's number, or `cwd`, `rtd` (root directory), `txt` (executable), `mem` (mapped).
    pub fd: String,
    /// `REG`, `DIR`, `CHR`, `BLK`, `FIFO`, `sock`, `a_inode` (anonymous inode), `LNK`, `unknown`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// `r`, `w`, `rw`; `path` for a descriptor that only names (`O_PATH`).
    pub access: &'static str,
    /// `O_*` flags in octal, as in `/proc/PID/fdinfo`.
    pub flags: Option<String>,
    /// File position.
    pub pos: Option<i64>,
    /// Id of the mount it was opened through.
    pub mount_id: Option<i32>,
    /// Device number of its filesystem, `MAJOR:MINOR`.
    pub device: Option<String>,
    /// Device number that a device file stands for.
    pub rdev: Option<String>,
    /// Inode number.
    pub inode: Option<u64>,
    /// Hard links; 0 for one that was removed.
    pub links: Option<u32>,
    /// Size in bytes, of files and directories.
    pub size: Option<u64>,
    /// Its path, or `pipe:[N]`, `socket:[N]`, `anon_inode:[eventpoll]`, … . Without the `(deleted)` of `/proc`: see `deleted`.
    pub path: Option<String>,
    /// Its name was removed.
    pub deleted: bool,
    /// Its path does not lead up to a root that is mounted anywhere.
    pub unreachable: bool,
    /// What a socket is bound and connected to.
    pub endpoint: Option<String>,
    /// Who holds the other end of a pipe or UNIX socket.
    pub peers: Vec<Owner>,
    /// The `struct sock` of a socket: the key to the listing of sockets.
    #[serde(serialize_with = "address::gva_opt")]
    pub socket: Option<Gva>,
    /// The `struct file`; `None` for directories.
    #[serde(serialize_with = "address::gva_opt")]
    pub address: Option<Gva>,
    /// What could not be read.
    pub problems: Vec<Problem>,
}

impl OpenFile {
    fn new(holder: &Holder, fd: String, address: Option<Gva>, facts: &Facts) -> Self {
        let path = facts.path.as_ref();
        let mut problems = facts.problems.clone();
        problems.extend(
            path.and_then(|p| p.problem.as_ref())
                .map(|p| Problem::new("path", p.clone())),
        );
        Self {
            pid: holder.pid,
            tid: holder.tid,
            name: holder.comm.clone(),
            fd,
            kind: facts.kind,
            access: facts.access,
            flags: None,
            pos: None,
            mount_id: facts.mount_id,
            device: facts.device.clone(),
            rdev: facts.rdev.clone(),
            inode: facts.inode,
            links: facts.links,
            size: facts.size,
            path: path.map(|p| p.path.clone()),
            deleted: path.is_some_and(|p| p.deleted),
            unreachable: path.is_some_and(|p| p.unreachable),
            endpoint: None,
            peers: Vec::new(),
            socket: facts.sock,
            address,
            problems,
        }
    }
}

impl Kernel {
    /// The open files of all processes, or of one.
    ///
    /// # Errors
    /// If the processes cannot be listed, the kernel's types lack a member, or the process asked for does not exist.
    pub fn open_files(&self, filter: FileFilter) -> Result<Listing<OpenFile>, LinuxError> {
        settled(
            self.memory().is_live(),
            |row: &OpenFile| row.problems.len(),
            || self.list_files(filter),
        )
    }

    fn list_files(&self, filter: FileFilter) -> Result<Listing<OpenFile>, LinuxError> {
        let (holders, warnings) = holder::all(self)?;
        let mut listing = Listing::new(Vec::new(), warnings);
        let wanted = |holder: &Holder| filter.pid.is_none_or(|pid| pid == holder.pid);
        if let Some(pid) = filter.pid
            && !holders.iter().any(wanted)
        {
            return Err(LinuxError::NotFound(format!("no process {pid}")));
        }
        let mut lister = Lister::new(self, holders.len())?;
        for holder in holders.iter().filter(|h| wanted(h)) {
            lister.begin();
            if filter.directories {
                lister.directories(holder, &mut listing);
            }
            lister.descriptors(holder, &mut listing);
            if filter.mapped {
                lister.mapped(holder, &mut listing);
            }
            if lister.full {
                let pid = holder.pid;
                listing.warn(format!(
                    "open files of process {pid}: cut, the listing holds too many already"
                ));
            }
        }
        lister
            .budget
            .warning("open files")
            .into_iter()
            .for_each(|warning| listing.warn(warning));
        if filter.peers {
            peer::fill(self, &holders, &mut lister, &mut listing)?;
        }
        Ok(listing)
    }
}

/// Lists one process after the other. What is known of a file is kept: after a fork many processes hold the same.
pub(super) struct Lister {
    kernel: Kernel,
    reader: FactReader,
    fds: fd::FdReader,
    fs: Arc<FsStructLayout>,
    mm: Arc<MmFilesLayout>,
    maps: Option<Result<MapReader, LinuxError>>,
    facts: FxHashMap<Gva, Arc<Facts>>,
    budget: Budget,
    /// What is left of what the process at hand has to itself.
    own: Own,
    /// No row more of that process finds room.
    full: bool,
}

/// What a process has to itself of the rows.
const OWN: Own = Own {
    rows: 1024,
    bytes: 64 << 10,
};

impl Lister {
    /// For so many holders of files.
    fn new(kernel: &Kernel, holders: usize) -> Result<Self, LinuxError> {
        Ok(Self {
            kernel: kernel.clone(),
            reader: FactReader::new(kernel)?,
            fds: fd::FdReader::new(kernel, holders)?,
            fs: kernel.layout()?,
            mm: kernel.layout()?,
            maps: None,
            facts: FxHashMap::default(),
            budget: Budget::shared_by(holders, OWN),
            own: Own::default(),
            full: false,
        })
    }

    fn facts(&mut self, file: Gva) -> Arc<Facts> {
        if let Some(known) = self.facts.get(&file) {
            return known.clone();
        }
        let facts = Arc::new(self.reader.file(file));
        self.facts.insert(file, facts.clone());
        facts
    }

    /// Goes on to the next process.
    fn begin(&mut self) {
        (self.own, self.full) = (self.budget.own(), false);
    }

    /// Adds a row; false where it finds no room.
    fn add(&mut self, row: OpenFile, listing: &mut Listing<OpenFile>) -> bool {
        let bytes = row.path.as_ref().map_or(0, String::len);
        self.full = self.full || !self.budget.row_of(&mut self.own, bytes);
        if !self.full {
            listing.rows.push(row);
        }
        !self.full
    }

    fn descriptors(&mut self, holder: &Holder, listing: &mut Listing<OpenFile>) {
        if holder.files.is_null() {
            return;
        }
        let open = match self.fds.open_fds(holder.files) {
            Ok(found) => found,
            Err(error) => {
                listing.warn(format!(
                    "the file descriptors of process {} cannot be read: {error}",
                    holder.pid
                ));
                return;
            }
        };
        let mut broken = 0;
        for entry in &open.fds {
            let facts = self.facts(entry.file);
            broken += usize::from(facts.flags.is_none());
            if broken > MAX_BROKEN {
                listing.warn(format!(
                    "file descriptors of process {}: cut at {}, after {broken} that lead to no file",
                    holder.pid, entry.fd
                ));
                break;
            }
            let mut row = OpenFile::new(holder, entry.fd.to_string(), Some(entry.file), &facts);
            row.pos = facts.pos;
            row.flags = facts.flags.map(|flags| {
                let own = if entry.close_on_exec { O_CLOEXEC } else { 0 };
                format!("0{:o}", flags & !O_CLOEXEC | own)
            });
            if !self.add(row, listing) {
                return;
            }
        }
        if let Some(cut) = &open.cut {
            listing.warn(format!("file descriptors of process {}: {cut}", holder.pid));
        }
    }

    fn directories(&mut self, holder: &Holder, listing: &mut Listing<OpenFile>) {
        if !holder.fs.is_null() {
            for (fd, place) in [("cwd", self.fs.pwd), ("rtd", self.fs.root)] {
                match self.reader.directory(place.at(holder.fs)) {
                    Ok(facts) => {
                        self.add(OpenFile::new(holder, fd.to_owned(), None, &facts), listing);
                    }
                    Err(error) => {
                        listing.warn(format!(
                            "the {fd} of process {} cannot be read: {error}",
                            holder.pid
                        ));
                    }
                }
            }
        }
        if !holder.mm.is_null()
            && let Some(exe) = self.mm.exe_file
            && let Ok(file) = exe.read(self.kernel.space(), holder.mm)
            && !file.is_null()
        {
            let facts = self.facts(file);
            self.add(
                OpenFile::new(holder, "txt".to_owned(), Some(file), &facts),
                listing,
            );
        }
    }

    fn mapped(&mut self, holder: &Holder, listing: &mut Listing<OpenFile>) {
        if holder.mm.is_null() {
            return;
        }
        let found = self
            .maps
            .get_or_insert_with(|| MapReader::new(&self.kernel))
            .as_ref()
            .map(|maps| maps.files(holder.mm, &self.budget));
        match found {
            Ok(Ok((files, cut))) => {
                // lsof shows each file once, and not the executable again. On an overlay what is mapped is the file below it: another
                // inode by the same name.
                let exe = self
                    .mm
                    .exe_file
                    .and_then(|exe| exe.read(self.kernel.space(), holder.mm).ok())
                    .map(|file| self.facts(file));
                let mut seen: FxHashSet<Gva> = exe.iter().map(|exe| exe.inode_address).collect();
                for file in files {
                    let facts = self.facts(file);
                    let is_exe = exe
                        .as_ref()
                        .is_some_and(|exe| exe.path.is_some() && exe.path == facts.path);
                    if seen.insert(facts.inode_address)
                        && !is_exe
                        && !self.add(
                            OpenFile::new(holder, "mem".to_owned(), Some(file), &facts),
                            listing,
                        )
                    {
                        return;
                    }
                }
                if let Some(cut) = cut {
                    listing.warn(format!("process {}: {cut}", holder.pid));
                }
            }
            Ok(Err(error)) => listing.warn(format!("the mappings of process {}: {error}", holder.pid)),
            Err(error) => listing.warn(format!("mapped files: {error}")),
        }
    }
}
