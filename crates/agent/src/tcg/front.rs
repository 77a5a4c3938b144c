//! The agent of a QEMU with TCG: what is hooked, and how hooks change.

use std::collections::HashMap;
use std::ffi::c_void;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use vmsight_arch::paging::{PagingMode, TableMemory, resolve};
use vmsight_arch::{Gpa, Gva};
use vmsight_channel::{MAX_VCPUS, Producer, Refusal, Reply, Request};
use vmsight_hooks::{
    Access, BackendKind, Capability, Counts, Expiry, FilterMemory, Hook, HookId, HookKind, Range, Scope,
    Tallied,
};

use super::api::{self, Dump, Info, Inside, Plugin};
use super::interrupt::{self, Handlers};
use super::registers::Reader;
use super::shadow::{self, Shadow};
use super::table::{Hooked, Table};
use super::{capability, guarded};
use crate::control::{self, Serve};
use crate::pending::expiry;
use crate::qemu::Qemu;
use crate::session::Session;
use crate::table::Armed;

/// How long vCPUs may take to come out of the guest. The monitor waits a little longer.
const PATIENCE: Duration = Duration::from_secs(8);
/// How long one may wait with the same event while hooks are to change.
const HELD: Duration = Duration::from_millis(500);
/// How often vCPUs are woken until they are out.
const AGAIN: Duration = Duration::from_millis(10);
/// How long QEMU's main thread may take until it begins to pause the VM.
const PAUSING: Duration = Duration::from_secs(1);
/// Most hooks at a time.
const HOOKS: usize = 4096;
const PAGE: u64 = 4096;

/// What is kept for a vCPU.
#[derive(Debug, Default)]
pub(super) struct Place {
    /// Its ends of the rings of monitors, by their numbers. Locked while an event is written.
    pub(super) rings: Mutex<Vec<(u64, Producer)>>,
    /// The event that it waits with, as a number that no two events in a row have; 0 where it waits with none.
    pub(super) held: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    hooks: Vec<Hooked>,
    /// Hooks whose counts may still be asked for.
    known: HashMap<HookId, Arc<Armed>>,
    last: u32,
    /// Where the guest's handlers were when hooks were changed last.
    handlers: Handlers,
    /// How often hooks were changed.
    wanted: u64,
}

/// The agent. It lives as long as the process.
#[derive(Debug)]
pub(super) struct Front {
    pub(super) plugin: Plugin,
    pub(super) registers: Option<Reader>,
    pub(super) values: Option<api::Values>,
    inside: Inside,
    dump: Option<Dump>,
    /// The version of QEMU's plugin interface.
    pub(super) version: i32,
    qemu: Option<Qemu>,
    pub(super) socket: PathBuf,
    started: Once,
    state: Mutex<State>,
    /// Replaced while no vCPU is in the guest, and read only by those who are.
    table: AtomicPtr<Table>,
    /// Tables to which translated code may still point.
    retired: Mutex<Vec<Table>>,
    queued: AtomicBool,
    /// The change of hooks that is in the table.
    applying: AtomicU64,
    applied: Mutex<u64>,
    changed: Condvar,
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

extern "C" fn apply(cpu: *mut c_void, _: *mut c_void) {
    guarded(|| {
        if let Some(front) = get() {
            front.apply(cpu);
        }
    });
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
            state: Mutex::default(),
            table: AtomicPtr::new(Box::into_raw(Box::default())),
            retired: Mutex::default(),
            queued: AtomicBool::new(false),
            applying: AtomicU64::new(0),
            applied: Mutex::new(0),
            changed: Condvar::new(),
            vcpus: AtomicU32::new(0),
            places: (0..MAX_VCPUS).map(|_| Place::default()).collect(),
            sessions: RwLock::default(),
            paused: AtomicBool::new(false),
        })
    }

    pub(super) fn add_vcpu(&'static self, vcpu: u32) {
        let vcpus = vcpu.saturating_add(1);
        let before = self.vcpus.fetch_max(vcpus, Ordering::SeqCst);
        for session in &*self.sessions.read().unwrap_or_else(PoisonError::into_inner) {
            session.shared.set_vcpus(before.max(vcpus));
        }
        self.started.call_once(|| control::start(self));
    }

    pub(super) fn vcpus(&self) -> u32 {
        self.vcpus.load(Ordering::SeqCst)
    }

    pub(super) fn place(&self, vcpu: u32) -> Option<&Place> {
        self.places.get(usize::try_from(vcpu).ok()?)
    }

    /// What is hooked. Only for callbacks of QEMU, which run while their vCPU is in the guest.
    pub(super) fn table(&self) -> &Table {
        // SAFETY: never null; freed only when all vCPUs have been out of the guest since it was replaced.
        unsafe { &*self.table.load(Ordering::Acquire) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn capabilities(&self) -> Vec<Capability> {
        capability::list(self.registers.is_some(), self.dump.is_some(), self.qemu.is_some())
    }

    /// Arms a hook. From the return on nothing passes it.
    fn arm(&self, session: &Arc<Session>, hook: &Hook) -> Result<HookId, Refusal> {
        let capabilities = self.capabilities();
        for feature in hook.kind.features() {
            if !capabilities.iter().any(|c| c.feature == feature) {
                return Err(Refusal::Unsupported { feature });
            }
        }
        let limit = |why: String| -> Result<HookId, Refusal> {
            Err(Refusal::Limit {
                what: hook.kind.to_string(),
                why,
            })
        };
        if let Err(error) = hook.validate() {
            return limit(error.to_string());
        }
        if self.registers.is_none()
            && let Some(why) = capability::unfit(hook)
        {
            return limit(format!(
                "{why}: this QEMU has version {} of the interface for plugins, which gives none; QEMU 10 has version 4, and the gdb-stub \
                 backend needs no plugin",
                self.version
            ));
        }
        if let HookKind::Step { vcpu, .. } = hook.kind
            && vcpu >= self.vcpus()
        {
            return limit(format!("there are {} vCPUs", self.vcpus()));
        }
        let (id, change) = {
            let mut state = self.state();
            if state.hooks.len() >= HOOKS {
                return limit(format!("there are {HOOKS} hooks already"));
            }
            state.last = state.last.wrapping_add(1);
            let id = HookId(state.last);
            let armed = Arc::new(Armed::new(id, Arc::clone(session), hook.clone()));
            let left = match hook.kind {
                HookKind::Step { count, .. } => count.saturating_add(1),
                _ => 0,
            };
            state.known.insert(id, Arc::clone(&armed));
            state.hooks.push(Hooked {
                armed,
                shadow: None,
                left: Arc::new(AtomicU64::new(left)),
            });
            state.wanted += 1;
            (id, state.wanted)
        };
        let armed = self.wait_for(change).and_then(|()| match hook.kind {
            HookKind::Interrupt { vectors } if self.state().handlers.of(vectors).is_none() => {
                limit("the gates of several vectors name one handler: which it was cannot be told".to_owned())
            }
            _ => Ok(id),
        });
        armed.inspect_err(|_| {
            self.disarm(id);
            self.forget(id);
        })
    }

    /// Takes a hook out: nothing is told of it any more, and who waits with an event of it goes on. Its calls leave the translated code a
    /// little later.
    pub(super) fn disarm(&self, id: HookId) {
        {
            let mut state = self.state();
            let Some(at) = state.hooks.iter().position(|h| h.armed.id == id) else {
                return;
            };
            state
                .hooks
                .swap_remove(at)
                .armed
                .removed
                .store(true, Ordering::Release);
            state.wanted += 1;
        }
        self.settle();
    }

    /// Takes out all hooks of a monitor.
    fn disarm_all(&self, session: u64) {
        {
            let mut state = self.state();
            let known = state.known.len();
            state.known.retain(|_, armed| armed.session.id != session);
            if known == state.known.len() {
                return;
            }
            state.hooks.retain(|hooked| {
                let stays = hooked.armed.session.id != session;
                if !stays {
                    hooked.armed.removed.store(true, Ordering::Release);
                }
                stays
            });
            state.wanted += 1;
        }
        self.settle();
    }

    /// Hooks were taken out: whoever waits looks around, and what was being written is written when this returns.
    fn settle(&self) {
        for session in &*self.sessions.read().unwrap_or_else(PoisonError::into_inner) {
            self.nudge(session);
        }
        for place in self.places.iter().take(self.vcpus() as usize) {
            drop(place.rings.lock().unwrap_or_else(PoisonError::into_inner));
        }
        self.schedule();
    }

    fn forget(&self, id: HookId) {
        self.state().known.remove(&id);
    }

    /// A hook of this monitor's.
    fn find(&self, session: u64, id: HookId) -> Option<Arc<Armed>> {
        let armed = self.state().known.get(&id).cloned();
        armed.filter(|armed| armed.session.id == session)
    }

    /// A hook needs no calls in translated code any more.
    pub(super) fn change(&self) {
        self.state().wanted += 1;
        self.schedule();
    }

    /// Has hooks changed as soon as all vCPUs are out of the guest.
    fn schedule(&self) {
        let cpu = self.cpu(0);
        if cpu.is_null() {
            return;
        }
        if self.queued.swap(true, Ordering::SeqCst) {
            // SAFETY: a vCPU of QEMU's, which lives as long as the machine; it may be woken from any thread.
            unsafe { (self.inside.kick)(cpu) };
            return;
        }
        // SAFETY: as above; the function lives as long as the process and takes no data.
        unsafe { (self.inside.alone)(cpu, apply, ptr::null_mut()) };
    }

    /// Waits until the change of hooks with this number is made.
    fn wait_for(&self, change: u64) -> Result<(), Refusal> {
        let start = Instant::now();
        let held = || -> Vec<u64> {
            let places = self.places.iter().take(self.vcpus() as usize);
            places.map(|p| p.held.load(Ordering::SeqCst)).collect()
        };
        let at_first = held();
        loop {
            self.schedule();
            let applied = self.applied.lock().unwrap_or_else(PoisonError::into_inner);
            let waited = self
                .changed
                .wait_timeout_while(applied, AGAIN, |applied| *applied < change);
            if *waited.unwrap_or_else(PoisonError::into_inner).0 >= change {
                return Ok(());
            }
            let same = held()
                .into_iter()
                .zip(&at_first)
                .position(|(now, then)| now != 0 && now == *then);
            if let Some(vcpu) = same.filter(|_| start.elapsed() > HELD) {
                let why = format!(
                    "vCPU {vcpu} waits with an event for its verdict: translated code can be changed only while none does"
                );
                return Err(Refusal::Busy { why });
            }
            if start.elapsed() > PATIENCE {
                let why = "the vCPUs do not come out of the guest".to_owned();
                return Err(Refusal::Failed { why });
            }
        }
    }

    /// No vCPU is in the guest: the table becomes what is wanted.
    fn apply(&self, cpu: *mut c_void) {
        self.queued.store(false, Ordering::SeqCst);
        let (table, change) = {
            let mut state = self.state();
            let change = state.wanted;
            for hooked in state.hooks.iter_mut().filter(|h| h.shadow.is_none()) {
                hooked.shadow = self.shadow(cpu, &hooked.armed.hook).map(Arc::new);
            }
            let of_interrupts = |h: &Hooked| matches!(h.armed.hook.kind, HookKind::Interrupt { .. });
            if state.hooks.iter().any(of_interrupts) {
                state.handlers = self.handlers();
            }
            (Table::new(state.hooks.iter(), &state.handlers), change)
        };
        let old = self.table.swap(Box::into_raw(Box::new(table)), Ordering::AcqRel);
        // SAFETY: made by `Box::into_raw`, and swapped out once.
        let old = unsafe { Box::from_raw(old) };
        self.retired
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(*old);
        self.applying.store(change, Ordering::SeqCst);
        // SAFETY: the vCPU that QEMU called with, while all others stand still.
        unsafe { (self.inside.flush)(cpu) };
    }

    /// All translated code is gone, while no vCPU is in the guest.
    pub(super) fn flushed(&self) {
        self.retired
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
        self.table().forget_sites();
        let applying = self.applying.load(Ordering::SeqCst);
        *self.applied.lock().unwrap_or_else(PoisonError::into_inner) = applying;
        self.changed.notify_all();
    }

    /// What the memory of a hook on writes holds; `None` where that is not known, or values are not told.
    fn shadow(&self, cpu: *mut c_void, hook: &Hook) -> Option<Shadow> {
        let HookKind::Memory { range, access } = hook.kind else {
            return None;
        };
        self.values?;
        if !access.contains(Access::WRITE) || range.len() > shadow::MOST {
            return None;
        }
        let mut bytes = vec![0; usize::try_from(range.len()).ok()?];
        match (range, hook.scope) {
            (Range::Physical { start, .. }, _) => self.read_physical(start.0, &mut bytes),
            (Range::Virtual { start, .. }, Scope::All) if start.0 >> 63 != 0 => {
                // SAFETY: the buffer is as long as it says, and nothing is written to the guest.
                let read = unsafe {
                    (self.inside.read_virtual)(cpu, start.0, bytes.as_mut_ptr().cast(), bytes.len(), false)
                };
                if read < 0 {
                    return None;
                }
            }
            // Whose memory it is differs from access to access.
            (Range::Virtual { .. }, Scope::All) => return None,
            (Range::Virtual { start, .. }, Scope::Dtb(dtb)) => {
                let mode = PagingMode::from_registers(&self.registers.as_ref()?.all(0, None))?;
                let mut at = start.0;
                let mut rest = bytes.as_mut_slice();
                while !rest.is_empty() {
                    let here = usize::try_from(PAGE - at % PAGE).ok()?.min(rest.len());
                    let (page, after) = rest.split_at_mut(here);
                    let gpa = resolve(mode, self, mode.dtb(dtb.0), Gva(at))?.gpa;
                    self.read_physical(gpa.0, page);
                    at = at.wrapping_add(here as u64);
                    rest = after;
                }
            }
        }
        Some(Shadow::new(range.first(), bytes))
    }

    /// Where the handlers of all vCPUs are.
    fn handlers(&self) -> Handlers {
        let mut handlers = Handlers::default();
        let Some(dump) = &self.dump else { return handlers };
        for vcpu in 0..self.vcpus() {
            let cpu = self.cpu(vcpu);
            if cpu.is_null() {
                continue;
            }
            let Some((base, len)) = interrupt::table(dump, cpu) else {
                continue;
            };
            let mut table = vec![0; len];
            // SAFETY: the buffer is as long as it says, and nothing is written to the guest.
            let read = unsafe {
                (self.inside.read_virtual)(cpu, base, table.as_mut_ptr().cast(), table.len(), false)
            };
            if read >= 0 {
                handlers.add(&table);
            }
        }
        handlers
    }

    /// QEMU's own of a vCPU; null where it has none.
    fn cpu(&self, vcpu: u32) -> *mut c_void {
        let Ok(index) = i32::try_from(vcpu) else {
            return ptr::null_mut();
        };
        // SAFETY: QEMU looks its list of vCPUs through; from any thread.
        unsafe { (self.inside.cpu)(index) }
    }

    /// 8 bytes of what a vCPU has mapped, on its thread.
    pub(super) fn read_virtual_u64(&self, vcpu: u32, at: u64) -> Option<u64> {
        let cpu = self.cpu(vcpu);
        if cpu.is_null() {
            return None;
        }
        let mut bytes = [0; 8];
        // SAFETY: the buffer is as long as it says, and nothing is written to the guest.
        let read = unsafe { (self.inside.read_virtual)(cpu, at, bytes.as_mut_ptr().cast(), 8, false) };
        (read >= 0).then(|| u64::from_le_bytes(bytes))
    }

    fn read_physical(&self, gpa: u64, bytes: &mut [u8]) {
        // SAFETY: the buffer is as long as it says, and nothing is written to the guest.
        unsafe { (self.inside.physical)(gpa, bytes.as_mut_ptr().cast(), bytes.len() as u64, false) };
    }

    /// Whether the monitor of this session is there.
    pub(super) fn is_there(&self, id: u64) -> bool {
        let sessions = self.sessions.read().unwrap_or_else(PoisonError::into_inner);
        sessions.iter().any(|s| s.id == id)
    }

    fn nudge(&self, session: &Session) {
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

/// Page tables, read where they lie.
impl TableMemory for Front {
    fn entry_u64(&self, gpa: Gpa) -> Option<u64> {
        let mut bytes = [0; 8];
        self.read_physical(gpa.0, &mut bytes);
        Some(u64::from_le_bytes(bytes))
    }

    fn entry_u32(&self, gpa: Gpa) -> Option<u32> {
        let mut bytes = [0; 4];
        self.read_physical(gpa.0, &mut bytes);
        Some(u32::from_le_bytes(bytes))
    }
}

/// The same memory, as filters read it. Where a device answers, a guest has its own device read.
impl FilterMemory for Front {
    fn read_physical(&self, gpa: Gpa, out: &mut [u8]) -> bool {
        Front::read_physical(self, gpa.0, out);
        true
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
        let fails_closed =
            |h: &Hooked| h.armed.session.id == session.id && expiry(&h.armed) == Expiry::Closed;
        let closed = !in_good_order && self.state().hooks.iter().any(fails_closed);
        if closed && !session.is_over() {
            self.freeze();
            for other in &*self.sessions.read().unwrap_or_else(PoisonError::into_inner) {
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
