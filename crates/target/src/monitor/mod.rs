//! The texts of QEMU's human monitor, which QMP and the gdb stub both can ask for.
//!
//! The monitor's text is no interface that QEMU promises to keep; it has not changed in these places from 5.x
//! to 10.x except by columns added at the end. The captured texts beside this file are what real QEMUs 7.2 and
//! 10.0 said.

mod mtree;
mod ramblock;
mod registers;

pub(crate) use mtree::guest_memory;
pub(crate) use ramblock::{RamBlock, parse_gpa2hva, parse_memdev, parse_ramblocks};
pub(crate) use registers::parse_registers;
