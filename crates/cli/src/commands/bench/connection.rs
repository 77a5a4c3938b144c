//! A connection of another process, to be cut under it.

use std::fs;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::process::Child;

use anyhow::{Context, Result, bail};
use rustix::net::{SocketAddrUnix, getpeername};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// The one socket of a child that is connected to something whose path `is` the one that is meant. What is given is the same
/// socket, not a copy of it: what is done to it happens to the child's.
pub(super) fn of(child: &Child, is: impl Fn(&[u8]) -> bool) -> Result<OwnedFd> {
    let process =
        pidfd_open(Pid::from_child(child), PidfdFlags::empty()).context("getting at the monitor")?;
    let folder = format!("/proc/{}/fd", child.id());
    let mut found = None;
    for entry in fs::read_dir(&folder).with_context(|| format!("reading {folder}"))? {
        let entry = entry.with_context(|| format!("reading {folder}"))?;
        let link = match fs::read_link(entry.path()) {
            Ok(link) => link,
            // It was closed meanwhile.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(error).context("looking at what the monitor has open"),
        };
        if !link.as_os_str().as_encoded_bytes().starts_with(b"socket:") {
            continue;
        }
        let number = entry.file_name().to_string_lossy().parse();
        let number = number.context("looking at what the monitor has open")?;
        let socket = pidfd_getfd(&process, number, PidfdGetfdFlags::empty())
            .context("getting at a socket of the monitor")?;
        let Ok(Some(peer)) = getpeername(&socket) else {
            continue;
        };
        let peer = SocketAddrUnix::try_from(peer).ok();
        if peer
            .as_ref()
            .and_then(SocketAddrUnix::path_bytes)
            .is_some_and(&is)
        {
            found = Some(socket);
        }
    }
    match found {
        Some(socket) => Ok(socket),
        None => bail!("the monitor has no such connection"),
    }
}
