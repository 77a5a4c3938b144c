//! How hooks change: with all vCPUs out of the guest, the table is replaced and all translated code thrown away.

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmsight_channel::Refusal;
use vmsight_hooks::{Expiry, Hook, HookId, HookKind};

use super::front::{self, Front};
use super::interrupt::Handlers;
use super::table::{Hooked, Table};
use super::{capability, guarded};
use crate::pending::expiry;
use crate::session::Session;
use crate::table::Armed;

/// How long vCPUs may take to come out of the guest. The monitor waits a little longer.
const PATIENCE: Duration = Duration::from_secs(8);
/// How long one may wait with the same event while hooks are to change.
const HELD: Duration = Duration::from_millis(500);
/// How often vCPUs are woken until they are out.
const AGAIN: Duration = Duration::from_millis(10);
/// Most hooks at a time.
const HOOKS: usize = 4096;

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

/// What is hooked, and how far that has come.
#[derive(Debug)]
pub(super) struct Changes {
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
}

impl Default for Changes {
    fn default() -> Self {
        Self {
            state: Mutex::default(),
            table: AtomicPtr::new(Box::into_raw(Box::default())),
            retired: Mutex::default(),
            queued: AtomicBool::new(false),
            applying: AtomicU64::new(0),
            applied: Mutex::new(0),
            changed: Condvar::new(),
        }
    }
}

extern "C" fn apply(cpu: *mut c_void, _: *mut c_void) {
    guarded(|| {
        if let Some(front) = front::get() {
            front.apply(cpu);
        }
    });
}

impl Front {
    /// What is hooked. Only for callbacks of QEMU, which run while their vCPU is in the guest.
    pub(super) fn table(&self) -> &Table {
        // SAFETY: never null; freed only when all vCPUs have been out of the guest since it was replaced.
        unsafe { &*self.changes.table.load(Ordering::Acquire) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.changes.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Arms a hook. From the return on nothing passes it.
    pub(super) fn arm(&self, session: &Arc<Session>, hook: &Hook) -> Result<HookId, Refusal> {
        let capabilities = self.capabilities();
        for feature in hook.features() {
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
                "{why}: this QEMU has version {} of the interface for plugins, which gives none; QEMU 10 has \
                 version 4, and the gdb-stub backend needs no plugin",
                self.version
            ));
        }
        if let HookKind::Step { vcpu, .. } | HookKind::StepUntil { vcpu, .. } = hook.kind
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
                HookKind::Step { count, .. } | HookKind::StepUntil { most: count, .. } => {
                    count.saturating_add(1)
                }
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

    /// Takes a hook out: nothing is told of it any more, and who waits with an event of it goes on. Its calls
    /// leave the translated code a little later.
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
    pub(super) fn disarm_all(&self, session: u64) {
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
        for session in self.sessions() {
            self.nudge(&session);
        }
        for place in self.places() {
            drop(place.rings.lock().unwrap_or_else(PoisonError::into_inner));
        }
        self.schedule();
    }

    pub(super) fn forget(&self, id: HookId) {
        self.state().known.remove(&id);
    }

    /// A hook of this monitor's.
    pub(super) fn find(&self, session: u64, id: HookId) -> Option<Arc<Armed>> {
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
        if self.changes.queued.swap(true, Ordering::SeqCst) {
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
        let held = || -> Vec<u64> { self.places().map(|p| p.held.load(Ordering::SeqCst)).collect() };
        let at_first = held();
        loop {
            self.schedule();
            let applied = self
                .changes
                .applied
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let waited = self
                .changes
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
                    "vCPU {vcpu} waits with an event for its verdict: translated code can be changed only \
                     while none does"
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
        self.changes.queued.store(false, Ordering::SeqCst);
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
        let old = self
            .changes
            .table
            .swap(Box::into_raw(Box::new(table)), Ordering::AcqRel);
        // SAFETY: made by `Box::into_raw`, and swapped out once.
        let old = unsafe { Box::from_raw(old) };
        self.changes
            .retired
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(*old);
        self.changes.applying.store(change, Ordering::SeqCst);
        // SAFETY: the vCPU that QEMU called with, while all others stand still.
        unsafe { (self.inside.flush)(cpu) };
    }

    /// All translated code is gone, while no vCPU is in the guest.
    pub(super) fn flushed(&self) {
        self.changes
            .retired
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
        self.table().forget_sites();
        let applying = self.changes.applying.load(Ordering::SeqCst);
        *self
            .changes
            .applied
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = applying;
        self.changes.changed.notify_all();
    }

    /// Whether a hook of this monitor's asks for the VM to stand still when it is gone.
    pub(super) fn fails_closed(&self, session: u64) -> bool {
        self.state()
            .hooks
            .iter()
            .any(|h| h.armed.session.id == session && expiry(&h.armed) == Expiry::Closed)
    }
}
