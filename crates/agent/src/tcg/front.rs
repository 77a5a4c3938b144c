//! The agent of a QEMU with TCG: its vCPUs, its monitor, and pausing the VM.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Once, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use vmsight_channel::{MAX_VCPUS, Producer, Refusal, Reply, Request};
use vmsight_hooks::{BackendKind, Capability, Counts, Expiry, HookId, Tallied};

use super::api::{self, Dump, Info, Inside, Plugin};
use super::capability;
use super::change::Changes;
use super::registers::Reader;
use crate::control::{self, Serve};
use crate::pending::expiry;
use crate::qemu::Qemu;
use crate::session::Session;
use crate::table::Armed;

/// How long QEMU's main thread may take until it begins to pause the VM.
const PAUSING: Duration = Duration::from_secs(1);

/// What is kept for a vCPU.
#[derive(Debug, Default)]
pub(super) struct Place {
    /// Its ends of the rings of monitors, by their numbers. Locked while an event is written.
    pub(super) rings: Mutex<Vec<(u64, Producer)>>,
    /// The event that it waits with, as a number that no two events in a row have; 0 where it waits with none.
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
    /// In the order in which they came.
    sessions: RwLock<Vec<Arc<Session>>>,
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
            sessions: RwLock::default(),
            paused: AtomicBool::new(false),
        })
    }

    pub(super) fn add_vcpu(&'static self, vcpu: u32) {
        let vcpus = vcpu.saturating_add(1);
        let before = self.vcpus.fetch_max(vcpus, Ordering::SeqCst);
        for session in self.sessions() {
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

    pub(super) fn sessions(&self) -> Vec<Arc<Session>> {
        self.sessions
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
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
                armed.notice("no verdict came in time: the guest went on, and the hook is out");
            }
            Expiry::Closed => {
                self.pause();
                armed.notice("no verdict came in time: the VM is paused");
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

    /// Whether QEMU lets its vCPUs run; while it does not it waits for them.
    pub(super) fn is_running(&self) -> bool {
        // SAFETY: it reads a variable.
        unsafe { (self.inside.runs)() }
    }
}

impl Serve for Front {
    fn kind(&self) -> BackendKind {
        BackendKind::AgentTcg
    }

    fn socket(&self) -> &Path {
        &self.socket
    }

    fn vcpus(&self) -> u32 {
        self.vcpus()
    }

    fn is_paused(&self) -> bool {
        self.paused.load(Ordering::SeqCst)
    }

    fn begin_session(&self, session: Arc<Session>) {
        let mut sessions = self.sessions.write().unwrap_or_else(PoisonError::into_inner);
        session.shared.set_vcpus(self.vcpus());
        sessions.push(session);
    }

    fn end_session(&self, session: &Session, in_good_order: bool) {
        let mut sessions = self.sessions.write().unwrap_or_else(PoisonError::into_inner);
        sessions.retain(|s| s.id != session.id);
        drop(sessions);
        let closed = !in_good_order && self.fails_closed(session.id);
        if closed && !session.is_over() {
            self.freeze();
            for other in self.sessions() {
                other.notice(
                    None,
                    "a monitor ended without a word, and asked for the VM to be paused then",
                );
            }
        }
        if session.end() {
            self.disarm_all(session.id);
            self.nudge(session);
        }
    }

    fn answer(&'static self, session: &Arc<Session>, request: Request) -> Reply {
        let own = |id: HookId| self.find(session.id, id);
        match request {
            Request::Hello { .. } | Request::Bye => Reply::Done,
            Request::Capabilities => {
                let capabilities = self.capabilities();
                let lacks = capability::lacks(&capabilities, self.registers.is_some());
                Reply::Capabilities { capabilities, lacks }
            }
            Request::Arm { hook } => match self.arm(session, &hook) {
                Ok(id) => Reply::Armed { id },
                Err(refusal) => Reply::Refused(refusal),
            },
            Request::Disarm { id } => {
                if own(id).is_some() {
                    self.disarm(id);
                    self.forget(id);
                }
                Reply::Done
            }
            Request::Counts { id } => Reply::Counts(own(id).map_or_else(Counts::default, |a| a.counts())),
            Request::Tally { id } => {
                Reply::Tally(own(id).map_or_else(Tallied::default, |a| a.sieve.tallied()))
            }
            Request::Resume => {
                let why = "it is QEMU's own pause: QEMU's monitor resumes it (cont)".to_owned();
                match self.is_paused() {
                    true => Reply::Refused(Refusal::Failed { why }),
                    false => Reply::Done,
                }
            }
        }
    }
}
