//! The socket: in a folder of one's own, between processes of one user, and the one descriptor that goes over it.

use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use rustix::net::sockopt::socket_peercred;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use rustix::process::geteuid;

use crate::ChannelError;

/// How long a message may take once it has begun.
const PATIENCE: Duration = Duration::from_secs(2);

/// Listens at `path`, a socket that only its owner may connect to. Its folder is made where it is not there yet; a socket
/// that a process left that is gone is replaced.
///
/// # Errors
/// Where the folder is open to others, somebody listens there already, or the system refuses.
pub fn listen(path: &Path) -> Result<UnixListener, ChannelError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            return Err(ChannelError::io("make the folder of the socket")(e));
        }
        _ => {}
    }
    private(folder)?;
    let listener = match UnixListener::bind(path) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Err(ChannelError::InUse);
            }
            fs::remove_file(path).map_err(ChannelError::io("replace an old socket"))?;
            UnixListener::bind(path)
        }
        bound => bound,
    }
    .map_err(ChannelError::io("listen at the socket"))?;
    // Nobody else gets here in between: the folder is closed.
    fs::set_permissions(path, Permissions::from_mode(0o600))
        .map_err(ChannelError::io("close the socket to others"))?;
    Ok(listener)
}

fn private(folder: &Path) -> Result<(), ChannelError> {
    let metadata = fs::metadata(folder).map_err(ChannelError::io("look at the folder of the socket"))?;
    let mode = metadata.mode() & 0o7777;
    if metadata.uid() == geteuid().as_raw() && mode & 0o077 == 0 && metadata.is_dir() {
        return Ok(());
    }
    Err(ChannelError::Folder {
        folder: folder.display().to_string(),
        uid: metadata.uid(),
        mode,
    })
}

/// The agent: takes a connection, if the monitor runs as the same user or as root.
///
/// # Errors
/// [`ChannelError::Peer`] for others; the connection is closed then.
pub fn accept(listener: &UnixListener) -> Result<UnixStream, ChannelError> {
    let (stream, _) = listener.accept().map_err(ChannelError::io("take a connection"))?;
    let (uid, own) = users(&stream)?;
    if uid != own && uid != 0 {
        return Err(ChannelError::Peer { uid, own });
    }
    stream
        .set_read_timeout(Some(PATIENCE))
        .and_then(|()| stream.set_write_timeout(Some(PATIENCE)))
        .map_err(ChannelError::io("set up a connection"))?;
    Ok(stream)
}

/// The monitor: connects to an agent, if that runs as the same user or as root. Root itself may watch anybody's VMs.
///
/// # Errors
/// Where nobody listens there, or somebody else does.
pub fn connect(path: &Path) -> Result<UnixStream, ChannelError> {
    let stream = UnixStream::connect(path).map_err(ChannelError::io("connect to the agent"))?;
    let (uid, own) = users(&stream)?;
    if uid != own && uid != 0 && own != 0 {
        return Err(ChannelError::Peer { uid, own });
    }
    stream
        .set_write_timeout(Some(PATIENCE))
        .map_err(ChannelError::io("set up a connection"))?;
    Ok(stream)
}

/// Who is at the other end, and who is here.
fn users(stream: &UnixStream) -> Result<(u32, u32), ChannelError> {
    let peer = socket_peercred(stream).map_err(|e| ChannelError::io("ask who is there")(e.into()))?;
    Ok((peer.uid.as_raw(), geteuid().as_raw()))
}

/// Sends a descriptor, with one byte.
///
/// # Errors
/// Where the other side is gone.
pub fn send_descriptor(stream: &UnixStream, descriptor: &OwnedFd) -> Result<(), ChannelError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [descriptor.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&descriptors));
    sendmsg(stream, &[IoSlice::new(b"m")], &mut control, SendFlags::NOSIGNAL)
        .map_err(|e| ChannelError::io("send the shared memory")(e.into()))?;
    Ok(())
}

/// Receives the descriptor of [`send_descriptor`].
///
/// # Errors
/// Where something else came.
pub fn receive_descriptor(stream: &UnixStream) -> Result<OwnedFd, ChannelError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let got = recvmsg(
        stream,
        &mut [IoSliceMut::new(&mut byte)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )
    .map_err(|e| ChannelError::io("receive the shared memory")(e.into()))?;
    if got.bytes == 0 {
        return Err(ChannelError::Closed);
    }
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
            return descriptors
                .next()
                .ok_or(ChannelError::Shared("it did not come along"));
        }
    }
    Err(ChannelError::Shared("it did not come along"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Shared;
    use std::io::Write;

    #[test]
    fn a_socket_is_its_owners_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("own").join("vm.sock");
        let listener = listen(&path).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(path.parent().unwrap()), 0o700);
        assert!(matches!(listen(&path), Err(ChannelError::InUse)));
        drop(listener);
        // What a dead process left is replaced.
        listen(&path).unwrap();
        fs::set_permissions(path.parent().unwrap(), Permissions::from_mode(0o755)).unwrap();
        assert!(matches!(
            listen(&path),
            Err(ChannelError::Folder { mode: 0o755, .. })
        ));
    }

    #[test]
    fn memory_is_handed_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("own").join("vm.sock");
        let listener = listen(&path).unwrap();
        let monitor = connect(&path).unwrap();
        let agent = accept(&listener).unwrap();
        let (shared, file) = Shared::create().unwrap();
        send_descriptor(&agent, &file).unwrap();
        let received = receive_descriptor(&monitor).unwrap();
        shared.ring_bell();
        assert_eq!(Shared::open(&received).unwrap().bell(), 1);

        // A byte without a descriptor, and the end.
        (&agent).write_all(b"m").unwrap();
        assert!(matches!(
            receive_descriptor(&monitor),
            Err(ChannelError::Shared(_))
        ));
        drop(agent);
        assert!(matches!(receive_descriptor(&monitor), Err(ChannelError::Closed)));
    }
}
