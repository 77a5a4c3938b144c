//! Sockets of every network namespace but UNIX sockets.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use vmsight_linux::Kernel;
use vmsight_linux::socket::{Socket, SocketFilter};

use super::{Differences, files, holders};
use crate::truth::{InetSocket, NetNamespace, Truth, VsockSocket};

/// Compares `Kernel::sockets` with `/proc/net` of every namespace: TCP, UDP, UDP-Lite, raw, ping, packet, netlink; with `vsock_diag`;
/// and with everybody's file descriptors: who holds a socket, and whose it is.
///
/// What the guest does not say: a socket's cookie, which is made when somebody asks for it; netlink groups above 32 and the port that
/// a netlink socket is connected to (both are for `netlink_diag`, which the kernels of the lab have as a module that is not loaded);
/// the interface of sockets that are bound to one, but for packet sockets.
pub fn sockets(kernel: &Kernel, truth: &Truth) -> anyhow::Result<Differences> {
    let mut out = Differences::default();
    let listing = kernel.sockets(SocketFilter::ALL)?;
    out.complaints("sockets", &listing.warnings);
    for row in &listing.rows {
        out.complaints(&format!("socket {}", row.endpoint()), &row.problems);
    }
    held(&listing.rows, truth, &mut out);
    for namespace in &truth.net {
        let rows: Vec<&Socket> = listing
            .rows
            .iter()
            .filter(|r| r.namespace.map(u64::from) == Some(namespace.inode))
            .collect();
        inet(namespace, &rows, &mut out);
        packet(namespace, &rows, &mut out);
        netlink(namespace, &rows, &mut out);
    }
    vsock(truth, &listing.rows, &mut out);
    Ok(out)
}

/// Who has each socket open, and that every socket somebody has open is among the rows or among the UNIX sockets.
fn held(rows: &[Socket], truth: &Truth, out: &mut Differences) {
    let (owners, uids) = (holders::of_sockets(truth), holders::uids_of_sockets(truth));
    for row in rows {
        let seen: BTreeSet<String> = row.owners.iter().map(files::owner).collect();
        let said = row.inode.and_then(|inode| owners.get(&inode)).cloned();
        let at = |what: &str| format!("{what} of {} ({:?})", row.endpoint(), row.inode);
        out.same(at("holders"), seen, said.unwrap_or_default());
        if let Some(&uid) = row.inode.and_then(|inode| uids.get(&inode)) {
            out.same(at("uid"), row.uid, Some(uid));
        }
    }
    let unix = truth.net.iter().flat_map(|n| &n.unix).map(|s| s.inode);
    let known: BTreeSet<u64> = rows.iter().filter_map(|r| r.inode).chain(unix).collect();
    let unknown: Vec<&u64> = owners.keys().filter(|inode| !known.contains(inode)).collect();
    out.same("sockets that only descriptors show", Vec::<&u64>::new(), unknown);
}

/// The address of the kernel's object, where the guest shows it.
pub(super) fn address(at: &dyn Fn(&str) -> String, seen: u64, said: u64, out: &mut Differences) {
    if said != 0 {
        out.same(at("address"), seen, said);
    }
}

/// A socket's identity in its table; those without a file have no inode, and are told apart by their ends.
fn key(table: &str, inode: u64, local: (String, u32), remote: (String, u32)) -> String {
    if inode == 0 {
        format!("{table} {}:{}->{}:{}", local.0, local.1, remote.0, remote.1)
    } else {
        format!("{table} {inode}")
    }
}

fn table(row: &Socket) -> Option<String> {
    let name = match row.protocol.as_str() {
        "icmpv6" => "icmp",
        other => other,
    };
    match row.family.as_str() {
        "ipv4" => Some(name.to_owned()),
        "ipv6" => Some(format!("{name}6")),
        _ => None,
    }
}

fn inet(namespace: &NetNamespace, rows: &[&Socket], out: &mut Differences) {
    let tables: BTreeSet<&str> = namespace.inet.iter().map(|s| s.table.as_str()).collect();
    let mut seen: BTreeMap<String, &Socket> = BTreeMap::new();
    for row in rows.iter().filter(|r| r.listed) {
        let Some(table) = table(row) else { continue };
        let end = |address: &Option<String>, port: Option<u32>| {
            (address.clone().unwrap_or_default(), port.unwrap_or_default())
        };
        let key = key(
            &table,
            row.inode.unwrap_or_default(),
            end(&row.local_address, row.local_port),
            end(&row.remote_address, row.remote_port),
        );
        if tables.contains(table.as_str()) || !matches!(table.as_str(), "tcp" | "tcp6" | "udp" | "udp6") {
            seen.insert(key, row);
        }
    }
    let ip = |ip: IpAddr| ip.to_string();
    let said: BTreeMap<String, &InetSocket> = namespace
        .inet
        .iter()
        .map(|s| {
            let ends = (
                (ip(s.local), s.local_port.into()),
                (ip(s.remote), s.remote_port.into()),
            );
            (key(&s.table, s.inode, ends.0, ends.1), s)
        })
        .collect();
    let lasting = |key: &&String| said.get(*key).is_none_or(|s| !s.is_transient());
    for key in said.keys().filter(lasting).filter(|k| !seen.contains_key(*k)) {
        out.differs(format!(
            "namespace {}: vmsight does not see {key}",
            namespace.inode
        ));
    }
    for (key, row) in &seen {
        let Some(said) = said.get(key) else {
            if row.state != "TIME_WAIT" && row.state != "SYN_RECV" {
                out.differs(format!(
                    "namespace {}: the guest does not know {key}",
                    namespace.inode
                ));
            }
            continue;
        };
        let at = |what: &str| format!("{what} of {key} in namespace {}", namespace.inode);
        out.same(
            at("local address"),
            row.local_address.clone(),
            Some(ip(said.local)),
        );
        out.same(at("local port"), row.local_port, Some(u32::from(said.local_port)));
        out.same(
            at("remote address"),
            row.remote_address.clone(),
            Some(ip(said.remote)),
        );
        out.same(
            at("remote port"),
            row.remote_port,
            Some(u32::from(said.remote_port)),
        );
        let state = match (said.table.trim_end_matches('6'), said.state.as_str()) {
            ("tcp", state) => state,
            (_, "CLOSE") => "UNCONNECTED",
            (_, state) => state,
        };
        out.same(at("state"), row.state.as_str(), state);
        if !said.is_transient() || said.state == "SYN_RECV" {
            out.same(at("owner"), row.uid.unwrap_or_default(), said.uid);
        }
        out.same(
            at("receive queue"),
            row.receive_queue.map(u64::from),
            Some(said.rx_queue),
        );
        out.same(
            at("send queue"),
            row.send_queue.map(u64::from),
            Some(said.tx_queue),
        );
        let kind = match said.table.trim_end_matches('6') {
            // What is left of a connection or is none yet has no kind.
            _ if said.is_transient() => None,
            "tcp" => Some("stream"),
            "raw" => Some("raw"),
            _ => Some("dgram"),
        };
        out.same(at("kind"), row.kind, kind);
        address(&at, row.address.0, said.address, out);
    }
}

fn packet(namespace: &NetNamespace, rows: &[&Socket], out: &mut Differences) {
    let seen: BTreeMap<u64, &&Socket> = rows
        .iter()
        .filter(|r| r.family == "packet")
        .map(|r| (r.inode.unwrap_or_default(), r))
        .collect();
    let said: BTreeSet<u64> = namespace.packet.iter().map(|p| p.inode).collect();
    out.same(
        "packet sockets",
        seen.keys().copied().collect::<BTreeSet<_>>(),
        said,
    );
    for said in &namespace.packet {
        let Some(row) = seen.get(&said.inode) else {
            continue;
        };
        let at = |what: &str| format!("{what} of packet socket {}", said.inode);
        out.same(
            at("kind"),
            row.kind,
            if said.kind == 3 {
                Some("raw")
            } else {
                Some("dgram")
            },
        );
        out.same(at("interface"), row.interface.unwrap_or_default(), said.interface);
        out.same(at("owner"), row.uid, Some(said.uid));
        out.same(at("protocol"), &row.protocol, &ether_protocol(said.protocol));
        address(&at, row.address.0, said.address, out);
    }
}

/// `ETH_P_*` by name.
pub(super) fn ether_protocol(number: u16) -> String {
    match number {
        0 => "none".to_owned(),
        3 => "all".to_owned(),
        0x800 => "ip".to_owned(),
        0x806 => "arp".to_owned(),
        0x86dd => "ipv6".to_owned(),
        other => format!("{other:#06x}"),
    }
}

fn netlink(namespace: &NetNamespace, rows: &[&Socket], out: &mut Differences) {
    let key = |protocol: &str, port: u32, inode: u64| format!("{protocol} {port} {inode}");
    let seen: BTreeMap<String, &Socket> = rows
        .iter()
        .filter(|r| r.family == "netlink" && r.listed)
        .map(|r| {
            let (port, inode) = (r.local_port.unwrap_or_default(), r.inode.unwrap_or_default());
            (key(&r.protocol, port, inode), *r)
        })
        .collect();
    let said: BTreeMap<String, _> = namespace
        .netlink
        .iter()
        .map(|n| (key(&netlink_protocol(n.protocol), n.port, n.inode), n))
        .collect();
    out.same(
        format!("netlink sockets of namespace {}", namespace.inode),
        seen.keys().collect::<Vec<_>>(),
        said.keys().collect::<Vec<_>>(),
    );
    for (key, said) in said {
        let Some(row) = seen.get(&key) else { continue };
        let at = |what: &str| format!("{what} of netlink socket {key} in namespace {}", namespace.inode);
        let groups = row.groups.iter().filter(|g| (1..=32).contains(*g));
        out.same(
            at("groups"),
            groups.fold(0u32, |bits, g| bits | 1 << (g - 1)),
            said.groups,
        );
        address(&at, row.address.0, said.address, out);
    }
}

/// Netlink's families by name.
pub(super) fn netlink_protocol(number: u32) -> String {
    match number {
        0 => "route".to_owned(),
        2 => "usersock".to_owned(),
        4 => "sock_diag".to_owned(),
        6 => "xfrm".to_owned(),
        7 => "selinux".to_owned(),
        9 => "audit".to_owned(),
        10 => "fib_lookup".to_owned(),
        11 => "connector".to_owned(),
        12 => "netfilter".to_owned(),
        15 => "kobject_uevent".to_owned(),
        16 => "generic".to_owned(),
        18 => "scsitransport".to_owned(),
        20 => "rdma".to_owned(),
        21 => "crypto".to_owned(),
        other => format!("protocol-{other}"),
    }
}

fn vsock(truth: &Truth, rows: &[Socket], out: &mut Differences) {
    // A connection that nobody has accepted yet has no inode: its ends tell it apart.
    let key = |inode: u64, port: Option<u32>, remote: Option<u32>| match inode {
        0 => format!("{port:?}->{remote:?}"),
        inode => inode.to_string(),
    };
    let port = |port: u32| (port != u32::MAX).then_some(port);
    let seen: BTreeMap<String, &Socket> = rows
        .iter()
        .filter(|r| r.family == "vsock")
        .map(|r| (key(r.inode.unwrap_or_default(), r.local_port, r.remote_port), r))
        .collect();
    let said: BTreeMap<String, &VsockSocket> = truth
        .vsock
        .iter()
        .map(|s| (key(s.inode, port(s.port), port(s.peer_port)), s))
        .collect();
    out.same(
        "vsock sockets",
        seen.keys().collect::<Vec<_>>(),
        said.keys().collect::<Vec<_>>(),
    );
    for (key, said) in said {
        let Some(row) = seen.get(&key) else { continue };
        let at = |what: &str| format!("{what} of vsock {key}");
        let cid = |cid: u32| {
            if cid == u32::MAX {
                "*".to_owned()
            } else {
                cid.to_string()
            }
        };
        out.same(at("address"), row.local_address.clone(), Some(cid(said.cid)));
        out.same(at("port"), row.local_port, port(said.port));
        out.same(
            at("remote address"),
            row.remote_address.clone(),
            Some(cid(said.peer_cid)),
        );
        out.same(at("remote port"), row.remote_port, port(said.peer_port));
        out.same(at("state"), row.state.as_str(), vsock_state(said.state));
        let kind = match said.kind {
            1 => "stream",
            2 => "dgram",
            _ => "seqpacket",
        };
        out.same(at("kind"), row.kind, Some(kind));
    }
}

/// A vsock socket's state by its TCP-like number.
pub(super) fn vsock_state(number: u32) -> &'static str {
    match number {
        1 => "ESTABLISHED",
        2 => "SYN_SENT",
        10 => "LISTEN",
        _ => "UNCONNECTED",
    }
}
