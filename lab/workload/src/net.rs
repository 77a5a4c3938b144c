//! Sockets and network interfaces, as the guest's /proc/net, netlink and socket diagnostics show them.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::Text;

/// One network namespace.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct NetNamespace {
    /// Its inode number.
    pub inode: u64,
    /// The process through whose /proc entry it was read.
    pub pid: u32,
    /// Its interfaces.
    pub interfaces: Vec<Interface>,
    /// TCP, UDP, UDP-Lite, raw and ping sockets over IPv4 and IPv6.
    pub inet: Vec<InetSocket>,
    /// UNIX sockets.
    pub unix: Vec<UnixSocket>,
    /// Packet sockets.
    pub packet: Vec<PacketSocket>,
    /// Netlink sockets, the kernel's own included.
    pub netlink: Vec<NetlinkSocket>,
    /// Neighbours of both families.
    pub neighbours: Vec<Neighbour>,
    /// Routes of both families, of all tables.
    pub routes: Vec<Route>,
}

/// One row of `/proc/net/{tcp,tcp6,udp,udp6,udplite,udplite6,raw,raw6,icmp,icmp6}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InetSocket {
    /// The table it was found in: `tcp`, `tcp6`, …
    pub table: String,
    /// Local address.
    pub local: IpAddr,
    /// Local port; the protocol number in the raw tables.
    pub local_port: u16,
    /// Remote address.
    pub remote: IpAddr,
    /// Remote port.
    pub remote_port: u16,
    /// State by its kernel name without `TCP_`: ESTABLISHED, LISTEN, CLOSE, … For UDP and raw: ESTABLISHED means connected.
    pub state: String,
    /// Owner.
    pub uid: u32,
    /// Inode of the socket; 0 for TIME_WAIT and SYN_RECV.
    pub inode: u64,
    /// Bytes waiting to be sent (in LISTEN: 0).
    pub tx_queue: u64,
    /// Bytes waiting to be read (in LISTEN: connections waiting to be accepted).
    pub rx_queue: u64,
    /// Address of the kernel's object, 0 where the kernel does not show it.
    pub address: u64,
}

impl InetSocket {
    /// Whether it goes away by itself within minutes: a TCP socket that has no file any more.
    pub fn is_transient(&self) -> bool {
        self.table.starts_with("tcp") && matches!(self.state.as_str(), "TIME_WAIT" | "SYN_RECV")
    }
}

/// One UNIX socket: `/proc/net/unix` joined with `unix_diag`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnixSocket {
    /// Inode of the socket.
    pub inode: u64,
    /// 1 stream, 2 datagram, 5 seqpacket.
    pub kind: u32,
    /// State by the number in `/proc/net/unix`: 1 unconnected, 2 connecting, 3 connected, 4 disconnecting.
    pub state: u32,
    /// Flags there; 0x10000 is listening.
    pub flags: u32,
    /// Reference count.
    pub refs: u32,
    /// The name: a path, or with a leading NUL an abstract one; empty for none.
    pub path: Text,
    /// Inode of the connected peer, where `unix_diag` knows one.
    pub peer: Option<u64>,
    /// Owner, where `unix_diag` says so.
    pub uid: Option<u32>,
    /// Bytes waiting to be read (of one that listens: connections waiting to be accepted), where `unix_diag` says so.
    pub rx_queue: Option<u32>,
    /// Memory of what was sent and not yet read, bytes (of one that listens: connections it lets wait).
    pub tx_queue: Option<u32>,
    /// Address of the kernel's object, 0 where the kernel does not show it.
    pub address: u64,
}

/// One row of `/proc/net/packet`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PacketSocket {
    /// Inode of the socket.
    pub inode: u64,
    /// 2 datagram, 3 raw.
    pub kind: u32,
    /// Ethernet protocol (3: all).
    pub protocol: u16,
    /// Index of the interface it is bound to, 0 for all.
    pub interface: u32,
    /// Whether it is running.
    pub running: bool,
    /// Owner.
    pub uid: u32,
    /// Address of the kernel's object, 0 where the kernel does not show it.
    pub address: u64,
}

/// One row of `/proc/net/netlink`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetlinkSocket {
    /// Inode of the socket; the kernel's own have one too.
    pub inode: u64,
    /// Netlink protocol: 0 route, 15 kobject uevent, 16 generic, …
    pub protocol: u32,
    /// Port id, 0 for the kernel's.
    pub port: u32,
    /// Multicast groups, the first 32.
    pub groups: u32,
    /// Address of the kernel's object, 0 where the kernel does not show it.
    pub address: u64,
}

/// One AF_VSOCK socket.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockSocket {
    /// Inode of the socket.
    pub inode: u64,
    /// 1 stream, 2 datagram, 5 seqpacket.
    pub kind: u32,
    /// State by its TCP-like number: 1 established, 10 listen, 7 close, …
    pub state: u32,
    /// Own context id (0xffffffff: any).
    pub cid: u32,
    /// Own port.
    pub port: u32,
    /// Peer's context id.
    pub peer_cid: u32,
    /// Peer's port.
    pub peer_port: u32,
}

/// One network interface.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Name.
    pub name: Text,
    /// Index.
    pub index: u32,
    /// MTU, bytes.
    pub mtu: u32,
    /// `IFF_*` flags.
    pub flags: u32,
    /// `ARPHRD_*` hardware type.
    pub hardware_type: u16,
    /// Hardware address, `aa:bb:…`; empty where there is none.
    pub mac: String,
    /// Promiscuity count.
    pub promiscuity: u32,
    /// Index of the lower or peer interface, 0 for none.
    pub link: u32,
    /// Index of the bridge or bond it belongs to, 0 for none.
    pub master: u32,
    /// Kind of a virtual interface: dummy, veth, vlan, …
    pub kind: String,
    /// State by the number of RFC 2863 as the kernel has it: 0 unknown, 2 down, 6 up, …
    pub state: u8,
    /// What it counted: packets received, packets sent, bytes received, bytes sent.
    pub counters: [u64; 4],
    /// Addresses with prefix length.
    pub addresses: Vec<(IpAddr, u8)>,
}

/// One neighbour, as rtnetlink shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbour {
    /// Its address.
    pub ip: IpAddr,
    /// Its hardware address, `aa:bb:…`; empty where none is known.
    pub mac: String,
    /// `NUD_*`.
    pub state: u16,
    /// Index of its interface.
    pub interface: u32,
}

impl Neighbour {
    /// Whether it stays as it is: somebody wrote it down, or its interface needs none.
    pub fn is_lasting(&self) -> bool {
        const NOARP_OR_PERMANENT: u16 = 0xc0;
        self.state & NOARP_OR_PERMANENT != 0
    }
}

/// One route, as rtnetlink shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Number of its table.
    pub table: u32,
    /// Whereto.
    pub destination: IpAddr,
    /// Length of the prefix.
    pub prefix: u8,
    /// `RTN_*`.
    pub kind: u8,
    /// `RTPROT_*`.
    pub protocol: u8,
    /// The router.
    pub gateway: Option<IpAddr>,
    /// Index of the interface.
    pub interface: Option<u32>,
    /// Metric.
    pub metric: u32,
    /// Preferred source address.
    pub source: Option<IpAddr>,
}
