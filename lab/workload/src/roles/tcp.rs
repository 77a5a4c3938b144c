//! TCP over IPv4 and IPv6 in every state that can be made to last.

use std::io::Write;
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::socket::{SockaddrIn, bind, connect, sendto};

use crate::play::Held;
use crate::sys;

/// Our address on an interface that swallows everything, and one beyond it that never answers.
const HERE: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 7);
const NOWHERE: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 99);

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

// include/uapi/linux/tcp.h
const TCP_REPAIR: i32 = 19;
const TCP_REPAIR_QUEUE: i32 = 20;
const TCP_QUEUE_SEQ: i32 = 21;
const RECV_QUEUE: i32 = 1;
const SEND_QUEUE: i32 = 2;
const OUR_SEQ: u32 = 1000;
const THEIR_SEQ: u32 = 2000;

/// All of them.
pub(super) fn states() -> Result<Held> {
    let mut held: Vec<Held> = Vec::new();
    for address in ["127.0.0.1:7001", "[::1]:7001"] {
        held.push(Box::new(
            with_a_peer(address).with_context(|| address.to_owned())?,
        ));
    }
    // An IPv4 peer at an IPv6 socket.
    let dual = TcpListener::bind("[::]:7003")?;
    let near = TcpStream::connect("127.0.0.1:7003")?;
    let far = dual.accept()?;
    held.push(Box::new((dual, near, far)));
    // Bound, and neither listening nor connected: in no table but its process's.
    let bound = sys::socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    bind(
        bound.as_raw_fd(),
        &SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 7005)),
    )?;
    held.push(Box::new(bound));
    held.push(Box::new(syn_sent()?));
    held.push(Box::new(syn_received()?));
    for (port, last) in [
        (7101, Stage::FinWait1),
        (7102, Stage::CloseWait),
        (7103, Stage::Last),
        (7104, Stage::Closing),
    ] {
        held.push(Box::new(
            without_a_peer(port, last).with_context(|| format!("port {port}"))?,
        ));
    }
    Ok(Box::new(held))
}

/// LISTEN with a connection not yet accepted, ESTABLISHED with bytes unread, and FIN_WAIT2 with its CLOSE_WAIT.
fn with_a_peer(address: &str) -> Result<Vec<Held>> {
    let listener = TcpListener::bind(address)?;
    let mut near = TcpStream::connect(address)?;
    let far = listener.accept()?;
    near.write_all(&[b'q'; 100])?;
    let half = TcpStream::connect(address)?;
    let other_half = listener.accept()?;
    half.shutdown(Shutdown::Write)?;
    let waiting = TcpStream::connect(address)?;
    Ok(vec![
        Box::new((listener, near, far)),
        Box::new((half, other_half, waiting)),
    ])
}

/// A connection attempt that nobody answers.
fn syn_sent() -> Result<OwnedFd> {
    let socket = sys::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0)?;
    match connect(
        socket.as_raw_fd(),
        &SockaddrIn::from(SocketAddrV4::new(NOWHERE, 9)),
    ) {
        Ok(()) => anyhow::bail!("nowhere answered"),
        Err(Errno::EINPROGRESS) => Ok(socket),
        Err(error) => Err(error).context("connect to nowhere"),
    }
}

/// A connection that nowhere asked for and never confirms.
fn syn_received() -> Result<TcpListener> {
    let listener = TcpListener::bind((HERE, 7010))?;
    inject(
        SocketAddrV4::new(NOWHERE, 4444),
        SocketAddrV4::new(HERE, 7010),
        THEIR_SEQ,
        0,
        SYN,
    )?;
    Ok(listener)
}

/// Where a connection without a peer ends up.
enum Stage {
    FinWait1,
    CloseWait,
    Last,
    Closing,
}

/// The states on the way to the end, of a connection whose peer is never heard. It is made whole with TCP_REPAIR, as
/// checkpoint/restore does; what the peer would have said is injected.
fn without_a_peer(port: u16, last: Stage) -> Result<TcpStream> {
    let here = SocketAddrV4::new(HERE, port);
    let there = SocketAddrV4::new(NOWHERE, 80);
    let socket = sys::socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    let option = |option, value| sys::set_option(socket.as_fd(), libc::IPPROTO_TCP, option, value);
    option(TCP_REPAIR, 1)?;
    option(TCP_REPAIR_QUEUE, SEND_QUEUE)?;
    option(TCP_QUEUE_SEQ, OUR_SEQ as i32)?;
    option(TCP_REPAIR_QUEUE, RECV_QUEUE)?;
    option(TCP_QUEUE_SEQ, THEIR_SEQ as i32)?;
    bind(socket.as_raw_fd(), &SockaddrIn::from(here))?;
    connect(socket.as_raw_fd(), &SockaddrIn::from(there))?;
    option(TCP_REPAIR, 0)?;
    let stream = TcpStream::from(socket);
    let their_fin = || inject(there, here, THEIR_SEQ, OUR_SEQ, FIN | ACK);
    match last {
        Stage::FinWait1 => stream.shutdown(Shutdown::Write)?,
        Stage::CloseWait => their_fin()?,
        Stage::Last => {
            their_fin()?;
            stream.shutdown(Shutdown::Write)?;
        }
        Stage::Closing => {
            stream.shutdown(Shutdown::Write)?;
            their_fin()?;
        }
    }
    Ok(stream)
}

/// Sends a TCP segment without data, from any address.
fn inject(from: SocketAddrV4, to: SocketAddrV4, seq: u32, ack: u32, flags: u8) -> Result<()> {
    let mut tcp = Vec::with_capacity(20);
    tcp.extend(from.port().to_be_bytes());
    tcp.extend(to.port().to_be_bytes());
    tcp.extend(seq.to_be_bytes());
    tcp.extend(ack.to_be_bytes());
    tcp.extend([5 << 4, flags]);
    tcp.extend(8192u16.to_be_bytes());
    tcp.extend([0; 4]);
    let mut pseudo = Vec::new();
    pseudo.extend(from.ip().octets());
    pseudo.extend(to.ip().octets());
    pseudo.extend([0, 6, 0, 20]);
    pseudo.extend(&tcp);
    let sum = checksum(&pseudo);
    tcp[16..18].copy_from_slice(&sum.to_be_bytes());
    // The kernel fills in the length, the id and the checksum of the IP header.
    let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 6, 0, 0];
    packet.extend(from.ip().octets());
    packet.extend(to.ip().octets());
    packet.extend(tcp);
    let socket = sys::socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
    sendto(
        socket.as_raw_fd(),
        &packet,
        &SockaddrIn::from(to),
        nix::sys::socket::MsgFlags::empty(),
    )
    .context("inject a segment")?;
    Ok(())
}

/// The internet checksum, RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_of_rfc_1071() {
        assert_eq!(
            checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]),
            !0xddf2
        );
        assert_eq!(checksum(&[0x01]), !0x0100);
    }
}
