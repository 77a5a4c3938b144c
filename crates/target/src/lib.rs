//! Finds the virtual machines of a host and attaches to them.
//!
//! [`list`] says what runs here, from `/proc` and the sockets only. [`attach`] makes a [`Target`] of a name, a
//! process, a monitor's socket, a gdb stub or a dump: its guest-physical memory, its registers, and a way to pause it that survives
//! our own death. Nobody needs to have prepared the VM, and nothing stays behind in it.

#![forbid(unsafe_code)]

mod attach;
mod control;
pub mod discover;
mod error;
pub mod gdb;
mod guard;
mod host;
mod layout;
mod monitor;
pub mod qmp;
mod spec;
mod target;

pub use attach::{Ahead, AttachOptions, Prove, attach};
pub use control::PauseGuard;
pub use discover::{VmInfo, Vmm, list};
pub use error::TargetError;
pub use spec::{GdbAddress, TargetSpec};
pub use target::{Target, TargetKind};
