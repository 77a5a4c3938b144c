//! Packet sockets (`AF_PACKET`): who listens on the wire (net/packet/af_packet.c).

use std::sync::Arc;

use vmsight_memory::ReadError;

use super::namespace::Namespace;
use super::table::{self, Found};
use super::{SockReader, Socket, address};
use crate::layout::{Field, Place, layout};
use crate::{Kernel, LinuxError};

layout! {
    struct NetPacketLayout = "net" {
        sklist: Option<Place> = "packet.sklist",
    }
}

layout! {
    pub(super) struct PacketLayout = "packet_sock" {
        num: Field<u16> = "num",
        ifindex: Field<i32> = "ifindex",
    }
}

pub(super) fn sockets(
    kernel: &Kernel,
    reader: &SockReader,
    namespaces: &[Namespace],
    found: &mut Found,
) -> Result<(), LinuxError> {
    let layout: Arc<NetPacketLayout> = kernel.layout()?;
    if let Some(list) = &layout.sklist {
        for namespace in namespaces {
            table::chain(
                kernel,
                "packet sockets",
                list.at(namespace.address),
                reader.sock.node.offset(),
                found,
            );
        }
    }
    Ok(())
}

pub(super) fn fill(
    reader: &SockReader,
    layout: Option<&PacketLayout>,
    row: &mut Socket,
) -> Result<(), ReadError> {
    row.protocol = "packet".to_owned();
    let Some(layout) = layout else { return Ok(()) };
    let space = reader.kernel.space();
    row.protocol = address::ether_protocol(layout.num.read(space, row.address)?.swap_bytes());
    row.interface = u32::try_from(layout.ifindex.read(space, row.address)?)
        .ok()
        .filter(|&i| i != 0);
    Ok(())
}
