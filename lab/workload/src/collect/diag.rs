//! A small netlink reader: interfaces and their addresses, neighbours, routes (rtnetlink), UNIX peers and vsock (sock_diag).
//!
//! Message layouts: include/uapi/linux/{netlink,rtnetlink,if_link,if_addr,neighbour,unix_diag,vm_sockets_diag}.h.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, bail};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};
use vmsight_workload::{Interface, Neighbour, Route, Text, VsockSocket};

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST_DUMP: u16 = 0x301;
const RTM_GETLINK: u16 = 18;
const RTM_GETADDR: u16 = 22;
const RTM_GETROUTE: u16 = 26;
const RTM_GETNEIGH: u16 = 30;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const AF_UNIX: u8 = 1;
const AF_VSOCK: u8 = 40;

/// What unix_diag knows of a socket beyond /proc/net/unix.
pub(super) struct UnixDetail {
    pub(super) inode: u64,
    pub(super) name: Option<Vec<u8>>,
    pub(super) peer: Option<u64>,
    pub(super) uid: Option<u32>,
    /// What waits to be read, and what was sent.
    pub(super) queues: Option<(u32, u32)>,
}

/// Interfaces of this thread's network namespace.
pub(super) fn interfaces() -> Result<Vec<Interface>> {
    let mut found: Vec<Interface> = dump(SockProtocol::NetlinkRoute, RTM_GETLINK, &[0; 16])?
        .iter()
        .filter_map(|m| interface(m))
        .collect();
    for message in dump(SockProtocol::NetlinkRoute, RTM_GETADDR, &[0; 8])? {
        let Some((index, address, prefix)) = address(&message) else {
            continue;
        };
        if let Some(interface) = found.iter_mut().find(|i| i.index == index) {
            interface.addresses.push((address, prefix));
        }
    }
    Ok(found)
}

/// Neighbours of this thread's network namespace.
pub(super) fn neighbours() -> Result<Vec<Neighbour>> {
    let mut found = Vec::new();
    for family in [AF_INET, AF_INET6] {
        let mut request = [0; 12];
        request[0] = family;
        let replies = dump(SockProtocol::NetlinkRoute, RTM_GETNEIGH, &request)?;
        found.extend(replies.iter().filter_map(|m| neighbour(m)));
    }
    Ok(found)
}

/// Routes of this thread's network namespace.
pub(super) fn routes() -> Result<Vec<Route>> {
    let mut found = Vec::new();
    for family in [AF_INET, AF_INET6] {
        let mut request = [0; 12];
        request[0] = family;
        let replies = dump(SockProtocol::NetlinkRoute, RTM_GETROUTE, &request)?;
        found.extend(replies.iter().filter_map(|m| route(m)));
    }
    Ok(found)
}

/// UNIX sockets of this thread's network namespace.
pub(super) fn unix_sockets() -> Result<Vec<UnixDetail>> {
    const NAME_PEER_QUEUES_UID: u32 = 1 | 4 | 0x10 | 0x40;
    let replies = dump(
        SockProtocol::NetlinkSockDiag,
        SOCK_DIAG_BY_FAMILY,
        &diag_request(AF_UNIX, NAME_PEER_QUEUES_UID),
    )?;
    Ok(replies
        .iter()
        .filter_map(|message| {
            let attributes = attributes(message.get(16..)?);
            Some(UnixDetail {
                inode: u64::from(word(message, 4)?),
                name: find(&attributes, 0).map(|name| socket_name(name).to_vec()),
                peer: find(&attributes, 2).and_then(|a| word(a, 0)).map(u64::from),
                uid: find(&attributes, 7).and_then(|a| word(a, 0)),
                queues: find(&attributes, 4).and_then(|a| Some((word(a, 0)?, word(a, 4)?))),
            })
        })
        .collect())
}

/// A path comes with the NUL that ends it; an abstract name, which starts with one, ends where it ends.
fn socket_name(raw: &[u8]) -> &[u8] {
    if raw.first() == Some(&0) {
        raw
    } else {
        raw.strip_suffix(b"\0").unwrap_or(raw)
    }
}

/// All AF_VSOCK sockets; an error where the kernel has no vsock_diag.
pub(super) fn vsock_sockets() -> Result<Vec<VsockSocket>> {
    let replies = dump(
        SockProtocol::NetlinkSockDiag,
        SOCK_DIAG_BY_FAMILY,
        &diag_request(AF_VSOCK, 0),
    )?;
    Ok(replies
        .iter()
        .filter_map(|message| {
            Some(VsockSocket {
                kind: u32::from(*message.get(1)?),
                state: u32::from(*message.get(2)?),
                cid: word(message, 4)?,
                port: word(message, 8)?,
                peer_cid: word(message, 12)?,
                peer_port: word(message, 16)?,
                inode: u64::from(word(message, 20)?),
            })
        })
        .collect())
}

fn diag_request(family: u8, show: u32) -> [u8; 24] {
    let mut request = [0u8; 24];
    request[0] = family;
    request[4..8].copy_from_slice(&u32::MAX.to_le_bytes()); // all states
    request[12..16].copy_from_slice(&show.to_le_bytes());
    request
}

fn interface(message: &[u8]) -> Option<Interface> {
    let attributes = attributes(message.get(16..)?);
    let number = |kind| {
        find(&attributes, kind)
            .and_then(|a| word(a, 0))
            .unwrap_or_default()
    };
    // struct rtnl_link_stats64 begins with packets in and out, bytes in and out.
    let statistics = find(&attributes, 23).unwrap_or_default();
    let counter = |n: usize| {
        let bytes = statistics.get(n * 8..n * 8 + 8).and_then(|b| b.try_into().ok());
        bytes.map_or(0, u64::from_le_bytes)
    };
    let kind = find(&attributes, 18).and_then(|nested| {
        let nested = self::attributes(nested);
        Some(String::from_utf8_lossy(until_nul(find(&nested, 1)?)).into_owned())
    });
    Some(Interface {
        name: Text::from(until_nul(find(&attributes, 3)?)),
        index: word(message, 4)?,
        mtu: number(4),
        flags: word(message, 8)?,
        hardware_type: u16::from_le_bytes(message.get(2..4)?.try_into().ok()?),
        mac: mac(find(&attributes, 1).unwrap_or_default()),
        promiscuity: number(30),
        link: number(5),
        master: number(10),
        kind: kind.unwrap_or_default(),
        state: find(&attributes, 16)
            .and_then(|a| a.first().copied())
            .unwrap_or_default(),
        counters: [counter(0), counter(1), counter(2), counter(3)],
        addresses: Vec::new(),
    })
}

fn neighbour(message: &[u8]) -> Option<Neighbour> {
    let attributes = attributes(message.get(12..)?);
    Some(Neighbour {
        ip: ip(find(&attributes, 1)?)?,
        mac: mac(find(&attributes, 2).unwrap_or_default()),
        state: half(message, 8)?,
        interface: word(message, 4)?,
    })
}

fn route(message: &[u8]) -> Option<Route> {
    // RTM_F_CLONED: what was looked up, no route of its own.
    if word(message, 8)? & 0x200 != 0 {
        return None;
    }
    let attributes = attributes(message.get(12..)?);
    let number = |kind| find(&attributes, kind).and_then(|a| word(a, 0));
    let address = |kind| find(&attributes, kind).and_then(ip);
    // All of a family's addresses are written as none.
    let all = match *message.first()? {
        AF_INET => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        _ => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    Some(Route {
        table: number(15).unwrap_or(u32::from(*message.get(4)?)),
        destination: address(1).unwrap_or(all),
        prefix: *message.get(1)?,
        kind: *message.get(7)?,
        protocol: *message.get(5)?,
        gateway: address(5),
        interface: number(4),
        metric: number(6).unwrap_or_default(),
        source: address(7),
    })
}

fn mac(bytes: &[u8]) -> String {
    let parts: Vec<String> = bytes.iter().map(|b| format!("{b:02x}")).collect();
    parts.join(":")
}

fn ip(raw: &[u8]) -> Option<IpAddr> {
    match raw.len() {
        4 => Some(IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(raw).ok()?))),
        16 => Some(IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(raw).ok()?))),
        _ => None,
    }
}

/// Interface index, address, prefix length. On point-to-point links IFA_LOCAL is ours, IFA_ADDRESS the peer's.
fn address(message: &[u8]) -> Option<(u32, IpAddr, u8)> {
    let attributes = attributes(message.get(8..)?);
    let raw = find(&attributes, 2).or_else(|| find(&attributes, 1))?;
    Some((word(message, 4)?, ip(raw)?, *message.get(1)?))
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|b| *b == 0).next().unwrap_or_default()
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// Splits a run of attributes (length, type, value, padded to 4) into type and value.
fn attributes(mut bytes: &[u8]) -> Vec<(u16, &[u8])> {
    let mut found = Vec::new();
    while let (Some(length), Some(kind)) = (half(bytes, 0), half(bytes, 2)) {
        let length = usize::from(length);
        let Some(value) = bytes.get(4..length) else { break };
        found.push((kind & 0x3fff, value));
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

fn find<'a>(attributes: &[(u16, &'a [u8])], kind: u16) -> Option<&'a [u8]> {
    attributes
        .iter()
        .find(|(k, _)| *k == kind)
        .map(|(_, value)| *value)
}

/// Sends one dump request and gives the bodies of the replies.
fn dump(protocol: SockProtocol, kind: u16, body: &[u8]) -> Result<Vec<Vec<u8>>> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        protocol,
    )?;
    let mut request = Vec::new();
    request.extend(u32::try_from(16 + body.len())?.to_le_bytes());
    request.extend(kind.to_le_bytes());
    request.extend(NLM_F_REQUEST_DUMP.to_le_bytes());
    request.extend(1u32.to_le_bytes());
    request.extend(0u32.to_le_bytes());
    request.extend(body);
    sendto(
        socket.as_raw_fd(),
        &request,
        &NetlinkAddr::new(0, 0),
        MsgFlags::empty(),
    )
    .context("netlink request")?;
    let mut replies = Vec::new();
    let mut buffer = vec![0u8; 64 << 10];
    loop {
        let received = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()).context("netlink reply")?;
        let mut rest = &buffer[..received];
        while let (Some(length), Some(kind)) = (word(rest, 0), half(rest, 4)) {
            let length = length as usize;
            let body = rest.get(16..length).context("a netlink reply is cut off")?;
            match kind {
                NLMSG_DONE => return Ok(replies),
                NLMSG_ERROR => bail!("netlink error {}", word(body, 0).unwrap_or_default() as i32),
                _ => replies.push(body.to_vec()),
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_split_and_a_broken_one_ends_them() {
        let bytes = [5, 0, 1, 0, 0xaa, 0, 0, 0, 6, 0, 2, 0x80, 1, 2, 0, 0, 200, 0, 3, 0];
        let found = attributes(&bytes);
        assert_eq!(found, [(1u16, &[0xaau8][..]), (2, &[1, 2])]);
        assert_eq!(find(&found, 2), Some(&[1u8, 2][..]));
        assert!(attributes(&[2, 0, 0, 0]).is_empty());
    }

    #[test]
    fn socket_names_end_in_no_nul_of_the_kernels() {
        assert_eq!(socket_name(b"/run/a\0"), b"/run/a");
        assert_eq!(socket_name(b"\0abstract\0"), b"\0abstract\0");
    }
}
