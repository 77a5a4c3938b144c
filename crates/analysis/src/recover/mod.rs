//! What can be got back out of a guest's memory: files, and what people and programs left behind.
//!
//! Unlike a check, a recovery has rows of its own kind. What is in them was written by the guest: texts are as the guest
//! wrote them, and whoever prints them escapes them.

mod certainty;
pub mod conntrack;
mod devices;
pub mod elf;
pub mod files;
pub mod framebuffers;
mod frames;
mod heap;
pub mod history;
pub mod input;
pub(crate) mod member;
mod output;
pub mod packets;
pub mod processes;
mod remains;
pub mod screen;
mod slab;
pub mod sockets;
pub mod tty;
mod vga;

pub use certainty::Certainty;
pub use devices::DeviceMemory;
