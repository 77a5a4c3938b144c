//! Whether a stub of this host serves a debugger already, found out without connecting.

use std::time::{Duration, Instant};

use super::GdbError;
use crate::host::peers::{self, Occupied};
use crate::host::process::Process;
use crate::host::sockets;
use crate::spec::GdbAddress;

/// How long a connection may look alive that is not: a process that this one is starting has a copy of all that it has
/// closed meanwhile, until it runs its program.
const COPIED: Duration = Duration::from_millis(200);

/// An error where somebody is connected to the stub that process `pid` has at `address`. A connection whose other
/// end is gone is waited for until `deadline`: the stub serves nobody before it has noticed.
pub(crate) fn refuse_if_busy(address: &GdbAddress, pid: u32, deadline: Instant) -> Result<(), GdbError> {
    let process = Process { pid };
    let copied = deadline.min(Instant::now() + COPIED);
    loop {
        let occupied = match address {
            GdbAddress::Unix(path) => {
                // The socket may be bound under another name than the one we came by; its listener tells.
                let bound = sockets::bound_name(process, path);
                let bound = bound.unwrap_or_else(|| path.to_string_lossy().into_owned());
                peers::occupied(process, &bound).unwrap_or(Occupied::Free)
            }
            // A TCP connection whose client is gone is in another state (CLOSE_WAIT).
            GdbAddress::Tcp { port, .. } => match sockets::has_tcp_client(process, *port) {
                Ok(true) => Occupied::Busy,
                _ => Occupied::Free,
            },
        };
        match occupied {
            Occupied::Free => return Ok(()),
            Occupied::Stale if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            Occupied::Busy if Instant::now() < copied => std::thread::sleep(Duration::from_millis(5)),
            _ => {
                return Err(GdbError::Busy {
                    address: address.to_string(),
                    pid,
                });
            }
        }
    }
}
