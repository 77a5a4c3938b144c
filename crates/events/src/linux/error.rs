//! What can go wrong with a named hook.

use vmsight_arch::Gva;
use vmsight_hooks::FilterError;
use vmsight_linux::LinuxError;
use vmsight_memory::ReadError;

use crate::EventError;

/// Why a named hook could not be armed, or its event not be understood.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TraceError {
    /// The kernel lacks something.
    #[error(transparent)]
    Linux(#[from] LinuxError),
    /// A hook failed.
    #[error(transparent)]
    Event(#[from] EventError),
    /// What is wanted does not fit into a filter.
    #[error("what is to be counted cannot be said in a filter: {0}")]
    Filter(#[from] FilterError),
    /// Guest memory could not be read.
    #[error("cannot read {what} at {at}")]
    Read {
        /// What lies there.
        what: &'static str,
        /// Where.
        at: Gva,
        /// Why.
        source: ReadError,
    },
    /// The place to hook was not found.
    #[error("cannot find where to hook {what}: {why}")]
    NoSite {
        /// What was to be hooked.
        what: String,
        /// What was looked for.
        why: String,
    },
    /// No such system call.
    #[error("this kernel has no system call {name:?}{}", suggestion.as_ref().map(|s| format!("; did you mean {s}?")).unwrap_or_default())]
    NoSyscall {
        /// What was asked for.
        name: String,
        /// What is spelt like it.
        suggestion: Option<String>,
    },
}

impl TraceError {
    pub(crate) fn read(what: &'static str, at: Gva) -> impl FnOnce(ReadError) -> Self {
        move |source| Self::Read { what, at, source }
    }
}
