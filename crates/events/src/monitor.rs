//! What a program uses: hooks as guards, events one by one or by callback, one verdict for each.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmsight_arch::Registers;
use vmsight_hooks::{BackendKind, Capability, Counts, Delivery, Event, Hook, HookId, Lack, Tallied, Verdict};

use crate::{Backend, EventError};

/// A wait that is none: who waits for so long is woken, or the VM ends.
const FOR_EVER: Duration = Duration::from_secs(365 * 24 * 3600);

type Callback = Arc<Mutex<dyn FnMut(&Occurrence) -> Verdict + Send>>;

/// Hooks of one VM. Clones share everything; several may be used from several threads, and each event goes to one of them.
#[derive(Clone)]
pub struct Monitor {
    inner: Arc<Inner>,
}

struct Inner {
    backend: Box<dyn Backend>,
    callbacks: Mutex<HashMap<HookId, Callback>>,
}

impl Monitor {
    /// A monitor over `backend`.
    pub fn new(backend: Box<dyn Backend>) -> Self {
        Self {
            inner: Arc::new(Inner {
                backend,
                callbacks: Mutex::default(),
            }),
        }
    }

    /// By what events come.
    pub fn backend(&self) -> BackendKind {
        self.inner.backend.kind()
    }

    /// What can be hooked here, and how.
    pub fn capabilities(&self) -> Vec<Capability> {
        self.inner.backend.capabilities()
    }

    /// What cannot be hooked here, and why, as far as it is known.
    pub fn lacks(&self) -> Vec<Lack> {
        self.inner.backend.lacks()
    }

    /// Arms a hook until the guard is dropped. Its events come from [`Self::next`].
    ///
    /// # Errors
    /// Where it makes no sense, or cannot be armed here.
    pub fn hook(&self, hook: &Hook) -> Result<HookGuard, EventError> {
        hook.validate()?;
        let id = self.inner.backend.arm(hook)?;
        Ok(HookGuard {
            monitor: self.clone(),
            id,
        })
    }

    /// Arms a hook whose events go to `callback`, which gives the verdict. It is called by whoever is in
    /// [`Self::next`] or [`Self::serve`], by one thread at a time.
    ///
    /// # Errors
    /// As [`Self::hook`].
    pub fn on(
        &self,
        hook: &Hook,
        callback: impl FnMut(&Occurrence) -> Verdict + Send + 'static,
    ) -> Result<HookGuard, EventError> {
        hook.validate()?;
        // Held over the arming: the first event may come before its id is known here, to another thread.
        let mut callbacks = self.callbacks();
        let id = self.inner.backend.arm(hook)?;
        callbacks.insert(id, Arc::new(Mutex::new(callback)));
        drop(callbacks);
        Ok(HookGuard {
            monitor: self.clone(),
            id,
        })
    }

    /// The next event that has no callback; `None` where none comes within `timeout`, or [`Self::wake`] was called.
    /// Callbacks are called meanwhile.
    ///
    /// # Errors
    /// [`EventError::Gone`] when the VM ended.
    pub fn next(&self, timeout: Duration) -> Result<Option<Occurrence>, EventError> {
        let deadline = Instant::now() + timeout;
        loop {
            let Some(event) = self.inner.backend.next(deadline)? else {
                return Ok(None);
            };
            let callback = self.callbacks().get(&event.hook).cloned();
            let occurrence = Occurrence {
                held: event.held,
                event,
                monitor: self.clone(),
            };
            let Some(callback) = callback else {
                return Ok(Some(occurrence));
            };
            // Dropped in a panic the occurrence lets its vCPU go.
            let verdict = callback.lock().unwrap_or_else(PoisonError::into_inner)(&occurrence);
            if let Err(error) = occurrence.answer(verdict) {
                match error {
                    EventError::Verdict { .. } => tracing::warn!("{error}"),
                    _ => return Err(error),
                }
            }
        }
    }

    /// The events that have no callback, as they come, until the VM ends or [`Self::wake`] is called. Callbacks are called meanwhile.
    /// After any other error one may go on.
    pub fn events(&self) -> impl Iterator<Item = Result<Occurrence, EventError>> + use<'_> {
        std::iter::from_fn(|| match self.next(FOR_EVER) {
            Ok(occurrence) => occurrence.map(Ok),
            Err(EventError::Gone) => None,
            Err(error) => Some(Err(error)),
        })
    }

    /// Calls back for `duration`. Events without a callback are let go.
    ///
    /// # Errors
    /// As [`Self::next`].
    pub fn serve(&self, duration: Duration) -> Result<(), EventError> {
        let end = Instant::now() + duration;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            if self.next(left)?.is_none() && Instant::now() < end {
                return Ok(());
            }
        }
    }

    /// Makes those who wait in [`Self::next`] return.
    pub fn wake(&self) {
        self.inner.backend.wake();
    }

    /// Whether an event that is held halts all vCPUs, not only its own.
    pub fn halts_all(&self) -> bool {
        self.inner.backend.halts_all()
    }

    /// Makes all vCPUs stand still with an event of vCPU 0, in which nothing was executed, until it is answered or the guard is
    /// dropped: only where [`Self::halts_all`].
    ///
    /// # Errors
    /// [`EventError::Unsupported`] where the backend cannot.
    pub fn halt(&self, delivery: Delivery) -> Result<HookGuard, EventError> {
        let id = self.inner.backend.halt(delivery)?;
        Ok(HookGuard {
            monitor: self.clone(),
            id,
        })
    }

    /// All registers of a vCPU that stands still because another one's event is held: only where [`Self::halts_all`].
    ///
    /// # Errors
    /// Where nothing is held, there is no such vCPU, or the VM could not be reached.
    pub fn registers_of(&self, vcpu: u32) -> Result<Registers, EventError> {
        self.inner.backend.registers_of(vcpu)
    }

    fn callbacks(&self) -> MutexGuard<'_, HashMap<HookId, Callback>> {
        self.inner
            .callbacks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn remove(&self, id: HookId) -> Result<(), EventError> {
        let result = self.inner.backend.disarm(id);
        self.callbacks().remove(&id);
        result
    }
}

impl fmt::Debug for Monitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Monitor").field(&self.inner.backend).finish()
    }
}

/// A hook that is armed. It is taken out when this is dropped.
#[derive(Debug)]
#[must_use = "the hook is taken out as soon as this is dropped"]
pub struct HookGuard {
    monitor: Monitor,
    id: HookId,
}

impl HookGuard {
    /// Its id, which its events carry.
    pub fn id(&self) -> HookId {
        self.id
    }

    /// What became of its occurrences.
    ///
    /// # Errors
    /// Where the VM could not be reached.
    pub fn counts(&self) -> Result<Counts, EventError> {
        self.monitor.inner.backend.counts(self.id)
    }

    /// What its filter counted by key: nothing where it was to count nothing.
    ///
    /// # Errors
    /// Where the VM could not be reached.
    pub fn tally(&self) -> Result<Tallied, EventError> {
        self.monitor.inner.backend.tally(self.id)
    }
}

impl Drop for HookGuard {
    fn drop(&mut self) {
        match self.monitor.remove(self.id) {
            Ok(()) | Err(EventError::Gone) => {}
            Err(error) => tracing::warn!(%error, "{} could not be taken out", self.id),
        }
    }
}

/// An event, and the vCPU that may wait with it. Dropped without an answer it goes on.
#[derive(Debug)]
#[must_use = "dropped, the vCPU goes on"]
pub struct Occurrence {
    event: Event,
    monitor: Monitor,
    held: bool,
}

impl Occurrence {
    /// What happened.
    pub fn event(&self) -> &Event {
        &self.event
    }

    /// All registers of its vCPU at the event.
    ///
    /// # Errors
    /// Where the event was not held, or the VM could not be reached.
    pub fn registers(&self) -> Result<Registers, EventError> {
        self.monitor.inner.backend.registers(&self.event)
    }

    /// Gives the verdict.
    ///
    /// # Errors
    /// [`EventError::Verdict`] where it does not fit: the vCPU went on as if it had been "continue".
    pub fn answer(mut self, verdict: Verdict) -> Result<(), EventError> {
        self.give(&verdict)
    }

    fn give(&mut self, verdict: &Verdict) -> Result<(), EventError> {
        let given = match std::mem::take(&mut self.held) {
            true => self.monitor.inner.backend.answer(&self.event, verdict),
            false => Ok(()),
        };
        match verdict {
            Verdict::Remove => given.and(self.monitor.remove(self.event.hook)),
            _ => given,
        }
    }
}

impl Drop for Occurrence {
    fn drop(&mut self) {
        if self.held {
            match self.give(&Verdict::Continue) {
                Ok(()) | Err(EventError::Gone) => {}
                Err(error) => tracing::warn!(%error, "a vCPU could not be told to go on"),
            }
        }
    }
}

/// What is shared between threads stays so.
const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<Monitor>();
    shared::<HookGuard>();
    shared::<Occurrence>();
};
