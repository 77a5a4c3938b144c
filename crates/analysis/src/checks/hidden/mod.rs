//! What is left out of a list: the same objects by several ways, held against each other.

mod cross_view;
mod files;
mod modules;
mod processes;
mod sockets;
mod task_slabs;
mod threads;

pub(super) use files::FILES;
pub(super) use modules::MODULES;
pub(super) use processes::PROCESSES;
pub(super) use sockets::SOCKETS;
pub(super) use threads::THREADS;
