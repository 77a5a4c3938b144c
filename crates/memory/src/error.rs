//! What can go wrong when guest memory is put together or accessed.

use crate::Region;
use std::io;
use thiserror::Error;
use vmsight_arch::Gpa;

/// Why a piece of guest-physical memory could not be read or written.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum MemoryError {
    /// No memory of the machine lies there: a hole, a device, or past the end.
    #[error("no memory at {gpa}{}", nearest.map(|r| format!(" (the nearest is {r})")).unwrap_or_default())]
    Unbacked {
        /// The first byte that has no memory behind it.
        gpa: Gpa,
        /// The region closest to it.
        nearest: Option<Region>,
    },
    /// The machine had memory there, but the dump lacks it (a truncated file, a segment left out).
    #[error("{gpa} is missing from the dump ({missing})")]
    Missing {
        /// The first byte that is missing.
        gpa: Gpa,
        /// The whole range that is missing.
        missing: Region,
    },
    /// The file behind the memory was cut or could no longer be read while it was in use.
    #[error("the file behind {gpa} was truncated or became unreadable while in use")]
    Lost {
        /// Start of the access that failed.
        gpa: Gpa,
    },
    /// The process of the VM ended.
    #[error("process {pid} of the VM has exited")]
    Exited {
        /// Its pid.
        pid: u32,
    },
    /// The kernel does not let us touch the process of the VM.
    #[error(
        "no permission to access the memory of process {pid}: run as root, or as the VM's user with CAP_SYS_PTRACE \
         (see also /proc/sys/kernel/yama/ptrace_scope)"
    )]
    NoPermission {
        /// Its pid.
        pid: u32,
    },
    /// The process of the VM has nothing mapped where the guest memory should be: the map of its memory is wrong or
    /// has changed (memory unplugged).
    #[error("{gpa}: process {pid} has no memory at its address {hva:#x}")]
    NotMapped {
        /// The guest-physical address.
        gpa: Gpa,
        /// The pid of the VM.
        pid: u32,
        /// The address in that process.
        hva: u64,
    },
    /// Write to memory that was opened read-only, or to a dump.
    #[error("{gpa}: the memory is read-only here")]
    ReadOnly {
        /// The first byte that may not be written.
        gpa: Gpa,
    },
    /// The system refused for another reason.
    #[error("{gpa}: {}", io::Error::from_raw_os_error(*errno))]
    System {
        /// Start of the access that failed.
        gpa: Gpa,
        /// The system's error number.
        errno: i32,
    },
    /// A source of its own kind ([`crate::Source`]) failed.
    #[error("{gpa}: {reason}")]
    Source {
        /// Start of the access that failed.
        gpa: Gpa,
        /// What the source says.
        reason: Box<str>,
    },
}

impl MemoryError {
    /// Whether nothing can be expected from this memory any more: the VM exited or we are not allowed in.
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Exited { .. } | Self::NoPermission { .. })
    }
}

/// Why a memory could not be put together from its parts.
#[derive(Debug, Error)]
pub enum BuildError {
    /// Two parts claim the same guest-physical address.
    #[error("guest memory {first} and {second} overlap")]
    Overlap {
        /// The part that starts first.
        first: Region,
        /// The part that runs into it.
        second: Region,
    },
    /// A part is empty or passes the end of the address space.
    #[error("impossible guest memory: {len:#x} bytes at {start}")]
    BadRange {
        /// Its start.
        start: Gpa,
        /// Its length in bytes.
        len: u64,
    },
    /// A part claims more than its mapping or source has.
    #[error("guest memory {region} wants {need:#x} bytes, its source has {have:#x}")]
    TooShort {
        /// The guest-physical range.
        region: Region,
        /// The bytes needed, from the start of the source.
        need: u64,
        /// The bytes that are there.
        have: u64,
    },
    /// The process of the VM could not be opened.
    #[error("cannot open process {pid}: {source}")]
    Process {
        /// Its pid.
        pid: u32,
        /// The system's reason.
        source: io::Error,
    },
}
