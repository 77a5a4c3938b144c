//! A thin VT-x hypervisor that runs the machine's own kernel, devices passed through, and keeps a monitor inside it out of
//! its reach.
//!
//! This library is what can be decided without the machine: what the boot loader handed over, the guest's memory map, the
//! kernel's boot protocol, extended page tables, the views and their gates, what the processor must be able to do. It is
//! `no_std`, allocates nothing, has no unsafe code, and is tested on the host. The program beside it (`main.rs` and its
//! modules) is what touches the machine.
#![no_std]

pub mod acpi;
pub mod attempt;
pub mod bytes;
pub mod command;
pub mod e820;
pub mod ept;
pub mod exit;
pub mod gate;
pub mod json;
pub mod linux;
pub mod multiboot;
pub mod place;
pub mod ports;
pub mod store;
pub mod views;
pub mod vmx;

#[cfg(test)]
extern crate std;

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Bytes of a large page.
pub const LARGE: u64 = 2 << 20;
/// The most processors that the hypervisor runs a guest on.
pub const PROCESSORS: usize = 4;
