//! What can go wrong when a kernel is attached to or a listing is made. A broken object is not here: it costs one row.

use thiserror::Error;
use vmsight_arch::Gva;
use vmsight_memory::ReadError;

/// Why a listing, as a whole, could not be made.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LinuxError {
    /// The kernel has no symbol of this name.
    #[error("kernel {release} has no symbol {name}")]
    NoSymbol {
        /// The symbol asked for; alternatives joined by " or ".
        name: String,
        /// The kernel's release.
        release: String,
    },
    /// The kernel's types have no struct or union of this name.
    #[error("the types of kernel {release} have no struct {name}")]
    NoType {
        /// The type asked for; alternatives joined by " or ".
        name: String,
        /// The kernel's release.
        release: String,
    },
    /// A struct lacks a member that the listing cannot do without.
    #[error("struct {structure} of kernel {release} has no member {member}")]
    NoMember {
        /// The struct.
        structure: String,
        /// The member; alternatives joined by " or ".
        member: String,
        /// The kernel's release.
        release: String,
    },
    /// A struct's layout in the type data cannot be true.
    #[error("struct {structure} of kernel {release} has an impossible layout: {reason}")]
    BadLayout {
        /// The struct.
        structure: String,
        /// The kernel's release.
        release: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Something that the listing starts from could not be read.
    #[error("cannot read {what} at {at}")]
    Read {
        /// What lies there.
        what: String,
        /// Where.
        at: Gva,
        /// Why.
        #[source]
        source: ReadError,
    },
    /// What was asked for does not exist in the guest.
    #[error("{0}")]
    NotFound(String),
    /// What was read contradicts itself.
    #[error("{what}: {reason}")]
    Implausible {
        /// What was read.
        what: String,
        /// Why it cannot be true.
        reason: String,
    },
}

impl LinuxError {
    /// For `map_err` on the reads that a listing starts from.
    pub(crate) fn read(what: impl Into<String>, at: Gva) -> impl FnOnce(ReadError) -> LinuxError {
        let what = what.into();
        move |source| LinuxError::Read { what, at, source }
    }
}
