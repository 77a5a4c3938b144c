//! Finds the virtual machines of a host and attaches to them.
