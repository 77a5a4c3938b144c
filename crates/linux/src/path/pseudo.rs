//! Names of things that live in no directory: pipes, sockets, anonymous inodes, namespaces, memfds.
//!
//! The kernel makes them with `dentry_operations.d_dname`. Which function it is tells the form of the name; where the symbols do not
//! name it, the filesystem's type does.

use std::sync::Arc;

use vmsight_arch::Gva;
use vmsight_memory::{AddressSpace, ReadError};

use super::GuestPath;
use crate::layout::{Field, layout};
use crate::text::guest_text;
use crate::{Kernel, LinuxError};

layout! {
    struct DentryOpsLayout = "dentry_operations" {
        dname: Field<Gva> = "d_dname",
    }
}

layout! {
    struct InodeNameLayout = "inode" {
        ino: Field<u64> = "i_ino",
        private: Field<Gva> = "i_private",
    }
}

layout! {
    struct SuperTypeLayout = "super_block" {
        fstype: Field<Gva> = "s_type",
    }
}

layout! {
    struct FsTypeLayout = "file_system_type" {
        name: Field<Gva> = "name",
    }
}

layout! {
    /// The kernel's `struct ns_common`, which a namespace's inode points to, and the operations that know its name.
    struct NsCommonLayout = "ns_common" {
        ops: Field<Gva> = "ops",
    }
}

layout! {
    struct NsOpsLayout = "proc_ns_operations" {
        name: Field<Gva> = "name",
    }
}

/// How a name is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// `pipe:[INODE]`
    Pipe,
    /// `socket:[INODE]`
    Socket,
    /// `anon_inode:NAME`
    Anon,
    /// `net:[INODE]`, with the kind of the namespace
    Namespace,
    /// `anon_inode:[pidfd]`
    Pidfd,
    /// `/NAME`, always deleted: memfds, System V shared memory, shared anonymous memory
    Simple,
    /// `/NAME:`; the buffer's own label follows, which is not read
    DmaBuf,
}

/// The `d_dname` functions by name. Sources: fs/pipe.c, net/socket.c, fs/anon_inodes.c, fs/nsfs.c, fs/pidfs.c, fs/d_path.c,
/// drivers/dma-buf/dma-buf.c.
const FUNCTIONS: &[(&str, Form)] = &[
    ("pipefs_dname", Form::Pipe),
    ("sockfs_dname", Form::Socket),
    ("anon_inodefs_dname", Form::Anon),
    ("ns_dname", Form::Namespace),
    ("pidfs_dname", Form::Pidfd),
    ("simple_dname", Form::Simple),
    ("dmabuffs_dname", Form::DmaBuf),
];

/// What the name of a dentry is made from.
pub(super) struct DentryFacts {
    pub(super) inode: Gva,
    pub(super) sb: Gva,
    pub(super) fsdata: Gva,
}

#[derive(Debug)]
pub(super) struct PseudoNames {
    functions: Vec<(Gva, Form)>,
    ops: Arc<DentryOpsLayout>,
    inode: Arc<InodeNameLayout>,
    sb: Arc<SuperTypeLayout>,
    fstype: Arc<FsTypeLayout>,
    ns: Arc<NsCommonLayout>,
    ns_ops: Arc<NsOpsLayout>,
}

impl PseudoNames {
    pub(super) fn new(kernel: &Kernel) -> Result<Self, LinuxError> {
        let functions = FUNCTIONS
            .iter()
            .filter_map(|&(name, form)| kernel.symbol(name).ok().map(|address| (address, form)))
            .collect();
        Ok(Self {
            functions,
            ops: kernel.layout()?,
            inode: kernel.layout()?,
            sb: kernel.layout()?,
            fstype: kernel.layout()?,
            ns: kernel.layout()?,
            ns_ops: kernel.layout()?,
        })
    }

    /// The name, `None` if the dentry is one of an ordinary filesystem.
    pub(super) fn name(
        &self,
        space: &AddressSpace,
        op: Gva,
        facts: &DentryFacts,
        own_name: impl Fn() -> Result<String, ReadError>,
    ) -> Option<GuestPath> {
        if op.is_null() {
            return None;
        }
        let function = match self.ops.dname.read(space, op) {
            Ok(function) if function.is_null() => return None,
            Ok(function) => function,
            Err(_) => return None,
        };
        let form = self
            .functions
            .iter()
            .find(|&&(address, _)| address == function)
            .map(|&(_, form)| form)
            .or_else(|| self.form_by_type(space, facts.sb));
        let ino = || self.inode.ino.read(space, facts.inode);
        let named = match form {
            Some(Form::Pipe) => ino().map(|ino| (format!("pipe:[{ino}]"), false)),
            Some(Form::Socket) => ino().map(|ino| (format!("socket:[{ino}]"), false)),
            Some(Form::Anon) => own_name().map(|name| (format!("anon_inode:{name}"), false)),
            Some(Form::Namespace) => {
                ino().map(|ino| (format!("{}:[{ino}]", self.ns_kind(space, facts)), false))
            }
            Some(Form::Pidfd) => Ok(("anon_inode:[pidfd]".to_owned(), false)),
            Some(Form::Simple) => own_name().map(|name| (format!("/{name}"), true)),
            Some(Form::DmaBuf) => own_name().map(|name| (format!("/{name}:"), false)),
            None => own_name().map(|name| {
                let fstype = self.fs_type(space, facts.sb).unwrap_or_else(|| "?".to_owned());
                (format!("{fstype}:{name}"), false)
            }),
        };
        Some(match named {
            Ok((path, deleted)) => GuestPath {
                path,
                deleted,
                ..GuestPath::default()
            },
            Err(error) => GuestPath {
                path: "?".to_owned(),
                problem: Some(error.to_string()),
                ..GuestPath::default()
            },
        })
    }

    fn form_by_type(&self, space: &AddressSpace, sb: Gva) -> Option<Form> {
        Some(match self.fs_type(space, sb)?.as_str() {
            "pipefs" => Form::Pipe,
            "sockfs" => Form::Socket,
            "anon_inodefs" => Form::Anon,
            "nsfs" => Form::Namespace,
            "pidfs" => Form::Pidfd,
            "dmabuf" => Form::DmaBuf,
            "tmpfs" | "hugetlbfs" | "ramfs" => Form::Simple,
            _ => return None,
        })
    }

    fn fs_type(&self, space: &AddressSpace, sb: Gva) -> Option<String> {
        let fstype = self.sb.fstype.read(space, sb).ok()?;
        let name = self.fstype.name.read(space, fstype).ok()?;
        Some(guest_text(&space.read_cstr(name, 64).ok()?))
    }

    /// `mnt`, `net`, `pid_for_children` …: the namespace's own `proc_ns_operations.name`.
    fn ns_kind(&self, space: &AddressSpace, facts: &DentryFacts) -> String {
        let by_ops = |ops: Gva| -> Option<String> {
            let name = self.ns_ops.name.read(space, ops).ok()?;
            let name = space.read_cstr(name, 32).ok()?;
            (!name.is_empty() && name.iter().all(|b| b.is_ascii_graphic())).then(|| guest_text(&name))
        };
        // Up to 6.8 the dentry holds the operations, later the inode leads to the namespace and that to them.
        by_ops(facts.fsdata)
            .or_else(|| {
                let ns = self.inode.private.read(space, facts.inode).ok()?;
                by_ops(self.ns.ops.read(space, ns).ok()?)
            })
            .unwrap_or_else(|| "?".to_owned())
    }
}
