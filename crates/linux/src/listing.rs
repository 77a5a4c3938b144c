//! What every listing returns: rows, and what the reader must know about them.

use std::fmt;

use serde::{Serialize, Serializer};
use vmsight_arch::Gva;
use vmsight_memory::ReadError;

/// The rows of a listing and its warnings. Rows are whole unless a row or a warning says otherwise.
#[derive(Clone, Debug, Serialize)]
pub struct Listing<T> {
    /// One per object, in the kernel's own order.
    pub rows: Vec<T>,
    /// What may be missing and why: lists cut at a cycle or a bound, lists that changed while they were read.
    pub warnings: Vec<String>,
}

impl<T> Default for Listing<T> {
    fn default() -> Self {
        Self {
            rows: Vec::new(),
            warnings: Vec::new(),
        }
    }
}

impl<T> Listing<T> {
    /// Notes something that the reader of the rows must know. The same sentence is kept once.
    pub fn warn(&mut self, warning: impl Into<String>) {
        let warning = warning.into();
        if !self.warnings.contains(&warning) {
            self.warnings.push(warning);
        }
    }
}

/// A field of a row that could not be read, and why. Serialised as `"field: reason"`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The row's field, by its name in JSON.
    pub field: &'static str,
    /// Why it is missing or not to be trusted.
    pub reason: String,
}

impl Problem {
    /// A problem of `field` with a reason in words.
    pub fn new(field: &'static str, reason: impl Into<String>) -> Self {
        Self {
            field,
            reason: reason.into(),
        }
    }

    /// A field that could not be read. A page that the guest has swapped out is called so.
    pub fn read(field: &'static str, error: &ReadError) -> Self {
        if error.is_paged_out() {
            Self::new(field, "paged out")
        } else {
            Self::new(field, error.to_string())
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.reason)
    }
}

impl Serialize for Problem {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// `#[serde(serialize_with = …)]` for addresses in rows: `"0xffff…"` strings, because JSON numbers lose bits past 2^53.
pub mod address {
    use super::{Gva, Serializer};

    /// An address as a `"0x…"` string.
    pub fn gva<S: Serializer>(value: &Gva, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    /// An address as a `"0x…"` string, `null` where there is none.
    pub fn gva_opt<S: Serializer>(value: &Option<Gva>, serializer: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(v) => serializer.collect_str(v),
            None => serializer.serialize_none(),
        }
    }

    /// A 64-bit set of flags as a `"0x…"` string.
    pub fn hex_opt<S: Serializer>(value: &Option<u64>, serializer: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(v) => serializer.collect_str(&format_args!("{v:#x}")),
            None => serializer.serialize_none(),
        }
    }
}
