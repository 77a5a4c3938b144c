//! Connections that netfilter tracks: who talks to whom through this machine or from it, rewritten addresses included
//! (net/netfilter/nf_conntrack_core.c).
//!
//! The table is the module nf_conntrack's, and so are the types: what that module is built from tells them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use rustc_hash::{FxHashMap, FxHashSet};
use serde::Serialize;
use vmsight_arch::Gva;
use vmsight_linux::listing::address;
use vmsight_linux::structures::hlist;
use vmsight_linux::{Kernel, LinuxError, Listing, Problem};
use vmsight_memory::ReadError;

use super::member::{Member, Structure};

const MODULE: &str = "nf_conntrack";
/// Chains of the table: it has 2^18 by default on large machines.
const MAX_CHAINS: u64 = 1 << 24;
/// Connections of one listing.
const MAX_ROWS: usize = 1 << 20;
/// Nodes of all chains: each connection has one for each direction.
const MAX_NODES: usize = 2 * MAX_ROWS;
/// Chains that are read at once.
const AT_ONCE: u64 = 512;

const AF_INET: u64 = 2;
const AF_INET6: u64 = 10;
const TCP: u64 = 6;
/// Protocols whose tuples have ports: TCP, UDP, DCCP, SCTP, UDP-Lite.
const WITH_PORTS: [u64; 5] = [6, 17, 33, 132, 136];

/// `enum ip_conntrack_status` (include/uapi/linux/netfilter/nf_conntrack_common.h): those bits that say something to people.
const STATUS: [(u32, &str); 8] = [
    (0, "expected"),
    (1, "seen-reply"),
    (2, "assured"),
    (4, "source-nat"),
    (5, "destination-nat"),
    (9, "dying"),
    (10, "fixed-timeout"),
    (14, "offloaded"),
];
/// `enum tcp_conntrack`.
const TCP_STATES: [&str; 10] = [
    "NONE",
    "SYN_SENT",
    "SYN_RECV",
    "ESTABLISHED",
    "FIN_WAIT",
    "CLOSE_WAIT",
    "LAST_ACK",
    "TIME_WAIT",
    "CLOSE",
    "SYN_SENT2",
];

/// One connection.
#[derive(Clone, Debug, Serialize)]
pub struct Connection {
    /// Inode number of its network namespace.
    pub namespace: Option<u64>,
    /// `tcp`, `udp`, `icmp`, … , or the protocol's number.
    pub protocol: String,
    /// Of TCP.
    pub state: Option<&'static str>,
    /// Where its first packet came from, with the port where there is one.
    pub source: String,
    /// Where that was sent to.
    pub destination: String,
    /// Where the answers come from: another than `destination` where that was rewritten.
    pub reply_source: String,
    /// Where the answers go: another than `source` where that was rewritten.
    pub reply_destination: String,
    /// `seen-reply`, `assured`, `source-nat`, `destination-nat`, `expected`, … .
    pub status: Vec<&'static str>,
    /// The mark that rules have given it.
    pub mark: Option<u64>,
    /// The `struct nf_conn`.
    #[serde(serialize_with = "address::gva")]
    pub address: Gva,
    /// What could not be read.
    pub problems: Vec<Problem>,
}

/// The connections in netfilter's table, of all network namespaces.
///
/// # Errors
/// If the guest tracks none (the module is not loaded), keeps no types of that module (before Linux 5.11), or a member is missing.
pub fn connections(kernel: &Kernel) -> Result<Listing<Connection>, LinuxError> {
    let reader = Reader::new(kernel)?;
    let mut out = Listing::default();
    reader.table(&mut out)?;
    Ok(out)
}

struct Reader<'k> {
    kernel: &'k Kernel,
    /// The table and how many chains it has.
    table: Gva,
    chains: u64,
    /// Bytes of a `struct nf_conntrack_tuple_hash`, of which a connection has two: one for each direction.
    side: u64,
    sides: Member,
    tuple: Tuple,
    status: Member,
    net: Option<Member>,
    inode: Option<Member>,
    mark: Option<Member>,
    tcp: Option<Member>,
}

/// Members of a tuple within its hash node.
struct Tuple {
    family: Member,
    source: Member,
    source_port: Member,
    destination: Member,
    destination_port: Member,
    protocol: Member,
    direction: Member,
}

/// One direction of a connection.
struct Side {
    source: String,
    destination: String,
    protocol: u64,
    direction: u64,
}

impl<'k> Reader<'k> {
    fn new(kernel: &'k Kernel) -> Result<Self, LinuxError> {
        let module = kernel.module_address(MODULE)?;
        let symbols = kernel.symbols_of_module(module, &MODULE.into())?;
        let known: FxHashMap<&str, Gva> = symbols
            .rows
            .iter()
            .map(|symbol| (symbol.name.as_str(), symbol.address))
            .collect();
        let read = |name: &str| {
            let at = known.get(name).ok_or_else(|| LinuxError::NoSymbol {
                name: name.to_owned(),
                release: kernel.release().to_owned(),
            })?;
            kernel.space().read_u64(*at).map_err(|source| LinuxError::Read {
                what: name.to_owned(),
                at: *at,
                source,
            })
        };
        let types = kernel.module_types(MODULE)?;
        let release = kernel.release();
        let connection = Structure::within(&types, release, "nf_conn")?;
        let hash = Structure::within(&types, release, "nf_conntrack_tuple_hash")?;
        let tuple = |path: &str| hash.member(&format!("tuple.{path}"));
        Ok(Self {
            table: Gva(read("nf_conntrack_hash")?),
            // An `unsigned int`.
            chains: read("nf_conntrack_htable_size")? & u64::from(u32::MAX),
            side: hash.size().max(1),
            sides: connection.member("tuplehash")?,
            tuple: Tuple {
                family: tuple("src.l3num")?,
                source: tuple("src.u3")?,
                source_port: tuple("src.u")?,
                destination: tuple("dst.u3")?,
                destination_port: tuple("dst.u")?,
                protocol: tuple("dst.protonum")?,
                direction: tuple("dst.dir")?,
            },
            status: connection.member("status")?,
            net: connection.find("ct_net.net"),
            inode: Structure::of(kernel, "net")?.find("ns.inum"),
            mark: connection.find("mark"),
            tcp: connection.find("proto.tcp.state"),
            kernel,
        })
    }

    fn table(&self, out: &mut Listing<Connection>) -> Result<(), LinuxError> {
        if self.chains > MAX_CHAINS {
            return Err(LinuxError::Implausible {
                what: "nf_conntrack_htable_size".to_owned(),
                reason: format!("{} chains", self.chains),
            });
        }
        let space = self.kernel.space();
        let mut seen = FxHashSet::default();
        let mut bytes = vec![0u8; AT_ONCE as usize * 8];
        let mut first = 0;
        let mut left = MAX_NODES;
        while first < self.chains {
            let many = AT_ONCE.min(self.chains - first);
            let heads = self.table.wrapping_add(first * 8);
            let bytes = bytes.get_mut(..many as usize * 8).unwrap_or(&mut []);
            space.read(heads, bytes).map_err(|source| LinuxError::Read {
                what: "the table of connections".to_owned(),
                at: heads,
                source,
            })?;
            for (nth, head) in (0u64..).zip(bytes.chunks_exact(8)) {
                // The end of a chain is odd.
                if head.first().is_none_or(|byte| byte & 1 == 1) {
                    continue;
                }
                let walk = hlist::walk_nulls(space, heads.wrapping_add(nth * 8), left);
                left = left.saturating_sub(walk.items.len());
                let end = walk.end.warning("a chain of connections");
                end.into_iter().for_each(|w| out.warn(w));
                for node in walk.items {
                    if out.rows.len() >= MAX_ROWS {
                        out.warn(format!("connections: cut after {MAX_ROWS}"));
                        return Ok(());
                    }
                    match self.connection(node, &mut seen) {
                        Ok(Some(row)) => out.rows.push(row),
                        Ok(None) => {}
                        Err(error) => out.warn(format!("the connection at {node}: {error}")),
                    }
                }
                if left == 0 {
                    out.warn(format!(
                        "connections: cut after {MAX_NODES} entries of their table"
                    ));
                    return Ok(());
                }
            }
            first += many;
        }
        Ok(())
    }

    /// The connection that a hash node belongs to; `None` for one that was seen.
    fn connection(&self, node: Gva, seen: &mut FxHashSet<Gva>) -> Result<Option<Connection>, ReadError> {
        let space = self.kernel.space();
        let own = self.side(node)?;
        // The node of the answers comes behind that of the first direction.
        let original = node.wrapping_sub((own.direction & 1) * self.side);
        let at = self.sides.container(original);
        if !seen.insert(at) {
            return Ok(None);
        }
        let (first, reply) = (self.side(original)?, self.side(original.wrapping_add(self.side))?);
        let status = self.status.number(space, at)?;
        let namespace = match (&self.net, &self.inode) {
            (Some(net), Some(inode)) => Some(inode.number(space, net.pointer(space, at)?)?),
            _ => None,
        };
        let state = match self.tcp.filter(|_| first.protocol == TCP) {
            Some(state) => state.number(space, at)? & 0xff,
            None => u64::MAX,
        };
        Ok(Some(Connection {
            namespace,
            protocol: protocol(first.protocol),
            state: usize::try_from(state)
                .ok()
                .and_then(|nth| TCP_STATES.get(nth))
                .copied(),
            source: first.source,
            destination: first.destination,
            reply_source: reply.source,
            reply_destination: reply.destination,
            status: STATUS
                .iter()
                .filter(|(bit, _)| status >> bit & 1 == 1)
                .map(|(_, name)| *name)
                .collect(),
            mark: match self.mark {
                Some(mark) => Some(mark.number(space, at)?),
                None => None,
            },
            address: at,
            problems: Vec::new(),
        }))
    }

    fn side(&self, node: Gva) -> Result<Side, ReadError> {
        let (space, tuple) = (self.kernel.space(), &self.tuple);
        let family = tuple.family.number(space, node)?;
        let protocol = tuple.protocol.number(space, node)?;
        let end = |ip: Member, port: Member| -> Result<String, ReadError> {
            let mut bytes = [0u8; 16];
            space.read(ip.at(node), &mut bytes)?;
            let ip = match (family, bytes.first_chunk::<4>()) {
                (AF_INET, Some(four)) => IpAddr::V4(Ipv4Addr::from(*four)),
                (AF_INET6, _) => IpAddr::V6(Ipv6Addr::from(bytes)),
                _ => return Ok(format!("family {family}")),
            };
            let mut port_bytes = [0u8; 2];
            space.read(port.at(node), &mut port_bytes)?;
            Ok(match WITH_PORTS.contains(&protocol) {
                true => SocketAddr::new(ip, u16::from_be_bytes(port_bytes)).to_string(),
                false => ip.to_string(),
            })
        };
        Ok(Side {
            source: end(tuple.source, tuple.source_port)?,
            destination: end(tuple.destination, tuple.destination_port)?,
            protocol,
            direction: tuple.direction.number(space, node)?,
        })
    }
}

fn protocol(number: u64) -> String {
    match number {
        1 => "icmp",
        6 => "tcp",
        17 => "udp",
        33 => "dccp",
        47 => "gre",
        58 => "icmpv6",
        132 => "sctp",
        136 => "udplite",
        other => return other.to_string(),
    }
    .to_owned()
}
