//! What a guest hides: checks that hold what its kernel says against what it must be.
//!
//! A [`Check`] looks at one kind of thing through a [`Context`], the kernel with the owners of its addresses, and puts what
//! is wrong into [`Findings`], with the evidence; what it could not look at it notes there. [`run`] runs several side by
//! side, looks again at what was found in a guest that runs, and keeps what is still so.
//!
//! What can be got back out of its memory is in [`recover`]; what of it YARA rules match, in [`yara`]; when
//! what happened, in [`timeline`].
//!
//! All that is read was written by whoever owns the guest: walks are bounded, and a broken object costs a note.

#![forbid(unsafe_code)]

pub mod assembly;
pub mod baseline;
mod check;
pub mod checks;
mod code;
mod context;
mod finding;
mod findings;
pub mod frames;
pub mod keys;
mod known;
mod object;
mod owner;
pub mod recover;
mod run;
mod text;
pub mod timeline;
pub mod yara;

pub use baseline::{Baseline, KernelFileError};
pub use check::{Check, Technique};
pub use context::Context;
pub use finding::{Certainty, Evidence, Finding, Severity};
pub use findings::Findings;
pub use known::Known;
pub use object::Object;
pub use owner::Owner;
pub use run::{Outcome, run};
