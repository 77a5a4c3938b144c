//! Whether a stub of this host serves a debugger already, found out without connecting.

use super::GdbError;
use crate::host::peers;
use crate::host::process::Process;
use crate::host::sockets;
use crate::spec::GdbAddress;

/// An error where somebody is connected to the stub that process `pid` has at `address`.
pub(crate) fn refuse_if_busy(address: &GdbAddress, pid: u32) -> Result<(), GdbError> {
    let process = Process { pid };
    let busy = match address {
        GdbAddress::Unix(path) => {
            // The socket may be bound under another name than the one we came by; its listener tells.
            let bound =
                sockets::bound_name(process, path).unwrap_or_else(|| path.to_string_lossy().into_owned());
            peers::has_clients(process, &bound).unwrap_or(false)
        }
        GdbAddress::Tcp { port, .. } => sockets::has_tcp_client(process, *port).unwrap_or(false),
    };
    if busy {
        Err(GdbError::Busy {
            address: address.to_string(),
            pid,
        })
    } else {
        Ok(())
    }
}
