//! vsock: sockets between a guest and its host (net/vmw_vsock/af_vsock.c), usually a module with types of its own.

use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use super::address::{self, TCP_CLOSE};
use super::table::Found;
use super::{MAX_SOCKETS, SockReader, Socket};
use crate::layout::{Field, Layout, Place, layout};
use crate::structures::list;
use crate::{Kernel, LinuxError};

/// `VSOCK_HASH_SIZE`; the table of bound sockets has one list more, for those without an address.
const HASH_SIZE: u64 = 251;

layout! {
    pub(super) struct VsockLayout = "vsock_sock" {
        bound: Place = "bound_table",
        connected: Place = "connected_table",
        local_cid: Field<u32> = "local_addr.svm_cid",
        local_port: Field<u32> = "local_addr.svm_port",
        remote_cid: Field<u32> = "remote_addr.svm_cid",
        remote_port: Field<u32> = "remote_addr.svm_port",
    }
}

impl VsockLayout {
    /// The layout, from the kernel's own types or those of the module; `None` if there is no vsock.
    pub(super) fn find(kernel: &Kernel) -> Option<Self> {
        Self::resolve(kernel.types(), kernel.release())
            .ok()
            .or_else(|| Self::resolve(&kernel.module_types("vsock").ok()?, kernel.release()).ok())
    }
}

pub(super) fn sockets(kernel: &Kernel, reader: &SockReader, found: &mut Found) -> Result<(), LinuxError> {
    let Some(layout) = &reader.vsock else {
        return Ok(());
    };
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
    let [bound, connected] = tables;
    let lists = [
        (bound, HASH_SIZE + 1, layout.bound),
        (connected, HASH_SIZE, layout.connected),
    ];
    for (table, count, link) in lists {
        let Some(table) = table else { continue };
        for index in 0..count {
            let head: Gva = table.wrapping_add(index * 16);
            let walk = list::walk(kernel.space(), head, MAX_SOCKETS).walk;
            found
                .socks
                .extend(walk.items.iter().map(|&at| link.container(at)));
            if let Some(warning) = walk.end.warning("vsock sockets") {
                found.warnings.push(warning);
                break;
            }
        }
    }
    Ok(())
}

pub(super) fn fill(
    reader: &SockReader,
    layout: Option<&VsockLayout>,
    state: u8,
    row: &mut Socket,
) -> Result<(), ReadError> {
    row.protocol = "vsock".to_owned();
    if state != TCP_CLOSE && state != 0 {
        row.state = address::tcp_state(state);
    }
    let Some(l) = layout else { return Ok(()) };
    let space = reader.kernel.space();
    // VMADDR_CID_ANY and VMADDR_PORT_ANY are all ones.
    let cid = |cid: u32| {
        if cid == u32::MAX {
            "*".to_owned()
        } else {
            cid.to_string()
        }
    };
    let port = |port: u32| (port != u32::MAX).then_some(port);
    row.local_address = Some(cid(l.local_cid.read(space, row.address)?));
    row.local_port = port(l.local_port.read(space, row.address)?);
    row.remote_address = Some(cid(l.remote_cid.read(space, row.address)?));
    row.remote_port = port(l.remote_port.read(space, row.address)?);
    Ok(())
}
