//! What goes wrong with a gdb stub.

use std::io;
use std::time::Duration;

/// Why a gdb stub does not help.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GdbError {
    /// It could not be connected to, or the system refused later.
    #[error("gdb stub {address}: {source}{}", hint(source))]
    Connect {
        /// Where.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// A debugger is connected to it already; it was not disturbed.
    #[error(
        "gdb stub {address} of process {pid} is busy: a debugger is connected, and it serves one client at a time"
    )]
    Busy {
        /// Where.
        address: String,
        /// The VM's process.
        pid: u32,
    },
    /// No answer in time.
    #[error(
        "gdb stub {address}: no answer to {doing} within {after:?} (is it a gdb stub, and is no other debugger connected?)"
    )]
    Timeout {
        /// Where.
        address: String,
        /// What was asked.
        doing: String,
        /// How long was waited.
        after: Duration,
    },
    /// It closed the connection: the VM exited.
    #[error("gdb stub {address} closed the connection during {doing}: the VM exited")]
    Closed {
        /// Where.
        address: String,
        /// What was asked.
        doing: String,
    },
    /// It is no longer the stub of the VM that was attached to.
    #[error("gdb stub {address} is not that of process {pid} any more: nothing was asked of it")]
    AnotherVm {
        /// Where.
        address: String,
        /// The VM's process.
        pid: u32,
    },
    /// It answered something that cannot be.
    #[error("gdb stub {address}: {reason}")]
    Protocol {
        /// Where.
        address: String,
        /// What is wrong.
        reason: String,
    },
    /// It refused what it was told.
    #[error("gdb stub {address} refuses {what} ({answer})")]
    Refused {
        /// Where.
        address: String,
        /// What it was told.
        what: String,
        /// What it answered: `E22`, or nothing where it does not know the packet.
        answer: String,
    },
    /// It cannot do what is needed.
    #[error(
        "gdb stub {address} cannot {what}: it is not QEMU's, or a QEMU that is too old (4.2 or later is needed)"
    )]
    Unsupported {
        /// Where.
        address: String,
        /// What was needed.
        what: &'static str,
    },
}

impl GdbError {
    /// Whether the VM is gone.
    #[must_use]
    pub fn is_exit(&self) -> bool {
        matches!(self, Self::Closed { .. })
    }
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "; run as root or as the user who owns the VM",
        io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => {
            "; nobody listens there: QEMU opens a stub with -gdb, or with gdbserver in its monitor"
        }
        _ => "",
    }
}
