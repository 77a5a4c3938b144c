//! Netlink sockets (net/netlink/af_netlink.c): one resizable hash table for each netlink family.

use std::sync::Arc;

use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use super::table::Found;
use super::{MAX_SOCKETS, SockReader, Socket, address};
use crate::budget::{Budget, NO_ROOM};
use crate::layout::{Field, Place, layout};
use crate::listing::Problem;
use crate::structures::hlist;
use crate::{Kernel, LinuxError};

/// `MAX_LINKS` (include/uapi/linux/netlink.h).
const MAX_LINKS: u64 = 32;
/// Largest table that is believed, and most multicast groups.
const MAX_BUCKETS: u32 = 1 << 22;
const MAX_GROUPS: u32 = 1 << 16;
/// Pointers on one page of a nested table.
const NESTED_BITS: u32 = 9;
const NESTED: u64 = 1 << NESTED_BITS;

layout! {
    struct NetlinkTableLayout = "netlink_table" {
        tbl: Field<Gva> = "hash.tbl",
    }
}

layout! {
    struct BucketTableLayout = "bucket_table" {
        size_: Field<u32> = "size",
        nest: Field<u32> = "nest",
        future: Field<Gva> = "future_tbl",
        buckets: Place = "buckets",
    }
}

layout! {
    pub(super) struct NetlinkLayout = "netlink_sock" {
        portid: Field<u32> = "portid",
        dst_portid: Field<u32> = "dst_portid",
        ngroups: Field<u32> = "ngroups",
        groups: Field<Gva> = "groups",
        node: Place = "node",
    }
}

pub(super) fn sockets(kernel: &Kernel, found: &mut Found) -> Result<(), LinuxError> {
    let layout: Arc<NetlinkTableLayout> = kernel.layout()?;
    let buckets: Arc<BucketTableLayout> = kernel.layout()?;
    let sock: Arc<NetlinkLayout> = kernel.layout()?;
    let table = kernel.symbol_pointer("nl_table")?;
    for family in 0..MAX_LINKS {
        let at = table.wrapping_add(family * layout.size);
        let Ok(mut tbl) = layout.tbl.read(kernel.space(), at) else {
            break;
        };
        // While it grows, a table has a successor that part of the sockets have moved to.
        for _ in 0..3 {
            if tbl.is_null() {
                break;
            }
            match hash_table(kernel, &buckets, tbl, sock.node.offset(), found) {
                Ok(future) => tbl = future,
                Err(error) => {
                    found
                        .warnings
                        .add(format!("netlink sockets: a table cannot be read: {error}"));
                    break;
                }
            }
        }
    }
    Ok(())
}

/// The objects of an `rhashtable`'s `bucket_table`; returns the table that follows it.
fn hash_table(
    kernel: &Kernel,
    layout: &BucketTableLayout,
    table: Gva,
    node: u64,
    found: &mut Found,
) -> Result<Gva, ReadError> {
    let space = kernel.space();
    let size = layout.size_.read(space, table)?;
    let nest = layout.nest.read(space, table)?;
    let future = layout.future.read(space, table)?;
    if size > MAX_BUCKETS {
        found.warnings.add(format!(
            "netlink sockets: a table was not read, it claims {size} buckets"
        ));
        return Ok(future);
    }
    if found.is_full() {
        return Ok(Gva(0));
    }
    found.look(u64::from(size));
    for bucket in 0..u64::from(size) {
        let at = if nest == 0 {
            layout.buckets.at(table).wrapping_add(bucket * 8)
        } else {
            match nested(kernel, layout, table, (size, nest), bucket)? {
                Some(at) => at,
                None => continue,
            }
        };
        // Bit 0 of a bucket is its lock; an empty one holds null or (up to 5.1) an odd mark.
        let first = space.read_u64(at)? & !1;
        if first == 0 {
            continue;
        }
        // A node starts with the pointer to the next one, as a head does.
        let walk = hlist::walk_nulls(space, Gva(first), hlist::MAX_CHAIN);
        found.add([Gva(first).wrapping_sub(node)]);
        found.add(walk.items.iter().map(|at| at.wrapping_sub(node)));
        found.warnings.extend(walk.end.warning("netlink sockets"));
        if found.socks.len() >= MAX_SOCKETS {
            break;
        }
    }
    Ok(future)
}

/// Where bucket `bucket` of a nested table lies. A table that found no memory in one piece is a tree of pages: 2^nest pointers in the
/// first, 512 in those below (lib/rhashtable.c).
fn nested(
    kernel: &Kernel,
    layout: &BucketTableLayout,
    table: Gva,
    (size, nest): (u32, u32),
    bucket: u64,
) -> Result<Option<Gva>, ReadError> {
    let space = kernel.space();
    let nest = nest.min(31);
    let top = Gva(space.read_u64(layout.buckets.at(table))?);
    if top.is_null() {
        return Ok(None);
    }
    let mut page = Gva(space.read_u64(top.wrapping_add((bucket & ((1 << nest) - 1)) * 8))?);
    let mut left = u64::from(size) >> nest;
    let mut rest = bucket >> nest;
    while !page.is_null() && left > NESTED {
        page = Gva(space.read_u64(page.wrapping_add((rest & (NESTED - 1)) * 8))?);
        rest >>= NESTED_BITS;
        left >>= NESTED_BITS;
    }
    Ok((!page.is_null()).then(|| page.wrapping_add(rest * 8)))
}

pub(super) fn fill(
    reader: &SockReader,
    layout: Option<&NetlinkLayout>,
    protocol: u16,
    row: &mut Socket,
    budget: &Budget,
) -> Result<(), ReadError> {
    row.protocol = address::netlink_protocol(protocol);
    let Some(layout) = layout else { return Ok(()) };
    let space = reader.kernel.space();
    row.local_port = Some(layout.portid.read(space, row.address)?);
    row.remote_port = Some(layout.dst_portid.read(space, row.address)?);
    let groups = layout.groups.read(space, row.address)?;
    let count = layout.ngroups.read(space, row.address)?.min(MAX_GROUPS);
    if !groups.is_null() && count > 0 {
        let mut bits = vec![0u8; count.div_ceil(64) as usize * 8];
        space.read(groups, &mut bits)?;
        let joined = bits.iter().map(|byte| byte.count_ones() as usize).sum::<usize>();
        if !budget.bytes(joined * size_of::<u32>()) {
            row.problems.push(Problem::new("groups", NO_ROOM));
            return Ok(());
        }
        row.groups = (0..count)
            .filter(|&bit| {
                bits.get(bit as usize / 8)
                    .is_some_and(|byte| byte >> (bit % 8) & 1 == 1)
            })
            .map(|bit| bit + 1)
            .collect();
    }
    Ok(())
}
