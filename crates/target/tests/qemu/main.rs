//! Against real QEMU processes, which the tests start and stop themselves.
//!
//! Needs the Debian package `qemu-system-x86`. Most machines here are started with `-S`: they have memory,
//! devices and monitors, and never run an instruction.

mod discovery;
mod machine;
