//! Network namespaces: the kernel's own list, and those that processes are in.

use std::sync::Arc;

use rustc_hash::FxHashMap;
use vmsight_arch::Gva;

use crate::file::holder::Holder;
use crate::layout::{Field, Place, layout};
use crate::structures::list;
use crate::warnings::Warnings;
use crate::{Kernel, LinuxError};

/// More network namespaces than are believed.
const MAX_NAMESPACES: usize = 1 << 16;

layout! {
    struct NetListLayout = "net" {
        list: Place = "list",
        inum: Field<u32> = "ns.inum",
    }
}

layout! {
    struct NetOfLayout = "nsproxy" {
        net: Field<Gva> = "net_ns",
    }
}

/// One network namespace.
#[derive(Clone, Debug)]
pub(crate) struct Namespace {
    /// The `struct net`.
    pub(crate) address: Gva,
    /// Inode number, as in `/proc/PID/ns/net`.
    pub(crate) inum: u32,
    /// The first process in it.
    pub(crate) pid: Option<i32>,
}

/// The network namespaces and what is wrong with their list.
#[derive(Debug, Default)]
pub(crate) struct Namespaces {
    pub(crate) rows: Vec<Namespace>,
    pub(crate) warnings: Warnings,
    by_address: FxHashMap<Gva, u32>,
}

impl Namespaces {
    /// The inode number of the namespace whose `struct net` lies at `net`.
    pub(crate) fn inum(&self, net: Gva) -> Option<u32> {
        self.by_address.get(&net).copied()
    }
}

/// All network namespaces: those in the kernel's list, the initial one first, and those of `holders`.
pub(crate) fn all(kernel: &Kernel, holders: &[Holder]) -> Result<Namespaces, LinuxError> {
    let layout: Arc<NetListLayout> = kernel.layout()?;
    let nsproxy: Arc<NetOfLayout> = kernel.layout()?;
    let space = kernel.space();
    let mut out = Namespaces::default();
    let mut nets: Vec<Gva> = Vec::new();
    if let Some(head) = kernel.find_symbol(&["net_namespace_list"]) {
        let found = list::walk(space, head, MAX_NAMESPACES);
        nets.extend(found.walk.items.iter().map(|&node| layout.list.container(node)));
        out.warnings
            .extend(found.walk.end.warning("list of network namespaces"));
    }
    nets.extend(kernel.find_symbol(&["init_net"]));
    let mut first: FxHashMap<Gva, i32> = FxHashMap::default();
    let mut proxies: FxHashMap<Gva, Option<Gva>> = FxHashMap::default();
    for holder in holders.iter().filter(|h| !h.nsproxy.is_null()) {
        let net = *proxies
            .entry(holder.nsproxy)
            .or_insert_with(|| nsproxy.net.read(space, holder.nsproxy).ok());
        if let Some(net) = net.filter(|net| !net.is_null()) {
            first.entry(net).or_insert_with(|| {
                nets.push(net);
                holder.pid
            });
        }
    }
    for net in nets {
        if out.by_address.contains_key(&net) {
            continue;
        }
        match layout.inum.read(space, net) {
            Ok(inum) => {
                out.by_address.insert(net, inum);
                out.rows.push(Namespace {
                    address: net,
                    inum,
                    pid: first.get(&net).copied(),
                });
            }
            Err(error) => out
                .warnings
                .add(format!("the network namespace at {net} cannot be read: {error}")),
        }
    }
    Ok(out)
}
