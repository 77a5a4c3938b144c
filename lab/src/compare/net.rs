//! Sockets and interfaces of every network namespace.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use vmsight_linux::Kernel;
use vmsight_linux::iface::Interface;
use vmsight_linux::socket::{Socket, SocketFilter};

use super::{Differences, spelt};
use crate::truth::{InetSocket, NetNamespace, Truth};

/// Compares `Kernel::sockets` with `/proc/net` of every namespace: TCP, UDP, UDP-Lite, raw, ping, packet, netlink, vsock.
pub fn sockets(kernel: &Kernel, truth: &Truth) -> anyhow::Result<Differences> {
    let mut out = Differences::default();
    let listing = kernel.sockets(SocketFilter::ALL)?;
    out.complaints("sockets", &listing.warnings);
    for row in &listing.rows {
        out.complaints(&format!("socket {}", row.endpoint()), &row.problems);
    }
    let owners = owners(truth);
    for namespace in &truth.net {
        let rows: Vec<&Socket> = listing
            .rows
            .iter()
            .filter(|r| r.namespace.map(u64::from) == Some(namespace.inode))
            .collect();
        inet(namespace, &rows, &owners, &mut out);
        packet(namespace, &rows, &mut out);
        netlink(namespace, &rows, &mut out);
    }
    for said in &truth.vsock {
        let at = |what: &str| format!("{what} of vsock {}", said.inode);
        // A connection that nobody has accepted yet has no inode: its ends tell it apart.
        let row = listing
            .rows
            .iter()
            .filter(|r| r.family == "vsock")
            .find(|r| match said.inode {
                0 => {
                    r.inode.is_none()
                        && r.local_port == Some(said.port)
                        && r.remote_port == Some(said.peer_port)
                }
                inode => r.inode == Some(inode),
            });
        let Some(row) = row else {
            out.differs(at("nothing"));
            continue;
        };
        let cid = |cid: u32| {
            if cid == u32::MAX {
                "*".to_owned()
            } else {
                cid.to_string()
            }
        };
        out.same(at("address"), row.local_address.clone(), Some(cid(said.cid)));
        out.same(
            at("port"),
            row.local_port,
            (said.port != u32::MAX).then_some(said.port),
        );
        out.same(
            at("remote address"),
            row.remote_address.clone(),
            Some(cid(said.peer_cid)),
        );
        out.same(
            at("remote port"),
            row.remote_port,
            (said.peer_port != u32::MAX).then_some(said.peer_port),
        );
        let state = match said.state {
            1 => "ESTABLISHED",
            2 => "SYN_SENT",
            10 => "LISTEN",
            _ => "UNCONNECTED",
        };
        out.same(at("state"), row.state.as_str(), state);
    }
    Ok(out)
}

/// Who has which socket open, by the guest's account: inode to `PID/FD`.
fn owners(truth: &Truth) -> BTreeMap<u64, BTreeSet<String>> {
    let mut owners: BTreeMap<u64, BTreeSet<String>> = BTreeMap::new();
    for process in &truth.processes {
        for fd in process.fds.iter().filter(|f| f.link.starts_with("socket:[")) {
            owners
                .entry(fd.inode)
                .or_default()
                .insert(format!("{}/{}", process.pid, fd.fd));
        }
    }
    owners
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

fn inet(
    namespace: &NetNamespace,
    rows: &[&Socket],
    owners: &BTreeMap<u64, BTreeSet<String>>,
    out: &mut Differences,
) {
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
        held_by(&at("holders"), row, owners, out);
    }
}

fn held_by(at: &str, row: &Socket, owners: &BTreeMap<u64, BTreeSet<String>>, out: &mut Differences) {
    let seen: BTreeSet<String> = row.owners.iter().map(|o| format!("{}/{}", o.pid, o.fd)).collect();
    let said = row
        .inode
        .and_then(|inode| owners.get(&inode))
        .cloned()
        .unwrap_or_default();
    out.same(at, seen, said);
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
        let protocol = match said.protocol {
            0 => "none".to_owned(),
            3 => "all".to_owned(),
            0x800 => "ip".to_owned(),
            0x806 => "arp".to_owned(),
            0x86dd => "ipv6".to_owned(),
            other => format!("{other:#06x}"),
        };
        out.same(at("protocol"), &row.protocol, &protocol);
    }
}

fn netlink(namespace: &NetNamespace, rows: &[&Socket], out: &mut Differences) {
    let key = |protocol: &str, port: u32, inode: u64| format!("{protocol} {port} {inode}");
    let name = |number: u32| match number {
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
    };
    let groups = |row: &Socket| {
        row.groups
            .iter()
            .filter(|g| **g <= 32)
            .fold(0u32, |bits, g| bits | 1 << (g - 1))
    };
    let seen: BTreeMap<String, u32> = rows
        .iter()
        .filter(|r| r.family == "netlink" && r.listed)
        .map(|r| {
            (
                key(
                    &r.protocol,
                    r.local_port.unwrap_or_default(),
                    r.inode.unwrap_or_default(),
                ),
                groups(r),
            )
        })
        .collect();
    let said: BTreeMap<String, u32> = namespace
        .netlink
        .iter()
        .map(|n| (key(&name(n.protocol), n.port, n.inode), n.groups))
        .collect();
    out.same(
        format!("netlink sockets of namespace {}", namespace.inode),
        seen,
        said,
    );
}

/// Compares `Kernel::unix_sockets` with `/proc/net/unix` and `unix_diag` of every namespace.
pub fn unix(kernel: &Kernel, truth: &Truth) -> anyhow::Result<Differences> {
    let mut out = Differences::default();
    let listing = kernel.unix_sockets()?;
    out.complaints("UNIX sockets", &listing.warnings);
    let owners = owners(truth);
    for namespace in &truth.net {
        let rows: BTreeMap<u64, _> = listing
            .rows
            .iter()
            .filter(|r| r.namespace.map(u64::from) == Some(namespace.inode) && r.listed)
            .filter_map(|r| Some((r.inode?, r)))
            .collect();
        let said: BTreeSet<u64> = namespace
            .unix
            .iter()
            .map(|u| u.inode)
            .filter(|&inode| inode != 0)
            .collect();
        out.same(
            format!("UNIX sockets of namespace {}", namespace.inode),
            rows.keys().copied().collect::<BTreeSet<_>>(),
            said,
        );
        for said in &namespace.unix {
            let Some(row) = rows.get(&said.inode) else {
                continue;
            };
            let at = |what: &str| format!("{what} of UNIX socket {}", said.inode);
            out.complaints(&at("row"), &row.problems);
            let kind = match said.kind {
                1 => "stream",
                2 => "dgram",
                _ => "seqpacket",
            };
            out.same(at("kind"), row.kind, Some(kind));
            let state = match (said.flags & 0x10000 != 0, said.state) {
                (true, _) => "LISTEN",
                (_, 1) => "UNCONNECTED",
                (_, 2) => "CONNECTING",
                (_, 3) => "CONNECTED",
                _ => "DISCONNECTING",
            };
            out.same(at("state"), row.state, state);
            out.same(at("references"), row.references, Some(said.refs));
            // vmsight writes the NUL bytes of an abstract name as /proc does.
            let path = if said.path.bytes().first() == Some(&0) {
                said.path
                    .bytes()
                    .iter()
                    .map(|b| if *b == 0 { b'@' } else { *b })
                    .collect::<Vec<u8>>()
            } else {
                said.path.bytes().to_vec()
            };
            let path = vmsight_linux::text::guest_text(&path);
            out.same(at("name"), row.path.clone().unwrap_or_default(), path);
            if let Some(peer) = said.peer {
                out.same(at("peer"), row.peer_inode, (peer != 0).then_some(peer));
            }
            let held = |o: &[vmsight_linux::file::Owner]| -> BTreeSet<String> {
                o.iter().map(|o| format!("{}/{}", o.pid, o.fd)).collect()
            };
            let holders = |inode: u64| owners.get(&inode).cloned().unwrap_or_default();
            out.same(at("holders"), held(&row.owners), holders(said.inode));
            if let Some(peer) = said.peer {
                out.same(at("peer's holders"), held(&row.peer_owners), holders(peer));
            }
        }
    }
    Ok(out)
}

/// Compares `Kernel::interfaces` with rtnetlink's account in every namespace.
pub fn interfaces(kernel: &Kernel, truth: &Truth) -> anyhow::Result<Differences> {
    let mut out = Differences::default();
    let listing = kernel.interfaces()?;
    out.complaints("interfaces", &listing.warnings);
    for namespace in &truth.net {
        let rows: Vec<&Interface> = listing
            .rows
            .iter()
            .filter(|r| u64::from(r.namespace) == namespace.inode)
            .collect();
        let seen: BTreeSet<String> = rows.iter().map(|r| r.name.clone()).collect();
        let said: BTreeSet<String> = namespace.interfaces.iter().map(|i| spelt(&i.name)).collect();
        out.same(format!("interfaces of namespace {}", namespace.inode), seen, said);
        for said in &namespace.interfaces {
            let Some(row) = rows.iter().find(|r| r.name == spelt(&said.name)) else {
                continue;
            };
            let at = |what: &str| format!("{what} of {} in namespace {}", row.name, namespace.inode);
            out.complaints(&at("row"), &row.problems);
            out.same(at("index"), u32::try_from(row.index), Ok(said.index));
            out.same(at("MTU"), row.mtu, said.mtu);
            out.same(
                at("address"),
                row.mac.clone().unwrap_or_default(),
                said.mac.clone(),
            );
            out.same(at("promiscuity"), row.promiscuity, said.promiscuity);
            out.same(
                at("kind"),
                row.kind.clone().unwrap_or_default(),
                said.kind.clone(),
            );
            out.same(at("flags"), &row.flags, &flags(said.flags));
            let link_type = match said.hardware_type {
                1 => "ether".to_owned(),
                768 => "ipip".to_owned(),
                769 => "tunnel6".to_owned(),
                772 => "loopback".to_owned(),
                776 => "sit".to_owned(),
                65534 => "none".to_owned(),
                other => other.to_string(),
            };
            out.same(at("type"), &row.link_type, &link_type);
            let seen: BTreeSet<String> = row.ipv4.iter().chain(&row.ipv6).cloned().collect();
            let addresses: BTreeSet<String> = said
                .addresses
                .iter()
                .map(|(ip, len)| format!("{ip}/{len}"))
                .collect();
            out.same(at("addresses"), seen, addresses);
            let master = namespace
                .interfaces
                .iter()
                .find(|i| i.index == said.master)
                .map(|i| spelt(&i.name));
            out.same(at("master"), row.master.clone(), master);
        }
    }
    Ok(out)
}

/// `IFF_*` by name (include/uapi/linux/if.h).
fn flags(bits: u32) -> Vec<&'static str> {
    const NAMES: [&str; 19] = [
        "up",
        "broadcast",
        "debug",
        "loopback",
        "pointopoint",
        "notrailers",
        "running",
        "noarp",
        "promisc",
        "allmulti",
        "master",
        "slave",
        "multicast",
        "portsel",
        "automedia",
        "dynamic",
        "lower_up",
        "dormant",
        "echo",
    ];
    NAMES
        .iter()
        .enumerate()
        .filter(|(bit, _)| bits >> bit & 1 == 1)
        .map(|(_, name)| *name)
        .collect()
}
