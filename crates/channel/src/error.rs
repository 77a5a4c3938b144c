//! What can go wrong between the two.

use std::io;

/// Why a message could not be sent, had or understood.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// The connection ended.
    #[error("the other side closed the connection")]
    Closed,
    /// The system refused.
    #[error("{doing}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// What the system says.
        source: io::Error,
    },
    /// A message longer than any that makes sense.
    #[error("a message of {bytes} bytes; at most {most} are taken")]
    TooLong {
        /// What it says of itself.
        bytes: usize,
        /// What is taken.
        most: usize,
    },
    /// A message that is no JSON, or not one of ours.
    #[error("a message that makes no sense: {0}")]
    Message(#[from] serde_json::Error),
    /// The other side is somebody else's.
    #[error("the other side runs as user {uid}, which is neither this one ({own}) nor root")]
    Peer {
        /// Whose it is.
        uid: u32,
        /// Who we are.
        own: u32,
    },
    /// The folder of the socket is open to others.
    #[error(
        "the folder {folder} belongs to user {uid} and has mode {mode:o}; it must be one's own and closed to all others (mode 0700)"
    )]
    Folder {
        /// Which folder.
        folder: String,
        /// Whose it is.
        uid: u32,
        /// Its permissions.
        mode: u32,
    },
    /// Somebody listens there already.
    #[error("somebody else listens there already")]
    InUse,
    /// What stands in shared memory makes no sense.
    #[error("the shared memory makes no sense: {0}")]
    Shared(&'static str),
}

impl ChannelError {
    /// The system's refusal while `doing`.
    pub fn io(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| match source.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof => {
                Self::Closed
            }
            _ => Self::Io { doing, source },
        }
    }
}
