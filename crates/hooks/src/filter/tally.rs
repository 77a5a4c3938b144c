//! Counts by key, kept where the events happen: counting them costs no event.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::FilterError;
use super::program::{Program, Yields};

/// Most keys that are kept apart.
pub const MOST_BUCKETS: usize = 4096;

/// What is counted together.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Buckets {
    /// Each number by itself: system calls by their number.
    Each,
    /// Numbers of the same length in bits: 0, 1, 2 to 3, 4 to 7 …, by the smallest of them. A histogram of sizes.
    Log2,
}

impl Buckets {
    const fn of(self, number: u64) -> u64 {
        match (self, number.checked_ilog2()) {
            (Self::Log2, Some(bits)) => 1 << bits,
            _ => number,
        }
    }
}

/// What is counted.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tally {
    key: Program,
    buckets: Buckets,
}

impl Tally {
    pub(super) fn new(key: Program, buckets: Buckets) -> Result<Self, FilterError> {
        let tally = Self { key, buckets };
        match tally.has_number() {
            true => Ok(tally),
            false => Err(FilterError::NoNumber),
        }
    }

    pub(super) fn has_number(&self) -> bool {
        self.key.yields() == Yields::Number
    }

    pub(super) fn key(&self) -> &Program {
        &self.key
    }

    pub(super) fn bucket(&self, number: u64) -> u64 {
        self.buckets.of(number)
    }
}

/// One key and how often it came.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Bucket {
    /// The key, or the smallest number of its bucket.
    pub key: u64,
    /// How often.
    pub count: u64,
}

/// What was counted.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Tallied {
    /// By key, in the order of the keys; at most [`MOST_BUCKETS`].
    pub buckets: Vec<Bucket>,
    /// Those whose key came when all buckets were taken.
    pub others: u64,
    /// Those whose key was not there.
    pub unknown: u64,
}

/// The same while it is counted.
#[derive(Debug, Default)]
pub(super) struct Counting {
    buckets: BTreeMap<u64, u64>,
    others: u64,
    unknown: u64,
}

impl Counting {
    pub(super) fn add(&mut self, bucket: Option<u64>) {
        let room = self.buckets.len() < MOST_BUCKETS;
        let count = match bucket {
            None => &mut self.unknown,
            Some(key) if room => self.buckets.entry(key).or_default(),
            Some(key) => self.buckets.get_mut(&key).unwrap_or(&mut self.others),
        };
        *count = count.saturating_add(1);
    }

    pub(super) fn tallied(&self) -> Tallied {
        let buckets = self.buckets.iter();
        Tallied {
            buckets: buckets.map(|(&key, &count)| Bucket { key, count }).collect(),
            others: self.others,
            unknown: self.unknown,
        }
    }
}
