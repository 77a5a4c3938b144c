//! Against real QEMU processes, which the tests start and stop themselves.
//!
//! Needs the Debian package `qemu-system-x86`. Most machines here are started with `-S`: they have memory,
//! devices and monitors, and never run an instruction.

#![allow(clippy::unwrap_used)] // what the tests share is test code too

mod attach;
mod discovery;
mod dumps;
mod gdb;
mod libvirt;
mod machine;
mod pause;
mod trouble;
