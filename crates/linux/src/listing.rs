//! What every listing returns: rows, and what the reader must know about them.

use std::fmt;

use serde::{Serialize, Serializer};
use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use crate::warnings::Told;

/// The rows of a listing and its warnings. Rows are whole unless a row or a warning says otherwise.
#[derive(Clone, Debug, Serialize)]
pub struct Listing<T> {
    /// One per object, in the kernel's own order.
    pub rows: Vec<T>,
    /// What may be missing and why: lists cut at a cycle or a bound, lists that changed while they were read.
    ///
    /// At most some hundreds: the last says how many more there would be.
    pub warnings: Vec<String>,
    #[serde(skip)]
    told: Told,
}

impl<T> Default for Listing<T> {
    fn default() -> Self {
        Self::new(Vec::new(), Vec::new())
    }
}

impl<T> Listing<T> {
    /// Rows with their warnings.
    pub fn new(rows: Vec<T>, warnings: Vec<String>) -> Self {
        Self {
            rows,
            warnings,
            told: Told::default(),
        }
    }

    /// Notes something that the reader of the rows must know. The same sentence is kept once, and of very many the first.
    pub fn warn(&mut self, warning: impl Into<String>) {
        self.told.add(&mut self.warnings, warning.into());
    }
}

/// How often a listing that came out with marks is made again while the guest runs.
const RETRIES: usize = 3;

/// Makes a listing, and where it came out with marks while the guest runs, makes it again: what was being changed has then settled.
/// Gives the one with the fewest marks. `marks` counts those of a row.
pub(crate) fn settled<T, E>(
    live: bool,
    marks: impl Fn(&T) -> usize,
    mut make: impl FnMut() -> Result<Listing<T>, E>,
) -> Result<Listing<T>, E> {
    let count =
        |listing: &Listing<T>| listing.warnings.len() + listing.rows.iter().map(&marks).sum::<usize>();
    let mut best = make()?;
    let mut fewest = count(&best);
    for _ in 0..RETRIES {
        if !live || fewest == 0 {
            break;
        }
        let again = make()?;
        let marks = count(&again);
        // Marks that stay are not of the guest's doing at this moment: something is paged out or broken.
        let stays = marks == fewest;
        if marks <= fewest {
            (best, fewest) = (again, marks);
        }
        if stays {
            break;
        }
    }
    Ok(best)
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

    /// A number of 64 bits as a `"0x…"` string.
    pub fn hex<S: Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{value:#x}"))
    }

    /// A 64-bit set of flags as a `"0x…"` string.
    pub fn hex_opt<S: Serializer>(value: &Option<u64>, serializer: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(v) => serializer.collect_str(&format_args!("{v:#x}")),
            None => serializer.serialize_none(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Listing, settled};

    fn run(live: bool, marks: &[usize]) -> (usize, usize) {
        let mut calls = 0;
        let listing = settled(
            live,
            |row: &usize| *row,
            || {
                let rows = vec![marks.get(calls).copied().unwrap_or(9)];
                calls += 1;
                Ok::<_, ()>(Listing::new(rows, Vec::new()))
            },
        );
        (listing.unwrap().rows[0], calls)
    }

    #[test]
    fn a_listing_is_made_again_until_it_is_clean_or_stays_as_it_is() {
        assert_eq!(run(true, &[0]), (0, 1));
        assert_eq!(run(true, &[3, 0]), (0, 2));
        assert_eq!(run(true, &[3, 5, 1, 2]), (1, 4));
        assert_eq!(run(true, &[3, 3, 0]), (3, 2));
        assert_eq!(run(false, &[3, 0]), (3, 1));
    }
}
