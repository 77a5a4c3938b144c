//! Images of Secure In-VM Monitoring: building the programs that run without an operating system, making what GRUB boots of
//! them, and running that in Bochs.
//!
//! Bochs has VT-x with all that the hypervisor needs, and counts instructions. Nothing that happens in it says anything
//! about time.

pub mod bochs;
pub mod channel;
pub mod programs;
pub mod rescue;
pub mod user;

pub use bochs::Machine;
pub use channel::Channel;
pub use programs::Program;
pub use rescue::Image;
