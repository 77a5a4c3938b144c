//! What a backend can do. It is asked, not guessed.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::verdict::VerdictKind;

/// Who delivers events.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum BackendKind {
    /// QEMU's gdb stub, opened at run time.
    GdbStub,
    /// The agent in a QEMU that runs its guest with KVM.
    AgentKvm,
    /// The agent in a QEMU that emulates its guest's processors (TCG).
    AgentTcg,
}

impl BackendKind {
    /// Its name in tables and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::GdbStub => "gdb-stub",
            Self::AgentKvm => "agent-kvm",
            Self::AgentTcg => "agent-tcg",
        }
    }

    /// Where the filters of its hooks are evaluated.
    pub const fn filters(self) -> FilterPlace {
        match self {
            Self::GdbStub => FilterPlace::Monitor,
            _ => FilterPlace::Vmm,
        }
    }
}

/// Where filters are evaluated. The results are the same; the cost is not.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FilterPlace {
    /// Before the event: what nobody wants costs the guest some instructions.
    Guest,
    /// Where the event happens: what nobody wants costs the guest an exit, and no more.
    Vmm,
    /// After the event has been brought to the monitor, as if there were none.
    Monitor,
}

impl fmt::Display for FilterPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Guest => "guest",
            Self::Vmm => "vmm",
            Self::Monitor => "monitor",
        })
    }
}

impl fmt::Display for BackendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

macro_rules! features {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// One thing that a hook can need.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        #[non_exhaustive]
        pub enum Feature {
            $($(#[$doc])* $name,)*
        }

        impl Feature {
            /// All of them, in the order in which they are listed.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// Its name in tables and messages.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

features! {
    /// Execution of an instruction.
    Execute = "execute",
    /// A filter of an execution that is judged in the guest, before there is an exit.
    Inside = "filter inside",
    /// Reads of virtual memory.
    VirtualRead = "virtual read",
    /// Writes to virtual memory.
    VirtualWrite = "virtual write",
    /// Execution anywhere in a range of virtual memory.
    VirtualExecute = "virtual execute",
    /// Reads of physical memory.
    PhysicalRead = "physical read",
    /// Writes to physical memory.
    PhysicalWrite = "physical write",
    /// Execution anywhere in a range of physical memory.
    PhysicalExecute = "physical execute",
    /// Writes of CR0, CR3 and CR4.
    ControlWrite = "CR0, CR3, CR4 write",
    /// Writes of CR8.
    Cr8Write = "CR8 write",
    /// Writes of XCR0.
    Xcr0Write = "XCR0 write",
    /// Writes of debug registers.
    DebugWrite = "DR write",
    /// Reads of control and debug registers.
    ControlRead = "CR, DR read",
    /// Writes of MSRs.
    MsrWrite = "MSR write",
    /// Reads of MSRs.
    MsrRead = "MSR read",
    /// Exceptions and interrupts.
    Interrupt = "interrupt, exception",
    /// Single steps.
    Step = "single step",
    /// Single steps until a condition holds, with one event.
    StepUntil = "steps until a condition",
    /// I/O ports.
    Port = "I/O port",
    /// CPUID.
    Cpuid = "CPUID",
    /// Hypercalls.
    Hypercall = "hypercall",
    /// Loads of descriptor tables.
    DescriptorTable = "descriptor table",
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One thing that a backend can do.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Capability {
    /// What.
    pub feature: Feature,
    /// By which means.
    pub mechanism: String,
    /// What it does not see or do; empty where nothing is known.
    pub limits: String,
    /// Which verdicts it takes.
    pub verdicts: Vec<VerdictKind>,
}

/// One thing that a backend cannot do.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Lack {
    /// What.
    pub feature: Feature,
    /// What stands against it.
    pub why: String,
}
