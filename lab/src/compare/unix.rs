//! UNIX sockets of every network namespace.

use std::collections::{BTreeMap, BTreeSet};

use vmsight_linux::Kernel;
use vmsight_linux::file::Owner;

use super::{Differences, files, holders, sockets};
use crate::truth::{Text, Truth};

/// Compares `Kernel::unix_sockets` with `/proc/net/unix` and `unix_diag` of every namespace.
pub fn unix_sockets(kernel: &Kernel, truth: &Truth) -> anyhow::Result<Differences> {
    let mut out = Differences::default();
    let listing = kernel.unix_sockets()?;
    out.complaints("UNIX sockets", &listing.warnings);
    let (owners, uids) = (holders::of_sockets(truth), holders::uids_of_sockets(truth));
    for namespace in &truth.net {
        let rows: BTreeMap<u64, _> = listing
            .rows
            .iter()
            .filter(|r| r.namespace.map(u64::from) == Some(namespace.inode) && r.listed)
            .filter_map(|r| Some((r.inode?, r)))
            .collect();
        let said: BTreeSet<u64> = namespace
            .unix
            .iter()
            .map(|u| u.inode)
            .filter(|&inode| inode != 0)
            .collect();
        out.same(
            format!("UNIX sockets of namespace {}", namespace.inode),
            rows.keys().copied().collect::<BTreeSet<_>>(),
            said,
        );
        for said in &namespace.unix {
            let Some(row) = rows.get(&said.inode) else {
                continue;
            };
            let at = |what: &str| format!("{what} of UNIX socket {}", said.inode);
            out.complaints(&at("row"), &row.problems);
            let kind = match said.kind {
                1 => "stream",
                2 => "dgram",
                _ => "seqpacket",
            };
            out.same(at("kind"), row.kind, Some(kind));
            let state = match (said.flags & 0x10000 != 0, said.state) {
                (true, _) => "LISTEN",
                (_, 1) => "UNCONNECTED",
                (_, 2) => "CONNECTING",
                (_, 3) => "CONNECTED",
                _ => "DISCONNECTING",
            };
            out.same(at("state"), row.state, state);
            out.same(at("references"), row.references, Some(said.refs));
            let named = |path: &Text| (!path.is_empty()).then(|| name(path));
            out.same(at("name"), row.path.clone(), named(&said.path));
            if let Some(peer) = said.peer {
                out.same(at("peer"), row.peer_inode, (peer != 0).then_some(peer));
                // Who nobody has accepted yet has no inode: which of those the peer is, the guest does not say.
                if let Some(peer) = namespace.unix.iter().find(|s| peer != 0 && s.inode == peer) {
                    out.same(at("peer's name"), row.peer_path.clone(), named(&peer.path));
                }
            }
            if let Some(uid) = said.uid {
                out.same(at("uid"), row.uid, Some(uid));
            }
            if let Some(&uid) = uids.get(&said.inode) {
                out.same(at("uid of its file"), row.uid, Some(uid));
            }
            match (said.rx_queue, said.tx_queue) {
                // Of one that listens both sides count the connections that wait; the other number is how many may.
                (Some(waiting), _) if state == "LISTEN" => {
                    out.same(at("receive queue"), row.receive_queue, Some(waiting));
                }
                // Here vmsight counts messages and the guest bytes: there are both or none.
                (Some(bytes), Some(sent)) => {
                    out.same(
                        at("receive queue"),
                        row.receive_queue.map(|n| n != 0),
                        Some(bytes != 0),
                    );
                    out.same(at("send queue"), row.send_queue, Some(sent));
                }
                _ => {}
            }
            sockets::address(&at, row.address.0, said.address, &mut out);
            let held = |owners: &[Owner]| -> BTreeSet<String> { owners.iter().map(files::owner).collect() };
            let holders = |inode: u64| owners.get(&inode).cloned().unwrap_or_default();
            out.same(at("holders"), held(&row.owners), holders(said.inode));
            if let Some(peer) = said.peer {
                out.same(at("peer's holders"), held(&row.peer_owners), holders(peer));
            }
        }
    }
    Ok(out)
}

/// A socket's name as vmsight writes it: the NUL bytes of an abstract one as /proc does.
pub(super) fn name(path: &Text) -> String {
    let mut bytes = path.bytes().to_vec();
    if bytes.first() == Some(&0) {
        for byte in &mut bytes {
            if *byte == 0 {
                *byte = b'@';
            }
        }
    }
    vmsight_linux::text::guest_text(&bytes)
}
