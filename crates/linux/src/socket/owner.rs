//! Which processes hold which socket, by their file descriptors.

use std::sync::Arc;

use rustc_hash::FxHashMap;
use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use crate::file::fd::FdReader;
use crate::file::holder::{Holder, Owner};
use crate::layout::{Field, Place, layout};
use crate::warnings::Warnings;
use crate::{Kernel, LinuxError};

layout! {
    struct SocketFileLayout = "file" {
        inode: Field<Gva> = "f_inode",
    }
}

layout! {
    struct SocketInodeLayout = "inode" {
        mode: Field<u16> = "i_mode",
        sb: Field<Gva> = "i_sb",
    }
}

layout! {
    struct SocketSuperLayout = "super_block" {
        fstype: Field<Gva> = "s_type",
    }
}

layout! {
    struct SocketFsTypeLayout = "file_system_type" {
        name: Field<Gva> = "name",
    }
}

layout! {
    struct SocketAllocLayout = "socket_alloc" {
        inode: Place = "vfs_inode",
        sk: Field<Gva> = "socket.sk",
    }
}

/// Descriptors of one process that lead to no file at all before the rest of its table is given up.
const MAX_BROKEN: usize = 256;

const S_IFMT: u16 = 0o170_000;
const S_IFSOCK: u16 = 0o140_000;

/// The sockets that file descriptors lead to, and whose they are.
#[derive(Debug, Default)]
pub(crate) struct SocketOwners {
    owners: FxHashMap<Gva, Vec<Owner>>,
    pub(crate) warnings: Warnings,
}

impl SocketOwners {
    /// Looks through the descriptors of `holders`.
    pub(crate) fn read(kernel: &Kernel, holders: &[Holder], fds: &mut FdReader) -> Result<Self, LinuxError> {
        let finder = Finder {
            kernel: kernel.clone(),
            file: kernel.layout()?,
            inode: kernel.layout()?,
            sb: kernel.layout()?,
            fstype: kernel.layout()?,
            alloc: kernel.layout()?,
        };
        let mut out = Self::default();
        let mut files: FxHashMap<Gva, Result<Option<Gva>, ()>> = FxHashMap::default();
        let mut sockfs: FxHashMap<Gva, bool> = FxHashMap::default();
        for holder in holders.iter().filter(|h| !h.files.is_null()) {
            match fds.open_fds(holder.files) {
                Ok(open) => {
                    let mut broken = 0;
                    for entry in &open.fds {
                        let sock = *files
                            .entry(entry.file)
                            .or_insert_with(|| finder.sock(entry.file, &mut sockfs).map_err(drop));
                        broken += usize::from(sock.is_err());
                        if broken > MAX_BROKEN {
                            out.warnings.add(format!(
                                "file descriptors of process {}: cut at {}, after {broken} that lead to no file",
                                holder.pid, entry.fd
                            ));
                            break;
                        }
                        if let Ok(Some(sock)) = sock {
                            out.owners.entry(sock).or_default().push(Owner {
                                pid: holder.pid,
                                name: holder.comm.clone(),
                                fd: entry.fd,
                            });
                        }
                    }
                    if let Some(cut) = &open.cut {
                        out.warnings
                            .add(format!("file descriptors of process {}: {cut}", holder.pid));
                    }
                }
                Err(error) => out.warnings.add(format!(
                    "the file descriptors of process {} cannot be read: {error}",
                    holder.pid
                )),
            }
        }
        Ok(out)
    }

    /// Who holds the `struct sock`.
    pub(crate) fn of(&self, sock: Gva) -> &[Owner] {
        self.owners.get(&sock).map_or(&[], Vec::as_slice)
    }

    /// All sockets that are held by somebody.
    pub(crate) fn socks(&self) -> impl Iterator<Item = Gva> + '_ {
        self.owners.keys().copied()
    }
}

struct Finder {
    kernel: Kernel,
    file: Arc<SocketFileLayout>,
    inode: Arc<SocketInodeLayout>,
    sb: Arc<SocketSuperLayout>,
    fstype: Arc<SocketFsTypeLayout>,
    alloc: Arc<SocketAllocLayout>,
}

impl Finder {
    /// The `struct sock` behind a file, `None` if the file is no socket.
    fn sock(&self, file: Gva, sockfs: &mut FxHashMap<Gva, bool>) -> Result<Option<Gva>, ReadError> {
        let space = self.kernel.space();
        let inode = self.file.inode.read(space, file)?;
        if self.inode.mode.read(space, inode)? & S_IFMT != S_IFSOCK {
            return Ok(None);
        }
        // The name of a bound UNIX socket has the same mode, but lies in another filesystem.
        let sb = self.inode.sb.read(space, inode)?;
        let is_socket = match sockfs.get(&sb) {
            Some(&known) => known,
            None => {
                let name = self.fstype.name.read(space, self.sb.fstype.read(space, sb)?)?;
                let is = space.read_cstr(name, 16)? == b"sockfs";
                sockfs.insert(sb, is);
                is
            }
        };
        if !is_socket {
            return Ok(None);
        }
        let sock = self.alloc.sk.read(space, self.alloc.inode.container(inode))?;
        Ok((!sock.is_null()).then_some(sock))
    }
}
