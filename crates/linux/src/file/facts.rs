//! What is known of one `struct file`, whoever holds it.

use std::sync::Arc;

use rustc_hash::FxHashMap;
use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use crate::layout::{Field, Place, Spans, layout};
use crate::listing::Problem;
use crate::mount::device;
use crate::path::{GuestPath, Location, PathResolver};
use crate::{Kernel, LinuxError};

layout! {
    struct FileLayout = "file" {
        inode: Field<Gva> = "f_inode",
        flags: Field<u32> = "f_flags",
        mode: Field<u32> = "f_mode",
        pos: Field<i64> = "f_pos",
        path_mnt: Field<Gva> = "f_path.mnt",
    }
}

layout! {
    struct InodeLayout = "inode" {
        mode: Field<u16> = "i_mode",
        ino: Field<u64> = "i_ino",
        sb: Field<Gva> = "i_sb",
        rdev: Field<u32> = "i_rdev",
        links: Field<u32> = "i_nlink",
        size_: Field<u64> = "i_size",
        pipe: Field<Gva> = "i_pipe",
    }
}

layout! {
    struct DentryInodeLayout = "dentry" {
        inode: Field<Gva> = "d_inode",
    }
}

layout! {
    struct FileSuperLayout = "super_block" {
        dev: Field<u32> = "s_dev",
        fstype: Field<Gva> = "s_type",
    }
}

layout! {
    struct FileFsTypeLayout = "file_system_type" {
        name: Field<Gva> = "name",
    }
}

layout! {
    struct FileMountLayout = "mount" {
        vfsmount: Place = "mnt",
        id: Field<i32> = "mnt_id",
    }
}

layout! {
    /// `struct socket_alloc`: a socket and its inode in one (include/net/sock.h).
    struct SocketAllocLayout = "socket_alloc" {
        inode: Place = "vfs_inode",
        sk: Field<Gva> = "socket.sk",
    }
}

/// `FMODE_*` (include/linux/fs.h), the same since 2.6.39.
const FMODE_READ: u32 = 1;
const FMODE_WRITE: u32 = 2;
const FMODE_PATH: u32 = 1 << 14;

const S_IFMT: u16 = 0o170_000;

/// What a file is, as `lsof` abbreviates it.
fn kind(mode: u16, fs_type: &str) -> &'static str {
    // Since 6.17 anonymous inodes are regular files by their mode; the filesystem tells.
    if matches!(fs_type, "anon_inodefs" | "pidfs") {
        return "a_inode";
    }
    match mode & S_IFMT {
        0o100_000 => "REG",
        0o040_000 => "DIR",
        0o020_000 => "CHR",
        0o060_000 => "BLK",
        0o010_000 => "FIFO",
        0o140_000 => "sock",
        0o120_000 => "LNK",
        0 => "a_inode",
        _ => "unknown",
    }
}

/// What is known of an open file.
#[derive(Clone, Debug, Default)]
pub(super) struct Facts {
    pub(super) kind: &'static str,
    pub(super) access: &'static str,
    pub(super) flags: Option<u32>,
    pub(super) pos: Option<i64>,
    pub(super) mount_id: Option<i32>,
    pub(super) device: Option<String>,
    pub(super) rdev: Option<String>,
    pub(super) inode: Option<u64>,
    pub(super) links: Option<u32>,
    pub(super) size: Option<u64>,
    pub(super) path: Option<GuestPath>,
    /// The `struct inode`.
    pub(super) inode_address: Gva,
    /// The `pipe_inode_info` of a pipe or FIFO.
    pub(super) pipe: Option<Gva>,
    /// The `struct sock` of a socket.
    pub(super) sock: Option<Gva>,
    pub(super) can_read: bool,
    pub(super) can_write: bool,
    pub(super) problems: Vec<Problem>,
}

/// Reads files, each superblock once.
pub(super) struct FactReader {
    kernel: Kernel,
    paths: PathResolver,
    file: Arc<FileLayout>,
    file_spans: Spans,
    inode: Arc<InodeLayout>,
    inode_spans: Spans,
    dentry: Arc<DentryInodeLayout>,
    sb: Arc<FileSuperLayout>,
    fstype: Arc<FileFsTypeLayout>,
    mount: Arc<FileMountLayout>,
    socket: Arc<SocketAllocLayout>,
    superblocks: FxHashMap<Gva, (u32, String)>,
}

impl FactReader {
    pub(super) fn new(kernel: &Kernel) -> Result<Self, LinuxError> {
        let file: Arc<FileLayout> = kernel.layout()?;
        let inode: Arc<InodeLayout> = kernel.layout()?;
        let file_spans = Spans::covering(
            "file",
            kernel.release(),
            [
                file.inode.extent(),
                file.flags.extent(),
                file.mode.extent(),
                file.pos.extent(),
                file.path_mnt.extent(),
            ],
        )?;
        let inode_spans = Spans::covering(
            "inode",
            kernel.release(),
            [
                inode.mode.extent(),
                inode.ino.extent(),
                inode.sb.extent(),
                inode.rdev.extent(),
                inode.links.extent(),
                inode.size_.extent(),
                inode.pipe.extent(),
            ],
        )?;
        Ok(Self {
            kernel: kernel.clone(),
            paths: PathResolver::new(kernel)?,
            file,
            file_spans,
            inode,
            inode_spans,
            dentry: kernel.layout()?,
            sb: kernel.layout()?,
            fstype: kernel.layout()?,
            mount: kernel.layout()?,
            socket: kernel.layout()?,
            superblocks: FxHashMap::default(),
        })
    }

    /// What is known of the `struct file` at `file`. What cannot be read is a problem.
    pub(super) fn file(&mut self, file: Gva) -> Facts {
        let mut facts = Facts {
            kind: "unknown",
            access: "",
            ..Facts::default()
        };
        let space = self.kernel.space();
        let mut object = self.file_spans.buffer();
        if let Err(error) = self.file_spans.read(space, file, &mut object) {
            facts.problems.push(Problem::read("path", &error));
            return facts;
        }
        let mode = self.file.mode.of(&object);
        facts.can_read = mode & FMODE_READ != 0;
        facts.can_write = mode & FMODE_WRITE != 0;
        facts.access = match (mode & FMODE_PATH != 0, facts.can_read, facts.can_write) {
            (true, _, _) => "path",
            (_, true, true) => "rw",
            (_, true, false) => "r",
            (_, false, true) => "w",
            (_, false, false) => "",
        };
        facts.flags = Some(self.file.flags.of(&object));
        facts.pos = Some(self.file.pos.of(&object));
        facts.mount_id = self
            .mount
            .id
            .read(
                space,
                self.mount.vfsmount.container(self.file.path_mnt.of(&object)),
            )
            .ok();
        let inode = self.file.inode.of(&object);
        match self.paths.file(file) {
            Ok(path) => facts.path = Some(path),
            Err(error) => facts.problems.push(Problem::read("path", &error)),
        }
        if let Err(error) = self.inode(inode, &mut facts) {
            facts.problems.push(Problem::read("inode", &error));
        }
        facts
    }

    /// What is known of a directory that a process is in or has as its root; `path` is a `struct path`.
    pub(super) fn directory(&mut self, path: Gva) -> Result<Facts, ReadError> {
        let at = self.paths.location(path)?;
        self.location(at)
    }

    fn location(&mut self, at: Location) -> Result<Facts, ReadError> {
        let mut facts = Facts {
            kind: "unknown",
            access: "",
            ..Facts::default()
        };
        let space = self.kernel.space();
        facts.mount_id = self
            .mount
            .id
            .read(space, self.mount.vfsmount.container(at.mnt))
            .ok();
        facts.path = Some(self.paths.resolve_at(at, None)?);
        let inode = self.dentry.inode.read(space, at.dentry)?;
        if let Err(error) = self.inode(inode, &mut facts) {
            facts.problems.push(Problem::read("inode", &error));
        }
        Ok(facts)
    }

    fn inode(&mut self, inode: Gva, facts: &mut Facts) -> Result<(), ReadError> {
        let space = self.kernel.space();
        let mut object = self.inode_spans.buffer();
        self.inode_spans.read(space, inode, &mut object)?;
        let l = &self.inode;
        let mode = l.mode.of(&object);
        let sb = l.sb.of(&object);
        facts.inode_address = inode;
        facts.inode = Some(l.ino.of(&object));
        facts.links = Some(l.links.of(&object));
        let (dev, fs_type) = match self.superblocks.get(&sb) {
            Some((dev, name)) => (*dev, name.as_str()),
            None => {
                let dev = self.sb.dev.read(space, sb)?;
                let name = self
                    .kernel
                    .text(self.fstype.name.read(space, self.sb.fstype.read(space, sb)?)?, 64)?;
                let entry = self.superblocks.entry(sb).or_insert((dev, name));
                (entry.0, entry.1.as_str())
            }
        };
        facts.device = Some(device(dev));
        facts.kind = kind(mode, fs_type);
        match facts.kind {
            "REG" | "DIR" | "LNK" => facts.size = Some(l.size_.of(&object)),
            "CHR" | "BLK" => facts.rdev = Some(device(l.rdev.of(&object))),
            "FIFO" => facts.pipe = Some(l.pipe.of(&object)).filter(|p| !p.is_null()),
            // A bound UNIX socket's name in a directory, opened with O_PATH, is a socket by its mode and not one to talk to.
            "sock" if fs_type == "sockfs" => {
                facts.sock = Some(self.socket.sk.read(space, self.socket.inode.container(inode))?)
                    .filter(|s| !s.is_null());
            }
            _ => {}
        }
        Ok(())
    }
}
