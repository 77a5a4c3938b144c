//! What the host's kernel says of its processes and sockets, through `/proc` and `sock_diag` only.
//!
//! Every process may belong to somebody else and may be hostile: sizes are capped, and what cannot be
//! read comes back as an error that says why, never as an empty answer.

pub(crate) mod maps;
pub(crate) mod peers;
pub(crate) mod process;
pub(crate) mod sockets;
