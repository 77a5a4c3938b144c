//! Connections of this process, to be cut as somebody else would cut them.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::net::{Shutdown, SocketAddrUnix, getpeername, shutdown, sockopt::socket_peercred};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

/// Shuts all connections that this process has to the one with pid `server` by a UNIX socket whose path `is` the one that is meant.
/// How many descriptors they had.
pub fn cut(server: u32, is: impl Fn(&Path) -> bool) -> io::Result<usize> {
    let own = pidfd_open(getpid(), PidfdFlags::empty())?;
    let mut cut = 0;
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let Ok(number) = entry?.file_name().to_string_lossy().parse() else {
            continue;
        };
        // Another thread may have closed it.
        let Ok(socket) = pidfd_getfd(&own, number, PidfdGetfdFlags::empty()) else {
            continue;
        };
        let peer = getpeername(&socket).ok().flatten();
        let peer = peer.and_then(|peer| SocketAddrUnix::try_from(peer).ok());
        let path = peer.as_ref().and_then(SocketAddrUnix::path_bytes);
        let meant = path.is_some_and(|path| is(Path::new(OsStr::from_bytes(path))))
            && socket_peercred(&socket).is_ok_and(|peer| u32::try_from(peer.pid.as_raw_pid()) == Ok(server));
        if meant {
            shutdown(&socket, Shutdown::Both)?;
            cut += 1;
        }
    }
    Ok(cut)
}
