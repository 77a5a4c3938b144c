//! Processes and threads.

pub(crate) mod ahead;
pub(crate) mod cgroup;
mod container;
mod cred;
mod current;
mod ids;
pub(crate) mod layouts;
mod names;
mod namespaces;
pub(crate) mod places;
mod process;
pub(crate) mod read;
pub(crate) mod saved;
mod sizes;
mod state;
mod threads;
mod times;
mod tree;
mod tty;
pub(crate) mod user;
pub(crate) mod walk;

pub use cgroup::Cgroup;
pub use current::{Current, CurrentReader, PidChain};
pub use process::{Process, ProcessDetails, ProcessFields};
pub use threads::Thread;
pub use tree::{TreeNode, process_tree};
