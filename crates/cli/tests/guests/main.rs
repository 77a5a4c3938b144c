//! `vmsight`, the program, on real guests and on dumps of them: what it prints, what it changes, and how it fails.
//! Whether every value is true is held against the guests' own account in `lab/tests/view.rs`; here it is that the
//! program says what the libraries see, in every format, and ends as its help promises.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod active;
mod agent;
mod bench;
mod changing;
mod check;
mod debug;
mod dump;
mod keys;
mod kvm;
mod lies;
mod listings;
mod memory;
mod recover;
mod report;
mod scrambled;
mod support;
mod tcg;
mod trouble;
