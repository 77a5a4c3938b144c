//! SHA-256 on a thread of its own.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use sha2::{Digest, Sha256};

use super::WriteError;

/// Chunks that may wait to be hashed. They are not copied, so this bounds memory only.
const WAITING: usize = 8;

static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

/// What is hashed next.
enum Feed {
    Shared(Arc<Vec<u8>>, Range<usize>),
    Owned(Vec<u8>),
    Zeros(u64),
    /// A digest ends here, and the next begins.
    End,
}

/// Digests of one stream of bytes after the other.
pub(super) struct Digester {
    feed: SyncSender<Feed>,
    thread: JoinHandle<Vec<[u8; 32]>>,
}

impl Digester {
    pub(super) fn start() -> io::Result<Self> {
        let (feed, fed) = sync_channel(WAITING);
        let thread = std::thread::Builder::new()
            .name("sha256".to_owned())
            .spawn(move || digests(&fed))?;
        Ok(Self { feed, thread })
    }

    fn send(&self, feed: Feed) -> Result<(), WriteError> {
        self.feed.send(feed).map_err(|_| WriteError::Hashing)
    }

    pub(super) fn shared(&self, bytes: &Arc<Vec<u8>>, range: Range<usize>) -> Result<(), WriteError> {
        self.send(Feed::Shared(Arc::clone(bytes), range))
    }

    pub(super) fn owned(&self, bytes: Vec<u8>) -> Result<(), WriteError> {
        self.send(Feed::Owned(bytes))
    }

    pub(super) fn zeros(&self, len: u64) -> Result<(), WriteError> {
        self.send(Feed::Zeros(len))
    }

    pub(super) fn end(&self) -> Result<(), WriteError> {
        self.send(Feed::End)
    }

    /// The digests of all streams that were ended.
    pub(super) fn finish(self) -> Result<Vec<[u8; 32]>, WriteError> {
        drop(self.feed);
        self.thread.join().map_err(|_| WriteError::Hashing)
    }
}

fn digests(fed: &Receiver<Feed>) -> Vec<[u8; 32]> {
    let mut done = Vec::new();
    let mut hash = Sha256::new();
    for feed in fed {
        match feed {
            Feed::Shared(bytes, range) => hash.update(bytes.get(range).unwrap_or_default()),
            Feed::Owned(bytes) => hash.update(&bytes),
            Feed::Zeros(mut len) => {
                while len > 0 {
                    let now = len.min(ZEROS.len() as u64);
                    hash.update(ZEROS.get(..now as usize).unwrap_or_default());
                    len -= now;
                }
            }
            Feed::End => done.push(hash.finalize_reset().into()),
        }
    }
    done
}
