//! What one listing may hold in all, and how much of the guest is looked at for it.
//!
//! Every walk is bounded by itself; yet a guest can let a million tasks share a list of a million threads, and what is bounded twice is
//! without bounds. So whatever is made for one listing is paid for from one budget: rows, bytes of strings and lists in them, and
//! steps, which are objects that are looked at and may come to no row. It is generous: only a guest that lies exhausts it.
//!
//! Who can make rows or long strings inside the guest could use up what all have together and so keep others out of a listing. What
//! belongs to a process therefore has a share of its own, which nobody else can take.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Rows of one listing.
pub(crate) const ROWS: usize = 1 << 20;
/// Bytes of strings and lists in the rows of one listing.
pub(crate) const BYTES: usize = 256 << 20;
/// Objects that are looked at for one listing: threads of processes, descriptors, mappings, buckets of tables.
pub(crate) const STEPS: usize = 16 << 20;

/// What a problem says of a part of a row that found no room.
pub(crate) const NO_ROOM: &str = "left out, the listing holds too many bytes already";

/// What is left of a listing's allowance, shared by the threads that make its rows.
#[derive(Debug)]
pub(crate) struct Budget {
    rows: Pot,
    bytes: Pot,
    steps: Pot,
    own: Own,
}

/// What one process (or whatever a listing is divided by) has to itself.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Own {
    /// Rows.
    pub(crate) rows: usize,
    /// Bytes.
    pub(crate) bytes: usize,
}

#[derive(Debug)]
struct Pot {
    left: AtomicUsize,
    refused: AtomicBool,
}

impl Pot {
    fn of(left: usize) -> Self {
        Self {
            left: AtomicUsize::new(left),
            refused: AtomicBool::new(false),
        }
    }

    fn left(&self) -> usize {
        self.left.load(Ordering::Relaxed)
    }

    /// All of it or nothing.
    fn take(&self, wanted: usize) -> bool {
        let taken = self
            .left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                left.checked_sub(wanted)
            })
            .is_ok();
        if !taken {
            self.refuse();
        }
        taken
    }

    /// As much as there is; returns how much that was.
    fn take_some(&self, wanted: usize) -> usize {
        let before = self
            .left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                Some(left.saturating_sub(wanted))
            });
        let taken = wanted.min(before.unwrap_or(0));
        if taken < wanted {
            self.refuse();
        }
        taken
    }

    fn refuse(&self) {
        self.refused.store(true, Ordering::Relaxed);
    }

    fn refused(&self) -> bool {
        self.refused.load(Ordering::Relaxed)
    }
}

impl Default for Budget {
    /// All together, nothing for anybody alone.
    fn default() -> Self {
        Self::shared_by(1, Own::default())
    }
}

impl Budget {
    /// For `many` who have up to `own` each to themselves, less if they are so many that this would come to more than all have together.
    pub(crate) fn shared_by(many: usize, own: Own) -> Self {
        let many = many.max(1);
        Self {
            rows: Pot::of(ROWS),
            bytes: Pot::of(BYTES),
            steps: Pot::of(STEPS),
            own: Own {
                rows: own.rows.min(ROWS / many),
                bytes: own.bytes.min(BYTES / many),
            },
        }
    }

    /// Takes one row with this many bytes in it; false if that is too much, and the listing is to end.
    pub(crate) fn row(&self, bytes: usize) -> bool {
        self.rows.take(1) && self.bytes.take(bytes)
    }

    /// Takes bytes alone; false if there are no longer so many.
    pub(crate) fn bytes(&self, bytes: usize) -> bool {
        self.bytes.take(bytes)
    }

    /// How long a walk may be that would be allowed `most` steps by itself. To be paid for with [`Budget::walked`].
    pub(crate) fn limit(&self, most: usize) -> usize {
        most.min(self.steps.left())
    }

    /// Pays for a walk.
    pub(crate) fn walked(&self, steps: usize) {
        self.steps.take_some(steps);
        if self.steps.left() == 0 {
            self.steps.refuse();
        }
    }

    /// Pays for a step before it is made; false if it is not to be.
    pub(crate) fn step(&self) -> bool {
        self.steps.take(1)
    }

    /// What each of those who share has to itself.
    pub(crate) fn own(&self) -> Own {
        self.own
    }

    /// Takes one row with this many bytes for somebody who has `own` left; false if that is too much.
    pub(crate) fn row_of(&self, own: &mut Own, bytes: usize) -> bool {
        let mut share = Share {
            budget: self,
            own: *own,
        };
        let taken = share.row() && share.bytes(bytes);
        *own = share.own;
        taken
    }

    /// What one of those who share may take.
    pub(crate) fn share(&self) -> Share<'_> {
        Share {
            budget: self,
            own: self.own,
        }
    }

    /// The sentence for a listing's warnings where something was refused; `what` names the rows.
    pub(crate) fn warning(&self, what: &str) -> Option<String> {
        let mut parts = Vec::new();
        if self.rows.refused() {
            parts.push(format!(
                "the listing holds {ROWS} rows already, the rest are left out"
            ));
        }
        if self.bytes.refused() {
            parts.push(format!(
                "their strings are longer than {} MiB in all, the rest are cut or left out",
                BYTES >> 20
            ));
        }
        if self.steps.refused() {
            parts.push(format!(
                "more than {STEPS} objects would have had to be looked at, the rest were not"
            ));
        }
        (!parts.is_empty()).then(|| format!("{what}: {}", parts.join("; ")))
    }
}

/// One share: what is its own first, then what all have together.
#[derive(Debug)]
pub(crate) struct Share<'b> {
    budget: &'b Budget,
    own: Own,
}

impl Share<'_> {
    /// Bytes that can still be taken.
    pub(crate) fn bytes_left(&self) -> usize {
        self.own.bytes.saturating_add(self.budget.bytes.left())
    }

    /// Takes bytes; false if there are no longer so many.
    pub(crate) fn bytes(&mut self, wanted: usize) -> bool {
        let own = self.own.bytes.min(wanted);
        let taken = wanted == own || self.budget.bytes.take(wanted - own);
        if taken {
            self.own.bytes -= own;
        }
        taken
    }

    /// Takes as many bytes as there are; returns how many.
    pub(crate) fn some_bytes(&mut self, wanted: usize) -> usize {
        let own = self.own.bytes.min(wanted);
        self.own.bytes -= own;
        if wanted == own {
            own
        } else {
            own + self.budget.bytes.take_some(wanted - own)
        }
    }

    /// Takes a row; false if there is none left.
    fn row(&mut self) -> bool {
        match self.own.rows.checked_sub(1) {
            Some(left) => {
                self.own.rows = left;
                true
            }
            None => self.budget.rows.take(1),
        }
    }

    /// Rows that can still be taken, `most` at most.
    pub(crate) fn rows_left(&self, most: usize) -> usize {
        self.own.rows.saturating_add(self.budget.rows.left()).min(most)
    }

    /// Takes rows, of which there were so many left.
    pub(crate) fn rows(&mut self, taken: usize) {
        let own = self.own.rows.min(taken);
        self.own.rows -= own;
        if taken > own {
            self.budget.rows.take_some(taken - own);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_ends_at_its_rows_or_bytes_and_says_so() {
        let budget = Budget::default();
        assert!((0..ROWS).all(|_| budget.row(8)));
        assert_eq!(budget.warning("things"), None);
        assert!(!budget.row(8));
        let warning = budget.warning("things").unwrap();
        assert!(
            warning.starts_with("things: ") && warning.contains("1048576 rows"),
            "{warning}"
        );

        let budget = Budget::default();
        assert!(budget.row(BYTES - 1) && !budget.row(2) && budget.row(1));
        assert!(budget.warning("things").unwrap().contains("256 MiB"));
    }

    #[test]
    fn walks_are_paid_for_together() {
        let budget = Budget::default();
        assert_eq!(budget.limit(10), 10);
        budget.walked(STEPS - 3);
        assert_eq!(budget.warning("things"), None);
        assert_eq!(budget.limit(10), 3);
        budget.walked(3);
        assert_eq!(budget.limit(10), 0);
        assert!(!budget.step());
        assert!(budget.warning("things").unwrap().contains("16777216 objects"));
    }

    #[test]
    fn nobody_takes_what_is_anothers_own() {
        let own = Own { rows: 4, bytes: 4096 };
        let budget = Budget::shared_by(100, own);
        let mut greedy = budget.share();
        assert_eq!(greedy.some_bytes(usize::MAX), 4096 + BYTES);
        assert_eq!((greedy.some_bytes(1), greedy.bytes(1)), (0, false));
        greedy.rows(ROWS + 4);
        assert_eq!(greedy.rows_left(100), 0);
        let mut modest = budget.share();
        assert!(modest.bytes(1000) && modest.bytes(3096) && !modest.bytes(1));
        assert_eq!(modest.rows_left(100), 4);
        let mut last = budget.own();
        assert!((0..4).all(|_| budget.row_of(&mut last, 1024)));
        assert!(!budget.row_of(&mut last, 0));
        // So many that their own must be less: all of it comes to no more than the common part.
        let budget = Budget::shared_by(BYTES, own);
        assert_eq!(budget.own.bytes, 1);
        assert_eq!(budget.own.rows, 0);
    }
}
