//! What can be wrong with type data.

use thiserror::Error;

/// Why bytes are not usable as BTF.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum TypesError {
    /// Shorter than a BTF header.
    #[error("reading BTF: {len} bytes are too few for the 24-byte header")]
    TooShort {
        /// Length of the input in bytes.
        len: usize,
    },
    /// The magic number 0xeb9f is not there.
    #[error("reading BTF: it starts with {found:#06x}, not with the magic number 0xeb9f")]
    Magic {
        /// The first two bytes, read as little-endian.
        found: u16,
    },
    /// The magic number is byte-swapped.
    #[error("reading BTF: it is big-endian, which vmsight does not read")]
    BigEndian,
    /// A version other than 1.
    #[error("reading BTF: version {found} is not known (only 1 is)")]
    Version {
        /// The version found.
        found: u8,
    },
    /// A section does not lie inside the blob.
    #[error(
        "reading BTF: the {section} section ({start:#x}..{end:#x}) lies outside the blob of {len:#x} bytes"
    )]
    Section {
        /// "header", "type", "string" or "layout".
        section: &'static str,
        /// First byte, from the start of the blob.
        start: u64,
        /// Byte after the last.
        end: u64,
        /// Length of the blob.
        len: usize,
    },
    /// A type's record reaches over the end of the type section.
    #[error("reading BTF: type {id} ({kind}, {vlen} elements) reaches over the end of the type section")]
    Cut {
        /// Id of the type.
        id: u32,
        /// Its kind's number.
        kind: u8,
        /// Its number of elements.
        vlen: u32,
    },
    /// A kind which is not known and which the blob does not describe either.
    #[error("reading BTF: type {id} has the unknown kind {kind}")]
    UnknownKind {
        /// Id of the type.
        id: u32,
        /// Its kind's number.
        kind: u8,
    },
    /// More than 2^32 types or string bytes, base included.
    #[error("reading BTF: there are more types or strings than 32 bits can number")]
    TooMany,
    /// Split BTF was to be laid over BTF that is split itself.
    #[error("reading split BTF: its base is split BTF itself, which kernels do not make")]
    NestedSplit,
    /// A saved index does not belong to the blob or is damaged.
    #[error("reading the saved index of BTF: {why}")]
    Index {
        /// What does not fit.
        why: &'static str,
    },
}
