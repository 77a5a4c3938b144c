//! Mount namespaces: those that processes are in, and on newer kernels those that nobody is in.

use std::sync::Arc;

use rustc_hash::FxHashMap;
use vmsight_arch::Gva;

use crate::budget::Budget;
use crate::file::holder;
use crate::layout::{Field, Place, layout};
use crate::path::Location;
use crate::structures::{End, list, rbtree};
use crate::warnings::Warnings;
use crate::{Kernel, LinuxError};

/// More mounts than a namespace can have (`sysctl_mount_max` is 100,000).
const MAX_MOUNTS: usize = 1 << 20;
/// More mount namespaces than are believed.
const MAX_NAMESPACES: usize = 1 << 16;

layout! {
    struct MntNamespaceLayout = "mnt_namespace" {
        inum: Field<u32> = "ns.inum",
        ns: Place = "ns",
        root: Field<Gva> = "root",
        list: Option<Place> = "list",                             // up to 6.7
        mounts: Option<Place> = "mounts",                         // a counter up to 6.7, a tree since
        tree_node: Option<Place> = "mnt_ns_tree_node" | "ns.ns_tree_node.ns_node",  // 6.11, 6.19
    }
}

layout! {
    struct MntNsOfLayout = "nsproxy" {
        mnt: Field<Gva> = "mnt_ns",
    }
}

layout! {
    struct FsLayout = "fs_struct" {
        root_mnt: Field<Gva> = "root.mnt",
        root_dentry: Field<Gva> = "root.dentry",
    }
}

/// One mount namespace.
#[derive(Clone, Debug)]
pub(super) struct Namespace {
    pub(super) address: Gva,
    pub(super) inum: u32,
    /// The root directory of its first process.
    pub(super) root: Option<Location>,
    pub(super) pid: Option<i32>,
    pub(super) processes: usize,
}

/// All mount namespaces that can be found, in the order of their first processes.
pub(super) fn all(kernel: &Kernel) -> Result<(Vec<Namespace>, Vec<String>), LinuxError> {
    let layout: Arc<MntNamespaceLayout> = kernel.layout()?;
    let nsproxy: Arc<MntNsOfLayout> = kernel.layout()?;
    let fs: Arc<FsLayout> = kernel.layout()?;
    let space = kernel.space();
    let (holders, told) = holder::all(kernel)?;
    let mut warnings = Warnings::default();
    warnings.extend(told);
    let mut namespaces: Vec<Namespace> = Vec::new();
    let mut known: FxHashMap<Gva, usize> = FxHashMap::default();
    // Hundreds of processes share one nsproxy.
    let mut proxies: FxHashMap<Gva, Option<Gva>> = FxHashMap::default();
    for holder in holders {
        if holder.nsproxy.is_null() {
            continue;
        }
        let proxy = *proxies
            .entry(holder.nsproxy)
            .or_insert_with(|| nsproxy.mnt.read(space, holder.nsproxy).ok());
        let Some(address) = proxy.filter(|ns| !ns.is_null()) else {
            continue;
        };
        if let Some(&index) = known.get(&address) {
            if let Some(namespace) = namespaces.get_mut(index) {
                namespace.processes += usize::from(holder.tid.is_none());
            }
            continue;
        }
        match layout.inum.read(space, address) {
            Ok(inum) => {
                let root = (!holder.fs.is_null())
                    .then(|| {
                        let mnt = fs.root_mnt.read(space, holder.fs).ok()?;
                        Some(Location {
                            mnt,
                            dentry: fs.root_dentry.read(space, holder.fs).ok()?,
                        })
                    })
                    .flatten();
                known.insert(address, namespaces.len());
                namespaces.push(Namespace {
                    address,
                    inum,
                    root,
                    pid: Some(holder.pid),
                    processes: 1,
                });
            }
            Err(error) => {
                warnings.add(format!(
                    "the mount namespace of process {} cannot be read: {error}",
                    holder.pid
                ));
            }
        }
    }
    // Those that only a file or a bind mount holds: from 6.11 on the kernel keeps all in a tree; before, what holds one is an inode.
    let (unheld, end) = match (&layout.tree_node, kernel.find_symbol(&["mnt_ns_tree"])) {
        (Some(node), Some(tree)) => {
            let found = rbtree::walk(space, tree, MAX_NAMESPACES);
            (
                found.items.into_iter().map(|at| node.container(at)).collect(),
                found.end,
            )
        }
        _ => by_inode(kernel, &layout)?,
    };
    for address in unheld {
        if known.contains_key(&address) {
            continue;
        }
        if let Ok(inum) = layout.inum.read(space, address) {
            known.insert(address, namespaces.len());
            namespaces.push(Namespace {
                address,
                inum,
                root: None,
                pid: None,
                processes: 0,
            });
        }
    }
    warnings.extend(end.warning("mount namespaces without processes"));
    Ok((namespaces, warnings.into_vec()))
}

layout! {
    struct NsMountLayout = "vfsmount" {
        sb: Field<Gva> = "mnt_sb",
    }
}

layout! {
    struct NsSuperLayout = "super_block" {
        inodes: Place = "s_inodes",
    }
}

layout! {
    struct NsInodeLayout = "inode" {
        sb_list: Place = "i_sb_list",
        private: Field<Gva> = "i_private",
    }
}

layout! {
    struct NsOpsOfLayout = "ns_common" {
        ops: Field<Gva> = "ops",
    }
}

/// The mount namespaces that an inode of nsfs stands for (fs/nsfs.c): every open or bind-mounted `/proc/PID/ns/mnt` is one.
fn by_inode(kernel: &Kernel, layout: &MntNamespaceLayout) -> Result<(Vec<Gva>, End), LinuxError> {
    let (Some(nsfs), Some(operations)) = (
        kernel.find_symbol(&["nsfs_mnt"]),
        kernel.find_symbol(&["mntns_operations"]),
    ) else {
        return Ok((Vec::new(), End::Complete));
    };
    let mount: Arc<NsMountLayout> = kernel.layout()?;
    let sb: Arc<NsSuperLayout> = kernel.layout()?;
    let inode: Arc<NsInodeLayout> = kernel.layout()?;
    let ns: Arc<NsOpsOfLayout> = kernel.layout()?;
    let space = kernel.space();
    let Ok(super_block) = kernel.pointer(nsfs).and_then(|mnt| mount.sb.read(space, mnt)) else {
        return Ok((Vec::new(), End::Complete));
    };
    let found = list::walk(space, sb.inodes.at(super_block), MAX_NAMESPACES).walk;
    let namespace = |node: &Gva| -> Option<Gva> {
        let common = inode.private.read(space, inode.sb_list.container(*node)).ok()?;
        (ns.ops.read(space, common).ok()? == operations).then(|| layout.ns.container(common))
    };
    Ok((found.items.iter().filter_map(namespace).collect(), found.end))
}

/// The `struct mount`s of a namespace in the kernel's order; `mnt_list` and `mnt_node` are the members that link them.
pub(super) fn mounts(
    kernel: &Kernel,
    namespace: &Namespace,
    mnt_list: Option<Place>,
    mnt_node: Option<Place>,
    budget: &Budget,
) -> (Vec<Gva>, End) {
    let layout: Arc<MntNamespaceLayout> = match kernel.layout() {
        Ok(layout) => layout,
        Err(_) => {
            return (
                Vec::new(),
                End::Broken {
                    at: namespace.address,
                    reason: "its layout is not known",
                },
            );
        }
    };
    let space = kernel.space();
    // Some of them come to no row: a list of readers' places only is looked at and paid for all the same.
    let limit = budget.limit(MAX_MOUNTS);
    let (mounts, end) = match (&layout.list, &layout.mounts, mnt_list, mnt_node) {
        (Some(head), _, Some(link), _) => {
            let found = list::walk(space, head.at(namespace.address), limit);
            (
                found
                    .walk
                    .items
                    .into_iter()
                    .map(|node| link.container(node))
                    .collect(),
                found.walk.end,
            )
        }
        (None, Some(tree), _, Some(link)) => {
            let found = rbtree::walk(space, tree.at(namespace.address), limit);
            (
                found.items.into_iter().map(|node| link.container(node)).collect(),
                found.end,
            )
        }
        _ => (
            Vec::new(),
            End::Broken {
                at: namespace.address,
                reason: "neither a list nor a tree of mounts is known",
            },
        ),
    };
    budget.walked(mounts.len());
    (mounts, end)
}
