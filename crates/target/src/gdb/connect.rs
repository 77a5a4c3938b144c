//! Connecting to a stub, with a watch that lets the VM go on should we die.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::error::GdbError;
use super::link::Link;
use super::refuse_if_busy;
use crate::guard::Guard;
use crate::host::peers;
use crate::host::process::{Identity, Process};
use crate::host::sockets;
use crate::qmp::{connect_socket, unix_socket};
use crate::spec::GdbAddress;

/// What a watch sends when we are gone, for `printf`: it lets the VM go on without breakpoints, whatever we were in
/// the midst of. First what acknowledges a packet and pauses a VM that runs, and the end of a packet of ours; then
/// the detach packet. QEMU (seen with 7.2) crashes when it is told to detach twice, and we may have told it
/// already: so it is attached again before that.
pub(super) const LAST_WORDS: &str = "+#00$vAttach;1#37$D#44";

/// Connects, which pauses the VM. `server` is its process, where that is on this host. `watch` is set before the
/// connection is made: QEMU pauses the VM for the connection alone.
pub(super) fn open(
    address: &GdbAddress,
    server: Option<Identity>,
    timeout: Duration,
    watch: impl Fn(OwnedFd) -> io::Result<Guard>,
) -> Result<(Link, Guard), GdbError> {
    let name = address.to_string();
    let deadline = Instant::now() + timeout;
    if let Some(vm) = server {
        if !vm.runs() {
            return Err(GdbError::Closed {
                address: name,
                doing: "connecting".into(),
            });
        }
        refuse_if_busy(address, vm.pid, deadline)?;
    }
    let arm = |socket: &OwnedFd| watch(socket.try_clone()?);
    let (stream, guard) = match connect(address, deadline, arm, Guard::dismiss) {
        Ok(connected) => connected,
        Err(e) if e.kind() == io::ErrorKind::TimedOut => {
            return Err(GdbError::Timeout {
                address: name,
                doing: "connecting".into(),
                after: timeout,
            });
        }
        Err(source) => {
            return Err(GdbError::Connect {
                address: name,
                source,
            });
        }
    };
    if let Some(vm) = server
        && !is_of(&stream, address, vm.pid)
    {
        return Err(GdbError::AnotherVm {
            address: name,
            pid: vm.pid,
        });
    }
    Ok((Link::new(name, stream, timeout), guard))
}

/// Whether the stub that was connected to is that of process `pid`.
fn is_of(stream: &OwnedFd, address: &GdbAddress, pid: u32) -> bool {
    let process = Process { pid };
    match address {
        GdbAddress::Unix(_) => {
            peers::listener_pid(stream) == Some(pid) || peers::holds_other_end(process, stream)
        }
        // It listens there still: of two that could, one would not have been able to.
        GdbAddress::Tcp { port, .. } => sockets::listens_on_tcp(process, *port).unwrap_or(true),
    }
}

/// Connects. `arm` is called with the socket before it is connected; what it gives is `disarm`ed where that fails.
fn connect<T>(
    address: &GdbAddress,
    deadline: Instant,
    arm: impl Fn(&OwnedFd) -> io::Result<T>,
    disarm: impl Fn(T),
) -> io::Result<(OwnedFd, T)> {
    match address {
        GdbAddress::Unix(path) => {
            let socket = unix_socket()?;
            let armed = arm(&socket)?;
            match connect_socket(&socket, path, deadline) {
                Ok(()) => Ok((socket, armed)),
                Err(e) => {
                    disarm(armed);
                    Err(e)
                }
            }
        }
        GdbAddress::Tcp { host, port } => {
            let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
            for address in (host.as_str(), *port).to_socket_addrs()?.take(8) {
                let family = if address.is_ipv4() {
                    AddressFamily::INET
                } else {
                    AddressFamily::INET6
                };
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
                let armed = arm(&socket)?;
                match connect_tcp(&socket, &address, deadline) {
                    Ok(()) => return Ok((socket, armed)),
                    Err(e) => {
                        disarm(armed);
                        last = e;
                    }
                }
            }
            Err(last)
        }
    }
}

fn connect_tcp(socket: &OwnedFd, address: &SocketAddr, deadline: Instant) -> io::Result<()> {
    match rustix::net::connect(socket, address) {
        Ok(()) => {}
        Err(Errno::INPROGRESS) => loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let timeout = rustix::event::Timespec::try_from(left).ok();
            match poll(&mut [PollFd::new(socket, PollFlags::OUT)], timeout.as_ref()) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => break rustix::net::sockopt::socket_error(socket)??,
                Err(e) => return Err(e.into()),
            }
        },
        Err(e) => return Err(e.into()),
    }
    rustix::net::sockopt::set_tcp_nodelay(socket, true)?;
    rustix::io::ioctl_fionbio(socket, false)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::unix::net::UnixListener;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// The watch must be there before the VM can be paused, and it is the connection that pauses it.
    #[test]
    fn the_watch_is_set_before_the_connection_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let unix = UnixListener::bind(&path).unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = tcp.local_addr().unwrap().port();
        let tcp_at = |port| GdbAddress::Tcp {
            host: "127.0.0.1".into(),
            port,
        };
        let deadline = Instant::now() + Duration::from_secs(10);
        let (armed, disarmed) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let arm = |socket: &OwnedFd| {
            assert_eq!(rustix::net::getpeername(socket).err(), Some(Errno::NOTCONN));
            armed.fetch_add(1, Ordering::SeqCst);
            Ok(())
        };
        let disarm = |()| {
            disarmed.fetch_add(1, Ordering::SeqCst);
        };
        for address in [GdbAddress::Unix(path.clone()), tcp_at(port)] {
            let (socket, ()) = connect(&address, deadline, arm, disarm).unwrap();
            assert!(rustix::net::getpeername(&socket).is_ok());
        }
        assert_eq!(
            (armed.load(Ordering::SeqCst), disarmed.load(Ordering::SeqCst)),
            (2, 0)
        );
        // Where there is nobody the watch ends.
        drop((unix, tcp));
        for address in [GdbAddress::Unix(path), tcp_at(port)] {
            assert!(connect(&address, deadline, arm, disarm).is_err());
        }
        assert_eq!(
            (armed.load(Ordering::SeqCst), disarmed.load(Ordering::SeqCst)),
            (4, 2)
        );
    }

    /// We may be killed between telling QEMU to detach and dismissing the watch.
    #[test]
    fn last_words_after_a_detach_do_no_harm() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let socket = |name: &str| format!("unix:{},server=on,wait=off", at(name).display());
        let qemu = std::process::Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-display", "none", "-accel", "tcg", "-m", "16"])
            .args(["-gdb", &socket("gdb"), "-qmp", &socket("qmp")])
            .spawn()
            .expect("qemu-system-x86_64 of the Debian package qemu-system-x86");
        let _qemu = Killed(qemu);
        let timeout = Duration::from_secs(30);
        let deadline = Instant::now() + timeout;
        while crate::qmp::Qmp::connect(&at("qmp"), timeout).is_err() {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(20));
        }
        let watch = |connection| Guard::set(connection, LAST_WORDS, "");
        let (mut link, guard) = open(&GdbAddress::Unix(at("gdb")), None, timeout, watch).unwrap();
        link.ask("qSupported").unwrap();
        assert_eq!(link.ask("D").unwrap(), b"OK");
        drop(guard);
        // They attach, which pauses it, and detach.
        assert_eq!(link.answer("the last words").unwrap(), b"OK");
        let status = crate::qmp::Qmp::connect(&at("qmp"), timeout)
            .unwrap()
            .status()
            .unwrap();
        assert!(status.running, "{status:?}");
    }

    /// A process that ends with the test.
    struct Killed(std::process::Child);

    impl Drop for Killed {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}
