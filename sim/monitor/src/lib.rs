//! The monitor that lives inside a guest, in an address space of its own: its handlers, and the guest's memory as they see
//! it.
//!
//! The image (`main.rs`) calls them in the guest, without an exit; the hypervisor calls the same handlers after an exit,
//! which is what it is compared with. What runs before the guest's vector registers are kept ([`null`], [`count`]) does not
//! use them. Everything that is read from the guest is the guest's to choose, at every read anew: reads are bounded, none
//! of them is trusted to agree with another, and what cannot be read is told as such.
#![no_std]

mod calls;
mod context;
mod credentials;
mod handlers;
mod modules;
mod processes;
mod task;

#[cfg(test)]
mod guest;

pub use context::{Context, Memory, Rest};
pub use handlers::{copy, count, handle, look, null};
