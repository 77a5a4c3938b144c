//! What a backend is.

use std::fmt;
use std::time::Instant;

use vmsight_arch::Registers;
use vmsight_hooks::{
    BackendKind, Capability, Counts, Delivery, Event, Feature, Hook, HookId, Lack, Tallied, Verdict,
};

use crate::EventError;

/// Arms hooks, delivers events, applies verdicts. Every method may be called from any thread at any time; an event is
/// held until it is answered, and what is held stays so until then, whatever else is called.
///
/// Dropping a backend takes all its hooks out and lets all vCPUs go.
pub trait Backend: Send + Sync + fmt::Debug {
    /// Which one this is.
    fn kind(&self) -> BackendKind;

    /// What it can do with this VM.
    fn capabilities(&self) -> Vec<Capability>;

    /// What it cannot do with this VM, and why, as far as it can say.
    fn lacks(&self) -> Vec<Lack> {
        Vec::new()
    }

    /// Arms a hook. From the return on no vCPU passes it unnoticed.
    ///
    /// # Errors
    /// [`EventError::Unsupported`] and [`EventError::Limit`] where it cannot; nothing is armed then.
    fn arm(&self, hook: &Hook) -> Result<HookId, EventError>;

    /// Takes a hook out. From the return on none of its events is delivered, and vCPUs that it held go on. An id that is
    /// not armed (any more) is no error.
    ///
    /// # Errors
    /// Where the VM could not be reached.
    fn disarm(&self, id: HookId) -> Result<(), EventError>;

    /// The next event; `None` where none comes until `deadline`.
    ///
    /// # Errors
    /// [`EventError::Gone`] when the VM ended.
    fn next(&self, deadline: Instant) -> Result<Option<Event>, EventError>;

    /// Wakes those who wait in [`Self::next`]: they return `None` early.
    fn wake(&self);

    /// All registers of the vCPU that waits with `event`.
    ///
    /// # Errors
    /// Where the event is not held any more, or the VM could not be reached.
    fn registers(&self, event: &Event) -> Result<Registers, EventError>;

    /// Applies a verdict and lets the vCPU go. For events that are not held this does nothing.
    ///
    /// # Errors
    /// [`EventError::Verdict`] where it does not fit; the vCPU goes on all the same.
    fn answer(&self, event: &Event, verdict: &Verdict) -> Result<(), EventError>;

    /// Whether an event that is held halts all vCPUs, not only its own.
    fn halts_all(&self) -> bool {
        false
    }

    /// Makes all vCPUs stand still, and holds an event ([`vmsight_hooks::Detail::Step`], of no step that was made) until it
    /// is answered or its hook, whose id is given, is taken out: only where [`Self::halts_all`].
    ///
    /// # Errors
    /// [`EventError::Unsupported`] where it cannot.
    fn halt(&self, _delivery: Delivery) -> Result<HookId, EventError> {
        Err(EventError::Unsupported {
            backend: self.kind(),
            feature: Feature::Step,
            can: &[BackendKind::GdbStub],
        })
    }

    /// All registers of a vCPU that stands still because another one's event is held: only where [`Self::halts_all`].
    ///
    /// # Errors
    /// Where nothing is held, there is no such vCPU, or the VM could not be reached.
    fn registers_of(&self, vcpu: u32) -> Result<Registers, EventError> {
        Err(EventError::Limit {
            backend: self.kind(),
            what: format!("the registers of vCPU {vcpu}"),
            why: "it has no event that is held".to_owned(),
        })
    }

    /// What became of a hook's occurrences.
    ///
    /// # Errors
    /// Where the VM could not be reached.
    fn counts(&self, id: HookId) -> Result<Counts, EventError>;

    /// What a hook's filter counted by key; nothing where it was to count nothing, or is not armed.
    ///
    /// # Errors
    /// Where the VM could not be reached.
    fn tally(&self, id: HookId) -> Result<Tallied, EventError>;
}
