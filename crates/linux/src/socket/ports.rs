//! The table of TCP's ports in use (`bhash`, net/ipv4/inet_hashtables.c): what the kernel asks before it lets somebody bind a port,
//! and what no tool lists. A socket stays in it while it is in none of the tables that tools show.

use std::sync::Arc;

use vmsight_arch::Gva;

use super::inet::offset;
use super::table::{self, Found, Table};
use crate::layout::{Field, Place, layout};
use crate::structures::hlist;
use crate::{Kernel, LinuxError};

layout! {
    struct PortsLayout = "inet_hashinfo" {
        bhash: Field<Gva> = "bhash",
        buckets: Field<u32> = "bhash_size",
    }
}

layout! {
    struct BucketLayout = "inet_bind_hashbucket" {
        chain: Place = "chain",
    }
}

layout! {
    struct PortLayout = "inet_bind_bucket" {
        node: Place = "node",
        owners: Option<Place> = "owners",                          // up to 6.7
        addresses: Option<Place> = "bhash2",                       // 6.8
    }
}

layout! {
    struct AddressLayout = "inet_bind2_bucket" {
        node: Place = "bhash_node",
        owners: Place = "owners",
    }
}

layout! {
    struct BoundLayout = "sock_common" {
        node: Place = "skc_bind_node",
    }
}

/// Adds the sockets that have a port of TCP: one table for all namespaces. `found` has the ports on the way, and is given back with
/// sockets alone.
pub(super) fn tcp(kernel: &Kernel, found: &mut Found) -> Result<(), LinuxError> {
    let layout: Arc<PortsLayout> = kernel.layout()?;
    let bucket: Arc<BucketLayout> = kernel.layout()?;
    let port: Arc<PortLayout> = kernel.layout()?;
    let bound: Arc<BoundLayout> = kernel.layout()?;
    let info = kernel.symbol("tcp_hashinfo")?;
    let space = kernel.space();
    let read = || LinuxError::read("the table of TCP's ports", info);
    let heads = layout.bhash.read(space, info).map_err(read())?;
    let table = Table {
        what: "TCP's ports in use",
        heads: offset(heads, bucket.chain.offset()),
        count: u64::from(layout.buckets.read(space, info).map_err(read())?),
        stride: bucket.size,
        node: port.node.offset(),
    };
    let mut ports = Found::default();
    table::walk(kernel, &table, &mut ports);
    let (node, what) = (bound.node.offset(), "sockets of one port of TCP");
    for &at in &ports.socks {
        match (&port.owners, &port.addresses) {
            (Some(owners), _) => table::chain(kernel, what, owners.at(at), node, found),
            (None, Some(addresses)) => {
                let address: Arc<AddressLayout> = kernel.layout()?;
                let walk = hlist::walk(space, addresses.at(at), hlist::MAX_CHAIN);
                found.look(walk.items.len() as u64);
                for one in walk.items {
                    let owners = address.owners.at(one.wrapping_sub(address.node.offset()));
                    table::chain(kernel, what, owners, node, found);
                }
            }
            (None, None) => {}
        }
        if found.is_full() {
            break;
        }
    }
    for warning in ports.warnings.into_vec() {
        found.warnings.add(warning);
    }
    Ok(())
}
