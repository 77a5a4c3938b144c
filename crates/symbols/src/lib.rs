//! The profile of one kernel build: its symbols and types.

#![forbid(unsafe_code)]

pub mod cache;
pub mod export;
pub mod import;
pub mod kallsyms;
pub mod kernel;
pub mod layout;
mod locate;
mod profile;
pub mod table;
pub mod types;

pub use locate::{LocateError, Located, locate, locate_with_file, recall};
pub use profile::{Profile, ProfileError, ProfileSource};
pub use table::{Symbol, SymbolTable, SymbolTableBuilder};
pub use types::{Bytes, Field, Kind, Kinds, Member, Type, TypeId, Types, TypesError};
