//! The profile of one kernel build: its symbols and types.
