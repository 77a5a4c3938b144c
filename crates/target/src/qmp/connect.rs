//! Connecting to a unix socket with a deadline, at paths of any length.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// `sun_path` of `sockaddr_un` with its final zero.
const SUN_PATH: usize = 108;

/// Connects. [`io::ErrorKind::TimedOut`] where the listener's queue stays full until the deadline: the
/// kernel would make a plain `connect` wait for ever.
pub(crate) fn connect_unix(path: &Path, deadline: Instant) -> io::Result<UnixStream> {
    let socket = unix_socket()?;
    connect_socket(&socket, path, deadline)?;
    Ok(UnixStream::from(socket))
}

/// A socket that is not connected yet.
pub(crate) fn unix_socket() -> io::Result<OwnedFd> {
    Ok(rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?)
}

/// Connects such a socket as [`connect_unix`] does.
pub(crate) fn connect_socket(socket: &OwnedFd, path: &Path, deadline: Instant) -> io::Result<()> {
    // Paths that do not fit are reached through a descriptor of the socket's file.
    let file;
    let address = match path.to_str().and_then(|p| p.strip_prefix('@')) {
        Some(name) => SocketAddrUnix::new_abstract_name(name.as_bytes())?,
        None if path.as_os_str().len() < SUN_PATH => SocketAddrUnix::new(path)?,
        None => {
            file = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
            SocketAddrUnix::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?
        }
    };
    loop {
        match rustix::net::connect(socket, &address) {
            Ok(()) => break,
            Err(Errno::AGAIN) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
            Err(Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    rustix::io::ioctl_fionbio(socket, false)?;
    Ok(())
}
