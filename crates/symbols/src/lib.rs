//! The profile of one kernel build: its symbols and types.

pub mod types;

pub use types::{Field, Kind, Kinds, Member, Type, TypeId, Types, TypesError};
