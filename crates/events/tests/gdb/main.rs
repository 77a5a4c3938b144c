//! The gdb-stub backend against real QEMU processes with guests of a few hundred bytes, which the tests start and stop
//! themselves.
//!
//! Needs the Debian package `qemu-system-x86`.

#![allow(clippy::unwrap_used)] // what the tests share is test code too

mod execute;
mod filter;
mod guest;
mod life;
mod machine;
mod memory;
mod queue;
mod step;
