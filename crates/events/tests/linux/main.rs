//! Named hooks on real Debian guests, held against the guests' own account of what they did.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod guard;
mod support;
mod syscalls;
mod torture;
mod writes;
