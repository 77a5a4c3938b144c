//! Images of Secure In-VM Monitoring: the programs that run without an operating system, what GRUB boots of them, running that
//! in Bochs, and reading what they say there or on hardware.
//!
//! Bochs has VT-x with all that the hypervisor needs, and counts instructions. Nothing that happens in it says anything
//! about time.

pub mod bochs;
pub mod channel;
mod error;
pub mod exits;
mod packages;
pub mod programs;
pub mod rescue;
mod screen;
pub mod trial;
pub mod user;
pub mod workload;

pub use bochs::Machine;
pub use channel::Channel;
pub use error::Error;
pub use programs::Program;
pub use rescue::Image;
