//! Filters: which of a hook's events are wanted. They are evaluated where the event happens, in the VMM with an
//! agent there, so that what nobody wants never leaves it.
//!
//! A [`Condition`] is compiled into a [`Program`], and a program is verified whenever it is made or received: it
//! goes forward only, its values are of the right kinds on every way through it, and its reads of the guest are
//! counted. Neither side has to believe the other. Running one ([`Sieve`]) is bounded by its length and cannot
//! fail; what it does not find in the guest is unknown, and **an event whose condition is unknown is told**: a
//! guest that makes its memory unreadable hides nothing by it.

mod compile;
mod evaluate;
mod expression;
mod looks;
mod program;
mod sieve;
mod tally;
mod verify;

pub use evaluate::{FilterMemory, Moment, Truth};
pub use expression::{Arithmetic, Comparison, Condition, Field, TextMatch, Value};
pub use looks::Looks;
pub use program::{Instruction, MOST_BYTES, MOST_INSTRUCTIONS, MOST_READS, MOST_VALUES, Program};
pub use sieve::{Passage, Sieve};
pub use tally::{Bucket, Buckets, MOST_BUCKETS, Tallied, Tally};

use std::time::Duration;

use serde::{Deserialize, Serialize};

use program::Yields;

/// At most so many events in a time. The times follow one another, the first one begins with the first event.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// How many events, at least 1.
    pub events: u32,
    /// In how long, longer than nothing.
    pub per: Duration,
}

/// Which of a hook's events are wanted, and what is counted of them.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Filter {
    /// Only those for which this holds or is unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    condition: Option<Program>,
    /// And of those not more than this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rate: Option<Rate>,
    /// What is counted of those for which the condition holds or is unknown, those above the rate included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tally: Option<Tally>,
}

impl Filter {
    /// Everything is wanted.
    pub const fn none() -> Self {
        Self {
            condition: None,
            rate: None,
            tally: None,
        }
    }

    /// Whether everything is wanted, and nothing counted.
    pub const fn is_none(&self) -> bool {
        self.condition.is_none() && self.rate.is_none() && self.tally.is_none()
    }

    /// Whether it says more of an event than how many are wanted.
    pub const fn has_condition(&self) -> bool {
        self.condition.is_some()
    }

    /// The condition that it has.
    pub const fn condition(&self) -> Option<&Program> {
        self.condition.as_ref()
    }

    /// Only those for which a condition holds.
    ///
    /// # Errors
    /// As [`Condition::compile`].
    pub fn only(condition: &Condition) -> Result<Self, FilterError> {
        Ok(Self {
            condition: Some(condition.compile()?),
            ..Self::none()
        })
    }

    /// The same with a limit: only for hooks whose events are told, not held.
    #[must_use]
    pub const fn at_most(mut self, events: u32, per: Duration) -> Self {
        self.rate = Some(Rate { events, per });
        self
    }

    /// The same, with `key` counted.
    ///
    /// # Errors
    /// As [`Value::compile`].
    pub fn counting(mut self, key: &Value, buckets: Buckets) -> Result<Self, FilterError> {
        self.tally = Some(Tally::new(key.compile()?, buckets)?);
        Ok(self)
    }

    /// What of the vCPU and of an event it looks at.
    pub fn looks(&self) -> Looks {
        let programs = [self.condition.as_ref(), self.tally.as_ref().map(Tally::key)];
        let all = programs.into_iter().flatten().map(Program::looks);
        all.fold(Looks::default(), Looks::and)
    }

    /// The limit.
    pub const fn rate(&self) -> Option<Rate> {
        self.rate
    }

    /// Whether the parts are what they should be: what came from elsewhere is asked this.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn validate(&self) -> Result<(), FilterError> {
        if self
            .condition
            .as_ref()
            .is_some_and(|p| p.yields() != Yields::Truth)
        {
            return Err(FilterError::NoCondition);
        }
        if self.tally.as_ref().is_some_and(|t| !t.has_number()) {
            return Err(FilterError::NoNumber);
        }
        match self.rate {
            Some(rate) if rate.events == 0 || rate.per.is_zero() => Err(FilterError::NoRate),
            _ => Ok(()),
        }
    }
}

/// A filter that cannot be.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FilterError {
    /// Too many instructions or bytes.
    #[error("a filter has at most {MOST_INSTRUCTIONS} instructions and {MOST_BYTES} bytes")]
    TooLong,
    /// Conditions in conditions in conditions.
    #[error("a filter is nested too deeply")]
    TooDeep,
    /// It would read too much of the guest.
    #[error("a filter reads guest memory at most {MOST_READS} times")]
    TooManyReads,
    /// It is no program, or one that may not run.
    #[error("instruction {at} of a filter is wrong: {what}")]
    Malformed {
        /// Which instruction, counted from 0.
        at: usize,
        /// What is wrong.
        what: &'static str,
    },
    /// The program of a value is where that of a condition should be.
    #[error("a filter needs a condition, not a number")]
    NoCondition,
    /// The program of a condition is where that of a value should be.
    #[error("what is counted must be a number, not a condition")]
    NoNumber,
    /// No events, or no time.
    #[error("a rate is at least one event, in longer than no time")]
    NoRate,
}

#[cfg(test)]
mod tests;
