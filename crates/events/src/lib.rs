//! Hooks in running guests: backends that deliver events, and the monitor that answers them.
//!
//! [`Monitor`] is what a program uses: it arms hooks, hands out events one by one or calls back, and sees to it that each
//! event gets exactly one verdict. What does the work is a [`Backend`].

#![forbid(unsafe_code)]

pub mod agent;
mod armed;
mod backend;
pub mod debug;
mod error;
pub mod gdb;
pub mod linux;
mod monitor;
mod open;
mod survey;

pub use armed::Armed;
pub use backend::Backend;
pub use error::EventError;
pub use monitor::{HookGuard, Monitor, Occurrence};
pub use open::{OpenOptions, open};
pub use survey::{Survey, survey};
pub use vmsight_hooks::Counts;
