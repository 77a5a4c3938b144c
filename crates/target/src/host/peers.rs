//! Who is at the other end of a unix socket: `sock_diag`'s answer, which is what `ss -xp` prints.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};

use super::process::{self, Process};
use super::sockets::{self, UnixSocket};

// linux/netlink.h, linux/sock_diag.h, linux/unix_diag.h
const NLM_F_REQUEST_DUMP: u16 = 0x1 | 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const UDIAG_SHOW_PEER: u32 = 4;
const UNIX_DIAG_PEER: u16 = 2;
const AF_UNIX: u8 = 1;
/// Most answers read: a host with more unix sockets than this goes without the courtesy of a name.
const MAX_DATAGRAMS: usize = 4096;

/// A process at the other end of a connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Holder {
    pub(crate) pid: u32,
    pub(crate) comm: String,
}

/// Who has a listening unix socket, as far as it can be told without connecting.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Occupied {
    /// Nobody.
    Free,
    /// Somebody who is gone; the server has not noticed yet.
    Stale,
    /// Somebody is connected, or waits to be.
    Busy,
}

/// Whether anybody is connected to the listening unix socket `path` of `server`, or waits to be.
pub(crate) fn occupied(server: Process, path: &str) -> io::Result<Occupied> {
    let table = sockets::parse_unix(&server.text("net/unix", 64 << 20)?);
    let mut taken = table
        .iter()
        .filter(|s| !s.listening && s.path.as_deref() == Some(path))
        .peekable();
    if taken.peek().is_none() {
        return Ok(Occupied::Free);
    }
    let pairs = peer_pairs()?;
    // One that still waits in the queue has no inode. Where the other end is gone nobody is told as its peer.
    let alive = |inode: u64| {
        inode == 0
            || pairs
                .iter()
                .any(|(ino, peer)| u64::from(*ino) == inode && *peer != 0)
    };
    Ok(if taken.any(|s| alive(s.inode)) {
        Occupied::Busy
    } else {
        Occupied::Stale
    })
}

/// The processes that are connected to the listening unix socket `path` of `server`, as far as we may see
/// them. Our own process is among them where it is.
pub(crate) fn clients_of(server: Process, path: &str) -> io::Result<Vec<Holder>> {
    let table = sockets::parse_unix(&server.text("net/unix", 64 << 20)?);
    // An accepted socket carries the name of the socket that accepted it; one that still waits in the queue
    // has no inode yet.
    let accepted: Vec<u64> = table
        .iter()
        .filter(|s: &&UnixSocket| !s.listening && s.inode != 0 && s.path.as_deref() == Some(path))
        .map(|s| s.inode)
        .collect();
    if accepted.is_empty() {
        return Ok(Vec::new());
    }
    let pairs = peer_pairs()?;
    let peers: Vec<u64> = pairs
        .iter()
        .filter(|(ino, peer)| *peer != 0 && accepted.contains(&u64::from(*ino)))
        .map(|(_, peer)| u64::from(*peer))
        .collect();
    // A client that is gone leaves a connection without its other end until the server notices.
    if peers.is_empty() {
        return Ok(Vec::new());
    }
    let mut holders = Vec::new();
    for process in process::all()? {
        let Ok(descriptors) = process.descriptors() else {
            continue;
        };
        if descriptors
            .iter()
            .any(|d| d.socket_inode().is_some_and(|i| peers.contains(&i)))
        {
            holders.push(Holder {
                pid: process.pid,
                comm: process.comm().unwrap_or_default(),
            });
        }
    }
    Ok(holders)
}

/// The process that listens at the other end of `stream`, as the kernel recorded it at `listen`. `None` where it is none
/// of our pid namespace: the kernel then says 0 (which is why this does not use a type for pids that are never 0).
pub(crate) fn listener_pid(stream: &impl AsFd) -> Option<u32> {
    let credentials = getsockopt(&stream.as_fd(), PeerCredentials).ok()?;
    u32::try_from(credentials.pid()).ok().filter(|pid| *pid != 0)
}

/// Whether `process` holds the other end of `stream`, which it has accepted: also where another process made the socket
/// that it listens on and passed it (libvirt does).
pub(crate) fn holds_other_end(process: Process, stream: &impl AsFd) -> bool {
    let ours = rustix::fs::fstat(stream).map(|s| s.st_ino);
    let (Ok(ours), Ok(pairs), Ok(descriptors)) = (ours, peer_pairs(), process.descriptors()) else {
        return false;
    };
    let theirs = pairs
        .iter()
        .find(|(inode, peer)| u64::from(*inode) == ours && *peer != 0)
        .map(|(_, peer)| u64::from(*peer));
    theirs.is_some() && descriptors.iter().any(|d| d.socket_inode() == theirs)
}

/// Every connected pair of unix sockets of our network namespace, by inode.
fn peer_pairs() -> io::Result<Vec<(u32, u32)>> {
    let socket = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        Some(netlink::SOCK_DIAG),
    )?;
    rustix::net::sockopt::set_socket_timeout(
        &socket,
        rustix::net::sockopt::Timeout::Recv,
        Some(Duration::from_millis(500)),
    )?;
    let mut request = Vec::with_capacity(40);
    request.extend_from_slice(&40_u32.to_ne_bytes());
    request.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend_from_slice(&NLM_F_REQUEST_DUMP.to_ne_bytes());
    request.extend_from_slice(&[0; 8]); // sequence, port
    request.extend_from_slice(&[AF_UNIX, 0, 0, 0]);
    request.extend_from_slice(&u32::MAX.to_ne_bytes()); // every state
    request.extend_from_slice(&0_u32.to_ne_bytes()); // every inode
    request.extend_from_slice(&UDIAG_SHOW_PEER.to_ne_bytes());
    request.extend_from_slice(&[0; 8]); // cookie
    rustix::net::send(&socket, &request, SendFlags::empty())?;
    let mut pairs = Vec::new();
    let mut buffer = vec![0_u8; 64 * 1024];
    for _ in 0..MAX_DATAGRAMS {
        let (len, _) = rustix::net::recv(&socket, &mut buffer[..], RecvFlags::empty())?;
        if !parse_messages(buffer.get(..len).unwrap_or_default(), &mut pairs)? {
            break;
        }
    }
    Ok(pairs)
}

/// Takes the pairs out of one datagram; false when it was the last.
fn parse_messages(mut bytes: &[u8], pairs: &mut Vec<(u32, u32)>) -> io::Result<bool> {
    let u16_at = |b: &[u8], at: usize| Some(u16::from_ne_bytes(b.get(at..at + 2)?.try_into().ok()?));
    let u32_at = |b: &[u8], at: usize| Some(u32::from_ne_bytes(b.get(at..at + 4)?.try_into().ok()?));
    let cut = || io::Error::new(io::ErrorKind::InvalidData, "a netlink message is cut");
    while !bytes.is_empty() {
        let len = u32_at(bytes, 0).ok_or_else(cut)? as usize;
        let kind = u16_at(bytes, 4).ok_or_else(cut)?;
        let message = bytes.get(..len).filter(|m| m.len() >= 16).ok_or_else(cut)?;
        match kind {
            NLMSG_DONE => return Ok(false),
            NLMSG_ERROR => {
                let code = u32_at(message, 16).unwrap_or_default().cast_signed();
                return Err(io::Error::from_raw_os_error(code.wrapping_neg()));
            }
            SOCK_DIAG_BY_FAMILY => {
                // nlmsghdr (16), unix_diag_msg (16: family, type, state, pad, inode, cookie), attributes
                let inode = u32_at(message, 20).ok_or_else(cut)?;
                let mut rest = message.get(32..).unwrap_or_default();
                while let (Some(len), Some(kind)) = (u16_at(rest, 0), u16_at(rest, 2)) {
                    if kind == UNIX_DIAG_PEER
                        && let Some(peer) = u32_at(rest, 4)
                    {
                        pairs.push((inode, peer));
                    }
                    let step = usize::from(len).max(4).next_multiple_of(4);
                    rest = rest.get(step..).unwrap_or_default();
                }
            }
            _ => {}
        }
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn the_client_of_a_socket_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let me = Process {
            pid: std::process::id(),
        };
        assert!(clients_of(me, path.to_str().unwrap()).unwrap().is_empty());
        let client = UnixStream::connect(&path).unwrap();
        let accepted = listener.accept().unwrap();
        let holders = clients_of(me, path.to_str().unwrap()).unwrap();
        assert_eq!(holders.iter().map(|h| h.pid).collect::<Vec<_>>(), [me.pid]);
        assert_eq!(listener_pid(&client), Some(me.pid));
        assert!(holds_other_end(me, &client));
        assert!(!holds_other_end(Process { pid: 1 }, &client) || me.pid == 1);
        assert_eq!(occupied(me, path.to_str().unwrap()).unwrap(), Occupied::Busy);
        drop(client);
        // Another test that starts a process has copies of what was just closed, until that runs its program.
        let now = || occupied(me, path.to_str().unwrap()).unwrap();
        let left = |then| {
            (0..1000).any(|_| {
                std::thread::sleep(Duration::from_millis(10));
                now() == then
            })
        };
        assert!(left(Occupied::Stale), "{:?}", now());
        assert!(clients_of(me, path.to_str().unwrap()).unwrap().is_empty());
        drop(accepted);
        assert!(left(Occupied::Free), "{:?}", now());
    }

    #[test]
    fn a_listener_of_another_pid_namespace_has_no_pid() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("not root: no namespace can be made; the case is covered where the tests run as root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        // A listener outside, a client inside a pid namespace of its own: this test again.
        if let Ok(path) = std::env::var("VMSIGHT_TEST_LISTENER") {
            let client = UnixStream::connect(path).unwrap();
            assert_eq!(listener_pid(&client), None);
            println!("nobody that is seen");
            return;
        }
        let _listener = UnixListener::bind(&path).unwrap();
        let output = std::process::Command::new("unshare")
            .args(["--pid", "--fork", "--"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture"])
            .arg("host::peers::tests::a_listener_of_another_pid_namespace_has_no_pid")
            .env("VMSIGHT_TEST_LISTENER", &path)
            .output()
            .expect("unshare of util-linux");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && text.contains("nobody that is seen"),
            "{text}"
        );
    }

    #[test]
    fn cut_answers_are_errors_and_terminate() {
        let mut pairs = Vec::new();
        assert!(parse_messages(&[1, 2, 3], &mut pairs).is_err());
        assert!(
            parse_messages(&[0; 16], &mut pairs).is_err(),
            "a length of zero must not loop"
        );
        assert!(pairs.is_empty());
    }
}
