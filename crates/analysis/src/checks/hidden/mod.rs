//! What is left out of a list: the same objects by several ways, held against each other.

mod cross_view;
mod modules;
mod processes;
mod sockets;

pub use modules::MODULES;
pub use processes::PROCESSES;
pub use sockets::SOCKETS;
