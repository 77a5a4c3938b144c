//! Families, addresses, states and protocol numbers as text.

use std::net::{Ipv4Addr, Ipv6Addr};

/// `AF_*` (include/linux/socket.h).
pub(super) const AF_UNIX: u16 = 1;
pub(super) const AF_INET: u16 = 2;
pub(super) const AF_INET6: u16 = 10;
pub(super) const AF_NETLINK: u16 = 16;
pub(super) const AF_PACKET: u16 = 17;
pub(super) const AF_VSOCK: u16 = 40;

pub(super) fn family(number: u16) -> String {
    match number {
        AF_UNIX => "unix",
        AF_INET => "ipv4",
        AF_INET6 => "ipv6",
        AF_NETLINK => "netlink",
        AF_PACKET => "packet",
        AF_VSOCK => "vsock",
        3 => "ax25",
        4 => "ipx",
        5 => "appletalk",
        15 => "key",
        21 => "rds",
        24 => "pppox",
        26 => "llc",
        27 => "ib",
        29 => "can",
        30 => "tipc",
        31 => "bluetooth",
        33 => "rxrpc",
        38 => "alg",
        39 => "nfc",
        41 => "kcm",
        42 => "qrtr",
        43 => "smc",
        44 => "xdp",
        45 => "mctp",
        other => return format!("family-{other}"),
    }
    .to_owned()
}

/// `SOCK_*` (include/linux/net.h).
pub(super) fn kind(number: u16) -> Option<&'static str> {
    Some(match number {
        1 => "stream",
        2 => "dgram",
        3 => "raw",
        4 => "rdm",
        5 => "seqpacket",
        6 => "dccp",
        10 => "packet",
        _ => return None,
    })
}

pub(super) const TCP_ESTABLISHED: u8 = 1;
pub(super) const TCP_TIME_WAIT: u8 = 6;
pub(super) const TCP_CLOSE: u8 = 7;
pub(super) const TCP_LISTEN: u8 = 10;
pub(super) const TCP_NEW_SYN_RECV: u8 = 12;

/// States of TCP (include/net/tcp_states.h), by the names that `netstat` and `ss` use.
pub(super) fn tcp_state(number: u8) -> String {
    match number {
        TCP_ESTABLISHED => "ESTABLISHED",
        2 => "SYN_SENT",
        3 => "SYN_RECV",
        4 => "FIN_WAIT1",
        5 => "FIN_WAIT2",
        TCP_TIME_WAIT => "TIME_WAIT",
        TCP_CLOSE => "CLOSE",
        8 => "CLOSE_WAIT",
        9 => "LAST_ACK",
        TCP_LISTEN => "LISTEN",
        11 => "CLOSING",
        // A request that waits for the handshake's last packet: to the outside the same as 3.
        TCP_NEW_SYN_RECV => "SYN_RECV",
        13 => "BOUND",
        other => return format!("state-{other}"),
    }
    .to_owned()
}

pub(super) const IPPROTO_ICMP: u16 = 1;
pub(super) const IPPROTO_TCP: u16 = 6;
pub(super) const IPPROTO_UDP: u16 = 17;
pub(super) const IPPROTO_UDPLITE: u16 = 136;

/// Protocols that have sockets of their own (include/uapi/linux/in.h).
pub(super) fn inet_protocol(number: u16) -> String {
    match number {
        IPPROTO_ICMP => "icmp",
        2 => "igmp",
        IPPROTO_TCP => "tcp",
        IPPROTO_UDP => "udp",
        33 => "dccp",
        58 => "icmpv6",
        115 => "l2tp",
        132 => "sctp",
        IPPROTO_UDPLITE => "udplite",
        256 => "smc",
        262 => "mptcp",
        other => return format!("protocol-{other}"),
    }
    .to_owned()
}

/// Netlink's families (include/uapi/linux/netlink.h).
pub(super) fn netlink_protocol(number: u16) -> String {
    match number {
        0 => "route",
        2 => "usersock",
        3 => "firewall",
        4 => "sock_diag",
        5 => "nflog",
        6 => "xfrm",
        7 => "selinux",
        8 => "iscsi",
        9 => "audit",
        10 => "fib_lookup",
        11 => "connector",
        12 => "netfilter",
        13 => "ip6_fw",
        14 => "dnrtmsg",
        15 => "kobject_uevent",
        16 => "generic",
        18 => "scsitransport",
        19 => "ecryptfs",
        20 => "rdma",
        21 => "crypto",
        22 => "smc",
        other => return format!("protocol-{other}"),
    }
    .to_owned()
}

/// Ethernet protocols that packet sockets are commonly bound to (include/uapi/linux/if_ether.h).
pub(super) fn ether_protocol(number: u16) -> String {
    match number {
        0 => "none",
        0x0003 => "all",
        0x0800 => "ip",
        0x0806 => "arp",
        0x86dd => "ipv6",
        0x888e => "eapol",
        0x88cc => "lldp",
        other => return format!("{other:#06x}"),
    }
    .to_owned()
}

/// An IPv4 address out of the four bytes in network order.
pub(super) fn ipv4(bytes: &[u8]) -> Option<String> {
    Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).to_string())
}

/// An IPv6 address out of its sixteen bytes; one that stands for an IPv4 address is written `::ffff:192.0.2.1`.
pub(super) fn ipv6(bytes: &[u8]) -> Option<String> {
    Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_written_as_everybody_writes_them() {
        assert_eq!(ipv4(&[127, 0, 0, 1]).as_deref(), Some("127.0.0.1"));
        assert_eq!(ipv6(&[0; 16]).as_deref(), Some("::"));
        let mapped = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 2, 15];
        assert_eq!(ipv6(&mapped).as_deref(), Some("::ffff:10.0.2.15"));
        assert_eq!(ipv6(&[0; 4]), None);
    }

    #[test]
    fn unknown_numbers_stay_numbers() {
        assert_eq!(family(200), "family-200");
        assert_eq!(tcp_state(99), "state-99");
        assert_eq!(inet_protocol(253), "protocol-253");
        assert_eq!(ether_protocol(0x1234), "0x1234");
    }
}
