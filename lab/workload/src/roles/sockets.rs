//! Sockets of the other families.

use std::net::{TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};

use anyhow::{Context, Result};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, SockaddrIn6, UnixAddr, VsockAddr, bind, connect,
    listen, socketpair,
};

use crate::play::{Held, join_cgroup, lacking};
use crate::sys;

/// UDP, raw, ping, packet and netlink.
pub(super) fn mix() -> Result<Held> {
    join_cgroup("/system.slice/socket-mix.service")?;
    Ok(Box::new((udp()?, raw()?, packet()?, netlink()?)))
}

fn udp() -> Result<Vec<UdpSocket>> {
    let server = UdpSocket::bind("0.0.0.0:5353")?;
    let client = UdpSocket::bind("127.0.0.1:5354")?;
    client.connect("127.0.0.1:5353")?;
    // Three datagrams that nobody reads.
    for _ in 0..3 {
        client.send(&[b'd'; 64])?;
    }
    let server6 = UdpSocket::bind("[::]:5355")?;
    let client6 = UdpSocket::bind("[::1]:5356")?;
    client6.connect("[::1]:5355")?;
    Ok(vec![server, client, server6, client6])
}

fn raw() -> Result<Vec<OwnedFd>> {
    let icmp = sys::socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP)?;
    let bound = sys::socket(libc::AF_INET, libc::SOCK_RAW, 89)?;
    bind(bound.as_raw_fd(), &SockaddrIn::new(10, 9, 8, 7, 0))?;
    let icmp6 = sys::socket(libc::AF_INET6, libc::SOCK_RAW, libc::IPPROTO_ICMPV6)?;
    let ping = sys::socket(libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_ICMP)?;
    bind(ping.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 777))?;
    let ping6 = sys::socket(libc::AF_INET6, libc::SOCK_DGRAM, libc::IPPROTO_ICMPV6)?;
    bind(
        ping6.as_raw_fd(),
        &SockaddrIn6::from("[::1]:778".parse::<std::net::SocketAddrV6>()?),
    )?;
    Ok(vec![icmp, bound, icmp6, ping, ping6])
}

fn packet() -> Result<Vec<OwnedFd>> {
    const ETH_P_ALL: u16 = 3;
    const ETH_P_ARP: u16 = 0x0806;
    let all = sys::socket(libc::AF_PACKET, libc::SOCK_RAW, i32::from(ETH_P_ALL.to_be()))?;
    let arp = sys::socket(libc::AF_PACKET, libc::SOCK_DGRAM, i32::from(ETH_P_ARP.to_be()))?;
    let index = nix::net::if_::if_nametoindex("dummy0").context("dummy0")?;
    // struct sockaddr_ll: family, protocol (network order), interface index, and 12 bytes that a bind leaves empty.
    let mut address = Vec::new();
    address.extend((libc::AF_PACKET as u16).to_ne_bytes());
    address.extend(ETH_P_ARP.to_be_bytes());
    address.extend(index.to_ne_bytes());
    address.resize(20, 0);
    sys::bind(&arp, &address)?;
    Ok(vec![all, arp])
}

fn netlink() -> Result<Vec<OwnedFd>> {
    let mut sockets = Vec::new();
    // Protocol, port, groups.
    for (protocol, port, groups) in [
        (libc::NETLINK_ROUTE, 0u32, 0x11u32),
        (libc::NETLINK_KOBJECT_UEVENT, 0, 1),
        (libc::NETLINK_GENERIC, 4242, 0),
    ] {
        let socket = sys::socket(libc::AF_NETLINK, libc::SOCK_RAW, protocol)?;
        let mut address = Vec::new();
        address.extend((libc::AF_NETLINK as u32).to_ne_bytes());
        address.extend(port.to_ne_bytes());
        address.extend(groups.to_ne_bytes());
        sys::bind(&socket, &address).with_context(|| format!("netlink protocol {protocol}"))?;
        sockets.push(socket);
    }
    Ok(sockets)
}

/// UNIX sockets: with a path, abstract and nameless; streams, datagrams and sequenced packets.
pub(super) fn unix() -> Result<Held> {
    let listener = UnixListener::bind("/run/app.sock")?;
    let near = UnixStream::connect("/run/app.sock")?;
    let far = listener.accept()?;
    let waiting = UnixStream::connect("/run/app.sock")?;
    let hidden = UnixListener::bind_addr(&SocketAddr::from_abstract_name(b"vmsight\0abstract\xff")?)?;
    let hidden_near = UnixStream::connect_addr(&hidden.local_addr()?)?;
    let hidden_far = hidden.accept()?;
    let log = UnixDatagram::bind("/run/log sock")?;
    let logger = UnixDatagram::unbound()?;
    logger.connect("/run/log sock")?;
    let pair = UnixStream::pair()?;
    let datagrams = UnixDatagram::pair()?;
    let packets = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    let sequenced = sys::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0)?;
    bind(sequenced.as_raw_fd(), &UnixAddr::new("/run/seq.sock")?)?;
    listen(&sequenced, Backlog::new(5)?)?;
    let deleted = UnixListener::bind("/run/removed.sock")?;
    std::fs::remove_file("/run/removed.sock")?;
    let other = TcpListener::bind("127.0.0.1:0")?;
    Ok(Box::new((
        (listener, near, far, waiting),
        (hidden, hidden_near, hidden_far),
        (log, logger, pair, datagrams),
        (packets, sequenced, deleted, other),
    )))
}

/// VM sockets: one that listens, and over the loopback transport a connection.
pub(super) fn vsock() -> Result<Held> {
    let listener = match sys::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0) {
        Ok(socket) => socket,
        Err(error) => {
            lacking("vsock", error);
            return Ok(Box::new(()));
        }
    };
    bind(listener.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, 1024))?;
    listen(&listener, Backlog::new(4)?)?;
    let near = sys::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0)?;
    match connect(near.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_LOCAL, 1024)) {
        // Left in the queue of the listener: both ends are connected, only one has a file.
        Ok(()) => Ok(Box::new((listener, near))),
        Err(error) => {
            lacking("vsock loopback", error);
            Ok(Box::new(listener))
        }
    }
}
