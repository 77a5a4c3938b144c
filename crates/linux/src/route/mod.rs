//! Routes of every network namespace, from all of its tables: what `ip route show table all` shows in each.

mod hop;
mod v4;
mod v6;

use std::net::IpAddr;

use rustc_hash::FxHashSet;
use serde::Serialize;
use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use crate::budget::Budget;
use crate::file::holder;
use crate::layout::{Field, layout};
use crate::listing::{Listing, Problem, address, settled};
use crate::socket::namespace::{self, Namespace};
use crate::structures::hlist;
use crate::{Kernel, LinuxError};
use hop::HopReader;

/// Chains of tables: one without policy routing (for IPv4 two), else `FIB_TABLE_HASHSZ` and `FIB6_TABLE_HASHSZ`.
const CHAINS: u64 = 256;
/// Tables of one chain.
const MAX_TABLES: usize = 1 << 16;

layout! {
    struct NetRoutesLayout = "net" {
        v4: Option<Field<Gva>> = "ipv4.fib_table_hash",
        v4_rules: Option<Field<Gva>> = "ipv4.rules_ops",          // CONFIG_IP_MULTIPLE_TABLES
        v6: Option<Field<Gva>> = "ipv6.fib_table_hash",
        v6_rules: Option<Field<Gva>> = "ipv6.fib6_rules_ops",     // CONFIG_IPV6_MULTIPLE_TABLES
        v6_null: Option<Field<Gva>> = "ipv6.fib6_null_entry",
    }
}

/// One route; one with several next hops is a row for each.
#[derive(Clone, Debug, Serialize)]
pub struct Route {
    /// Inode number of its network namespace.
    pub namespace: u32,
    /// The first process in that namespace.
    pub pid: Option<i32>,
    /// The table it is in: `main`, `local`, `default`, or its number.
    pub table: String,
    /// Whereto: address and length of the prefix.
    pub destination: String,
    /// `unicast`, `local`, `broadcast`, `multicast`, `anycast`; `blackhole`, `unreachable`, `prohibit`, `throw`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The router; `None` where the destination is on the link.
    pub gateway: Option<IpAddr>,
    /// The interface.
    pub interface: Option<String>,
    /// Its number.
    pub index: Option<i32>,
    /// Of several to one destination the one with the lowest is taken.
    pub metric: u32,
    /// Who made it: `kernel`, `boot`, `static`, `ra`, `dhcp`, … , or a number.
    pub protocol: String,
    /// The address that is preferred as a packet's source.
    pub source: Option<IpAddr>,
    /// The `struct fib_alias` or `fib6_info`.
    #[serde(serialize_with = "address::gva")]
    pub address: Gva,
    /// What could not be read.
    pub problems: Vec<Problem>,
}

/// What the readers of both protocols work with.
struct Walker<'k> {
    kernel: &'k Kernel,
    hops: HopReader<'k>,
    budget: Budget,
    listing: Listing<Route>,
}

impl Kernel {
    /// The routes of all network namespaces, IPv4 before IPv6 in each, table by table.
    ///
    /// What the kernel has only looked up and remembers (exceptions for path MTU and redirects) is not listed.
    ///
    /// # Errors
    /// If the network namespaces cannot be listed or the kernel's types lack a member.
    pub fn routes(&self) -> Result<Listing<Route>, LinuxError> {
        settled(
            self.memory().is_live(),
            |row: &Route| row.problems.len(),
            || self.list_routes(),
        )
    }

    fn list_routes(&self) -> Result<Listing<Route>, LinuxError> {
        let net: std::sync::Arc<NetRoutesLayout> = self.layout()?;
        let (holders, warnings) = holder::all(self)?;
        let namespaces = namespace::all(self, &holders)?;
        let mut walker = Walker {
            kernel: self,
            hops: HopReader::new(self)?,
            budget: Budget::default(),
            listing: Listing::new(Vec::new(), warnings),
        };
        for warning in namespaces.warnings.as_slice() {
            walker.listing.warn(warning.clone());
        }
        for namespace in &namespaces.rows {
            if let Some(tables) = &net.v4 {
                let chains = if net.v4_rules.is_some() { CHAINS } else { 2 };
                let done = walker
                    .heads(namespace, tables, chains)
                    .and_then(|tables| v4::routes(&mut walker, namespace, &tables));
                walker.note(namespace, "IPv4", done);
            }
            if let Some(tables) = &net.v6 {
                let chains = if net.v6_rules.is_some() { CHAINS } else { 1 };
                let null = net.v6_null.as_ref();
                let null = null.and_then(|field| field.read(self.space(), namespace.address).ok());
                let done = walker
                    .heads(namespace, tables, chains)
                    .and_then(|tables| v6::routes(&mut walker, namespace, &tables, null));
                walker.note(namespace, "IPv6", done);
            }
        }
        let warning = walker.budget.warning("routes");
        warning.into_iter().for_each(|w| walker.listing.warn(w));
        Ok(walker.listing)
    }
}

impl Walker<'_> {
    /// What could not be read of one namespace is no reason to keep the others' routes from the reader.
    fn note(&mut self, namespace: &Namespace, what: &str, done: Result<(), LinuxError>) {
        if let Err(error) = done {
            self.listing
                .warn(format!("{what} routes of namespace {}: {error}", namespace.inum));
        }
    }

    /// The hash nodes of a namespace's tables.
    fn heads(
        &mut self,
        namespace: &Namespace,
        tables: &Field<Gva>,
        chains: u64,
    ) -> Result<Vec<Gva>, LinuxError> {
        let space = self.kernel.space();
        let read = |at: Gva| LinuxError::read("the tables of routes", at);
        let table = tables
            .read(space, namespace.address)
            .map_err(read(namespace.address))?;
        let mut out = Vec::new();
        // A protocol that is switched off has none.
        if table.is_null() {
            return Ok(out);
        }
        for chain in 0..chains {
            let at = table.wrapping_add(chain * 8);
            let first = space.read_u64(at).map(Gva).map_err(read(at))?;
            let walk = hlist::walk_next(space, first, 0, self.budget.limit(MAX_TABLES));
            self.budget.walked(walk.items.len());
            let end = walk.end.warning("a chain of tables of routes");
            end.into_iter().for_each(|w| self.listing.warn(w));
            out.extend(walk.items);
        }
        Ok(out)
    }

    /// Visits the nodes of one table, depth first, from `top` on. `visit` puts a node's children on the stack, the first
    /// one last, and gives false where there is no more room.
    fn visit(
        &mut self,
        table: u32,
        top: Gva,
        mut visit: impl FnMut(&mut Self, Gva, &mut Vec<Gva>) -> Result<bool, ReadError>,
    ) {
        let mut seen = FxHashSet::default();
        let mut stack = vec![top];
        while let Some(node) = stack.pop().filter(|_| self.budget.limit(1) > 0) {
            if node.is_null() {
                continue;
            }
            self.budget.walked(1);
            if !seen.insert(node.0) {
                self.listing.warn(format!(
                    "table of routes {table}: it comes back to {node} (a cycle)"
                ));
                continue;
            }
            match visit(self, node, &mut stack) {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => self.listing.warn(format!("table of routes {table}: {error}")),
            }
        }
    }

    /// Adds a row; false where there is no room.
    fn push(&mut self, row: Route) -> bool {
        let room = self.budget.row(row.destination.len());
        if room {
            self.listing.rows.push(row);
        }
        room
    }
}

/// `RT_TABLE_*` (include/uapi/linux/rtnetlink.h).
fn table(id: u32) -> String {
    match id {
        253 => "default".to_owned(),
        254 => "main".to_owned(),
        255 => "local".to_owned(),
        other => other.to_string(),
    }
}

/// `RTN_*`.
fn kind(number: u8) -> &'static str {
    match number {
        1 => "unicast",
        2 => "local",
        3 => "broadcast",
        4 => "anycast",
        5 => "multicast",
        6 => "blackhole",
        7 => "unreachable",
        8 => "prohibit",
        9 => "throw",
        10 => "nat",
        11 => "xresolve",
        _ => "unspecified",
    }
}

/// `RTPROT_*`, by the names that iproute2 uses.
fn protocol(number: u8) -> String {
    match number {
        1 => "redirect",
        2 => "kernel",
        3 => "boot",
        4 => "static",
        9 => "ra",
        11 => "zebra",
        12 => "bird",
        16 => "dhcp",
        18 => "keepalived",
        42 => "babel",
        186 => "bgp",
        188 => "ospf",
        other => return other.to_string(),
    }
    .to_owned()
}
