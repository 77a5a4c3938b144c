//! What is said over the socket.

use serde::{Deserialize, Serialize};
use vmsight_hooks::{BackendKind, Capability, Counts, Feature, Hook, HookId, Lack, Tallied};

/// The version of the whole: messages, records, the layout of the shared memory. Both sides must have the same one.
pub const VERSION: u32 = 4;

/// What a monitor asks.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// The first one. Answered with [`Reply::Hello`], with the descriptor of the shared memory.
    Hello {
        /// [`VERSION`].
        version: u32,
    },
    /// What can be hooked.
    Capabilities,
    /// Arms a hook.
    Arm {
        /// Which.
        hook: Hook,
    },
    /// Takes a hook out.
    Disarm {
        /// Which.
        id: HookId,
    },
    /// What became of a hook's occurrences.
    Counts {
        /// Which.
        id: HookId,
    },
    /// What a hook's filter counted by key.
    Tally {
        /// Which hook.
        id: HookId,
    },
    /// Lets a VM go on that a verdict or the end of a monitor has paused.
    Resume,
    /// The monitor goes in good order: nothing is paused for its absence.
    Bye,
}

/// What the agent answers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// To [`Request::Hello`].
    Hello {
        /// [`VERSION`].
        version: u32,
        /// Which agent this is.
        backend: BackendKind,
        /// The VMM's process id.
        pid: u32,
        /// How many vCPUs there are so far.
        vcpus: u32,
        /// Whether the VM stands still since an earlier monitor, or its absence, paused it.
        paused: bool,
    },
    /// To [`Request::Capabilities`].
    Capabilities {
        /// What can be hooked.
        capabilities: Vec<Capability>,
        /// What cannot, and why.
        lacks: Vec<Lack>,
    },
    /// To [`Request::Arm`].
    Armed {
        /// The hook's id.
        id: HookId,
    },
    /// To [`Request::Counts`].
    Counts(Counts),
    /// To [`Request::Tally`].
    Tally(Tallied),
    /// To [`Request::Disarm`], [`Request::Resume`] and [`Request::Bye`].
    Done,
    /// It was not done.
    Refused(Refusal),
    /// Nobody asked, but the monitor should know.
    Notice {
        /// Which hook it is about.
        hook: Option<HookId>,
        /// What happened.
        text: String,
    },
}

/// Why something was not done.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// The agent cannot hook that.
    Unsupported {
        /// What.
        feature: Feature,
    },
    /// It can, but not just so.
    Limit {
        /// What was asked for.
        what: String,
        /// What stands against it.
        why: String,
    },
    /// Somebody else is there: another monitor, a debugger, a migration.
    Busy {
        /// Who.
        why: String,
    },
    /// The system refused, or the other side speaks another version.
    Failed {
        /// What, and why.
        why: String,
    },
}
