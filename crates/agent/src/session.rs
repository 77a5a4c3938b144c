//! A monitor's connection, and what it is told.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use vmsight_channel::{ChannelError, Reply, Shared};
use vmsight_hooks::HookId;

/// Most notices that wait for a monitor.
const NOTICES: usize = 64;

/// The connection. Its hooks are its own, and go with it.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) id: u64,
    pub(crate) shared: Shared,
    /// The number of the next event.
    pub(crate) sequence: AtomicU64,
    over: AtomicBool,
    notices: Mutex<VecDeque<Reply>>,
    /// Wakes the thread that speaks with the monitor.
    pub(crate) bell: OwnedFd,
}

impl Session {
    /// A new one, and the descriptor of the memory that its monitor is to share.
    pub(crate) fn new(id: u64) -> Result<(Self, OwnedFd), ChannelError> {
        let (shared, file) = Shared::create()?;
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| ChannelError::io("make a bell")(e.into()))?;
        let session = Self {
            id,
            shared,
            sequence: AtomicU64::new(0),
            over: AtomicBool::new(false),
            notices: Mutex::default(),
            bell,
        };
        Ok((session, file))
    }

    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Nobody waits for its monitor any more; whether that is news.
    pub(crate) fn end(&self) -> bool {
        !self.over.swap(true, Ordering::AcqRel)
    }

    /// Tells the monitor what it did not ask for.
    pub(crate) fn notice(&self, hook: Option<HookId>, text: impl Into<String>) {
        let text = text.into();
        let mut notices = self.notices.lock().unwrap_or_else(PoisonError::into_inner);
        if notices.len() < NOTICES {
            notices.push_back(Reply::Notice { hook, text });
        }
        drop(notices);
        // Full means that it is rung already.
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }

    pub(crate) fn take_notice(&self) -> Option<Reply> {
        self.notices
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front()
    }
}
