//! The namespaces of a process, by the inode numbers that /proc/PID/ns shows.

use std::sync::Arc;

use rustc_hash::FxHashMap;
use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use super::layouts::NsproxyLayout;
use crate::layout::{Field, layout};
use crate::{Kernel, LinuxError};

macro_rules! namespace {
    ($($name:ident = $structure:literal),* $(,)?) => {$(
        layout! {
            #[doc = concat!("`struct ", $structure, "`.")]
            struct $name = $structure {
                inum: Field<u32> = "ns.inum",
            }
        }
    )*};
}
namespace! {
    Uts = "uts_namespace",
    Ipc = "ipc_namespace",
    Mnt = "mnt_namespace",
    Net = "net",
    Time = "time_namespace",
    Cgroup = "cgroup_namespace",
    User = "user_namespace",
}

/// Inode numbers of the namespaces that hang on `nsproxy`; `None` where the kernel is built without one.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Namespaces {
    pub(crate) uts: Option<u32>,
    pub(crate) ipc: Option<u32>,
    pub(crate) mnt: Option<u32>,
    pub(crate) net: Option<u32>,
    pub(crate) time: Option<u32>,
    pub(crate) cgroup: Option<u32>,
}

/// Reads `struct nsproxy`s, each once: most processes share one.
#[derive(Debug)]
pub(crate) struct NamespaceReader {
    kernel: Kernel,
    nsproxy: Arc<NsproxyLayout>,
    // A kernel may be built without the one or other: then its nsproxy member, if any, is of no use.
    uts: Option<Arc<Uts>>,
    ipc: Option<Arc<Ipc>>,
    mnt: Option<Arc<Mnt>>,
    net: Option<Arc<Net>>,
    time: Option<Arc<Time>>,
    cgroup: Option<Arc<Cgroup>>,
    user: Arc<User>,
}

/// What a [`NamespaceReader`] has read already.
#[derive(Debug, Default)]
pub(crate) struct NamespaceCache {
    proxies: FxHashMap<u64, Namespaces>,
    users: FxHashMap<u64, u32>,
}

impl NamespaceReader {
    pub(crate) fn new(kernel: &Kernel) -> Result<Self, LinuxError> {
        Ok(Self {
            kernel: kernel.clone(),
            nsproxy: kernel.layout()?,
            uts: kernel.layout().ok(),
            ipc: kernel.layout().ok(),
            mnt: kernel.layout().ok(),
            net: kernel.layout().ok(),
            time: kernel.layout().ok(),
            cgroup: kernel.layout().ok(),
            user: kernel.layout()?,
        })
    }

    /// The namespaces of the `nsproxy` at `at`.
    pub(crate) fn of_nsproxy(&self, at: Gva, cache: &mut NamespaceCache) -> Result<Namespaces, ReadError> {
        if let Some(known) = cache.proxies.get(&at.0) {
            return Ok(*known);
        }
        let space = self.kernel.space();
        let inum = |member: Option<Field<Gva>>, inum: Option<Field<u32>>| -> Result<Option<u32>, ReadError> {
            let (Some(member), Some(inum)) = (member, inum) else {
                return Ok(None);
            };
            let namespace = member.read(space, at)?;
            if namespace.is_null() {
                Ok(None)
            } else {
                inum.read(space, namespace).map(Some)
            }
        };
        let proxy = &self.nsproxy;
        let out = Namespaces {
            uts: inum(Some(proxy.uts), self.uts.as_ref().map(|l| l.inum))?,
            ipc: inum(Some(proxy.ipc), self.ipc.as_ref().map(|l| l.inum))?,
            mnt: inum(Some(proxy.mnt), self.mnt.as_ref().map(|l| l.inum))?,
            net: inum(Some(proxy.net), self.net.as_ref().map(|l| l.inum))?,
            time: inum(proxy.time, self.time.as_ref().map(|l| l.inum))?,
            cgroup: inum(proxy.cgroup, self.cgroup.as_ref().map(|l| l.inum))?,
        };
        cache.proxies.insert(at.0, out);
        Ok(out)
    }

    /// The inode number of a user namespace.
    pub(crate) fn user(&self, at: Gva, cache: &mut NamespaceCache) -> Result<u32, ReadError> {
        if let Some(&known) = cache.users.get(&at.0) {
            return Ok(known);
        }
        let inum = self.user.inum.read(self.kernel.space(), at)?;
        cache.users.insert(at.0, inum);
        Ok(inum)
    }
}
