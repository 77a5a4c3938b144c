//! What can be hooked in a guest, what an event says, and what a verdict does: the model that monitors and all
//! backends share.
//!
//! A [`Hook`] is what a monitor asks to be told of. A backend (QEMU's gdb stub, the agent in the VMM) arms it and, when it
//! happens, holds the vCPU and hands out an [`Event`]. Exactly one [`Verdict`] is given to each event that is held, and
//! applied once. What a backend can do is asked of it: see [`Capability`]. A [`Filter`] says which events are
//! wanted at all.
//!
//! This crate holds no machinery. It is linked into the VMM's process with the agent, so it depends on little.

#![forbid(unsafe_code)]

mod capability;
mod event;
mod filter;
mod hook;
mod verdict;

pub use capability::{BackendKind, Capability, Feature, FilterPlace, Lack};
pub use event::{Counts, Detail, Event, Sequence, StepEnd};
pub use filter::{
    Arithmetic, Bucket, Buckets, Comparison, Condition, Field, Filter, FilterError, FilterMemory,
    Instruction, Looks, MOST_BUCKETS, MOST_BYTES, MOST_INSTRUCTIONS, MOST_READS, MOST_VALUES, Moment,
    Passage, Program, Rate, Sieve, Tallied, Tally, TextMatch, Truth, Value,
};
pub use hook::{
    Access, ControlRegister, Delivery, Expiry, Hook, HookError, HookId, HookKind, MAX_RANGE, Overflow, Range,
    Scope, Vectors,
};
pub use verdict::{Decision, Exception, Register, Verdict, VerdictKind};
