//! Network interfaces of every network namespace, with their addresses.

mod counters;
pub(crate) mod name;

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use serde::Serialize;
use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use crate::budget::Budget;
use crate::file::holder;
use crate::layout::{Buffer, Field, Place, Spans, layout};
use crate::listing::{Listing, Problem, address, settled};
use crate::socket::namespace::{self, Namespace};
use crate::structures::{hlist, list};
use crate::text::guest_array_text;
use crate::{Kernel, LinuxError};

pub use counters::Counters;

/// More interfaces, and more addresses of one, than are believed.
const MAX_INTERFACES: usize = 1 << 18;
const MAX_ADDRESSES: usize = 1 << 14;

layout! {
    struct NetDevicesLayout = "net" {
        devices: Place = "dev_base_head",
    }
}

layout! {
    /// `struct net_device` (include/linux/netdevice.h).
    struct DeviceLayout = "net_device" {
        list: Place = "dev_list",
        name: Place = "name",
        ifindex: Field<i32> = "ifindex",
        mtu: Field<u32> = "mtu",
        flags: Field<u32> = "flags",
        gflags: Field<u16> = "gflags",
        state: Field<u64> = "state",
        kind: Field<u16> = "type",
        operstate: Field<u8> = "operstate",
        promiscuity: Field<u32> = "promiscuity",
        addr_len: Field<u8> = "addr_len",
        dev_addr: Field<Gva> = "dev_addr",
        ip: Field<Gva> = "ip_ptr",
        ip6: Option<Field<Gva>> = "ip6_ptr",
        upper: Place = "adj_list.upper",
        link_ops: Option<Field<Gva>> = "rtnl_link_ops",
    }
}

layout! {
    struct LinkOpsLayout = "rtnl_link_ops" {
        kind: Field<Gva> = "kind",
    }
}

layout! {
    struct AdjacentLayout = "netdev_adjacent" {
        dev: Field<Gva> = "dev",
        master: Field<bool> = "master",
        list: Place = "list",
    }
}

layout! {
    struct InDeviceLayout = "in_device" {
        addresses: Field<Gva> = "ifa_list",
    }
}

layout! {
    struct InAddressLayout = "in_ifaddr" {
        next: Field<Gva> = "ifa_next",
        local: Place = "ifa_local",
        prefix: Field<u8> = "ifa_prefixlen",
    }
}

layout! {
    struct Inet6DeviceLayout = "inet6_dev" {
        addresses: Place = "addr_list",
    }
}

layout! {
    struct Inet6AddressLayout = "inet6_ifaddr" {
        address: Place = "addr",
        prefix: Field<u32> = "prefix_len",
        list: Place = "if_list",
    }
}

/// `IFF_*` (include/uapi/linux/if.h) by their lower-case names.
const FLAGS: &[&str] = &[
    "up",
    "broadcast",
    "debug",
    "loopback",
    "pointopoint",
    "notrailers",
    "running",
    "noarp",
    "promisc",
    "allmulti",
    "master",
    "slave",
    "multicast",
    "portsel",
    "automedia",
    "dynamic",
    "lower_up",
    "dormant",
    "echo",
];

const IFF_RUNNING: u32 = 1 << 6;
const IFF_PROMISC: u32 = 1 << 8;
const IFF_ALLMULTI: u32 = 1 << 9;
const IFF_LOWER_UP: u32 = 1 << 16;
const IFF_DORMANT: u32 = 1 << 17;

/// Bits of `net_device.state` (`enum netdev_state_t`; the type data has them under names that may change, not so their values).
const STATE_START: u64 = 1 << 0;
const STATE_NOCARRIER: u64 = 1 << 2;
const STATE_DORMANT: u64 = 1 << 4;

/// `IF_OPER_*` (include/uapi/linux/if.h).
const OPER_UNKNOWN: u8 = 0;
const OPER_UP: u8 = 6;

/// The flags as the guest's tools see them: `dev_get_flags` (net/core/dev.c).
fn visible_flags(flags: u32, gflags: u32, state: u64, operstate: u8) -> u32 {
    let own = IFF_PROMISC | IFF_ALLMULTI;
    let mut out = flags & !(own | IFF_RUNNING | IFF_LOWER_UP | IFF_DORMANT) | gflags & own;
    if state & STATE_START != 0 {
        if matches!(operstate, OPER_UP | OPER_UNKNOWN) {
            out |= IFF_RUNNING;
        }
        if state & STATE_NOCARRIER == 0 {
            out |= IFF_LOWER_UP;
        }
        if state & STATE_DORMANT != 0 {
            out |= IFF_DORMANT;
        }
    }
    out
}

/// The state as the guest's tools see it: one that is not switched on is down, whatever was noted when it last was
/// (`rtnl_fill_ifinfo` in net/core/rtnetlink.c, `operstate_show` in net/core/net-sysfs.c).
fn visible_state(operstate: u8, state: u64) -> &'static str {
    match operstate {
        _ if state & STATE_START == 0 => "down",
        1 => "notpresent",
        2 => "down",
        3 => "lowerlayerdown",
        4 => "testing",
        5 => "dormant",
        OPER_UP => "up",
        _ => "unknown",
    }
}

/// A network interface.
#[derive(Clone, Debug, Serialize)]
pub struct Interface {
    /// Inode number of its network namespace.
    pub namespace: u32,
    /// The first process in that namespace.
    pub pid: Option<i32>,
    /// Its number in the namespace.
    pub index: i32,
    /// Its name.
    pub name: String,
    /// `loopback`, `ether`, … (`ARPHRD_*`).
    #[serde(rename = "type")]
    pub link_type: String,
    /// What made it: `veth`, `bridge`, `vlan`, `tun`, … ; `None` for hardware.
    pub kind: Option<String>,
    /// State by RFC 2863: `up`, `down`, `unknown`, … .
    pub state: &'static str,
    /// Flags as the guest's tools show them: `up`, `running`, `broadcast`, … . `promisc` only if it was asked for by name; see
    /// `promiscuity`.
    pub flags: Vec<&'static str>,
    /// How many asked for promiscuous mode: a sniffer shows here and not in the flags.
    pub promiscuity: u32,
    /// Largest packet in bytes.
    pub mtu: u32,
    /// Hardware address; `None` if it has none.
    pub mac: Option<String>,
    /// IPv4 addresses with the length of their prefix.
    pub ipv4: Vec<String>,
    /// IPv6 addresses likewise.
    pub ipv6: Vec<String>,
    /// The bridge, bond or VRF that it belongs to.
    pub master: Option<String>,
    /// What it counted; `None` where its driver keeps the counts in a way of its own.
    #[serde(flatten)]
    pub counters: Option<Counters>,
    /// The `struct net_device`.
    #[serde(serialize_with = "address::gva")]
    pub address: Gva,
    /// What could not be read.
    pub problems: Vec<Problem>,
}

impl Interface {
    /// Bytes of its addresses, of which it can have very many.
    fn bytes(&self) -> usize {
        let text = |text: &String| size_of::<String>() + text.len();
        self.ipv4.iter().chain(&self.ipv6).map(text).sum()
    }
}

impl Kernel {
    /// The interfaces of all network namespaces, by namespace and in the kernel's order.
    ///
    /// # Errors
    /// If the network namespaces cannot be listed or the kernel's types lack a member.
    pub fn interfaces(&self) -> Result<Listing<Interface>, LinuxError> {
        settled(
            self.memory().is_live(),
            |row: &Interface| row.problems.len(),
            || self.list_interfaces(),
        )
    }

    fn list_interfaces(&self) -> Result<Listing<Interface>, LinuxError> {
        let net: Arc<NetDevicesLayout> = self.layout()?;
        let reader = DeviceReader::new(self)?;
        let (holders, warnings) = holder::all(self)?;
        let namespaces = namespace::all(self, &holders)?;
        let mut listing = Listing::new(Vec::new(), warnings);
        for warning in namespaces.warnings.into_vec() {
            listing.warn(warning);
        }
        let budget = Budget::default();
        'all: for (nth, namespace) in namespaces.rows.iter().enumerate() {
            let limit = budget.limit(MAX_INTERFACES);
            let found = list::walk(self.space(), net.devices.at(namespace.address), limit);
            budget.walked(found.walk.items.len());
            for node in found.walk.items {
                let row = reader.device(reader.device.list.container(node), namespace, &budget);
                if !budget.row(row.bytes()) {
                    listing.warn(format!(
                        "interfaces: those of the last {} namespaces are left out, at least in part",
                        namespaces.rows.len() - nth
                    ));
                    break 'all;
                }
                listing.rows.push(row);
            }
            if let Some(warning) = found
                .walk
                .end
                .warning(&format!("interfaces of namespace {}", namespace.inum))
            {
                listing.warn(warning);
            }
        }
        budget
            .warning("interfaces")
            .into_iter()
            .for_each(|warning| listing.warn(warning));
        Ok(listing)
    }
}

struct DeviceReader {
    kernel: Kernel,
    device: Arc<DeviceLayout>,
    spans: Spans,
    link: Option<Arc<LinkOpsLayout>>,
    adjacent: Arc<AdjacentLayout>,
    in_device: Arc<InDeviceLayout>,
    in_address: Arc<InAddressLayout>,
    in6_device: Option<Arc<Inet6DeviceLayout>>,
    in6_address: Option<Arc<Inet6AddressLayout>>,
    counters: counters::CounterReader,
}

impl DeviceReader {
    fn new(kernel: &Kernel) -> Result<Self, LinuxError> {
        let device: Arc<DeviceLayout> = kernel.layout()?;
        let d = &device;
        let mut extents = vec![
            d.name.extent(),
            d.ifindex.extent(),
            d.mtu.extent(),
            d.flags.extent(),
            d.gflags.extent(),
            d.state.extent(),
            d.kind.extent(),
            d.operstate.extent(),
            d.promiscuity.extent(),
            d.addr_len.extent(),
            d.dev_addr.extent(),
            d.ip.extent(),
        ];
        extents.extend([&d.ip6, &d.link_ops].into_iter().flatten().map(Field::extent));
        Ok(Self {
            kernel: kernel.clone(),
            spans: Spans::covering("net_device", kernel.release(), extents)?,
            device,
            link: kernel.layout().ok(),
            adjacent: kernel.layout()?,
            in_device: kernel.layout()?,
            in_address: kernel.layout()?,
            in6_device: kernel.layout().ok(),
            in6_address: kernel.layout().ok(),
            counters: counters::CounterReader::new(kernel)?,
        })
    }

    fn device(&self, at: Gva, namespace: &Namespace, budget: &Budget) -> Interface {
        let mut row = Interface {
            namespace: namespace.inum,
            pid: namespace.pid,
            index: 0,
            name: String::new(),
            link_type: String::new(),
            kind: None,
            state: "unknown",
            flags: Vec::new(),
            promiscuity: 0,
            mtu: 0,
            mac: None,
            ipv4: Vec::new(),
            ipv6: Vec::new(),
            master: None,
            counters: None,
            address: at,
            problems: Vec::new(),
        };
        let space = self.kernel.space();
        let d = &self.device;
        let mut object = self.spans.buffer();
        if let Err(error) = self.spans.read(space, at, &mut object) {
            row.problems.push(Problem::read("name", &error));
            return row;
        }
        row.name = guest_array_text(d.name.of(&object));
        row.index = d.ifindex.of(&object);
        row.mtu = d.mtu.of(&object);
        row.promiscuity = d.promiscuity.of(&object);
        row.link_type = link_type(d.kind.of(&object));
        let operstate = d.operstate.of(&object);
        let flags = visible_flags(
            d.flags.of(&object),
            u32::from(d.gflags.of(&object)),
            d.state.of(&object),
            operstate,
        );
        row.flags = FLAGS
            .iter()
            .enumerate()
            .filter(|(bit, _)| flags >> bit & 1 == 1)
            .map(|(_, &name)| name)
            .collect();
        row.state = visible_state(operstate, d.state.of(&object));
        let mut problem = |field: &'static str, result: Result<(), ReadError>| {
            if let Err(error) = result {
                row.problems.push(Problem::read(field, &error));
            }
        };
        problem("mac", self.mac(&object).map(|mac| row.mac = mac));
        problem("kind", self.kind(&object).map(|kind| row.kind = kind));
        problem(
            "counters",
            self.counters.read(at).map(|counters| row.counters = counters),
        );
        let mut notes = Vec::new();
        problem("ipv4", self.ipv4(&object, &mut row.ipv4, &mut notes, budget));
        problem("ipv6", self.ipv6(&object, &mut row.ipv6, &mut notes, budget));
        problem(
            "master",
            self.master(at, &mut notes, budget)
                .map(|master| row.master = master),
        );
        row.problems.extend(notes);
        row
    }

    fn mac(&self, object: &Buffer) -> Result<Option<String>, ReadError> {
        let len = usize::from(self.device.addr_len.of(object)).min(32);
        let at = self.device.dev_addr.of(object);
        if len == 0 || at.is_null() {
            return Ok(None);
        }
        let mut bytes = vec![0u8; len];
        self.kernel.space().read(at, &mut bytes)?;
        Ok(Some(
            bytes
                .iter()
                .map(|b| format!("{b:02x}"))
                .collect::<Vec<_>>()
                .join(":"),
        ))
    }

    fn kind(&self, object: &Buffer) -> Result<Option<String>, ReadError> {
        let (Some(field), Some(link)) = (&self.device.link_ops, &self.link) else {
            return Ok(None);
        };
        let ops = field.of(object);
        if ops.is_null() {
            return Ok(None);
        }
        let kind = link.kind.read(self.kernel.space(), ops)?;
        if kind.is_null() {
            Ok(None)
        } else {
            self.kernel.text(kind, 32).map(Some)
        }
    }

    fn ipv4(
        &self,
        object: &Buffer,
        out: &mut Vec<String>,
        notes: &mut Vec<Problem>,
        budget: &Budget,
    ) -> Result<(), ReadError> {
        let device = self.device.ip.of(object);
        if device.is_null() {
            return Ok(());
        }
        let space = self.kernel.space();
        let first = self.in_device.addresses.read(space, device)?;
        let limit = budget.limit(MAX_ADDRESSES);
        let found = hlist::walk_next(space, first, self.in_address.next.extent().offset, limit);
        budget.walked(found.items.len());
        for at in found.items {
            let mut bytes = [0u8; 4];
            space.read(self.in_address.local.at(at), &mut bytes)?;
            out.push(format!(
                "{}/{}",
                Ipv4Addr::from(bytes),
                self.in_address.prefix.read(space, at)?
            ));
        }
        notes.extend(
            found
                .end
                .warning("list of addresses")
                .map(|w| Problem::new("ipv4", w)),
        );
        Ok(())
    }

    fn ipv6(
        &self,
        object: &Buffer,
        out: &mut Vec<String>,
        notes: &mut Vec<Problem>,
        budget: &Budget,
    ) -> Result<(), ReadError> {
        let (Some(field), Some(device), Some(address)) =
            (&self.device.ip6, &self.in6_device, &self.in6_address)
        else {
            return Ok(());
        };
        let at = field.of(object);
        if at.is_null() {
            return Ok(());
        }
        let space = self.kernel.space();
        let found = list::walk(space, device.addresses.at(at), budget.limit(MAX_ADDRESSES));
        budget.walked(found.walk.items.len());
        for node in found.walk.items {
            let at = address.list.container(node);
            let mut bytes = [0u8; 16];
            space.read(address.address.at(at), &mut bytes)?;
            out.push(format!(
                "{}/{}",
                Ipv6Addr::from(bytes),
                address.prefix.read(space, at)?
            ));
        }
        notes.extend(
            found
                .walk
                .end
                .warning("list of addresses")
                .map(|w| Problem::new("ipv6", w)),
        );
        Ok(())
    }

    fn master(
        &self,
        at: Gva,
        notes: &mut Vec<Problem>,
        budget: &Budget,
    ) -> Result<Option<String>, ReadError> {
        let space = self.kernel.space();
        let found = list::walk(space, self.device.upper.at(at), budget.limit(MAX_INTERFACES));
        budget.walked(found.walk.items.len());
        notes.extend(
            found
                .walk
                .end
                .warning("list of upper devices")
                .map(|w| Problem::new("master", w)),
        );
        for node in found.walk.items {
            let adjacent = self.adjacent.list.container(node);
            if self.adjacent.master.read(space, adjacent)? {
                let master = self.adjacent.dev.read(space, adjacent)?;
                let mut name = vec![0u8; self.device.name.size().min(64) as usize];
                space.read(self.device.name.at(master), &mut name)?;
                return Ok(Some(guest_array_text(&name)));
            }
        }
        Ok(None)
    }
}

/// `ARPHRD_*` (include/uapi/linux/if_arp.h), by the names that iproute2 uses.
fn link_type(number: u16) -> String {
    match number {
        1 => "ether",
        32 => "infiniband",
        280 => "can",
        512 => "ppp",
        768 => "ipip",
        769 => "tunnel6",
        772 => "loopback",
        776 => "sit",
        778 => "gre",
        801 => "ieee802.11",
        803 => "ieee802.11/radiotap",
        823 => "gre6",
        824 => "netlink",
        826 => "vsockmon",
        65534 => "none",
        other => return format!("{other}"),
    }
    .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_that_is_off_is_down() {
        assert_eq!(visible_state(OPER_UNKNOWN, STATE_NOCARRIER), "down");
        assert_eq!(visible_state(OPER_UP, 0), "down");
        assert_eq!(visible_state(OPER_UP, STATE_START), "up");
        assert_eq!(visible_state(OPER_UNKNOWN, STATE_START), "unknown");
    }
}
