//! Address types, registers and page-table walkers of the machines a guest can run on.
//!
//! `no_std`: the in-VM monitor links this crate too.
#![no_std]

mod address;
pub mod paging;

pub use address::{Dtb, Gfn, Gpa, Gva};
