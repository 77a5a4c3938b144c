//! Guest-physical memory as a source of bytes, and the address spaces over it.
//!
//! [`GuestMemory`] is the one type the rest of vmsight reads from. Where its bytes come from (shared memory of a VM
//! that runs, the memory of its process, a dump) is settled when it is built. Memory that lives is never seen as
//! `&[u8]`, only copied out; a dump's can be looked at in place.

mod batch;
mod builder;
mod copy;
pub mod dump;
mod error;
mod fault;
mod guest;
mod mapping;
mod pagemap;
mod prefetch;
mod process;
mod region;
mod scan;
mod slot;
mod source;
mod space;

pub use batch::ReadOp;
pub use builder::Builder;
pub use error::{BuildError, MemoryError};
pub use guest::GuestMemory;
pub use mapping::{Mapping, MappingKind};
pub use process::ProcessMemory;
pub use region::Region;
pub use scan::{Chunk, Chunks, Scan, ScanOptions};
pub use source::Source;
pub use space::{AddressSpace, GvaReadOp, ReadCause, ReadError};

/// What is shared between threads stays so.
const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<GuestMemory>();
    shared::<AddressSpace>();
    shared::<Mapping>();
    shared::<ProcessMemory>();
    shared::<dump::Dump>();
    shared::<MemoryError>();
    shared::<BuildError>();
    shared::<ReadError>();
};
