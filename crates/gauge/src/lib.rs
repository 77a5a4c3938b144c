//! What hooks cost, measured where it is felt: a guest that times itself, and the least VMM that runs it.
//!
//! The guest ([`image`]) is its own firmware. It calls one of its functions again and again and notes by its time-stamp counter
//! how long each call took; hooks are put on that function from outside. QEMU runs it, and so does a VMM of some lines
//! ([`vmm`]) on whatever `/dev/kvm` there is, which shows what the exit to user space alone costs.

#![deny(unsafe_code)]

mod guest;
pub mod image;
mod statistics;
pub mod vmm;

pub use guest::{Operation, Samples, Timer};
pub use statistics::Summary;
