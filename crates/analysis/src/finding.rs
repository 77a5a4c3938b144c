//! What a check found, and why that is to be believed.

use std::fmt;

use serde::{Serialize, Serializer};
use vmsight_arch::Gva;
use vmsight_linux::listing::address;

/// How bad it is if it is what it looks like.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Worth knowing, and of no weight by itself: honest guests have it. It makes no guest suspicious.
    Info,
    /// Unusual; there are honest reasons.
    Low,
    /// Weakens the guest, or has honest reasons that are rare.
    Medium,
    /// Has no honest reason that is known.
    High,
    /// The kernel's control flow or its defences are in somebody else's hands.
    Critical,
}

impl Severity {
    /// As in results: `info`, `low`, `medium`, `high`, `critical`.
    pub fn as_str(self) -> &'static str {
        match self {
            Severity::Info => "info",
            Severity::Low => "low",
            Severity::Medium => "medium",
            Severity::High => "high",
            Severity::Critical => "critical",
        }
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a finding rests on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Certainty {
    /// Memory that does not change: a dump, or a guest that stands still.
    Still,
    /// The guest ran, and it was seen again when read anew so many times.
    Seen(u32),
}

impl fmt::Display for Certainty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Certainty::Still => f.write_str("memory stood still"),
            Certainty::Seen(1) => f.write_str("seen once"),
            Certainty::Seen(times) => write!(f, "seen {times} times, read anew each time"),
        }
    }
}

impl Serialize for Certainty {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// One fact that a finding rests on. Serialised as a text.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Evidence {
    /// An address and what lies there.
    Address {
        /// What it is: `handler`, `table entry`.
        what: String,
        /// The address.
        at: Gva,
        /// The symbol there, and to whom it belongs: see [`crate::Context::describe`].
        place: String,
    },
    /// Bytes as they are in memory.
    Bytes {
        /// What they are.
        what: String,
        /// Where they lie.
        at: Gva,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// Instructions.
    Code {
        /// What they are.
        what: String,
        /// Where they lie.
        at: Gva,
        /// One each, with names for addresses.
        instructions: Vec<String>,
    },
    /// Anything else: a view's answer, a number, a name.
    Value {
        /// What it is.
        what: String,
        /// What was read.
        value: String,
    },
}

impl Evidence {
    /// A value with what it is.
    pub fn value(what: impl Into<String>, value: impl fmt::Display) -> Self {
        Evidence::Value {
            what: what.into(),
            value: value.to_string(),
        }
    }
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Evidence::Address { what, at, place } => write!(f, "{what} {at}: {place}"),
            Evidence::Bytes { what, at, bytes } => {
                write!(f, "{what} at {at}:")?;
                bytes.iter().try_for_each(|byte| write!(f, " {byte:02x}"))
            }
            Evidence::Code {
                what,
                at,
                instructions,
            } => write!(f, "{what} at {at}: {}", instructions.join("; ")),
            Evidence::Value { what, value } => write!(f, "{what}: {value}"),
        }
    }
}

impl Serialize for Evidence {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Something that is not as it must be.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// The check's name.
    pub check: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What is wrong: `sys_call_table[59] (execve)`. With `address` it tells one finding of a check from another, and it
    /// stays the same when the same thing is looked at again.
    pub subject: String,
    /// What is wrong with it, in a sentence.
    pub explanation: String,
    /// Where the subject lies.
    #[serde(serialize_with = "address::gva_opt")]
    pub address: Option<Gva>,
    /// The module that is behind it, where one is known.
    pub module: Option<String>,
    /// What shows it.
    pub evidence: Vec<Evidence>,
    /// What it rests on; [`crate::run()`] fills it in.
    pub certainty: Certainty,
}

impl Finding {
    /// A finding without evidence so far. The check's name is filled in by [`crate::Findings::report`].
    pub fn new(severity: Severity, subject: impl Into<String>, explanation: impl Into<String>) -> Self {
        Self {
            check: "",
            severity,
            subject: subject.into(),
            explanation: explanation.into(),
            address: None,
            module: None,
            evidence: Vec::new(),
            certainty: Certainty::Still,
        }
    }

    /// Says where the subject lies.
    #[must_use]
    pub fn at(mut self, address: Gva) -> Self {
        self.address = Some(address);
        self
    }

    /// Adds evidence.
    #[must_use]
    pub fn with(mut self, evidence: Evidence) -> Self {
        self.evidence.push(evidence);
        self
    }

    /// Names the module behind it.
    #[must_use]
    pub fn by(mut self, module: Option<String>) -> Self {
        self.module = module;
        self
    }

    /// Whether it makes the guest suspicious: it is more than worth knowing.
    pub fn is_suspicious(&self) -> bool {
        self.severity > Severity::Info
    }

    /// Whether both say the same of the same thing.
    pub(crate) fn is_of(&self, other: &Finding) -> bool {
        self.check == other.check && self.subject == other.subject && self.address == other.address
    }
}
