//! Interfaces of every network namespace.

use std::collections::BTreeSet;

use vmsight_linux::Kernel;
use vmsight_linux::iface::Interface;

use super::{Differences, spelt};
use crate::truth::{self, Truth};

/// Compares `Kernel::interfaces` with rtnetlink's account in every namespace.
pub fn interfaces(kernel: &Kernel, truth: &Truth) -> anyhow::Result<Differences> {
    let mut out = Differences::default();
    let listing = kernel.interfaces()?;
    out.complaints("interfaces", &listing.warnings);
    for namespace in &truth.net {
        let rows: Vec<&Interface> = listing
            .rows
            .iter()
            .filter(|r| u64::from(r.namespace) == namespace.inode)
            .collect();
        let seen: BTreeSet<String> = rows.iter().map(|r| r.name.clone()).collect();
        let said: BTreeSet<String> = namespace.interfaces.iter().map(|i| spelt(&i.name)).collect();
        out.same(format!("interfaces of namespace {}", namespace.inode), seen, said);
        for said in &namespace.interfaces {
            let Some(row) = rows.iter().find(|r| r.name == spelt(&said.name)) else {
                continue;
            };
            let at = |what: &str| format!("{what} of {} in namespace {}", row.name, namespace.inode);
            out.complaints(&at("row"), &row.problems);
            out.same(at("index"), u32::try_from(row.index), Ok(said.index));
            out.same(at("MTU"), row.mtu, said.mtu);
            out.same(
                at("address"),
                row.mac.clone().unwrap_or_default(),
                said.mac.clone(),
            );
            out.same(at("promiscuity"), row.promiscuity, said.promiscuity);
            out.same(
                at("kind"),
                row.kind.clone().unwrap_or_default(),
                said.kind.clone(),
            );
            out.same(at("flags"), &row.flags, &flags(said.flags));
            out.same(at("state"), row.state, state(said.state));
            counters(&at, row, said, &mut out);
            let link_type = match said.hardware_type {
                1 => "ether".to_owned(),
                768 => "ipip".to_owned(),
                769 => "tunnel6".to_owned(),
                772 => "loopback".to_owned(),
                776 => "sit".to_owned(),
                65534 => "none".to_owned(),
                other => other.to_string(),
            };
            out.same(at("type"), &row.link_type, &link_type);
            let seen: BTreeSet<String> = row.ipv4.iter().chain(&row.ipv6).cloned().collect();
            let addresses: BTreeSet<String> = said
                .addresses
                .iter()
                .map(|(ip, len)| format!("{ip}/{len}"))
                .collect();
            out.same(at("addresses"), seen, addresses);
            let master = namespace
                .interfaces
                .iter()
                .find(|i| i.index == said.master)
                .map(|i| spelt(&i.name));
            out.same(at("master"), row.master.clone(), master);
        }
    }
    Ok(out)
}

/// States of RFC 2863 by their numbers in the kernel (include/uapi/linux/if.h).
fn state(number: u8) -> &'static str {
    match number {
        1 => "notpresent",
        2 => "down",
        3 => "lowerlayerdown",
        4 => "testing",
        5 => "dormant",
        6 => "up",
        _ => "unknown",
    }
}

/// What a connection that is made in vain still sends while nobody looks, packets: one in some seconds.
const STRAY_PACKETS: u64 = 1000;
/// Their bytes.
const STRAY_BYTES: u64 = 200 * STRAY_PACKETS;

fn counters(at: &dyn Fn(&str) -> String, row: &Interface, said: &truth::Interface, out: &mut Differences) {
    let Some(seen) = row.counters else {
        // Drivers that count in a way of their own; those of the kernel proper do not.
        let own = ["bridge", "veth", "vlan", "dummy"].contains(&said.kind.as_str());
        out.same(at("counters that vmsight cannot read"), true, own);
        return;
    };
    let up = said.flags & 1 == 1;
    for (what, seen, said, stray) in [
        (
            "packets received",
            seen.rx_packets,
            said.counters[0],
            STRAY_PACKETS,
        ),
        ("packets sent", seen.tx_packets, said.counters[1], STRAY_PACKETS),
        ("bytes received", seen.rx_bytes, said.counters[2], STRAY_BYTES),
        ("bytes sent", seen.tx_bytes, said.counters[3], STRAY_BYTES),
    ] {
        // Counters never fall, and those of an interface that is down stand still.
        let most = if up { said + stray } else { said };
        out.near(at(what), (said..=most).contains(&seen), seen, said);
    }
}

/// `IFF_*` by name (include/uapi/linux/if.h).
fn flags(bits: u32) -> Vec<&'static str> {
    const NAMES: [&str; 19] = [
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
    NAMES
        .iter()
        .enumerate()
        .filter(|(bit, _)| bits >> bit & 1 == 1)
        .map(|(_, name)| *name)
        .collect()
}
