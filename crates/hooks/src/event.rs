//! One occurrence.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use vmsight_arch::{Gpa, Gva};

use crate::hook::{Access, ControlRegister, HookId};

/// The number of an event: counts up by one for each event of a connection, in the order in which they are told.
pub type Sequence = u64;

/// What happened, and to what.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Detail {
    /// The instruction at `rip` is about to be executed.
    Execute {
        /// Where it is.
        rip: Gva,
    },
    /// Memory was or is about to be accessed.
    Memory {
        /// The virtual address, where the backend knows it.
        gva: Option<Gva>,
        /// The physical address, where the backend knows it.
        gpa: Option<Gpa>,
        /// Bytes accessed; 0 where the backend does not know.
        len: u8,
        /// How: one of the three.
        access: Access,
        /// What was there before, little-endian, up to 8 bytes, where the backend knows it.
        old: Option<u64>,
        /// What is there after, or what is read.
        new: Option<u64>,
        /// Whether it has happened already: then it cannot be denied, only undone.
        done: bool,
    },
    /// A control register is about to be written or read.
    ControlRegister {
        /// Which.
        register: ControlRegister,
        /// How.
        access: Access,
        /// What it holds, where the backend knows it.
        old: Option<u64>,
        /// What it will hold.
        new: Option<u64>,
    },
    /// A model-specific register is about to be written or read.
    Msr {
        /// Its number.
        index: u32,
        /// How.
        access: Access,
        /// What it holds, where the backend knows it.
        old: Option<u64>,
        /// What it will hold.
        new: Option<u64>,
    },
    /// An exception or interrupt is being delivered: the vCPU is at the first instruction of its handler.
    Interrupt {
        /// Its vector.
        vector: u8,
        /// The error code, for those exceptions that have one.
        error_code: Option<u32>,
        /// CR2, for a page fault.
        cr2: Option<u64>,
        /// Where the guest was.
        rip: Gva,
    },
    /// The steps asked for were made.
    Step {
        /// The next instruction.
        rip: Gva,
        /// How many instructions were executed.
        made: u64,
        /// Why no more.
        end: StepEnd,
    },
    /// An I/O port is accessed.
    Port {
        /// Which.
        port: u16,
        /// How.
        access: Access,
        /// Bytes: 1, 2 or 4.
        len: u8,
        /// What is written.
        value: Option<u32>,
    },
    /// CPUID.
    Cpuid {
        /// EAX.
        leaf: u32,
        /// ECX.
        subleaf: u32,
    },
    /// VMCALL or VMMCALL.
    Hypercall {
        /// RAX.
        number: u64,
    },
    /// LGDT, LIDT, LLDT or LTR.
    DescriptorTable {
        /// Where the instruction is.
        rip: Gva,
    },
}

/// What ended a run of steps.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepEnd {
    /// As many were made as were asked for, or allowed.
    Count,
    /// The condition holds, or is unknown.
    Condition,
    /// The vCPU sleeps in HLT, and cannot be woken while others stand: the gdb stub only.
    Sleep,
}

/// One occurrence of what was hooked.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Event {
    /// Its number.
    pub sequence: Sequence,
    /// When it was noticed, by the host's clock.
    pub time: SystemTime,
    /// Which vCPU.
    pub vcpu: u32,
    /// Which hook.
    pub hook: HookId,
    /// CR3 at the time, 0 where the backend did not say.
    pub cr3: u64,
    /// What happened.
    pub detail: Detail,
    /// Whether the vCPU waits for a verdict.
    pub held: bool,
}

/// What became of a hook's occurrences.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Counts {
    /// How often it happened, in its scope.
    pub occurred: u64,
    /// Of those: put away by the filter.
    #[serde(default)]
    pub filtered: u64,
    /// Of those: let through because the filter's condition was unknown.
    #[serde(default)]
    pub undecided: u64,
    /// Of those: above the rate.
    #[serde(default)]
    pub limited: u64,
    /// Events that were told, held or not.
    pub told: u64,
    /// Events for which there was no room.
    pub dropped: u64,
    /// Events for which no verdict came in time.
    pub expired: u64,
}

impl Counts {
    /// How often it happened and was wanted, or may have been: what is left after the filter's condition.
    pub const fn matched(&self) -> u64 {
        self.occurred.saturating_sub(self.filtered)
    }
}
