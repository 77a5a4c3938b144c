//! The tables of TCP, UDP, UDP-Lite and raw sockets (net/ipv4/inet_hashtables.c, udp.c, raw.c; the same tables serve IPv6).

use std::sync::Arc;

use rustc_hash::FxHashSet;
use vmsight_arch::Gva;

use super::SockReader;
use super::namespace::Namespace;
use super::table::{self, Found, Table};
use crate::layout::{Field, Place, layout};
use crate::{Kernel, LinuxError};

layout! {
    struct HashInfoLayout = "inet_hashinfo" {
        ehash: Field<Gva> = "ehash",
        ehash_mask: Field<u32> = "ehash_mask",
        lhash2: Option<Field<Gva>> = "lhash2",
        lhash2_mask: Option<Field<u32>> = "lhash2_mask",
        listening: Option<Place> = "listening_hash",              // up to 5.18
    }
}

layout! {
    struct EhashBucketLayout = "inet_ehash_bucket" {
        chain: Place = "chain",
    }
}

layout! {
    struct ListenBucketLayout = "inet_listen_hashbucket" {
        head: Place = "nulls_head" | "head",
    }
}

layout! {
    struct NetTcpLayout = "net" {
        // A struct in most kernels, a pointer to one in 6.0: its size tells.
        death_row: Place = "ipv4.tcp_death_row",
        embedded: Option<Field<Gva>> = "ipv4.tcp_death_row.hashinfo",
        udp_table: Option<Field<Gva>> = "ipv4.udp_table",         // 6.2
    }
}

layout! {
    struct DeathRowLayout = "inet_timewait_death_row" {
        hashinfo: Field<Gva> = "hashinfo",
    }
}

layout! {
    struct UdpTableLayout = "udp_table" {
        hash: Field<Gva> = "hash",
        mask: Field<u32> = "mask",
    }
}

layout! {
    struct UdpSlotLayout = "udp_hslot" {
        head: Place = "head",
    }
}

layout! {
    struct RawHashLayout = "raw_hashinfo" {
        ht: Place = "ht",
    }
}

/// The hash tables are shared by all namespaces, except for those that were made with tables of their own (6.1 and later).
pub(super) fn tcp(
    kernel: &Kernel,
    reader: &SockReader,
    namespaces: &[Namespace],
    found: &mut Found,
) -> Result<(), LinuxError> {
    let layout: Arc<HashInfoLayout> = kernel.layout()?;
    let bucket: Arc<EhashBucketLayout> = kernel.layout()?;
    let listen: Arc<ListenBucketLayout> = kernel.layout()?;
    let net: Arc<NetTcpLayout> = kernel.layout()?;
    let space = kernel.space();
    let mut infos: Vec<Gva> = kernel.find_symbol(&["tcp_hashinfo"]).into_iter().collect();
    for namespace in namespaces {
        let info = match &net.embedded {
            Some(field) => field.read(space, namespace.address).ok(),
            None => kernel.layout::<DeathRowLayout>().ok().and_then(|row| {
                let at = kernel.pointer(net.death_row.at(namespace.address)).ok()?;
                row.hashinfo.read(space, at).ok()
            }),
        };
        infos.extend(info.filter(|info| !info.is_null()));
    }
    let mut seen: FxHashSet<Gva> = FxHashSet::default();
    for info in infos {
        if !seen.insert(info) {
            continue;
        }
        let read = || LinuxError::read("the tables of TCP", info);
        let node = reader.sock.node.offset();
        // Listening sockets first, as /proc/net/tcp has them.
        if let Some(listening) = &layout.listening {
            let table = Table {
                what: "TCP's listening sockets",
                heads: listening.at(info).wrapping_add(listen.head.offset()),
                count: listening.size().checked_div(listen.size).unwrap_or(0),
                stride: listen.size,
                node,
            };
            table::walk(kernel, &table, found);
        } else if let (Some(lhash2), Some(mask)) = (&layout.lhash2, &layout.lhash2_mask) {
            let table = Table {
                what: "TCP's listening sockets",
                heads: offset(lhash2.read(space, info).map_err(read())?, listen.head.offset()),
                count: u64::from(mask.read(space, info).map_err(read())?) + 1,
                stride: listen.size,
                node,
            };
            table::walk(kernel, &table, found);
        }
        let table = Table {
            what: "TCP's connections",
            heads: offset(
                layout.ehash.read(space, info).map_err(read())?,
                bucket.chain.offset(),
            ),
            count: u64::from(layout.ehash_mask.read(space, info).map_err(read())?) + 1,
            stride: bucket.size,
            node,
        };
        table::walk(kernel, &table, found);
    }
    if seen.is_empty() {
        return Err(LinuxError::NotFound(
            "the tables of TCP are not to be found".to_owned(),
        ));
    }
    Ok(())
}

/// A pointer moved on, null staying null.
pub(super) fn offset(at: Gva, by: u64) -> Gva {
    if at.is_null() { at } else { at.wrapping_add(by) }
}

/// One table for all namespaces, one for each that was made with its own (6.2 and later), and one for UDP-Lite.
pub(super) fn udp(
    kernel: &Kernel,
    reader: &SockReader,
    namespaces: &[Namespace],
    found: &mut Found,
) -> Result<(), LinuxError> {
    let layout: Arc<UdpTableLayout> = kernel.layout()?;
    let slot: Arc<UdpSlotLayout> = kernel.layout()?;
    let net: Arc<NetTcpLayout> = kernel.layout()?;
    let space = kernel.space();
    let mut tables: Vec<(&str, Gva)> = Vec::new();
    tables.extend(kernel.find_symbol(&["udp_table"]).map(|at| ("UDP sockets", at)));
    tables.extend(
        kernel
            .find_symbol(&["udplite_table"])
            .map(|at| ("UDP-Lite sockets", at)),
    );
    if let Some(field) = &net.udp_table {
        for namespace in namespaces {
            tables.extend(
                field
                    .read(space, namespace.address)
                    .ok()
                    .filter(|at| !at.is_null())
                    .map(|at| ("UDP sockets", at)),
            );
        }
    }
    let mut seen: FxHashSet<Gva> = FxHashSet::default();
    for (what, at) in tables {
        if !seen.insert(at) {
            continue;
        }
        let read = || LinuxError::read(what, at);
        let table = Table {
            what,
            heads: offset(layout.hash.read(space, at).map_err(read())?, slot.head.offset()),
            count: u64::from(layout.mask.read(space, at).map_err(read())?) + 1,
            stride: slot.size,
            node: reader.sock.node.offset(),
        };
        table::walk(kernel, &table, found);
    }
    Ok(())
}

layout! {
    struct PingTableLayout = "ping_table" {
        hash: Place = "hash",
    }
}

/// Sockets that send pings without privileges (`IPPROTO_ICMP` datagrams, net/ipv4/ping.c).
pub(super) fn ping(kernel: &Kernel, reader: &SockReader, found: &mut Found) -> Result<(), LinuxError> {
    // Without the symbol nothing is lost: such sockets are found by the descriptors that hold them.
    let Some(at) = kernel.find_symbol(&["ping_table"]) else {
        return Ok(());
    };
    let layout: Arc<PingTableLayout> = kernel.layout()?;
    let table = Table {
        what: "ping sockets",
        heads: layout.hash.at(at),
        count: layout.hash.size() / 8,
        stride: 8,
        node: reader.sock.node.offset(),
    };
    table::walk(kernel, &table, found);
    Ok(())
}

/// One table for IPv4 and one for IPv6.
pub(super) fn raw(kernel: &Kernel, reader: &SockReader, found: &mut Found) -> Result<(), LinuxError> {
    let layout: Arc<RawHashLayout> = kernel.layout()?;
    for symbol in ["raw_v4_hashinfo", "raw_v6_hashinfo"] {
        let Some(at) = kernel.find_symbol(&[symbol]) else {
            continue;
        };
        let table = Table {
            what: "raw sockets",
            heads: layout.ht.at(at),
            count: layout.ht.size() / 8,
            stride: 8,
            node: reader.sock.node.offset(),
        };
        table::walk(kernel, &table, found);
    }
    Ok(())
}
