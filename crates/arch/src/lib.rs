//! Address types, registers and page-table walkers of the machines a guest can run on.
//!
//! `no_std`: the in-VM monitor links this crate too.
#![no_std]

mod address;
pub mod paging;
pub mod registers;

pub use address::{Dtb, Gfn, Gpa, Gva};
pub use registers::{Registers, Segment, TableRegister};
