//! What sockets are bound and connected to, by the guest's account and in vmsight's words.

use std::collections::BTreeMap;

use super::sockets::{ether_protocol, netlink_protocol, vsock_state};
use crate::truth::{InetSocket, Truth, VsockSocket};

/// What each socket is bound and connected to, by its inode number. A socket that is in none of the guest's tables, as one that was
/// made and never bound, has no entry: the guest does not say more of it than that it is there. Nor has a UNIX socket whose peer nobody
/// has accepted yet: the guest does not say which that is.
pub(super) fn all(truth: &Truth) -> BTreeMap<u64, String> {
    let mut found = BTreeMap::new();
    for namespace in &truth.net {
        found.extend(namespace.inet.iter().map(|s| (s.inode, inet(s))));
        found.extend(
            namespace
                .packet
                .iter()
                .map(|s| (s.inode, ether_protocol(s.protocol))),
        );
        found.extend(
            namespace
                .netlink
                .iter()
                .map(|s| (s.inode, format!("{} :{}", netlink_protocol(s.protocol), s.port))),
        );
        for socket in namespace.unix.iter().filter(|s| s.peer != Some(0)) {
            let name = |inode: u64| {
                let socket = namespace.unix.iter().find(|s| s.inode == inode)?;
                (!socket.path.is_empty()).then(|| super::unix::name(&socket.path))
            };
            let mut text = "unix".to_owned();
            if let Some(own) = name(socket.inode) {
                text = format!("{text} {own}");
            }
            if let Some(far) = socket.peer.filter(|&peer| peer != 0).and_then(name) {
                text = format!("{text}->{far}");
            }
            found.insert(socket.inode, text);
        }
    }
    found.extend(truth.vsock.iter().map(|s| (s.inode, vsock(s))));
    found.remove(&0);
    found
}

fn inet(socket: &InetSocket) -> String {
    let protocol = match socket.table.as_str() {
        "icmp6" => "icmpv6",
        table => table.trim_end_matches('6'),
    };
    let end = |address: std::net::IpAddr, port: u16| match address {
        std::net::IpAddr::V4(ip) => format!("{ip}:{port}"),
        std::net::IpAddr::V6(ip) => format!("[{ip}]:{port}"),
    };
    let mut text = format!("{protocol} {}", end(socket.local, socket.local_port));
    if socket.remote_port != 0 {
        text = format!("{text}->{}", end(socket.remote, socket.remote_port));
    }
    // Only TCP's CLOSE is a state; elsewhere it is what is not connected.
    if protocol == "tcp" || socket.state != "CLOSE" {
        text = format!("{text} {}", socket.state);
    }
    text
}

fn vsock(socket: &VsockSocket) -> String {
    let end = |cid: u32, port: u32| {
        let cid = if cid == u32::MAX {
            "*".to_owned()
        } else {
            cid.to_string()
        };
        if port == u32::MAX {
            cid
        } else {
            format!("{cid}:{port}")
        }
    };
    let mut text = format!("vsock {}", end(socket.cid, socket.port));
    if socket.peer_port != 0 && socket.peer_port != u32::MAX {
        text = format!("{text}->{}", end(socket.peer_cid, socket.peer_port));
    }
    match vsock_state(socket.state) {
        "UNCONNECTED" => text,
        state => format!("{text} {state}"),
    }
}
