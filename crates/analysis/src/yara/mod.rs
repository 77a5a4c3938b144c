//! YARA rules over a guest's memory.
//!
//! YARA knows files and processes; a guest's memory is neither. In physical memory ([`physical`]) a rule is judged for each piece
//! of [`PIECE`] bytes by itself, as if it were a file. A process ([`processes`]) and the kernel's own areas ([`kernel_areas`]) are judged
//! as YARA judges a process: all that is mapped together, each run of pages whose virtual addresses follow each other in one piece.
//!
//! The engine is boreal. It is given bytes and rules, and neither is trusted: rules are bounded in length, depth and number of
//! patterns, matches in number and length, and a judgement in time.

mod areas;
mod engine;
mod physical;
mod rules;

use std::sync::Arc;
use std::time::Duration;

use vmsight_arch::Gpa;

pub use areas::{OfProcess, kernel_areas, processes};
pub use physical::physical;
pub use rules::{BadRules, Rule, Rules, Source};

/// Bytes of physical memory that a rule is judged for.
pub const PIECE: usize = 4 << 20;
/// Bytes of the next piece that each piece shows as well: a match that begins in a piece and is not longer than this is found
/// wherever it ends. (Of what is more than a text the engine itself, as YARA, follows no more than 4096 bytes either way.)
pub const OVERLAP: usize = 64 << 10;

/// Bounds of one scan.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Matches of one pattern in one piece, or in one process.
    pub per_pattern: u32,
    /// Matches in all.
    pub in_all: usize,
    /// What judging one piece, or one process, may take; ordinary rules take milliseconds. After four that take longer the scan ends.
    pub patience: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            per_pattern: 1000,
            in_all: 100_000,
            patience: Duration::from_secs(120),
        }
    }
}

/// One match of one pattern, or of a rule that has matched without one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Match {
    /// The rule.
    pub rule: Arc<Rule>,
    /// The pattern: `$a`; `None` where the rule's condition needs none.
    pub pattern: Option<String>,
    /// Its first byte, a physical or a virtual address as what was scanned; of a match without pattern that of what was judged.
    pub address: u64,
    /// Its length in bytes; 0 without a pattern.
    pub length: u64,
    /// Its first bytes, 64 at most.
    pub matched: Vec<u8>,
    /// Up to 16 bytes before it.
    pub before: Vec<u8>,
    /// Up to 16 bytes behind it; none where not all of it is kept.
    pub after: Vec<u8>,
}

impl Match {
    /// Its physical address, of a scan of physical memory.
    pub fn gpa(&self) -> Gpa {
        Gpa(self.address)
    }
}

/// What a scan has found.
#[derive(Debug, Default)]
pub struct Scanned {
    /// By rising address.
    pub matches: Vec<Match>,
    /// Bytes that were looked at.
    pub looked_at: u64,
    /// What was not looked at or is not all shown, and why.
    pub notes: Vec<String>,
}

impl Scanned {
    fn sort(&mut self) {
        self.matches
            .sort_by(|a, b| (a.address, &a.rule, &a.pattern).cmp(&(b.address, &b.rule, &b.pattern)));
    }
}
