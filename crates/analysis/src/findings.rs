//! Where a check puts what it finds.

use vmsight_arch::Gva;
use vmsight_linux::structures::{End, Walk};

use crate::{Check, Finding};

/// Findings that are kept of one check: a guest whose every table is broken is told so by the first of them.
const MAX_FINDINGS: usize = 512;
/// Objects that one check goes to. Bounds of single lists do not bound what a hostile guest can make of lists of lists.
const MAX_OBJECTS: u64 = 1 << 20;
/// Notes that are kept of one check.
const MAX_NOTES: usize = 64;

/// What one check found, how much it looked at, and what it could not look at.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    check: &'static str,
    found: Vec<Finding>,
    more: u64,
    notes: Vec<String>,
    unnoted: u64,
    looked_at: u64,
    went_to: u64,
}

impl Findings {
    /// For `check`.
    pub fn of(check: &Check) -> Self {
        Self {
            check: check.name,
            ..Self::default()
        }
    }

    /// Counts things that were looked at: table entries, functions, objects.
    pub fn looked_at(&mut self, things: usize) {
        self.looked_at = self.looked_at.saturating_add(things as u64);
    }

    /// Whether there may be another object: asked before each. Past the last a note says that the check was given up.
    pub fn go_on(&mut self) -> bool {
        self.went_to = self.went_to.saturating_add(1);
        if self.went_to > MAX_OBJECTS {
            self.note(format!(
                "given up after {MAX_OBJECTS} objects: no honest guest has so many"
            ));
        }
        self.went_to <= MAX_OBJECTS
    }

    /// How many objects more there may be: what limits a walk.
    pub fn left(&self) -> usize {
        usize::try_from(MAX_OBJECTS.saturating_sub(self.went_to)).unwrap_or(usize::MAX)
    }

    /// A walk went to so many.
    pub fn went_to(&mut self, objects: usize) {
        self.went_to = self.went_to.saturating_add(objects as u64);
    }

    /// Adds a finding. Past some hundreds they are only counted, and a note says so.
    pub fn report(&mut self, finding: Finding) {
        self.report_with(|_| finding);
    }

    /// [`report`](Self::report) where evidence is costly to gather and a guest can ask for it without end: made only if it is kept.
    pub fn report_with(&mut self, make: impl FnOnce(&mut Self) -> Finding) {
        if self.found.len() >= MAX_FINDINGS {
            self.more += 1;
            return;
        }
        let mut finding = make(self);
        finding.check = self.check;
        self.found.push(finding);
    }

    /// Says what could not be checked, and why. The same is said once.
    pub fn note(&mut self, note: impl Into<String>) {
        let note = note.into();
        if self.notes.contains(&note) {
            return;
        }
        if self.notes.len() >= MAX_NOTES {
            self.unnoted += 1;
            return;
        }
        self.notes.push(note);
    }

    /// The value, or a note why there is none: `what` could not be checked.
    pub fn or_note<T, E: std::fmt::Display>(&mut self, what: &str, result: Result<T, E>) -> Option<T> {
        result.map_err(|why| self.note(format!("{what}: {why}"))).ok()
    }

    /// A walk's elements; a note where it is not complete. The container itself counts as looked at: it may be empty.
    pub fn complete<T>(&mut self, what: &str, walk: Walk<T>) -> Vec<T> {
        self.went_to(walk.items.len());
        self.looked_at(1);
        self.end(what, &walk.end);
        walk.items
    }

    /// A note where a walk did not end at its container's own end.
    pub fn end(&mut self, what: &str, end: &End) {
        if let Some(warning) = end.warning(what) {
            self.note(warning);
        }
    }

    /// What was found so far.
    pub fn found(&self) -> &[Finding] {
        &self.found
    }

    /// Whether something is wrong with `subject` already.
    pub fn has(&self, subject: &str, address: Option<Gva>) -> bool {
        self.found
            .iter()
            .any(|f| f.subject == subject && f.address == address)
    }

    /// What was found, what could not be checked, and how much was looked at.
    pub(crate) fn into_parts(mut self) -> (Vec<Finding>, Vec<String>, u64) {
        if self.more > 0 {
            self.notes.push(format!("and {} more findings", self.more));
        }
        if self.unnoted > 0 {
            self.notes.push(format!("and {} more notes", self.unnoted));
        }
        (self.found, self.notes, self.looked_at)
    }
}
