//! Sockets and interfaces of every network namespace.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result};
use vmsight_workload::{InetSocket, NetNamespace, NetlinkSocket, PacketSocket, Process, Text, UnixSocket};

use super::{diag, files, one_per_namespace};

/// States by number, include/net/tcp_states.h.
const STATES: [&str; 14] = [
    "?",
    "ESTABLISHED",
    "SYN_SENT",
    "SYN_RECV",
    "FIN_WAIT1",
    "FIN_WAIT2",
    "TIME_WAIT",
    "CLOSE",
    "CLOSE_WAIT",
    "LAST_ACK",
    "LISTEN",
    "CLOSING",
    "SYN_RECV",
    "BOUND_INACTIVE",
];

/// What /proc/PID/net says, of every namespace.
pub(super) fn tables(processes: &[Process]) -> Result<Vec<NetNamespace>> {
    let mut found = Vec::new();
    for (inode, process) in one_per_namespace(processes, "net", |_| true) {
        let at = format!("/proc/{}/net", process.pid);
        let mut inet = Vec::new();
        for table in [
            "tcp", "tcp6", "udp", "udp6", "udplite", "udplite6", "raw", "raw6", "icmp", "icmp6",
        ] {
            // A table that the kernel does not have has no file.
            for row in rows(&format!("{at}/{table}")).unwrap_or_default() {
                inet.push(inet_row(table, &row).with_context(|| format!("row '{row}' of {table}"))?);
            }
        }
        let parse = |table: &str, row: fn(&[&str]) -> Option<Row>| -> Result<Vec<Row>> {
            rows(&format!("{at}/{table}"))?
                .iter()
                .map(|line| {
                    let words: Vec<&str> = line.split_ascii_whitespace().collect();
                    row(&words).with_context(|| format!("row '{line}' of {table}"))
                })
                .collect()
        };
        let mut namespace = NetNamespace {
            inode,
            pid: process.pid,
            inet,
            unix: unix_rows(&at)?,
            ..NetNamespace::default()
        };
        for row in parse("packet", packet_row)?
            .into_iter()
            .chain(parse("netlink", netlink_row)?)
        {
            match row {
                Row::Packet(socket) => namespace.packet.push(socket),
                Row::Netlink(socket) => namespace.netlink.push(socket),
            }
        }
        found.push(namespace);
    }
    Ok(found)
}

/// What only the kernel's netlink interfaces tell: interfaces, neighbours, routes, and who is connected to whom. Asked after all tables
/// were read, so that the asking does not show up in them.
pub(super) fn ask_kernel(namespaces: &mut [NetNamespace]) -> Result<()> {
    for namespace in namespaces {
        let pid = namespace.pid;
        let asked = std::thread::spawn(move || -> Result<_> {
            let file = std::fs::File::open(format!("/proc/{pid}/ns/net"))?;
            nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET)?;
            Ok((
                diag::interfaces()?,
                diag::unix_sockets()?,
                diag::neighbours()?,
                diag::routes()?,
            ))
        });
        let (interfaces, unix, neighbours, routes) = asked
            .join()
            .map_err(|_| anyhow::anyhow!("the thread that asked ended badly"))?
            .with_context(|| format!("network namespace of pid {pid}"))?;
        namespace.interfaces = interfaces;
        namespace.neighbours = neighbours;
        namespace.routes = routes;
        let unix: BTreeMap<u64, diag::UnixDetail> = unix.into_iter().map(|u| (u.inode, u)).collect();
        for socket in &mut namespace.unix {
            if let Some(detail) = unix.get(&socket.inode) {
                socket.peer = detail.peer;
                socket.uid = detail.uid;
                (socket.rx_queue, socket.tx_queue) = detail.queues.unzip();
                if let Some(name) = &detail.name {
                    socket.path = Text::from(name.as_slice());
                }
            }
        }
    }
    Ok(())
}

enum Row {
    Packet(PacketSocket),
    Netlink(NetlinkSocket),
}

/// The lines after the heading.
fn rows(path: &str) -> Result<Vec<String>> {
    let text = String::from_utf8_lossy(&files::bytes(path)?).into_owned();
    Ok(text
        .lines()
        .skip(1)
        .filter(|l| !l.trim().is_empty())
        .map(str::to_owned)
        .collect())
}

fn inet_row(table: &str, row: &str) -> Option<InetSocket> {
    let words: Vec<&str> = row.split_ascii_whitespace().collect();
    let (local, local_port) = endpoint(words.get(1)?)?;
    let (remote, remote_port) = endpoint(words.get(2)?)?;
    let state = usize::from_str_radix(words.get(3)?, 16).ok()?;
    let (tx, rx) = words.get(4)?.split_once(':')?;
    Some(InetSocket {
        table: table.to_owned(),
        local,
        local_port,
        remote,
        remote_port,
        state: STATES.get(state).copied().unwrap_or("?").to_owned(),
        uid: words.get(7)?.parse().ok()?,
        inode: words.get(9)?.parse().ok()?,
        tx_queue: u64::from_str_radix(tx, 16).ok()?,
        rx_queue: u64::from_str_radix(rx, 16).ok()?,
        address: address(words.get(11).copied()),
    })
}

/// The address of a kernel object, 0 where a hash, a zero or nothing stands in its place.
fn address(word: Option<&str>) -> u64 {
    let number = word.and_then(|w| u64::from_str_radix(w.trim_end_matches(':'), 16).ok());
    number.filter(|n| n >> 48 == 0xffff).unwrap_or_default()
}

/// `0100007F:1F90`, or with four words for IPv6: each word of the address as the CPU reads it.
fn endpoint(text: &str) -> Option<(IpAddr, u16)> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let words = (0..address.len() / 8)
        .map(|i| u32::from_str_radix(address.get(i * 8..i * 8 + 8)?, 16).ok())
        .collect::<Option<Vec<u32>>>()?;
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    let address = match bytes.len() {
        4 => IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?)),
        16 => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?)),
        _ => return None,
    };
    Some((address, port))
}

fn unix_rows(at: &str) -> Result<Vec<UnixSocket>> {
    let raw = files::bytes(format!("{at}/unix"))?;
    raw.split(|b| *b == b'\n')
        .skip(1)
        .filter(|line| !line.is_empty())
        .map(|line| {
            unix_row(line).with_context(|| format!("row '{}' of unix", String::from_utf8_lossy(line)))
        })
        .collect()
}

/// `address: refs protocol flags type state inode path`; a path may hold anything but a line break.
fn unix_row(line: &[u8]) -> Option<UnixSocket> {
    let mut rest = line;
    let mut words = Vec::new();
    while words.len() < 7 {
        let from = rest.iter().position(|b| *b != b' ')?;
        let end = rest[from..]
            .iter()
            .position(|b| *b == b' ')
            .map_or(rest.len(), |n| from + n);
        words.push(std::str::from_utf8(&rest[from..end]).ok()?);
        rest = &rest[end..];
    }
    let hex = |at: usize| u32::from_str_radix(words[at], 16).ok();
    let mut path = rest.strip_prefix(b" ").unwrap_or_default().to_vec();
    // The kernel prints NUL as '@'. unix_diag tells the truth of the rest of the name.
    if let Some(first) = path.first_mut().filter(|b| **b == b'@') {
        *first = 0;
    }
    Some(UnixSocket {
        refs: hex(1)?,
        flags: hex(3)?,
        kind: hex(4)?,
        state: hex(5)?,
        inode: words[6].parse().ok()?,
        path: Text(path),
        peer: None,
        uid: None,
        rx_queue: None,
        tx_queue: None,
        address: address(words.first().copied()),
    })
}

fn packet_row(words: &[&str]) -> Option<Row> {
    Some(Row::Packet(PacketSocket {
        kind: words.get(2)?.parse().ok()?,
        protocol: u16::from_str_radix(words.get(3)?, 16).ok()?,
        interface: words.get(4)?.parse().ok()?,
        running: *words.get(5)? == "1",
        uid: words.get(7)?.parse().ok()?,
        inode: words.get(8)?.parse().ok()?,
        address: address(words.first().copied()),
    }))
}

fn netlink_row(words: &[&str]) -> Option<Row> {
    Some(Row::Netlink(NetlinkSocket {
        protocol: words.get(1)?.parse().ok()?,
        port: words.get(2)?.parse().ok()?,
        groups: u32::from_str_radix(words.get(3)?, 16).ok()?,
        inode: words.get(9)?.parse().ok()?,
        address: address(words.first().copied()),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_as_the_kernel_prints_them() {
        assert_eq!(
            endpoint("0100007F:1F90"),
            Some(("127.0.0.1".parse().unwrap(), 8080))
        );
        let v6 = endpoint("B80D0120000000000000000001000000:0035");
        assert_eq!(v6, Some(("2001:db8::1".parse().unwrap(), 53)));
        assert_eq!(endpoint("0100:1F90"), None);
    }

    #[test]
    fn a_tcp_row() {
        let row = "   1: 0100007F:1B59 0100007F:C350 08 00000001:00000002 00:00000000 00000000  1000        0 4242 1 0";
        let socket = inet_row("tcp", row).unwrap();
        assert_eq!(
            (socket.state.as_str(), socket.uid, socket.inode),
            ("CLOSE_WAIT", 1000, 4242)
        );
        assert_eq!((socket.local_port, socket.remote_port), (7001, 50000));
        assert_eq!((socket.tx_queue, socket.rx_queue, socket.address), (1, 2, 0));
    }

    #[test]
    fn unix_rows_with_and_without_a_name() {
        let named = unix_row(b"0000000000000000: 00000002 00000000 00010000 0001 01  123 /run/a b").unwrap();
        assert_eq!(
            (named.inode, named.flags, named.kind, named.state),
            (123, 0x10000, 1, 1)
        );
        assert_eq!(named.path, "/run/a b");
        let bare = unix_row(b"0000000000000000: 00000003 00000000 00000000 0002 01 7").unwrap();
        assert!(bare.path.is_empty() && bare.address == 0);
        let shown = unix_row(b"ffff888012345600: 00000003 00000000 00000000 0002 01 7").unwrap();
        assert_eq!(shown.address, 0xffff_8880_1234_5600);
        let hidden = unix_row(b"0000000000000000: 00000003 00000000 00000000 0002 01 7 @x").unwrap();
        assert_eq!(hidden.path.bytes(), b"\0x");
    }
}
