//! Finds the virtual machines of a host and attaches to them.

pub mod discover;
#[allow(dead_code)] // attaching, which lands next, reads more of it than listing does
mod host;
pub mod qmp;

pub use discover::{VmInfo, Vmm, list};
