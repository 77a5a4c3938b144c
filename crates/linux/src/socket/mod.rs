//! Sockets of every network namespace: from the tables of their protocols, and from the file descriptors that hold them.
//!
//! The two sources are joined by the address of `struct sock`. A socket that only a descriptor knows (not yet bound, closed, of a
//! family without tables) is listed too and says so.

mod address;
mod decode;
mod inet;
pub(crate) mod namespace;
mod netlink;
mod owner;
mod packet;
mod ports;
mod table;
mod unix;
mod vsock;

use rustc_hash::FxHashSet;
use serde::Serialize;
use vmsight_arch::Gva;

use crate::budget::{Budget, ROWS};
use crate::file::fd::FdReader;
use crate::file::holder::{self, Owner};
use crate::listing::{Listing, Problem, address as serial, settled};
use crate::{Kernel, LinuxError};

pub(crate) use decode::SockReader;
pub(crate) use owner::SocketOwners;
pub(crate) use unix::UnixReader;
pub use unix::UnixSocket;

/// More sockets than are listed; a table that claims more has been tampered with.
pub(crate) const MAX_SOCKETS: usize = 2 * ROWS;

/// A socket that is not of the UNIX family (see [`UnixSocket`]).
#[derive(Clone, Debug, Serialize)]
pub struct Socket {
    /// `ipv4`, `ipv6`, `packet`, `netlink`, `vsock`, … ; `family-N` for one that has no name here.
    pub family: String,
    /// `tcp`, `udp`, `udplite`, `icmp`, `raw`, … ; for netlink the family (`route`), for packet sockets the protocol they receive.
    pub protocol: String,
    /// `stream`, `dgram`, `raw`, `seqpacket`, … ; `None` for what is left of a connection (time wait) or not yet one.
    pub kind: Option<&'static str>,
    /// State of a connection: `ESTABLISHED`, `LISTEN`, … ; `UNCONNECTED` where the protocol has none.
    pub state: String,
    /// Address it is bound to; `*` of a family is written out (`0.0.0.0`, `::`). Context id for vsock.
    pub local_address: Option<String>,
    /// Port it is bound to; for raw sockets the protocol number, for netlink the port id.
    pub local_port: Option<u32>,
    /// Address of the other end; unspecified if not connected.
    pub remote_address: Option<String>,
    /// Port of the other end.
    pub remote_port: Option<u32>,
    /// Bytes received and not yet read; for a listening socket the connections not yet accepted.
    pub receive_queue: Option<u32>,
    /// Bytes not yet acknowledged or not yet sent.
    pub send_queue: Option<u32>,
    /// Owner's uid; `None` if the kernel keeps none.
    pub uid: Option<u32>,
    /// Inode number, as in `socket:[N]`; `None` if no file belongs to it (yet or any more).
    pub inode: Option<u64>,
    /// Who has it open.
    pub owners: Vec<Owner>,
    /// Inode number of its network namespace.
    pub namespace: Option<u32>,
    /// Index of the network interface that it is bound to.
    pub interface: Option<u32>,
    /// Cookie of `SO_COOKIE` and `sock_diag`, once one was asked for.
    pub cookie: Option<u64>,
    /// Netlink multicast groups joined, by number.
    pub groups: Vec<u32>,
    /// Whether it was found in its protocol's tables: what the guest's own tools list. False for those only a descriptor leads to.
    pub listed: bool,
    /// Whether the table of ports in use has it, which no tool lists; false where [`SocketFilter::ports`] did not ask.
    pub in_ports: bool,
    /// The `struct sock` (or what stands in for it while a connection is made or dies).
    #[serde(serialize_with = "serial::gva")]
    pub address: Gva,
    /// What could not be read.
    pub problems: Vec<Problem>,
}

impl Socket {
    /// `tcp 127.0.0.1:80->127.0.0.1:4000 ESTABLISHED`: as other tools name a socket.
    pub fn endpoint(&self) -> String {
        let end = |address: &Option<String>, port: &Option<u32>| -> String {
            let address = match address {
                Some(a) if a.contains(':') => format!("[{a}]"),
                Some(a) => a.clone(),
                None => String::new(),
            };
            match port {
                Some(port) => format!("{address}:{port}"),
                None => address,
            }
        };
        let mut out = format!("{} {}", self.protocol, end(&self.local_address, &self.local_port));
        if self.remote_port.is_some_and(|p| p != 0) {
            out.push_str("->");
            out.push_str(&end(&self.remote_address, &self.remote_port));
        }
        if self.state != "UNCONNECTED" {
            out.push(' ');
            out.push_str(&self.state);
        }
        out
    }
}

/// Which sockets are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketFilter {
    /// TCP, UDP, UDP-Lite, raw and all else over IPv4 and IPv6.
    pub inet: bool,
    /// Packet sockets (`AF_PACKET`).
    pub packet: bool,
    /// Netlink.
    pub netlink: bool,
    /// vsock (`AF_VSOCK`).
    pub vsock: bool,
    /// Every other family, found by file descriptors.
    pub other: bool,
    /// TCP sockets that only the table of ports in use leads to, too.
    pub ports: bool,
}

impl SocketFilter {
    /// All of them.
    pub const ALL: Self = Self {
        inet: true,
        packet: true,
        netlink: true,
        vsock: true,
        other: true,
        ports: false,
    };
    /// The internet families alone.
    pub const INET: Self = Self {
        inet: true,
        packet: false,
        netlink: false,
        vsock: false,
        other: false,
        ports: false,
    };

    fn wants(&self, family: u16) -> bool {
        match family {
            address::AF_INET | address::AF_INET6 => self.inet,
            address::AF_PACKET => self.packet,
            address::AF_NETLINK => self.netlink,
            address::AF_VSOCK => self.vsock,
            address::AF_UNIX => false,
            _ => self.other,
        }
    }
}

impl Kernel {
    /// The sockets of all network namespaces, UNIX sockets left out (see [`Kernel::unix_sockets`]).
    ///
    /// # Errors
    /// If the network namespaces or the processes cannot be listed.
    pub fn sockets(&self, filter: SocketFilter) -> Result<Listing<Socket>, LinuxError> {
        settled(
            self.memory().is_live(),
            |row: &Socket| row.problems.len(),
            || self.list_sockets(filter),
        )
    }

    /// The rows of sockets whose `struct sock`s were found in some other way: in the memory that sockets are made in. They need not live
    /// any more; none is `listed`, and of none it is said who has it open.
    ///
    /// # Errors
    /// If the kernel's types lack what is needed.
    pub fn sockets_at(&self, addresses: &[Gva]) -> Result<Listing<Socket>, LinuxError> {
        let reader = SockReader::new(self)?;
        let (owners, namespaces) = (SocketOwners::default(), namespace::all(self, &[])?);
        let budget = Budget::default();
        let mut listing = Listing::default();
        for &at in addresses {
            if !budget.row(0) {
                break;
            }
            listing.rows.push(reader.row(at, &owners, &namespaces, &budget));
        }
        budget
            .warning("sockets")
            .into_iter()
            .for_each(|warning| listing.warn(warning));
        Ok(listing)
    }

    fn list_sockets(&self, filter: SocketFilter) -> Result<Listing<Socket>, LinuxError> {
        let mut listing = Listing::default();
        let reader = SockReader::new(self)?;
        let (holders, warnings) = holder::all(self)?;
        let owners = SocketOwners::read(self, &holders, &mut FdReader::new(self, holders.len())?)?;
        let namespaces = namespace::all(self, &holders)?;
        for warning in warnings
            .iter()
            .chain(owners.warnings.as_slice())
            .chain(namespaces.warnings.as_slice())
        {
            listing.warn(warning.clone());
        }
        let mut found = table::Found::default();
        // One protocol's tables being unreadable is no reason to keep the others' sockets from the reader.
        let mut tables =
            |wanted: bool, what: &str, read: &dyn Fn(&mut table::Found) -> Result<(), LinuxError>| {
                if wanted && let Err(error) = read(&mut found) {
                    listing.warn(format!("{what}: {error}"));
                }
            };
        let nets = &namespaces.rows;
        tables(filter.inet, "TCP sockets", &|found| {
            inet::tcp(self, &reader, nets, found)
        });
        tables(filter.inet, "UDP sockets", &|found| {
            inet::udp(self, &reader, nets, found)
        });
        tables(filter.inet, "raw sockets", &|found| {
            inet::raw(self, &reader, found)
        });
        tables(filter.inet, "ping sockets", &|found| {
            inet::ping(self, &reader, found)
        });
        tables(filter.packet, "packet sockets", &|found| {
            packet::sockets(self, &reader, nets, found)
        });
        tables(filter.netlink, "netlink sockets", &|found| {
            netlink::sockets(self, found)
        });
        tables(filter.vsock, "vsock sockets", &|found| {
            vsock::sockets(self, &reader, found)
        });
        let mut with_port = table::Found::default();
        if filter.ports
            && let Err(error) = ports::tcp(self, &mut with_port)
        {
            listing.warn(format!("ports in use: {error}"));
        }
        let in_ports: FxHashSet<Gva> = with_port.socks.iter().copied().collect();
        let budget = Budget::default();
        let mut seen: FxHashSet<Gva> = FxHashSet::default();
        for &sock in &found.socks {
            if seen.insert(sock) {
                if !budget.row(0) {
                    break;
                }
                let mut row = reader.row(sock, &owners, &namespaces, &budget);
                row.listed = true;
                row.in_ports = in_ports.contains(&sock);
                listing.rows.push(row);
            }
        }
        for warning in found
            .warnings
            .into_vec()
            .into_iter()
            .chain(with_port.warnings.into_vec())
        {
            listing.warn(warning);
        }
        let others = owners.socks().chain(with_port.socks.iter().copied());
        let mut unlisted: Vec<Gva> = others.filter(|sock| !seen.contains(sock)).collect();
        unlisted.sort_unstable();
        unlisted.dedup();
        for sock in unlisted {
            match reader.family(sock) {
                Ok(family) if filter.wants(family) => {
                    if !budget.row(0) {
                        break;
                    }
                    let mut row = reader.row(sock, &owners, &namespaces, &budget);
                    row.in_ports = in_ports.contains(&sock);
                    listing.rows.push(row);
                }
                Ok(_) => {}
                Err(error) => listing.warn(format!("the socket at {sock} cannot be read: {error}")),
            }
        }
        budget
            .warning("sockets")
            .into_iter()
            .for_each(|warning| listing.warn(warning));
        Ok(listing)
    }
}
