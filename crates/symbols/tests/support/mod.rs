//! What the tests of this crate are fed with: kallsyms tables of every layout, and guests in whose memory a kernel lies.
//!
//! Written from the kernel's own generator (scripts/kallsyms.c), sharing no code with the decoder.

#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

pub mod guest;
pub mod tables;
