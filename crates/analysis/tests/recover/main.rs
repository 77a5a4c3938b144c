//! What is recovered from a real guest is what its workload left there: while it runs, and from its dump.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod conntrack;
mod elf;
mod files;
mod frames;
mod hidden;
mod history;
mod hostile;
mod packets;
mod processes;
mod screen;
mod sockets;
mod support;
mod timeline;
mod tty;
