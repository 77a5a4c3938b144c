//! One `struct sock` as a row.

use std::cell::OnceCell;
use std::sync::Arc;

use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use super::address::{
    self, AF_INET, AF_INET6, AF_NETLINK, AF_PACKET, AF_VSOCK, IPPROTO_TCP, IPPROTO_UDP, IPPROTO_UDPLITE,
    TCP_CLOSE, TCP_LISTEN, TCP_NEW_SYN_RECV, TCP_TIME_WAIT,
};
use super::namespace::Namespaces;
use super::owner::SocketOwners;
use super::{Socket, netlink, packet, vsock};
use crate::budget::{Budget, NO_ROOM};
use crate::layout::{Buffer, Extent, Field, Place, Spans, layout};
use crate::listing::Problem;
use crate::{Kernel, LinuxError};

layout! {
    /// `struct sock` (include/net/sock.h); its head, `sock_common`, is all that there is of connections being made or dying.
    pub(crate) struct SockLayout = "sock" {
        family: Field<u16> = "__sk_common.skc_family",
        state: Field<u8> = "__sk_common.skc_state",
        daddr: Place = "__sk_common.skc_daddr",
        rcv_saddr: Place = "__sk_common.skc_rcv_saddr",
        dport: Field<u16> = "__sk_common.skc_dport",
        num: Field<u16> = "__sk_common.skc_num",
        v6_daddr: Option<Place> = "__sk_common.skc_v6_daddr",      // CONFIG_IPV6
        v6_rcv_saddr: Option<Place> = "__sk_common.skc_v6_rcv_saddr",
        bound_if: Field<i32> = "__sk_common.skc_bound_dev_if",
        net: Field<Gva> = "__sk_common.skc_net.net",
        cookie: Field<u64> = "__sk_common.skc_cookie",
        listener: Field<Gva> = "__sk_common.skc_listener",
        node: Place = "__sk_common.skc_node",
        kind: Field<u16> = "sk_type",
        protocol: Field<u16> = "sk_protocol",
        uid: Field<u32> = "sk_uid",
        rmem: Field<i32> = "sk_backlog.rmem_alloc",
        wmem: Field<i32> = "sk_wmem_alloc",
        ack_backlog: Field<u32> = "sk_ack_backlog",
        socket: Field<Gva> = "sk_socket",
    }
}

layout! {
    struct SocketInodeNumberLayout = "socket_alloc" {
        socket: Place = "socket",
        ino: Field<u64> = "vfs_inode.i_ino",
    }
}

layout! {
    struct TcpLayout = "tcp_sock" {
        rcv_nxt: Field<u32> = "rcv_nxt",
        copied_seq: Field<u32> = "copied_seq",
        write_seq: Field<u32> = "write_seq",
        snd_una: Field<u32> = "snd_una",
    }
}

layout! {
    struct UdpLayout = "udp_sock" {
        forward_deficit: Option<Field<i32>> = "forward_deficit",
    }
}

layout! {
    struct TimeWaitLayout = "inet_timewait_sock" {
        substate: Field<u8> = "tw_substate",
    }
}

/// Reads sockets of every family.
pub(crate) struct SockReader {
    pub(super) kernel: Kernel,
    pub(super) sock: Arc<SockLayout>,
    common_spans: Spans,
    full_spans: Spans,
    inode: Arc<SocketInodeNumberLayout>,
    tcp: Option<Arc<TcpLayout>>,
    udp: Option<Arc<UdpLayout>>,
    time_wait: Option<Arc<TimeWaitLayout>>,
    packet: Option<Arc<packet::PacketLayout>>,
    netlink: Option<Arc<netlink::NetlinkLayout>>,
    // Looked up at the first vsock socket: it may cost the types of a module.
    vsock: OnceCell<vsock::VsockLayout>,
}

impl SockReader {
    pub(crate) fn new(kernel: &Kernel) -> Result<Self, LinuxError> {
        let sock: Arc<SockLayout> = kernel.layout()?;
        let l = &sock;
        let mut common: Vec<Extent> = vec![
            l.family.extent(),
            l.state.extent(),
            l.daddr.extent(),
            l.rcv_saddr.extent(),
            l.dport.extent(),
            l.num.extent(),
            l.bound_if.extent(),
            l.net.extent(),
            l.cookie.extent(),
            l.listener.extent(),
        ];
        common.extend(
            [&l.v6_daddr, &l.v6_rcv_saddr]
                .into_iter()
                .flatten()
                .map(Place::extent),
        );
        let mut full = common.clone();
        full.extend([
            l.kind.extent(),
            l.protocol.extent(),
            l.uid.extent(),
            l.rmem.extent(),
            l.wmem.extent(),
            l.ack_backlog.extent(),
            l.socket.extent(),
        ]);
        Ok(Self {
            kernel: kernel.clone(),
            common_spans: Spans::covering("sock_common", kernel.release(), common)?,
            full_spans: Spans::covering("sock", kernel.release(), full)?,
            sock,
            inode: kernel.layout()?,
            tcp: kernel.layout().ok(),
            udp: kernel.layout().ok(),
            time_wait: kernel.layout().ok(),
            packet: kernel.layout().ok(),
            netlink: kernel.layout().ok(),
            vsock: OnceCell::new(),
        })
    }

    /// Where the members of vsock sockets lie.
    pub(super) fn vsock(&self) -> &vsock::VsockLayout {
        self.vsock
            .get_or_init(|| vsock::VsockLayout::find(&self.kernel, self.sock.size))
    }

    /// The family of the socket at `sock`.
    pub(crate) fn family(&self, sock: Gva) -> Result<u16, ReadError> {
        self.sock.family.read(self.kernel.space(), sock)
    }

    /// Whether the socket at `sock` is a UNIX socket.
    pub(crate) fn is_unix(&self, sock: Gva) -> Result<bool, ReadError> {
        Ok(self.family(sock)? == address::AF_UNIX)
    }

    /// The inode number of a `struct sock`'s file, `None` if it has none.
    pub(super) fn inode_of(&self, socket: Gva) -> Result<Option<u64>, ReadError> {
        if socket.is_null() {
            return Ok(None);
        }
        self.inode
            .ino
            .read(self.kernel.space(), self.inode.socket.container(socket))
            .map(Some)
    }

    /// The row of the socket at `address`. What cannot be read is a problem of the row.
    pub(crate) fn row(
        &self,
        address: Gva,
        owners: &SocketOwners,
        namespaces: &Namespaces,
        budget: &Budget,
    ) -> Socket {
        let mut row = Socket {
            family: String::new(),
            protocol: String::new(),
            kind: None,
            state: "UNCONNECTED".to_owned(),
            local_address: None,
            local_port: None,
            remote_address: None,
            remote_port: None,
            receive_queue: None,
            send_queue: None,
            uid: None,
            inode: None,
            owners: owners.of(address).to_vec(),
            namespace: None,
            interface: None,
            cookie: None,
            groups: Vec::new(),
            listed: false,
            in_ports: false,
            address,
            problems: Vec::new(),
        };
        if !budget.bytes(size_of_val(row.owners.as_slice())) {
            row.owners = Vec::new();
            row.problems.push(Problem::new("owners", NO_ROOM));
        }
        let l = &self.sock;
        let space = self.kernel.space();
        let mut object = self.common_spans.buffer();
        if let Err(error) = self.common_spans.read(space, address, &mut object) {
            row.problems.push(Problem::read("family", &error));
            return row;
        }
        let family = l.family.of(&object);
        let state = l.state.of(&object);
        row.family = address::family(family);
        row.cookie = Some(l.cookie.of(&object)).filter(|&c| c != 0);
        row.interface = u32::try_from(l.bound_if.of(&object)).ok().filter(|&i| i != 0);
        let net = l.net.of(&object);
        row.namespace = namespaces.inum(net);
        if row.namespace.is_none() {
            row.problems.push(Problem::new(
                "namespace",
                format!("{net} is no network namespace that is known"),
            ));
        }
        let inet = family == AF_INET || family == AF_INET6;
        if inet && (state == TCP_TIME_WAIT || state == TCP_NEW_SYN_RECV) {
            self.addresses(&mut row, family, &object);
            row.local_port = Some(u32::from(l.num.of(&object)));
            row.protocol = "tcp".to_owned();
            self.half_connection(&mut row, state, &object);
            return row;
        }
        let mut object = self.full_spans.buffer();
        if let Err(error) = self.full_spans.read(space, address, &mut object) {
            row.problems.push(Problem::read("protocol", &error));
            return row;
        }
        row.kind = address::kind(l.kind.of(&object));
        row.uid = Some(l.uid.of(&object));
        row.receive_queue = u32::try_from(l.rmem.of(&object)).ok();
        row.send_queue = u32::try_from(l.wmem.of(&object).wrapping_sub(1)).ok();
        match self.inode_of(l.socket.of(&object)) {
            Ok(inode) => row.inode = inode,
            Err(error) => row.problems.push(Problem::read("inode", &error)),
        }
        let protocol = l.protocol.of(&object);
        let detail = match family {
            AF_INET | AF_INET6 => {
                self.addresses(&mut row, family, &object);
                self.inet(&mut row, &object, state, protocol)
            }
            AF_PACKET => packet::fill(self, self.packet.as_deref(), &mut row),
            AF_NETLINK => netlink::fill(self, self.netlink.as_deref(), protocol, &mut row, budget),
            AF_VSOCK => vsock::fill(self, state, &mut row),
            _ => {
                row.protocol = row.family.clone();
                if protocol != 0 {
                    row.local_port = Some(u32::from(protocol));
                }
                if state != TCP_CLOSE {
                    row.state = address::tcp_state(state);
                }
                Ok(())
            }
        };
        if let Err(error) = detail {
            row.problems.push(Problem::read("protocol", &error));
        }
        row
    }

    /// What is left of a connection, or is not one yet.
    fn half_connection(&self, row: &mut Socket, state: u8, object: &Buffer) {
        let space = self.kernel.space();
        row.state = address::tcp_state(state);
        row.receive_queue = Some(0);
        row.send_queue = Some(0);
        if state == TCP_TIME_WAIT {
            // A socket in FIN_WAIT2 whose process is gone is kept like this too.
            if let Some(layout) = &self.time_wait
                && let Ok(substate) = layout.substate.read(space, row.address)
            {
                row.state = address::tcp_state(substate);
            }
        } else {
            let listener = self.sock.listener.of(object);
            match self.sock.uid.read(space, listener) {
                Ok(uid) => row.uid = Some(uid),
                Err(error) => row.problems.push(Problem::read("uid", &error)),
            }
        }
    }

    fn addresses(&self, row: &mut Socket, family: u16, object: &Buffer) {
        let l = &self.sock;
        (row.local_address, row.remote_address) = match (family, &l.v6_rcv_saddr, &l.v6_daddr) {
            (AF_INET6, Some(local), Some(remote)) => {
                (address::ipv6(local.of(object)), address::ipv6(remote.of(object)))
            }
            (AF_INET6, ..) => (None, None),
            _ => (
                address::ipv4(l.rcv_saddr.of(object)),
                address::ipv4(l.daddr.of(object)),
            ),
        };
        row.remote_port = Some(u32::from(l.dport.of(object).swap_bytes()));
    }

    fn inet(&self, row: &mut Socket, object: &Buffer, state: u8, protocol: u16) -> Result<(), ReadError> {
        let l = &self.sock;
        let space = self.kernel.space();
        row.local_port = Some(u32::from(l.num.of(object)));
        if row.kind == Some("raw") {
            row.protocol = "raw".to_owned();
        } else {
            row.protocol = address::inet_protocol(protocol);
        }
        let stream = row.kind == Some("stream") || row.kind == Some("seqpacket");
        row.state = match state {
            TCP_CLOSE if !stream => "UNCONNECTED".to_owned(),
            state => address::tcp_state(state),
        };
        match (protocol, row.kind) {
            (_, Some("raw")) => {}
            (IPPROTO_TCP, _) => {
                if state == TCP_LISTEN {
                    row.receive_queue = Some(l.ack_backlog.of(object));
                    row.send_queue = Some(0);
                } else if let Some(tcp) = &self.tcp {
                    let at = row.address;
                    let waiting =
                        tcp.rcv_nxt
                            .read(space, at)?
                            .wrapping_sub(tcp.copied_seq.read(space, at)?) as i32;
                    row.receive_queue = Some(waiting.max(0) as u32);
                    row.send_queue = Some(
                        tcp.write_seq
                            .read(space, at)?
                            .wrapping_sub(tcp.snd_una.read(space, at)?),
                    );
                }
            }
            (IPPROTO_UDP | IPPROTO_UDPLITE, _) => {
                // Memory given back late is still counted in rmem_alloc (udp_rqueue_get).
                if let Some(deficit) = self.udp.as_ref().and_then(|udp| udp.forward_deficit) {
                    let deficit = deficit.read(space, row.address)?;
                    row.receive_queue = u32::try_from(l.rmem.of(object).wrapping_sub(deficit)).ok();
                }
            }
            _ => {}
        }
        Ok(())
    }
}
