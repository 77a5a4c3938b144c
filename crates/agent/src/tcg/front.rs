//! The agent of a QEMU with TCG: its vCPUs, its monitor, and pausing the VM.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Once, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use vmsight_channel::{MAX_VCPUS, Producer, Reply, Shared};
use vmsight_hooks::{Capability, Expiry, HookId};

use super::api::{self, Dump, Info, Inside, Plugin};
use super::change::Changes;
use super::registers::Reader;
use super::{capability, control};
use crate::pending::expiry;
use crate::qemu::Qemu;
use crate::table::Armed;

/// Most notices that wait for the monitor.
const NOTICES: usize = 64;
/// How long QEMU's main thread may take until it begins to pause the VM.
const PAUSING: Duration = Duration::from_secs(1);

/// A monitor's connection.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) id: u64,
    pub(super) shared: Shared,
    pub(super) sequence: AtomicU64,
    over: AtomicBool,
}

impl Session {
    pub(super) fn new(id: u64, shared: Shared) -> Self {
        Self {
            id,
            shared,
            sequence: AtomicU64::new(0),
            over: AtomicBool::new(false),
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }
}

/// What is kept for a vCPU.
#[derive(Debug, Default)]
pub(super) struct Place {
    /// Its end of the ring of the monitor with this number. Locked while an event is written.
    pub(super) ring: Mutex<Option<(u64, Producer)>>,
    /// The event that it waits with, plus one.
    pub(super) held: AtomicU64,
}

/// The agent. It lives as long as the process.
#[derive(Debug)]
pub(super) struct Front {
    pub(super) plugin: Plugin,
    pub(super) registers: Option<Reader>,
    pub(super) values: Option<api::Values>,
    pub(super) inside: Inside,
    pub(super) dump: Option<Dump>,
    /// The version of QEMU's plugin interface.
    pub(super) version: i32,
    qemu: Option<Qemu>,
    pub(super) socket: PathBuf,
    started: Once,
    pub(super) changes: Changes,
    vcpus: AtomicU32,
    places: Vec<Place>,
    session: RwLock<Option<Arc<Session>>>,
    notices: Mutex<VecDeque<Reply>>,
    /// Wakes the control thread.
    pub(super) bell: OwnedFd,
    paused: AtomicBool,
}

static FRONT: OnceLock<&'static Front> = OnceLock::new();

/// The agent, once QEMU has loaded it as a plugin.
pub(super) fn get() -> Option<&'static Front> {
    FRONT.get().copied()
}

/// Keeps it; false where there is one already.
pub(super) fn begin(front: Front) -> bool {
    FRONT.get().is_none() && FRONT.set(Box::leak(Box::new(front))).is_ok()
}

/// QEMU says that its owner lets the VM run.
fn runs() {
    if let Some(front) = get() {
        front.paused.store(false, Ordering::SeqCst);
    }
}

impl Front {
    pub(super) fn new(info: &Info, plugin: Plugin, socket: PathBuf) -> Result<Self, String> {
        let Some(inside) = Inside::find() else {
            return Err(
                "this QEMU does not export what it takes to change hooks in a running guest".to_owned(),
            );
        };
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        let bell = rustix::event::eventfd(0, flags).map_err(|e| format!("no event descriptor: {e}"))?;
        // Read with the interface's own version in mind: where QEMU does not know of it, it is not there.
        let values = (info.current >= 4).then(api::Values::find).flatten();
        let registers = if values.is_some() { Reader::find() } else { None };
        Ok(Self {
            plugin,
            values: values.filter(|_| registers.is_some()),
            registers,
            inside,
            dump: Dump::find(),
            version: info.current,
            qemu: Qemu::find(runs),
            socket,
            started: Once::new(),
            changes: Changes::default(),
            vcpus: AtomicU32::new(0),
            places: (0..MAX_VCPUS).map(|_| Place::default()).collect(),
            session: RwLock::default(),
            notices: Mutex::default(),
            bell,
            paused: AtomicBool::new(false),
        })
    }

    pub(super) fn add_vcpu(&'static self, vcpu: u32) {
        let vcpus = vcpu.saturating_add(1);
        let before = self.vcpus.fetch_max(vcpus, Ordering::SeqCst);
        if let Some(session) = self.session() {
            session.shared.set_vcpus(before.max(vcpus));
        }
        self.started.call_once(|| control::start(self));
    }

    pub(super) fn vcpus(&self) -> u32 {
        self.vcpus.load(Ordering::SeqCst)
    }

    pub(super) fn places(&self) -> impl Iterator<Item = &Place> {
        self.places.iter().take(self.vcpus() as usize)
    }

    pub(super) fn place(&self, vcpu: u32) -> Option<&Place> {
        self.places.get(usize::try_from(vcpu).ok()?)
    }

    pub(super) fn capabilities(&self) -> Vec<Capability> {
        capability::list(self.registers.is_some(), self.dump.is_some(), self.qemu.is_some())
    }

    pub(super) fn session(&self) -> Option<Arc<Session>> {
        self.session
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(super) fn begin_session(&self, session: Arc<Session>) {
        self.notices
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
        session.shared.set_vcpus(self.vcpus());
        *self.session.write().unwrap_or_else(PoisonError::into_inner) = Some(session);
    }

    /// The monitor is gone: every hook comes out. Without a good-bye the VM stands still where a hook asks for that.
    pub(super) fn end_session(&self, in_good_order: bool) {
        let ended = self
            .session
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let closed = !in_good_order && self.fails_closed();
        if closed {
            self.freeze();
        }
        if let Some(ended) = ended {
            ended.over.store(true, Ordering::Release);
            self.disarm_all();
            self.nudge(&ended);
        }
    }

    /// Wakes vCPUs that wait for verdicts, so that they look around.
    pub(super) fn nudge(&self, session: &Session) {
        for vcpu in 0..self.vcpus() {
            if let Some(area) = session.shared.area(vcpu) {
                area.nudge();
            }
        }
    }

    /// No verdict came in time.
    pub(super) fn expired(&self, armed: &Armed) {
        armed.expired.fetch_add(1, Ordering::Relaxed);
        match expiry(armed) {
            Expiry::Open => {
                self.disarm(armed.id);
                self.notice(
                    Some(armed.id),
                    "no verdict came in time: the guest went on, and the hook is out",
                );
            }
            Expiry::Closed => {
                self.pause();
                self.notice(Some(armed.id), "no verdict came in time: the VM is paused");
            }
        }
    }

    /// Asks for the VM to be paused, until its owner resumes it.
    fn freeze(&self) {
        if let Some(qemu) = &self.qemu {
            self.paused.store(true, Ordering::SeqCst);
            qemu.pause();
        }
    }

    /// The same on a vCPU's thread, which goes on when the VM begins to pause: it is out of the guest soon after.
    pub(super) fn pause(&self) {
        self.freeze();
        let end = Instant::now() + PAUSING;
        while self.paused.load(Ordering::SeqCst) && self.is_running() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Whether a monitor, or its absence, has paused the VM.
    pub(super) fn is_paused(&self) -> bool {
        self.paused.load(Ordering::SeqCst)
    }

    /// Whether QEMU lets its vCPUs run; while it does not it waits for them.
    pub(super) fn is_running(&self) -> bool {
        // SAFETY: it reads a variable.
        unsafe { (self.inside.runs)() }
    }

    /// Tells the monitor what it did not ask for.
    pub(super) fn notice(&self, hook: Option<HookId>, text: &str) {
        let text = text.to_owned();
        let mut notices = self.notices.lock().unwrap_or_else(PoisonError::into_inner);
        if notices.len() < NOTICES {
            notices.push_back(Reply::Notice { hook, text });
        }
        drop(notices);
        // Full means that it is rung already.
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }

    pub(super) fn take_notice(&self) -> Option<Reply> {
        self.notices
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front()
    }
}
