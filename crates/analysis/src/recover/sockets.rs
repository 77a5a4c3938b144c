//! Sockets of the internet in the memory that they are made in: those that were closed, and those that live, whatever leads there.
//!
//! The kernel makes sockets of each protocol in slabs of their own (`struct proto`, include/net/sock.h). Given back, a socket keeps
//! almost all of what it held until the next one gets its place: whom it was connected to, by which port. So all objects of those
//! slabs are looked at, and then other memory, for what slabs that were given back have left.

use rustc_hash::{FxHashMap, FxHashSet};
use serde::Serialize;
use vmsight_arch::{Gpa, Gva};
use vmsight_linux::listing::address;
use vmsight_linux::socket::{Socket, SocketFilter};
use vmsight_linux::{Kernel, LinuxError, Listing};

use super::certainty::Certainty;
use super::frames::Frames;
use super::member::{Member, Structure};
use super::remains;
use super::slab::Slabs;

/// Rows of one listing.
const MAX_ROWS: usize = 1 << 16;
/// The largest socket that is believed: those of TCP over IPv6 have some 2.5 KB.
const MAX_SOCK: u64 = 64 << 10;
/// AF_INET and AF_INET6 (include/linux/socket.h).
const FAMILIES: [u64; 2] = [2, 10];
/// TCP_CLOSE (include/net/tcp_states.h).
const CLOSE: &str = "CLOSE";

/// The protocols whose sockets have slabs, by the variables that describe them (net/ipv4, net/ipv6).
const PROTOCOLS: &[&str] = &[
    "tcp_prot",
    "tcpv6_prot",
    "udp_prot",
    "udpv6_prot",
    "udplite_prot",
    "udplitev6_prot",
    "raw_prot",
    "rawv6_prot",
    "ping_prot",
    "pingv6_prot",
];

/// Those of which every socket with a port is in a table.
const TABLED: &[&str] = &["tcp_prot", "tcpv6_prot", "udp_prot", "udpv6_prot"];

/// A socket in the memory of its protocol's sockets.
#[derive(Clone, Debug, Serialize)]
pub struct RecoveredSocket {
    /// `closed`; `open`: it lives, and a table or a process has it; `unlisted`: it looks alive, and nobody has it.
    pub status: &'static str,
    /// How sure it is that this is or was such a socket.
    pub certainty: Certainty,
    /// `slab` of such sockets, or `memory` that was given back and not used since.
    pub found_in: &'static str,
    /// `ipv4` or `ipv6`.
    pub family: String,
    /// `tcp`, `udp`, `udplite`, `raw`, `icmp`, `icmpv6`.
    pub protocol: String,
    /// State of a connection that lives: `ESTABLISHED`, `LISTEN`, … .
    pub state: Option<String>,
    /// Address that it is or was bound to.
    pub local_address: Option<String>,
    /// Its port; of a raw socket the protocol.
    pub local_port: Option<u32>,
    /// Address of the other end; unspecified if it was not connected.
    pub remote_address: Option<String>,
    /// Port of the other end.
    pub remote_port: Option<u32>,
    /// Bytes that came in over a connection of TCP.
    pub received_bytes: Option<u64>,
    /// Bytes that the other end has acknowledged.
    pub sent_bytes: Option<u64>,
    /// Its owner.
    pub uid: Option<u32>,
    /// Inode number of its network namespace, where that still is.
    pub namespace: Option<u32>,
    /// The `struct sock` as the kernel saw it.
    #[serde(serialize_with = "address::gva")]
    pub address: Gva,
}

/// The sockets in the memory of sockets, those that are open too: the first first.
///
/// # Errors
/// If sockets cannot be listed, or the kernel's types or symbols lack what is needed.
pub fn sockets(kernel: &Kernel) -> Result<Listing<RecoveredSocket>, LinuxError> {
    let mut known = known(kernel)?;
    let reader = SocketReader::new(kernel, PROTOCOLS)?;
    let mut found = Listing::default();
    if reader.slabs.iter().any(|slabs| slabs.cut) {
        found.warn("sockets: cut, there are more slabs of them than can be");
    }
    reader.in_slabs(&mut found);
    reader.elsewhere(&mut found);
    if kernel.memory().is_live() {
        // A socket that came or went meanwhile is not hidden.
        known.extend(self::known(kernel)?);
    }
    let mut out = reader.rows(&found.rows, &known)?;
    found.warnings.into_iter().for_each(|warning| out.warn(warning));
    Ok(out)
}

/// All sockets that a table or a descriptor has.
fn known(kernel: &Kernel) -> Result<FxHashSet<Gva>, LinuxError> {
    let filter = SocketFilter {
        ports: true,
        ..SocketFilter::INET
    };
    let rows = kernel.sockets(filter)?.rows;
    Ok(rows.into_iter().map(|row| row.address).collect())
}

/// The sockets that live in the slabs of protocols that keep them in tables: to be looked for there, and then asked whether they
/// still live.
pub(crate) struct Living<'k> {
    reader: SocketReader<'k>,
    found: Vec<Found>,
    /// What was cut.
    pub(crate) warnings: Vec<String>,
}

impl<'k> Living<'k> {
    pub(crate) fn find(kernel: &'k Kernel) -> Result<Self, LinuxError> {
        let reader = SocketReader::new(kernel, TABLED)?;
        let mut found = Listing::default();
        reader.in_slabs(&mut found);
        found
            .rows
            .retain(|one: &Found| one.references > 0 && one.certainty == Certainty::Certain);
        Ok(Self {
            reader,
            found: found.rows,
            warnings: found.warnings,
        })
    }

    /// How many.
    pub(crate) fn len(&self) -> usize {
        self.found.len()
    }

    /// Those that are not `known`, and live still.
    pub(crate) fn others(&self, known: &FxHashSet<Gva>) -> Result<Vec<Socket>, LinuxError> {
        let kernel = self.reader.kernel;
        let others: Vec<Gva> = self
            .found
            .iter()
            .map(|one| one.at)
            .filter(|at| !known.contains(at))
            .collect();
        let mut rows = kernel.sockets_at(&others)?.rows;
        let mut bytes = vec![0; self.reader.size];
        rows.retain(|row| {
            let read = kernel.space().read(row.address, &mut bytes).is_ok();
            let looks = self.reader.looks(&bytes).filter(|_| read);
            looks.is_some_and(|look| look.references > 0 && look.agrees)
        });
        Ok(rows)
    }
}

/// An object that is or was a socket.
#[derive(Clone, Copy, Debug)]
struct Found {
    at: Gva,
    references: u32,
    certainty: Certainty,
    found_in: &'static str,
}

/// What an object looks like.
struct Look {
    references: u32,
    /// Both members that name its protocol do, and of a closed one nothing is on its way any more.
    agrees: bool,
}

struct SocketReader<'k> {
    kernel: &'k Kernel,
    frames: Frames,
    /// One for each cache: protocols may share one.
    slabs: Vec<Slabs>,
    protocols: FxHashSet<u64>,
    size: usize,
    family: Member,
    references: Member,
    protocol: Member,
    creator: Member,
    sending: Member,
    port: Option<Member>,
    received: Option<Member>,
    acknowledged: Option<Member>,
}

impl<'k> SocketReader<'k> {
    fn new(kernel: &'k Kernel, protocols: &[&str]) -> Result<Self, LinuxError> {
        let sock = Structure::of(kernel, "sock")?;
        let size = sock.size();
        if size == 0 || size > MAX_SOCK {
            return Err(LinuxError::Implausible {
                what: "sock".to_owned(),
                reason: format!("it has {size} bytes"),
            });
        }
        let slab = Structure::of(kernel, "proto")?.member("slab")?;
        let mut caches: Vec<(&str, Gva)> = Vec::new();
        let mut seen = FxHashSet::default();
        let mut found = FxHashSet::default();
        for name in protocols {
            let Some(at) = kernel.find_symbol(&[name]) else {
                continue;
            };
            found.insert(at.0);
            // Null where the protocol is not registered.
            let cache = slab.number(kernel.space(), at).unwrap_or(0);
            if cache != 0 && seen.insert(cache) {
                caches.push((name, slab.at(at)));
            }
        }
        let inet = Structure::of(kernel, "inet_sock");
        let tcp = Structure::of(kernel, "tcp_sock");
        let of_tcp = |name| tcp.as_ref().ok().and_then(|tcp| tcp.find(name));
        let slabs = Slabs::find_all(kernel, &caches)?;
        if slabs.iter().any(|slabs| slabs.stride < size) {
            return Err(LinuxError::Implausible {
                what: "slabs of sockets".to_owned(),
                reason: format!("their objects have less than the {size} bytes of a socket"),
            });
        }
        Ok(Self {
            kernel,
            frames: Frames::new(kernel)?,
            slabs,
            protocols: found,
            size: size as usize,
            family: sock.member("__sk_common.skc_family")?,
            references: sock.member("__sk_common.skc_refcnt")?,
            protocol: sock.member("__sk_common.skc_prot")?,
            creator: sock.member("sk_prot_creator")?,
            sending: sock.member("sk_wmem_alloc")?,
            port: inet.ok().and_then(|inet| inet.find("inet_sport")),
            received: of_tcp("bytes_received"),
            acknowledged: of_tcp("bytes_acked"),
        })
    }

    fn looks(&self, sock: &[u8]) -> Option<Look> {
        let number = |member: &Member| member.of(sock).unwrap_or(0);
        let named = [&self.protocol, &self.creator]
            .into_iter()
            .filter(|member| self.protocols.contains(&number(member)))
            .count();
        let references = number(&self.references) as u32;
        // The count of one that was let go too often is set to a number far below zero (REFCOUNT_SATURATED).
        let possible = named > 0 && FAMILIES.contains(&number(&self.family)) && references < 1 << 30;
        possible.then(|| Look {
            references,
            agrees: named == 2 && (references > 0 || number(&self.sending) == 0),
        })
    }

    /// All objects of the slabs.
    fn in_slabs(&self, out: &mut Listing<Found>) {
        let mut bytes = vec![0; self.size];
        for at in self.slabs.iter().flat_map(Slabs::objects) {
            if self.kernel.memory().read(at, &mut bytes).is_err() {
                continue;
            }
            let Some(look) = self.looks(&bytes) else { continue };
            let certainty = match look.agrees {
                true => Certainty::Certain,
                false => Certainty::Likely,
            };
            if !self.add(at, &look, certainty, "slab", out) {
                return;
            }
        }
    }

    /// What is left of sockets in pages that were given back.
    fn elsewhere(&self, out: &mut Listing<Found>) {
        let memory = self.kernel.memory();
        let closed = |at| {
            let mut object = vec![0; self.size];
            memory.read(at, &mut object).ok()?;
            self.looks(&object)
                .filter(|look| look.references == 0 && look.agrees)
        };
        let caches: Vec<&Slabs> = self.slabs.iter().collect();
        let found = remains::search(memory, &caches, &self.creator, |at, creator: &[u8; 8]| {
            self.protocols.contains(&u64::from_le_bytes(*creator)) && closed(at).is_some()
        });
        if found.unread > 0 {
            out.warn(format!(
                "sockets: {} places where there may be what is left of one could not be read",
                found.unread
            ));
        }
        for at in found.places {
            // It may have changed meanwhile.
            let Some(look) = closed(at) else { continue };
            let held = self.slabs.iter().any(|slabs| slabs.holds(at));
            if !held && !self.add(at, &look, Certainty::Likely, "memory", out) {
                return;
            }
        }
    }

    /// Adds an object; false where there is no room.
    fn add(
        &self,
        at: Gpa,
        look: &Look,
        certainty: Certainty,
        found_in: &'static str,
        out: &mut Listing<Found>,
    ) -> bool {
        if out.rows.len() >= MAX_ROWS {
            out.warn(format!("sockets: cut after {MAX_ROWS}"));
            return false;
        }
        out.rows.push(Found {
            at: self.frames.seen(at),
            references: look.references,
            certainty,
            found_in,
        });
        true
    }

    fn rows(&self, found: &[Found], known: &FxHashSet<Gva>) -> Result<Listing<RecoveredSocket>, LinuxError> {
        let by_address: FxHashMap<Gva, &Found> = found.iter().map(|one| (one.at, one)).collect();
        let addresses: Vec<Gva> = found.iter().map(|one| one.at).collect();
        let mut out = Listing::default();
        let listing = self.kernel.sockets_at(&addresses)?;
        listing.warnings.into_iter().for_each(|warning| out.warn(warning));
        for socket in listing.rows {
            if let Some(one) = by_address.get(&socket.address)
                && let Some(row) = self.row(one, socket, known)
            {
                out.rows.push(row);
            }
        }
        Ok(out)
    }

    /// The row of a socket; none of one that never had an address, and none of the kernel's own, which are in no table.
    fn row(&self, one: &Found, socket: Socket, known: &FxHashSet<Gva>) -> Option<RecoveredSocket> {
        let number = |member: &Option<Member>| member.as_ref()?.number(self.kernel.space(), one.at).ok();
        let status = match (one.references > 0, known.contains(&one.at)) {
            (false, _) => "closed",
            (true, true) => "open",
            (true, false) => "unlisted",
        };
        // A socket lets go of its port when it is closed, and keeps what it was.
        let port = match socket.local_port {
            Some(0) | None => number(&self.port).map(|port| u32::from((port as u16).swap_bytes())),
            port => port,
        };
        let is_some = |port: Option<u32>| port.is_some_and(|port| port != 0);
        let raw = matches!(socket.protocol.as_str(), "raw" | "icmp" | "icmpv6");
        let never_listed = raw || (socket.protocol == "tcp" && socket.state == CLOSE);
        let worth = match status {
            "open" => true,
            "unlisted" => is_some(port) && !never_listed,
            _ => is_some(port) || is_some(socket.remote_port),
        };
        if !worth {
            return None;
        }
        let of_tcp = |member| match socket.protocol.as_str() {
            "tcp" if socket.state != "LISTEN" => number(member),
            _ => None,
        };
        Some(RecoveredSocket {
            status,
            certainty: one.certainty,
            found_in: one.found_in,
            received_bytes: of_tcp(&self.received),
            sent_bytes: of_tcp(&self.acknowledged),
            state: (one.references > 0).then_some(socket.state),
            family: socket.family,
            protocol: socket.protocol,
            local_address: socket.local_address,
            local_port: port,
            remote_address: socket.remote_address,
            remote_port: socket.remote_port,
            uid: socket.uid,
            namespace: socket.namespace,
            address: one.at,
        })
    }
}
