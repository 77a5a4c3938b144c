//! vsock: sockets between a guest and its host (net/vmw_vsock/af_vsock.c), usually a module with types of its own.

use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use super::address::{self, AF_VSOCK, TCP_CLOSE};
use super::table::Found;
use super::{MAX_SOCKETS, SockReader, Socket};
use crate::layout::{Layout, Place, layout};
use crate::listing::Problem;
use crate::structures::list;
use crate::{Kernel, LinuxError};

/// `VSOCK_HASH_SIZE`; the table of bound sockets has one list more, for those without an address.
const HASH_SIZE: u64 = 251;

layout! {
    struct VsockTypes = "vsock_sock" {
        bound: Place = "bound_table",
        connected: Place = "connected_table",
        local: Place = "local_addr",
        remote: Place = "remote_addr",
    }
}

/// Offsets in `struct sockaddr_vm` (include/uapi/linux/vm_sockets.h), which is ABI.
const SVM_FAMILY: u64 = 0;
const SVM_PORT: u64 = 4;
const SVM_CID: u64 = 8;
const SVM_SIZE: u64 = 16;

/// Where the members of `struct vsock_sock` lie.
pub(super) struct VsockLayout {
    bound: u64,
    connected: u64,
    local: u64,
    remote: u64,
}

impl VsockLayout {
    /// The layout, from the kernel's own types or those of the module.
    ///
    /// Before 5.11 modules have no types in memory. Then the members are taken to follow `struct sock` and the pointer to the transport
    /// as they have since 5.5; [`fill`] believes them only where the addresses' families say so.
    pub(super) fn find(kernel: &Kernel, sock_size: u64) -> Self {
        let types = VsockTypes::resolve(kernel.types(), kernel.release())
            .or_else(|_| VsockTypes::resolve(&kernel.module_types("vsock")?, kernel.release()));
        match types {
            Ok(types) => Self {
                bound: types.bound.offset(),
                connected: types.connected.offset(),
                local: types.local.offset(),
                remote: types.remote.offset(),
            },
            Err(_) => {
                let local = sock_size + 8;
                let (remote, bound) = (local + SVM_SIZE, local + 2 * SVM_SIZE);
                Self {
                    bound,
                    connected: bound + 16,
                    local,
                    remote,
                }
            }
        }
    }
}

pub(super) fn sockets(kernel: &Kernel, reader: &SockReader, found: &mut Found) -> Result<(), LinuxError> {
    let mut tables = [
        kernel.find_symbol(&["vsock_bind_table"]),
        kernel.find_symbol(&["vsock_connected_table"]),
    ];
    if tables.iter().any(Option::is_none) {
        let Ok(module) = kernel.module_address("vsock") else {
            return Ok(());
        };
        for symbol in kernel.symbols_of_module(module, &"vsock".into())?.rows {
            match symbol.name.as_str() {
                "vsock_bind_table" => tables[0] = Some(symbol.address),
                "vsock_connected_table" => tables[1] = Some(symbol.address),
                _ => {}
            }
        }
    }
    let layout = reader.vsock();
    let [bound, connected] = tables;
    let lists = [
        (bound, HASH_SIZE + 1, layout.bound),
        (connected, HASH_SIZE, layout.connected),
    ];
    for (table, count, link) in lists {
        let Some(table) = table else { continue };
        for index in 0..count {
            let head: Gva = table.wrapping_add(index * 16);
            if found.is_full() {
                break;
            }
            let walk = list::walk(kernel.space(), head, MAX_SOCKETS).walk;
            found.add(walk.items.iter().map(|&at| at.wrapping_sub(link)));
            if let Some(warning) = walk.end.warning("vsock sockets") {
                found.warnings.add(warning);
                break;
            }
        }
    }
    Ok(())
}

pub(super) fn fill(reader: &SockReader, state: u8, row: &mut Socket) -> Result<(), ReadError> {
    row.protocol = "vsock".to_owned();
    if state != TCP_CLOSE && state != 0 {
        row.state = address::tcp_state(state);
    }
    let l = reader.vsock();
    let space = reader.kernel.space();
    let (local, remote) = (
        row.address.wrapping_add(l.local),
        row.address.wrapping_add(l.remote),
    );
    for at in [local, remote] {
        if space.read_u16(at.wrapping_add(SVM_FAMILY))? != AF_VSOCK {
            row.problems.push(Problem::new(
                "local_address",
                "no vsock address lies where it should",
            ));
            return Ok(());
        }
    }
    // VMADDR_CID_ANY and VMADDR_PORT_ANY are all ones.
    let cid = |cid: u32| {
        if cid == u32::MAX {
            "*".to_owned()
        } else {
            cid.to_string()
        }
    };
    let port = |port: u32| (port != u32::MAX).then_some(port);
    row.local_address = Some(cid(space.read_u32(local.wrapping_add(SVM_CID))?));
    row.local_port = port(space.read_u32(local.wrapping_add(SVM_PORT))?);
    row.remote_address = Some(cid(space.read_u32(remote.wrapping_add(SVM_CID))?));
    row.remote_port = port(space.read_u32(remote.wrapping_add(SVM_PORT))?);
    Ok(())
}
