//! Neighbours: which hardware address the kernel sends to for an IP address (ARP for IPv4, neighbour discovery for IPv6;
//! net/core/neighbour.c).
//!
//! One table for each protocol serves all network namespaces; a neighbour belongs to that of its interface.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use serde::Serialize;
use vmsight_arch::Gva;

use crate::budget::Budget;
use crate::file::holder;
use crate::iface::name::DeviceNames;
use crate::layout::{Field, Place, layout};
use crate::listing::{Listing, Problem, address, settled};
use crate::socket::namespace;
use crate::structures::hlist;
use crate::{Kernel, LinuxError};

/// Chains of a table: it doubles with its entries, which are a thousand unless an administrator wants more.
const MAX_SHIFT: u32 = 24;
/// Entries of one chain.
const MAX_CHAIN: usize = 1 << 16;
/// Chains that are read at once.
const AT_ONCE: u64 = 512;

layout! {
    struct NeighbourTableLayout = "neigh_table" {
        hash: Field<Gva> = "nht",
    }
}

layout! {
    struct NeighbourHashLayout = "neigh_hash_table" {
        heads: Field<Gva> = "hash_heads" | "hash_buckets",        // an hlist since 6.13
        shift: Field<u32> = "hash_shift",
    }
}

layout! {
    struct NeighbourLayout = "neighbour" {
        link: Place = "hash" | "next",                            // as above
        mac: Place = "ha",
        dev: Field<Gva> = "dev",
        state: Field<u8> = "nud_state",
        key: Place = "primary_key",
    }
}

/// `NUD_*` (include/uapi/linux/neighbour.h) by bits.
const STATES: [&str; 8] = [
    "INCOMPLETE",
    "REACHABLE",
    "STALE",
    "DELAY",
    "PROBE",
    "FAILED",
    "NOARP",
    "PERMANENT",
];
/// States in which the hardware address is known: `NUD_VALID`.
const VALID: u8 = 0x02 | 0x04 | 0x08 | 0x10 | 0x40 | 0x80;

/// One neighbour.
#[derive(Clone, Debug, Serialize)]
pub struct Neighbour {
    /// Inode number of its network namespace.
    pub namespace: Option<u32>,
    /// The first process in that namespace.
    pub pid: Option<i32>,
    /// Its IP address.
    pub ip: Option<IpAddr>,
    /// Its hardware address, where that is known.
    pub mac: Option<String>,
    /// `REACHABLE`, `STALE`, `PERMANENT` (somebody wrote it down), `NOARP`, `FAILED`, … ; `NONE` for one that is new.
    pub state: String,
    /// The interface that it is reached by.
    pub interface: Option<String>,
    /// That interface's number.
    pub index: Option<i32>,
    /// The `struct neighbour`.
    #[serde(serialize_with = "address::gva")]
    pub address: Gva,
    /// What could not be read.
    pub problems: Vec<Problem>,
}

impl Kernel {
    /// The neighbours of all network namespaces: what `ip neigh` shows in each, IPv4 first.
    ///
    /// Entries that only say for whom the kernel answers (proxies) are in a table of their own and are not listed.
    ///
    /// # Errors
    /// If the network namespaces cannot be listed or the kernel's types lack a member.
    pub fn neighbours(&self) -> Result<Listing<Neighbour>, LinuxError> {
        settled(
            self.memory().is_live(),
            |row: &Neighbour| row.problems.len(),
            || self.list_neighbours(),
        )
    }

    fn list_neighbours(&self) -> Result<Listing<Neighbour>, LinuxError> {
        let (holders, warnings) = holder::all(self)?;
        let namespaces = namespace::all(self, &holders)?;
        let mut listing = Listing::new(Vec::new(), warnings);
        for warning in namespaces.warnings.as_slice() {
            listing.warn(warning.clone());
        }
        let mut reader = NeighbourReader {
            kernel: self,
            table: self.layout()?,
            hash: self.layout()?,
            neighbour: self.layout()?,
            devices: DeviceNames::new(self)?,
            budget: Budget::default(),
        };
        for (symbol, bytes) in [("arp_tbl", 4), ("nd_tbl", 16)] {
            // Without IPv6 there is no second one.
            let Some(table) = self.find_symbol(&[symbol]) else {
                continue;
            };
            if let Err(error) = reader.table(symbol, table, bytes, &namespaces, &mut listing) {
                listing.warn(format!("neighbours: {error}"));
            }
        }
        let warning = reader.budget.warning("neighbours");
        warning.into_iter().for_each(|w| listing.warn(w));
        Ok(listing)
    }
}

struct NeighbourReader<'k> {
    kernel: &'k Kernel,
    table: Arc<NeighbourTableLayout>,
    hash: Arc<NeighbourHashLayout>,
    neighbour: Arc<NeighbourLayout>,
    devices: DeviceNames,
    budget: Budget,
}

impl NeighbourReader<'_> {
    fn table(
        &mut self,
        what: &str,
        table: Gva,
        key: usize,
        namespaces: &namespace::Namespaces,
        listing: &mut Listing<Neighbour>,
    ) -> Result<(), LinuxError> {
        let space = self.kernel.space();
        let read = |at: Gva| LinuxError::read(what, at);
        let hash = self.table.hash.read(space, table).map_err(read(table))?;
        let heads = self.hash.heads.read(space, hash).map_err(read(hash))?;
        let shift = self.hash.shift.read(space, hash).map_err(read(hash))?;
        if shift > MAX_SHIFT {
            return Err(LinuxError::Implausible {
                what: what.to_owned(),
                reason: format!("it has 2^{shift} chains"),
            });
        }
        let chains = 1u64 << shift;
        let mut bytes = vec![0u8; AT_ONCE as usize * 8];
        let mut first = 0;
        while first < chains {
            let many = AT_ONCE.min(chains - first);
            let at = heads.wrapping_add(first * 8);
            let bytes = bytes.get_mut(..many as usize * 8).unwrap_or(&mut []);
            space.read(at, bytes).map_err(read(at))?;
            for head in bytes.chunks_exact(8) {
                let head = Gva(u64::from_le_bytes(head.try_into().unwrap_or_default()));
                let walk = hlist::walk_next(space, head, 0, self.budget.limit(MAX_CHAIN));
                self.budget.walked(walk.items.len());
                let end = walk.end.warning(&format!("a chain of {what}"));
                end.into_iter().for_each(|w| listing.warn(w));
                for node in walk.items {
                    if !self.budget.row(0) {
                        return Ok(());
                    }
                    // The link comes first in a chain's node, and before 6.13 in the neighbour itself.
                    let row = self.row(self.neighbour.link.container(node), key, namespaces);
                    listing.rows.push(row);
                }
            }
            first += many;
        }
        Ok(())
    }

    fn row(&mut self, at: Gva, key: usize, namespaces: &namespace::Namespaces) -> Neighbour {
        let mut row = Neighbour {
            namespace: None,
            pid: None,
            ip: None,
            mac: None,
            state: "NONE".to_owned(),
            interface: None,
            index: None,
            address: at,
            problems: Vec::new(),
        };
        let (space, layout) = (self.kernel.space(), &self.neighbour);
        let mut bytes = [0u8; 16];
        match space.read(layout.key.at(at), bytes.get_mut(..key).unwrap_or(&mut [])) {
            Ok(()) => row.ip = Some(ip(&bytes, key)),
            Err(error) => row.problems.push(Problem::read("ip", &error)),
        }
        let state = match layout.state.read(space, at) {
            Ok(state) => state,
            Err(error) => {
                row.problems.push(Problem::read("state", &error));
                0
            }
        };
        let known = STATES.iter().enumerate();
        let names: Vec<&str> = known
            .filter(|(bit, _)| state >> bit & 1 == 1)
            .map(|(_, name)| *name)
            .collect();
        if !names.is_empty() {
            row.state = names.join(",");
        }
        let device = layout
            .dev
            .read(space, at)
            .and_then(|device| self.devices.of(device));
        let device = match device {
            Ok(device) => device,
            Err(error) => {
                row.problems.push(Problem::read("interface", &error));
                return row;
            }
        };
        let own = namespaces.rows.iter().find(|n| n.address == device.net);
        row.namespace = own.map(|n| n.inum);
        row.pid = own.and_then(|n| n.pid);
        row.index = Some(device.index);
        row.interface = Some(device.name);
        let mut mac = vec![0u8; usize::from(device.addr_len).min(layout.mac.size() as usize)];
        if state & VALID != 0 && !mac.is_empty() {
            match space.read(layout.mac.at(at), &mut mac) {
                Ok(()) => {
                    let parts: Vec<String> = mac.iter().map(|b| format!("{b:02x}")).collect();
                    row.mac = Some(parts.join(":"));
                }
                Err(error) => row.problems.push(Problem::read("mac", &error)),
            }
        }
        row
    }
}

/// The address in the first `length` bytes: of IPv6 where there are 16.
pub(crate) fn ip(bytes: &[u8; 16], length: usize) -> IpAddr {
    match (length, bytes.first_chunk::<4>()) {
        (4, Some(four)) => IpAddr::V4(Ipv4Addr::from(*four)),
        _ => IpAddr::V6(Ipv6Addr::from(*bytes)),
    }
}
