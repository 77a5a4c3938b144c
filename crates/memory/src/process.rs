//! Guest memory that lies in another process and cannot be mapped: read and written by `process_vm_readv(2)` and
//! `process_vm_writev(2)`.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// The kernel's limit for the vectors of one call (UIO_MAXIOV).
pub(crate) const MAX_VECTORS: usize = 1024;

/// Why an access to the process failed, without the guest address, which this level does not know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ProcessError {
    Exited,
    NoPermission,
    NotMapped,
    System(i32),
}

/// Another process, held so that its pid cannot come to mean a different process unnoticed.
#[derive(Debug)]
pub struct ProcessMemory {
    pid: u32,
    handle: OwnedFd,
}

impl ProcessMemory {
    /// Takes hold of the process (a pidfd: Linux 5.3 or later). Says nothing about permission yet: the first read
    /// does.
    pub fn open(pid: u32) -> io::Result<Self> {
        let raw = libc::pid_t::try_from(pid).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: a plain system call; a descriptor that comes back is ours alone.
        let handle = unsafe {
            let fd = libc::syscall(libc::SYS_pidfd_open, raw, 0);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(i32::try_from(fd).map_err(|_| io::ErrorKind::InvalidData)?)
        };
        Ok(Self { pid, handle })
    }

    /// Its pid.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it has ended (a zombie has).
    pub fn has_exited(&self) -> bool {
        let mut poll = libc::pollfd {
            fd: self.handle.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid pollfd, no waiting.
        let ready = unsafe { libc::poll(&mut poll, 1, 0) };
        ready > 0 && poll.revents & (libc::POLLIN | libc::POLLERR) != 0
    }

    /// Reads the ranges in order and returns how many bytes came before the first that failed, with the reason.
    ///
    /// # Safety
    /// Each of `local` must be writable for its length; both lists must have the same shape and at most
    /// [`MAX_VECTORS`] entries.
    unsafe fn read_vectors(
        &self,
        local: &[libc::iovec],
        remote: &[libc::iovec],
    ) -> Result<usize, ProcessError> {
        let (l, r) = (local.len() as libc::c_ulong, remote.len() as libc::c_ulong);
        // SAFETY: the caller's promise for `local`; the kernel checks `remote`.
        let n = unsafe {
            libc::process_vm_readv(self.pid as libc::pid_t, local.as_ptr(), l, remote.as_ptr(), r, 0)
        };
        self.outcome(n)
    }

    /// What a call's return value means. Whether the process still lives is asked *after* the call: a pid is not
    /// given to another process as long as ours lives, so what was read came from ours.
    fn outcome(&self, n: isize) -> Result<usize, ProcessError> {
        let error = (n < 0).then(|| io::Error::last_os_error().raw_os_error().unwrap_or(0));
        if self.has_exited() {
            return Err(ProcessError::Exited);
        }
        match error {
            None => Ok(n.unsigned_abs()),
            Some(libc::ESRCH) => Err(ProcessError::Exited),
            Some(libc::EPERM | libc::EACCES) => Err(ProcessError::NoPermission),
            Some(libc::EFAULT) => Err(ProcessError::NotMapped),
            Some(errno) => Err(ProcessError::System(errno)),
        }
    }

    /// Fills `buf` from `hva`. The error says how many bytes were read before.
    pub(crate) fn read(&self, hva: u64, buf: &mut [u8]) -> Result<(), (usize, ProcessError)> {
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let local = [libc::iovec {
                iov_base: rest.as_mut_ptr().cast(),
                iov_len: rest.len(),
            }];
            let remote = [remote_vector(hva.wrapping_add(done as u64), rest.len())];
            // SAFETY: `local` is the rest of `buf`.
            match unsafe { self.read_vectors(&local, &remote) } {
                // Less than asked for: the next round, from there, learns why.
                Ok(n) if n > 0 => done += n,
                Ok(_) => return Err((done, ProcessError::NotMapped)),
                Err(error) => return Err((done, error)),
            }
        }
        Ok(())
    }

    /// Reads many pieces with as few calls as possible; each gets its own result.
    pub(crate) fn read_many(&self, pieces: &mut [Piece<'_>]) {
        let mut local = Vec::with_capacity(pieces.len().min(MAX_VECTORS));
        let mut remote = Vec::with_capacity(pieces.len().min(MAX_VECTORS));
        let mut at = 0;
        while at < pieces.len() {
            local.clear();
            remote.clear();
            for piece in pieces.iter_mut().skip(at).take(MAX_VECTORS) {
                remote.push(remote_vector(piece.hva, piece.buf.len()));
                local.push(libc::iovec {
                    iov_base: piece.buf.as_mut_ptr().cast(),
                    iov_len: piece.buf.len(),
                });
            }
            let asked = local.len();
            // SAFETY: `local` holds the buffers of distinct pieces, borrowed for the whole call.
            let outcome = unsafe { self.read_vectors(&local, &remote) };
            let mut got = match outcome {
                Ok(n) => n,
                Err(ProcessError::NotMapped) => 0,
                Err(error) => {
                    // Of the process, not of a piece.
                    pieces
                        .iter_mut()
                        .skip(at)
                        .for_each(|piece| piece.result = Err(error));
                    return;
                }
            };
            let batch = pieces.iter_mut().skip(at).take(asked);
            let mut read = 0;
            for piece in batch {
                if piece.buf.len() > got {
                    // The kernel stops at the first range that fails: this one. Alone, it tells the reason.
                    piece.result = self.read(piece.hva, piece.buf).map_err(|(_, error)| error);
                    read += 1;
                    break;
                }
                got -= piece.buf.len();
                piece.result = Ok(());
                read += 1;
            }
            at += read;
        }
    }

    /// Writes `data` at `hva`. The error says how many bytes were written before.
    pub(crate) fn write(&self, hva: u64, data: &[u8]) -> Result<(), (usize, ProcessError)> {
        let mut done = 0;
        while let Some(rest) = data.get(done..).filter(|rest| !rest.is_empty()) {
            let local = libc::iovec {
                iov_base: rest.as_ptr().cast_mut().cast(),
                iov_len: rest.len(),
            };
            let remote = remote_vector(hva.wrapping_add(done as u64), rest.len());
            // SAFETY: the kernel only reads from `local`, which is the rest of `data`, and checks `remote`.
            let n = unsafe { libc::process_vm_writev(self.pid as libc::pid_t, &local, 1, &remote, 1, 0) };
            match self.outcome(n) {
                Ok(n) if n > 0 => done += n,
                Ok(_) => return Err((done, ProcessError::NotMapped)),
                Err(error) => return Err((done, error)),
            }
        }
        Ok(())
    }
}

/// One piece of a batched read.
pub(crate) struct Piece<'a> {
    pub(crate) hva: u64,
    pub(crate) buf: &'a mut [u8],
    pub(crate) result: Result<(), ProcessError>,
}

fn remote_vector(hva: u64, len: usize) -> libc::iovec {
    libc::iovec {
        iov_base: hva as usize as *mut libc::c_void,
        iov_len: len,
    }
}
