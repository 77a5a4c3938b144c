//! The profile of one kernel build: its symbols and types.

pub mod kallsyms;
pub mod kernel;
pub mod layout;
mod profile;
pub mod table;
pub mod types;

pub use profile::{Profile, ProfileError, ProfileSource};
pub use table::{Symbol, SymbolTable, SymbolTableBuilder};
pub use types::{Bytes, Field, Kind, Kinds, Member, Type, TypeId, Types, TypesError};
