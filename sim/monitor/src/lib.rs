//! The monitor that lives inside a guest, in an address space of its own: its handlers, and the guest's memory as they see
//! it.
//!
//! The image (`main.rs`) calls them in the guest, without an exit; the hypervisor calls the same null handler after an exit,
//! which is what it is compared with. Nothing here may use floating point or vector registers: they are the guest's.
#![no_std]

mod context;
mod handlers;

pub use context::{Context, Memory};
pub use handlers::{copy, null};
