//! What our kernel module `vmsight_poke` (lab/modules) can be told to do inside a guest's kernel.

use serde::{Deserialize, Serialize};

/// Something to be done in kernel mode, on the CPU that the order runs on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Poke {
    /// Writes values to one place: `first`, `first + step`, and so on, each in one instruction. Before and afterwards the place is
    /// read once.
    Write {
        /// The address, a multiple of the width.
        at: u64,
        /// How it is reached.
        reach: Reach,
        /// Bytes: 1, 2, 4 or 8.
        width: u64,
        /// The first value; what does not fit into the width is cut off.
        first: u64,
        /// What each is more than the one before (modulo 2^64).
        step: u64,
        /// How many; at most 100,000 with [`Reach::Wp`].
        count: u64,
        /// Write the old value once more afterwards, if another was seen.
        restore: bool,
    },
    /// Reads one place `count` times: `old` is the last value, `seen` the sum of all (modulo 2^64).
    Read {
        /// The address, a multiple of the width.
        at: u64,
        /// How it is reached.
        reach: Reach,
        /// Bytes: 1, 2, 4 or 8.
        width: u64,
        /// How often.
        count: u64,
    },
    /// Reads a register.
    Get {
        /// Which.
        register: Register,
    },
    /// Writes a register with the plain instruction, so that no helper of the kernel's stands in the way, and reads it before and
    /// afterwards. Interrupts are off meanwhile.
    Set {
        /// Which.
        register: Register,
        /// The bits that are changed; the others keep their values.
        mask: u64,
        /// What they become.
        value: u64,
        /// How often; at most 100,000.
        count: u64,
        /// Write the old value once more afterwards, if another was seen.
        restore: bool,
    },
    /// Calls a function of the kernel `count` times; `seen` is what it returned at last.
    Call {
        /// Its address.
        at: u64,
        /// Its arguments; four at most.
        arguments: Vec<u64>,
        /// How often.
        count: u64,
    },
}

/// How a place in memory is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reach {
    /// At its virtual address. Writing to what is read-only faults.
    Direct,
    /// At its virtual address, with CR0.WP clear and interrupts off meanwhile.
    Wp,
    /// At a writable virtual address made for this, of the same physical page.
    Alias,
    /// The same, where the address given is a physical one (of memory).
    Physical,
}

/// A register. The order's CPU has its own of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Register {
    /// CR0.
    Cr0,
    /// CR2.
    Cr2,
    /// CR3.
    Cr3,
    /// CR4.
    Cr4,
    /// A debug register: 0 to 3, 6 or 7.
    Dr(u8),
    /// XCR0.
    Xcr0,
    /// Where the interrupt descriptor table is; its limit stays.
    Idtr,
    /// A model-specific register, by its number.
    Msr(u32),
}

/// What the module saw.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Poked {
    /// What was there before.
    pub old: u64,
    /// What was there afterwards, before anything was restored.
    pub seen: u64,
    /// How often it was done without a fault, which does not say that it had an effect.
    pub made: u64,
    /// How often the instruction faulted (#GP, #PF).
    pub faults: u64,
}
