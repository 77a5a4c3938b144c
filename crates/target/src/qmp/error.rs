//! What goes wrong with a QMP socket.

use std::fmt;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::host::peers::{self, Holder};
use crate::host::process::Process;

/// Why a QMP command did not work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QmpError {
    /// The socket could not be connected to, or the system refused later.
    #[error("QMP socket {}: {source}{}", path.display(), hint(source))]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another client holds the socket, which serves one at a time. Its session was not touched.
    #[error("QMP socket {} is busy: {} is connected, and it serves one client at a time", path.display(), Clients(clients))]
    Busy {
        /// The socket.
        path: PathBuf,
        /// The processes that are connected, as pid and name.
        clients: Vec<(u32, String)>,
    },
    /// The socket took the connection and said nothing: another client that we may not see, or a QEMU that hangs.
    #[error("QMP socket {} took the connection and did not greet within {after:?}: {why}", path.display())]
    Silent {
        /// The socket.
        path: PathBuf,
        /// How long was waited.
        after: Duration,
        /// What may be the reason.
        why: String,
    },
    /// An answer did not come in time.
    #[error("QMP socket {}: no answer to {doing} within {after:?}", path.display())]
    Timeout {
        /// The socket.
        path: PathBuf,
        /// The command.
        doing: String,
        /// How long was waited.
        after: Duration,
    },
    /// QEMU closed the connection: it exited.
    #[error("QMP socket {} was closed during {doing}: the VM exited", path.display())]
    Closed {
        /// The socket.
        path: PathBuf,
        /// The command.
        doing: String,
    },
    /// QEMU refused the command.
    #[error("QMP command {command} at {}: {reason} ({class})", path.display())]
    Command {
        /// The socket.
        path: PathBuf,
        /// The command.
        command: String,
        /// QEMU's error class.
        class: String,
        /// QEMU's words.
        reason: String,
    },
    /// It is no longer, or never was, the socket of the VM that was attached to.
    #[error(
        "QMP socket {} is not that of process {pid}{}: nothing was asked of it",
        path.display(),
        server.map(|other| format!(" but of process {other}")).unwrap_or_default()
    )]
    AnotherVm {
        /// The socket.
        path: PathBuf,
        /// The VM's process.
        pid: u32,
        /// Who listens there.
        server: Option<u32>,
    },
    /// What came is not QMP.
    #[error("{} does not speak QMP: {reason}", path.display())]
    Protocol {
        /// The socket.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl QmpError {
    /// An error where a client is seen to be connected to the socket at `path`, without touching it. A process that this one
    /// is starting meanwhile has a copy of every connection, closed ones too, until it runs its program: it is waited for
    /// until `deadline`.
    pub(super) fn held(path: &Path, deadline: Instant) -> Option<Self> {
        let me = Process {
            pid: std::process::id(),
        };
        let clients = loop {
            let clients = peers::clients_of(me, &path.to_string_lossy())
                .ok()
                .filter(|c| !c.is_empty())?;
            // One that has ended since they were looked through holds nothing any more.
            let passes = |holder: &Holder| {
                let holder = Process { pid: holder.pid };
                me.is_starting(holder) || holder.is_gone()
            };
            if !clients.iter().all(passes) || Instant::now() >= deadline {
                break clients;
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        Some(Self::Busy {
            path: path.to_owned(),
            clients: clients.into_iter().map(|h| (h.pid, h.comm)).collect(),
        })
    }

    /// A socket that was connected to and said nothing: finds out why, as far as the kernel tells.
    pub(super) fn silent(path: &Path, stream: Option<&UnixStream>, after: Duration) -> Self {
        let path = path.to_owned();
        // The name under which the server bound the socket, which may not be the one we came by.
        let bound = stream
            .and_then(|s| s.peer_addr().ok())
            .and_then(|a| a.as_pathname().map(Path::to_owned));
        let bound = bound.unwrap_or_else(|| path.clone());
        let server = stream.and_then(peers::listener_pid).map(|pid| Process { pid });
        let me = Process {
            pid: std::process::id(),
        };
        let clients: Vec<Holder> =
            peers::clients_of(server.unwrap_or(me), &bound.to_string_lossy()).unwrap_or_default();
        if !clients.is_empty() {
            let clients = clients.into_iter().map(|h| (h.pid, h.comm)).collect();
            return Self::Busy { path, clients };
        }
        let stopped = server.and_then(|p| Some((p, p.stat().ok()?.state)));
        let why = match stopped {
            Some((p, b'T' | b't')) => format!("process {} is stopped by a signal or a debugger", p.pid),
            Some((p, _)) => format!(
                "another client that may not be seen from here holds it, or process {} hangs",
                p.pid
            ),
            None => "another client holds it, or its process hangs".to_owned(),
        };
        Self::Silent { path, after, why }
    }

    /// Whether the VM is gone.
    #[must_use]
    pub fn is_exit(&self) -> bool {
        match self {
            Self::Closed { .. } => true,
            Self::Connect { source, .. } => source.kind() == io::ErrorKind::ConnectionRefused,
            _ => false,
        }
    }
}

struct Clients<'a>(&'a [(u32, String)]);

impl fmt::Display for Clients<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (pid, comm)) in self.0.iter().take(4).enumerate() {
            if i > 0 {
                f.write_str(", ")?;
            }
            write!(f, "process {pid} ({})", comm.escape_debug())?;
        }
        Ok(())
    }
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "; run as root or as the user who owns the VM",
        io::ErrorKind::ConnectionRefused => "; nobody listens there any more: did the VM exit?",
        io::ErrorKind::NotFound => "; is the VM running, and is this the path of its -qmp option?",
        _ => "",
    }
}
