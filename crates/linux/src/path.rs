//! Paths of dentries as the guest's own `/proc` shows them: up through the dentries, across the mounts, to the root.
//!
//! The walk is that of the kernel's `prepend_path` and `d_path` (fs/d_path.c). Objects of pseudo filesystems (pipes, sockets, memfds)
//! have no path; their names are made by a function of the filesystem.

mod pseudo;

use std::fmt;
use std::sync::Arc;

use serde::{Serialize, Serializer};
use vmsight_arch::Gva;
use vmsight_memory::{AddressSpace, ReadError};

use crate::layout::{Buffer, Field, Place, Spans, layout};
use crate::text::guest_text;
use crate::{Kernel, LinuxError};

use pseudo::PseudoNames;

/// More components than any path has: PATH_MAX allows 2048, nested mounts some more. What goes on longer is a cycle.
const MAX_COMPONENTS: usize = 4096;

/// Longest text of a path that is collected; the kernel itself gives up at PATH_MAX, 4096.
const MAX_TEXT: usize = 32 << 10;

/// Longest name of one component. Filesystems stop at 255; pseudo files may have a little more.
const MAX_NAME: u32 = 1024;

/// `FMODE_NOACCOUNT` of include/linux/fs.h: the kernel's own files, among them those embedded in a `struct backing_file`. The flag of
/// the latter, `FMODE_BACKING`, has moved between releases and is not in the type data.
const FMODE_NOACCOUNT: u32 = 1 << 29;

layout! {
    /// One name in a directory (include/linux/dcache.h).
    pub(crate) struct DentryLayout = "dentry" {
        hash_pprev: Field<Gva> = "d_hash.pprev",
        parent: Field<Gva> = "d_parent",
        name_len: Field<u32> = "d_name.len",
        name: Field<Gva> = "d_name.name",
        inode: Field<Gva> = "d_inode",
        inline_name: Place = "d_iname" | "d_shortname",  // renamed in 6.14
        op: Field<Gva> = "d_op",
        sb: Field<Gva> = "d_sb",
        fsdata: Field<Gva> = "d_fsdata",
    }
}

layout! {
    /// One mounted tree (fs/mount.h); a `struct path` points to the `vfsmount` inside.
    pub(crate) struct MountPathLayout = "mount" {
        parent: Field<Gva> = "mnt_parent",
        mountpoint: Field<Gva> = "mnt_mountpoint",
        vfsmount: Place = "mnt",
        root: Field<Gva> = "mnt.mnt_root",
        sb: Field<Gva> = "mnt.mnt_sb",
        ns: Field<Gva> = "mnt_ns",
    }
}

layout! {
    pub(crate) struct PathLayout = "path" {
        mnt: Field<Gva> = "mnt",
        dentry: Field<Gva> = "dentry",
    }
}

layout! {
    pub(crate) struct FilePathLayout = "file" {
        path: Place = "f_path",
        mode: Field<u32> = "f_mode",
    }
}

layout! {
    /// A file of an underlying filesystem that is open on behalf of a stacked one, as overlayfs does (fs/file_table.c, 6.8).
    pub(crate) struct BackingFileLayout = "backing_file" {
        file: Place = "file",
        user_path: Place = "user_path",
    }
}

/// A file's name as the guest's own `/proc` would show it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuestPath {
    /// The path, or the name of what has none (`pipe:[123]`, `anon_inode:[eventfd]`). Control characters are as the guest wrote
    /// them, bytes that are not UTF-8 are spelt `\xNN`.
    pub path: String,
    /// The name has been removed from its directory; `/proc` appends ` (deleted)`.
    pub deleted: bool,
    /// The way up ended somewhere else than at the root asked for: a detached mount, or a directory moved out of a bind mount.
    pub unreachable: bool,
    /// Why the path is not whole. Its unknown head is written `?`.
    pub problem: Option<String>,
}

impl fmt::Display for GuestPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)?;
        if self.deleted {
            f.write_str(" (deleted)")
        } else {
            Ok(())
        }
    }
}

impl Serialize for GuestPath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A mounted tree's `vfsmount` and a dentry in it: what the kernel's `struct path` holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Location {
    /// The `struct vfsmount`.
    pub mnt: Gva,
    /// The `struct dentry`.
    pub dentry: Gva,
}

/// Resolves paths, with the members' places looked up once.
#[derive(Debug)]
pub struct PathResolver {
    space: AddressSpace,
    dentry: Arc<DentryLayout>,
    dentry_spans: Spans,
    mount: Arc<MountPathLayout>,
    mount_spans: Spans,
    path: Arc<PathLayout>,
    file: Arc<FilePathLayout>,
    backing: Option<Arc<BackingFileLayout>>,
    pseudo: PseudoNames,
}

impl PathResolver {
    /// Looks up what path resolution needs.
    ///
    /// # Errors
    /// If the kernel's types lack a member of `dentry`, `mount`, `path` or `file`.
    pub fn new(kernel: &Kernel) -> Result<Self, LinuxError> {
        let dentry: Arc<DentryLayout> = kernel.layout()?;
        let mount: Arc<MountPathLayout> = kernel.layout()?;
        let release = kernel.release();
        let dentry_spans = Spans::covering(
            "dentry",
            release,
            [
                dentry.hash_pprev.extent(),
                dentry.parent.extent(),
                dentry.name_len.extent(),
                dentry.name.extent(),
                dentry.inode.extent(),
                dentry.inline_name.extent(),
                dentry.op.extent(),
                dentry.sb.extent(),
                dentry.fsdata.extent(),
            ],
        )?;
        let mount_spans = Spans::covering(
            "mount",
            release,
            [
                mount.parent.extent(),
                mount.mountpoint.extent(),
                mount.root.extent(),
                mount.ns.extent(),
            ],
        )?;
        Ok(Self {
            space: kernel.space().clone(),
            dentry,
            dentry_spans,
            mount,
            mount_spans,
            path: kernel.layout()?,
            file: kernel.layout()?,
            backing: kernel.layout().ok(),
            pseudo: PseudoNames::new(kernel)?,
        })
    }

    /// Reads a `struct path`.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn location(&self, path: Gva) -> Result<Location, ReadError> {
        Ok(Location {
            mnt: self.path.mnt.read(&self.space, path)?,
            dentry: self.path.dentry.read(&self.space, path)?,
        })
    }

    /// The path in the `struct path` at `path`, up to the topmost mount: for a process in a `chroot` the path as seen from outside.
    ///
    /// # Errors
    /// If the `struct path` or its dentry cannot be read. What fails further up is a problem of the result.
    pub fn resolve(&self, path: Gva) -> Result<GuestPath, ReadError> {
        self.resolve_at(self.location(path)?, None)
    }

    /// The path that `/proc/PID/fd` and `/proc/PID/maps` show for a `struct file`: the user's, where a stacked filesystem opened another.
    ///
    /// # Errors
    /// As [`PathResolver::resolve`].
    pub fn file(&self, file: Gva) -> Result<GuestPath, ReadError> {
        self.resolve_at(self.file_location(file)?, None)
    }

    /// Where a `struct file` is, as its user sees it.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn file_location(&self, file: Gva) -> Result<Location, ReadError> {
        if let Some(backing) = &self.backing
            && self.file.mode.read(&self.space, file)? & FMODE_NOACCOUNT != 0
            && let Ok(user) = self.location(backing.user_path.at(backing.file.container(file)))
            && self.is_consistent(user)
        {
            return Ok(user);
        }
        self.location(self.file.path.at(file))
    }

    /// Whether mount and dentry are of one filesystem, as they are in every `struct path`.
    fn is_consistent(&self, at: Location) -> bool {
        let mount = self.mount.vfsmount.container(at.mnt);
        match (
            self.mount.sb.read(&self.space, mount),
            self.dentry.sb.read(&self.space, at.dentry),
        ) {
            (Ok(mounted), Ok(own)) => mounted == own && !own.is_null(),
            _ => false,
        }
    }

    /// The path of a location relative to `root`, or to the topmost mount where none is given.
    ///
    /// # Errors
    /// If the location's own dentry cannot be read. What fails further up is a problem of the result.
    pub fn resolve_at(&self, at: Location, root: Option<Location>) -> Result<GuestPath, ReadError> {
        let mut dentry = self.dentry_spans.buffer();
        self.dentry_spans.read(&self.space, at.dentry, &mut dentry)?;
        let is_root = self.dentry.parent.of(&dentry) == at.dentry;

        if let Some(name) = self.pseudo_name(at, &dentry, is_root) {
            return Ok(name);
        }

        let mut path = GuestPath {
            deleted: self.is_unlinked(&dentry, is_root),
            ..GuestPath::default()
        };
        let mut names = Names::default();
        let mut mount = self.mount_spans.buffer();
        let mut here = at;
        let mut mounted_at = Gva(0);
        let problem = 'walk: loop {
            if Some(here) == root {
                break None;
            }
            let mount_address = self.mount.vfsmount.container(here.mnt);
            if mounted_at != mount_address {
                if let Err(error) = self.mount_spans.read(&self.space, mount_address, &mut mount) {
                    break Some(format!("cannot read its mount: {error}"));
                }
                mounted_at = mount_address;
            }
            let at_mount_root = here.dentry == self.mount.root.of(&mount);
            let parent = self.dentry.parent.of(&dentry);
            if at_mount_root || parent == here.dentry {
                if !at_mount_root {
                    path.unreachable = true;
                    break Some("the directory lies outside of its mount".to_owned());
                }
                let above = self.mount.parent.of(&mount);
                if above == mount_address || above.is_null() {
                    path.unreachable = root.is_some() || !is_namespace(self.mount.ns.of(&mount));
                    break None;
                }
                here = Location {
                    mnt: self.mount.vfsmount.at(above),
                    dentry: self.mount.mountpoint.of(&mount),
                };
                names.crossed += 1;
            } else {
                if let Err(error) = self.push_name(&mut names, here.dentry, &dentry) {
                    break 'walk Some(format!("cannot read the name of a directory: {error}"));
                }
                here.dentry = parent;
            }
            if names.ends.len() + names.crossed > MAX_COMPONENTS || names.text.len() > MAX_TEXT {
                break Some("the path has no end: its directories or mounts form a cycle".to_owned());
            }
            if let Err(error) = self.dentry_spans.read(&self.space, here.dentry, &mut dentry) {
                break Some(format!("cannot read a directory above: {error}"));
            }
        };
        path.path = names.join(if problem.is_some() { "?" } else { "" });
        path.problem = problem;
        Ok(path)
    }

    /// The path of a dentry inside its filesystem, as the fourth field of `/proc/PID/mountinfo`: `//deleted` is appended where it was
    /// unlinked.
    ///
    /// # Errors
    /// If the dentry cannot be read. What fails further up is a problem of the result.
    pub fn within_filesystem(&self, dentry_address: Gva) -> Result<GuestPath, ReadError> {
        let mut dentry = self.dentry_spans.buffer();
        self.dentry_spans.read(&self.space, dentry_address, &mut dentry)?;
        let mut path = GuestPath::default();
        let mut names = Names::default();
        let mut here = dentry_address;
        let deleted = self.is_unlinked(&dentry, self.dentry.parent.of(&dentry) == here);
        let problem = loop {
            let parent = self.dentry.parent.of(&dentry);
            if parent == here {
                break None;
            }
            if let Err(error) = self.push_name(&mut names, here, &dentry) {
                break Some(format!("cannot read the name of a directory: {error}"));
            }
            if names.ends.len() > MAX_COMPONENTS || names.text.len() > MAX_TEXT {
                break Some("the path has no end: its directories form a cycle".to_owned());
            }
            here = parent;
            if let Err(error) = self.dentry_spans.read(&self.space, here, &mut dentry) {
                break Some(format!("cannot read a directory above: {error}"));
            }
        };
        path.path = names.join(if problem.is_some() { "?" } else { "" });
        if deleted {
            path.path.push_str("//deleted");
        }
        path.problem = problem;
        Ok(path)
    }

    /// The name of a pseudo filesystem's object at `dentry`, `None` if it is an ordinary one.
    ///
    /// # Errors
    /// If the dentry cannot be read.
    pub(crate) fn pseudo_object(&self, dentry_address: Gva) -> Result<Option<GuestPath>, ReadError> {
        let mut dentry = self.dentry_spans.buffer();
        self.dentry_spans.read(&self.space, dentry_address, &mut dentry)?;
        let op = self.dentry.op.of(&dentry);
        Ok(self.pseudo.name(&self.space, op, &self.facts(&dentry), || {
            self.name(dentry_address, &dentry)
        }))
    }

    fn pseudo_name(&self, at: Location, dentry: &Buffer, is_root: bool) -> Option<GuestPath> {
        let op = self.dentry.op.of(dentry);
        if op.is_null() {
            return None;
        }
        if is_root {
            // The root directory of an ordinary mount has a name like any other directory (d_path).
            let mount = self.mount.vfsmount.container(at.mnt);
            if self
                .mount
                .root
                .read(&self.space, mount)
                .is_ok_and(|root| root == at.dentry)
            {
                return None;
            }
        }
        self.pseudo.name(&self.space, op, &self.facts(dentry), || {
            self.name(at.dentry, dentry)
        })
    }

    fn facts(&self, dentry: &Buffer) -> pseudo::DentryFacts {
        pseudo::DentryFacts {
            inode: self.dentry.inode.of(dentry),
            sb: self.dentry.sb.of(dentry),
            fsdata: self.dentry.fsdata.of(dentry),
        }
    }

    /// `d_unlinked`: no longer in the hash of names, and not a root.
    fn is_unlinked(&self, dentry: &Buffer, is_root: bool) -> bool {
        self.dentry.hash_pprev.of(dentry).is_null() && !is_root
    }

    fn push_name(&self, names: &mut Names, address: Gva, dentry: &Buffer) -> Result<(), ReadError> {
        let from = names.text.len();
        self.name_into(&mut names.text, address, dentry)?;
        names.ends.push((from, names.text.len()));
        Ok(())
    }

    fn name(&self, address: Gva, dentry: &Buffer) -> Result<String, ReadError> {
        let mut text = Vec::new();
        self.name_into(&mut text, address, dentry)?;
        Ok(guest_text(&text))
    }

    fn name_into(&self, text: &mut Vec<u8>, address: Gva, dentry: &Buffer) -> Result<(), ReadError> {
        let len = self.dentry.name_len.of(dentry).min(MAX_NAME) as usize;
        let at = self.dentry.name.of(dentry);
        let from = text.len();
        if at == self.dentry.inline_name.at(address)
            && let Some(inline) = self.dentry.inline_name.of(dentry).get(..len)
        {
            text.extend_from_slice(inline);
        } else {
            text.resize(from + len, 0);
            if let Some(to) = text.get_mut(from..)
                && let Err(error) = self.space.read(at, to)
            {
                text.truncate(from);
                return Err(error);
            }
        }
        // A name that was replaced while it was read can be shorter than its length said.
        if let Some(nul) = text
            .get(from..)
            .and_then(|name| name.iter().position(|&b| b == 0))
        {
            text.truncate(from + nul);
        }
        Ok(())
    }
}

/// `is_mounted`: a mount that belongs to no namespace has null there, one of the kernel's own an error number.
fn is_namespace(ns: Gva) -> bool {
    !ns.is_null() && ns.0 < u64::MAX - 4095
}

/// The components of a path, collected from the last to the first.
#[derive(Default)]
struct Names {
    text: Vec<u8>,
    ends: Vec<(usize, usize)>,
    crossed: usize,
}

impl Names {
    fn join(&self, head: &str) -> String {
        let mut bytes = Vec::with_capacity(head.len() + self.text.len() + self.ends.len() + 1);
        bytes.extend_from_slice(head.as_bytes());
        for &(from, to) in self.ends.iter().rev() {
            bytes.push(b'/');
            bytes.extend_from_slice(self.text.get(from..to).unwrap_or(&[]));
        }
        if self.ends.is_empty() {
            bytes.push(b'/');
        }
        guest_text(&bytes)
    }
}

/// The path in the `struct path` at `path`, up to the topmost mount. For many paths keep a [`PathResolver`].
///
/// # Errors
/// If the kernel's types lack what is needed, or the `struct path` or its dentry cannot be read.
pub fn resolve(kernel: &Kernel, path: Gva) -> Result<GuestPath, LinuxError> {
    PathResolver::new(kernel)?
        .resolve(path)
        .map_err(LinuxError::read("struct path", path))
}

/// The path of the `struct file` at `file`, as `/proc` shows it. For many files keep a [`PathResolver`].
///
/// # Errors
/// As [`resolve`].
pub fn resolve_file(kernel: &Kernel, file: Gva) -> Result<GuestPath, LinuxError> {
    PathResolver::new(kernel)?
        .file(file)
        .map_err(LinuxError::read("struct file", file))
}
