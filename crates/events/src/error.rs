//! What can go wrong with hooks.

use vmsight_hooks::{BackendKind, Feature, HookError, VerdictKind};
use vmsight_target::TargetError;

/// Why a hook could not be armed, or an event not be had or answered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EventError {
    /// The hook makes no sense.
    #[error("this hook makes no sense")]
    Hook(#[from] HookError),
    /// The backend cannot do that.
    #[error("the {backend} backend cannot hook {feature}{}", instead(can))]
    Unsupported {
        /// Which backend was asked.
        backend: BackendKind,
        /// What it was asked for.
        feature: Feature,
        /// Those that can.
        can: &'static [BackendKind],
    },
    /// The backend can, but not just so.
    #[error("the {backend} backend cannot hook {what}: {why}")]
    Limit {
        /// Which backend was asked.
        backend: BackendKind,
        /// What it was asked for.
        what: String,
        /// What stands against it.
        why: String,
    },
    /// The verdict does not fit the event, or the backend cannot give it.
    #[error(
        "the verdict {verdict} cannot be given here: {why}; the guest went on as if it were \"continue\""
    )]
    Verdict {
        /// Which verdict.
        verdict: VerdictKind,
        /// What stands against it.
        why: String,
    },
    /// The target cannot be hooked.
    #[error("{target} cannot be hooked: {why}")]
    NoBackend {
        /// The target's name.
        target: String,
        /// Why, and what to try.
        why: String,
    },
    /// Somebody else made hooks there, or attached a debugger.
    #[error("{target} is in use by somebody else: {why}")]
    Busy {
        /// The target's name.
        target: String,
        /// By whom, as far as it is known.
        why: String,
    },
    /// The VM, or its VMM's connection, is gone.
    #[error("the VM is gone")]
    Gone,
    /// The target's monitor or stub failed.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// Something the backend needs of the host failed.
    #[error("{doing}")]
    Io {
        /// What was being done.
        doing: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// What came back makes no sense.
    #[error("{what}")]
    Protocol {
        /// What, from whom.
        what: String,
    },
}

fn instead(can: &[BackendKind]) -> String {
    match can {
        [] => "; no backend of this version can".to_owned(),
        some => {
            let names: Vec<&str> = some.iter().map(|b| b.name()).collect();
            format!("; what can: {}", names.join(", "))
        }
    }
}
