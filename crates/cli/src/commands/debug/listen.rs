//! Where a debugger connects: a Unix socket for its owner alone, or a port of the loopback.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, fchmod};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, bind, listen, socket};
use vmsight_events::debug::Wire;

/// An address to listen at.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Address {
    /// Of the loopback; port 0 stands for any that is free.
    Port(SocketAddr),
    /// A Unix socket.
    Path(PathBuf),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("HOST:PORT or a path".to_owned());
        }
        if text.contains('/') {
            return Ok(Self::Path(text.into()));
        }
        let address: SocketAddr = text.parse().map_err(|_| {
            "127.0.0.1:PORT, [::1]:PORT, or the path of a Unix socket with a slash in it".to_owned()
        })?;
        match address.ip().is_loopback() {
            true => Ok(Self::Port(address)),
            false => Err(format!(
                "{} is no address of the loopback: whoever reaches the port owns the guest; tunnel it (ssh -L) instead",
                address.ip()
            )),
        }
    }
}

/// A socket that listens. A Unix socket is removed when this is dropped.
#[derive(Debug)]
pub(super) enum Listener {
    Tcp(TcpListener),
    Unix {
        listener: UnixListener,
        path: PathBuf,
        /// The folder that was made for it.
        _folder: Option<tempfile::TempDir>,
    },
}

impl Listener {
    /// Listens at an address; without one at a Unix socket in a new folder that only we can enter.
    pub(super) fn bind(address: Option<&Address>) -> Result<Self> {
        match address {
            Some(Address::Port(address)) => {
                let listener =
                    TcpListener::bind(address).with_context(|| format!("listening at {address}"))?;
                Ok(Self::Tcp(listener))
            }
            Some(Address::Path(path)) => {
                // A debugger may be elsewhere.
                let path = std::path::absolute(path).context("finding the folder of the socket")?;
                Self::unix(path, None)
            }
            None => {
                let folder = tempfile::Builder::new()
                    .prefix("vmsight-debug-")
                    .tempdir()
                    .context("making a folder for the socket")?;
                Self::unix(folder.path().join("gdb"), Some(folder))
            }
        }
    }

    fn unix(path: PathBuf, folder: Option<tempfile::TempDir>) -> Result<Self> {
        let listen = || -> io::Result<UnixListener> {
            let fd = socket(AddressFamily::UNIX, SocketType::STREAM, None)?;
            // Before it has a name: what bind(2) makes has the socket's own mode (unix_bind in
            // net/unix/af_unix.c).
            fchmod(&fd, Mode::RUSR | Mode::WUSR)?;
            rustix::io::ioctl_fioclex(&fd)?;
            bind(&fd, &SocketAddrUnix::new(&path)?)?;
            listen(&fd, 1)?;
            Ok(fd.into())
        };
        let listener = listen().with_context(|| format!("listening at {}", path.display()))?;
        Ok(Self::Unix {
            listener,
            path,
            _folder: folder,
        })
    }

    /// The next debugger; `None` where none comes within `patience`.
    pub(super) fn accept(&self, patience: Duration) -> io::Result<Option<Wire>> {
        let patience = Timespec::try_from(patience).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut fds = [match self {
            Self::Tcp(listener) => PollFd::new(listener, PollFlags::IN),
            Self::Unix { listener, .. } => PollFd::new(listener, PollFlags::IN),
        }];
        match poll(&mut fds, Some(&patience)) {
            Ok(0) => return Ok(None),
            // A signal: whoever waits looks what it was.
            Err(rustix::io::Errno::INTR) => return Ok(None),
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(Some(match self {
            Self::Tcp(listener) => Wire::Tcp(listener.accept()?.0),
            Self::Unix { listener, .. } => Wire::Unix(listener.accept()?.0),
        }))
    }

    /// For `process connect` of lldb.
    pub(super) fn url(&self) -> String {
        match self {
            Self::Tcp(_) => format!("connect://{self}"),
            Self::Unix { .. } => format!("unix-connect://{self}"),
        }
    }
}

impl fmt::Display for Listener {
    /// For `target remote` of gdb.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(listener) => match listener.local_addr() {
                Ok(address) => address.fmt(f),
                Err(_) => f.write_str("?"),
            },
            Self::Unix { path, .. } => path.display().fmt(f),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix { path, .. } = self {
            // Somebody may have put something else there.
            if std::fs::symlink_metadata(&path).is_ok_and(|m| m.file_type().is_socket()) {
                let _ = std::fs::remove_file(path);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn only_the_loopback_and_paths() {
        for (text, good) in [
            ("127.0.0.1:0", true),
            ("[::1]:1234", true),
            ("./gdb", true),
            ("0.0.0.0:1234", false),
            ("192.0.2.1:1234", false),
            ("[::]:1234", false),
            ("localhost", false),
            ("1234", false),
            ("", false),
        ] {
            assert_eq!(Address::from_str(text).is_ok(), good, "{text}");
        }
    }

    #[test]
    fn a_socket_is_its_owners_alone_and_goes_with_the_listener() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gdb");
        let address = Address::Path(path.clone());
        let listener = Listener::bind(Some(&address)).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(Listener::bind(Some(&address)).is_err(), "it is taken");
        assert!(listener.accept(Duration::from_millis(1)).unwrap().is_none());
        let _client = std::os::unix::net::UnixStream::connect(&path).unwrap();
        assert!(listener.accept(Duration::from_secs(60)).unwrap().is_some());
        drop(listener);
        assert!(!path.exists());
    }
}
