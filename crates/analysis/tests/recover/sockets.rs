//! Sockets in the memory that they are made in: open ones, those that were closed, and one that somebody took out of every table.

use std::collections::BTreeMap;

use vmsight_analysis::recover::Certainty;
use vmsight_analysis::recover::sockets::{RecoveredSocket, sockets};
use vmsight_analysis::{Context, Evidence, checks, run};
use vmsight_arch::Gva;
use vmsight_linux::Kernel;
use vmsight_linux::socket::{Socket, SocketFilter};

use crate::support::{Forgery, subject};

/// The port of the two connections that the workload makes last, closes and leaves in TIME_WAIT.
const PORT: u32 = 7999;
/// What it sends over each.
const SENT: u64 = 300;

fn all(kernel: &Kernel) -> Vec<RecoveredSocket> {
    let listing = sockets(kernel).unwrap();
    assert_eq!(listing.warnings, [""; 0]);
    listing.rows
}

fn listed(kernel: &Kernel) -> Vec<Socket> {
    let filter = SocketFilter {
        ports: true,
        ..SocketFilter::INET
    };
    kernel.sockets(filter).unwrap().rows
}

#[test]
fn every_open_socket_is_found_where_sockets_are_made() {
    let subject = subject();
    for (how, kernel) in subject.both() {
        let rows = all(&kernel);
        let open: BTreeMap<Gva, &RecoveredSocket> = rows
            .iter()
            .filter(|row| row.status == "open")
            .map(|row| (row.address, row))
            .collect();
        // What is left of a connection, or is not one yet, is made elsewhere and has no type.
        let known: Vec<Socket> = listed(&kernel).into_iter().filter(|s| s.kind.is_some()).collect();
        assert!(known.len() > 40, "{how}: {known:#?}");
        for socket in known {
            let row = open.get(&socket.address);
            let row = row.unwrap_or_else(|| panic!("{how}: {socket:?} is not found"));
            assert_eq!(
                (row.certainty, row.found_in),
                (Certainty::Certain, "slab"),
                "{how}"
            );
            assert_eq!((&row.family, &row.protocol), (&socket.family, &socket.protocol));
            assert_eq!(row.state.as_ref(), Some(&socket.state), "{how}");
            // A socket that has only let go of its port still says which it was.
            let gone = socket.local_port == Some(0);
            assert!(gone || row.local_port == socket.local_port, "{how}: {socket:?}");
            assert_eq!(row.remote_port, socket.remote_port, "{how}");
            assert_eq!((row.uid, row.namespace), (socket.uid, socket.namespace), "{how}");
        }
        let unlisted: Vec<_> = rows.iter().filter(|row| row.status == "unlisted").collect();
        assert!(unlisted.is_empty(), "{how}: {unlisted:#?}");
    }
}

#[test]
fn connections_that_ended_say_whom_they_were_to() {
    let subject = subject();
    let truth = subject.guest.truth();
    let waiting: Vec<(String, u32)> = truth.net[0]
        .inet
        .iter()
        .filter(|s| s.state == "TIME_WAIT" && u32::from(s.remote_port) == PORT)
        .map(|s| (s.table.clone(), u32::from(s.local_port)))
        .collect();
    assert_eq!(waiting.len(), 2, "{waiting:?}");
    let rows = all(&subject.dumped());
    for (table, ephemeral) in waiting {
        let (family, here) = match table.as_str() {
            "tcp" => ("ipv4", "127.0.0.1"),
            _ => ("ipv6", "::1"),
        };
        let closed = |local: u32, remote: u32| {
            let mut found = rows.iter().filter(|row| {
                let ports = (row.local_port, row.remote_port);
                row.status == "closed" && row.family == family && ports == (Some(local), Some(remote))
            });
            let row = found
                .next()
                .unwrap_or_else(|| panic!("{family} {local}->{remote}: {rows:#?}"));
            assert_eq!((row.protocol.as_str(), row.state.as_ref()), ("tcp", None));
            assert_eq!(row.local_address.as_deref(), Some(here));
            assert_eq!(row.uid, Some(0));
            row
        };
        let near = closed(ephemeral, PORT);
        let far = closed(PORT, ephemeral);
        closed(PORT, 0);
        for row in [near, far] {
            assert_eq!(row.remote_address.as_deref(), Some(here));
            assert!(row.certainty <= Certainty::Likely, "{row:?}");
        }
        // SYN and FIN count as one each.
        let sent = SENT..=SENT + 2;
        assert!(
            near.sent_bytes.is_some_and(|bytes| sent.contains(&bytes)),
            "{near:?}"
        );
        assert!(
            far.received_bytes.is_some_and(|bytes| sent.contains(&bytes)),
            "{far:?}"
        );
    }
}

/// A connection that no process has accepted, taken out of the table of connections and out of that of ports.
#[test]
fn a_socket_that_lives_and_is_in_no_table_is_found() {
    let subject = subject();
    let forged = Forgery::of(&subject);
    let context = Context::new(subject.dumped());
    let check = [checks::named("hidden-sockets").unwrap()];
    let clean = run(&context, &check, &|_| {}).remove(0);
    assert!(clean.findings.is_empty() && clean.notes.is_empty(), "{clean:?}");
    let nobodys = |s: &Socket| s.state == "ESTABLISHED" && s.owners.is_empty() && s.in_ports;
    let socket = listed(&forged.kernel).into_iter().find(nobodys).unwrap();
    for member in ["skc_nulls_node", "skc_bind_node"] {
        let node = forged.member("sock_common", member, socket.address);
        let (next, before) = (forged.pointer(node), forged.pointer(node.wrapping_add(8)));
        forged.put(before, &next.0.to_le_bytes());
        // The lowest bit marks the end of the one kind of list, null that of the other.
        if next.0 & 1 == 0 && !next.is_null() {
            forged.put(next.wrapping_add(8), &before.0.to_le_bytes());
        }
    }
    let kernel = forged.forged();
    assert!(listed(&kernel).iter().all(|s| s.address != socket.address));
    let found = run(&Context::new(kernel.clone()), &check, &|_| {})
        .remove(0)
        .findings;
    let [finding] = found.as_slice() else {
        panic!("{found:#?}")
    };
    assert_eq!(finding.subject, format!("socket {}", socket.endpoint()));
    assert_eq!(finding.address, Some(socket.address));
    let evidence: Vec<String> = finding.evidence.iter().map(Evidence::to_string).collect();
    assert!(
        evidence.contains(&"in the memory of its protocol's sockets: yes".to_owned()),
        "{evidence:?}"
    );
    let rows = all(&kernel);
    let unlisted: Vec<_> = rows.iter().filter(|row| row.status == "unlisted").collect();
    let [row] = unlisted.as_slice() else {
        panic!("{unlisted:#?}")
    };
    assert_eq!(row.address, socket.address);
    // Let go of, it is a socket that was closed.
    forged.put(
        forged.member("sock_common", "skc_refcnt", socket.address),
        &[0; 4],
    );
    let kernel = forged.forged();
    let found = run(&Context::new(kernel.clone()), &check, &|_| {})
        .remove(0)
        .findings;
    assert!(found.is_empty(), "{found:#?}");
    let row = all(&kernel).into_iter().find(|row| row.address == socket.address);
    assert_eq!(row.map(|row| row.status), Some("closed"));
}

/// A cache that says that its objects are smaller than a socket, or larger than memory: memory is not gone through byte by byte for it, and
/// the check still does what it can.
#[test]
fn caches_that_lie_are_no_caches() {
    let subject = subject();
    let forged = Forgery::of(&subject);
    let protocol = forged.kernel.symbol("tcp_prot").unwrap();
    let slot = forged.member("proto", "slab", protocol);
    let cache = forged.pointer(slot);
    let check = [checks::named("hidden-sockets").unwrap()];
    let size = forged.member("kmem_cache", "size", cache);
    let right = forged.kernel.space().read_u32(size).unwrap();
    for wrong in [0, 1, 8, u32::MAX] {
        forged.put(size, &wrong.to_le_bytes());
        let kernel = forged.forged();
        let error = sockets(&kernel).unwrap_err();
        assert!(error.to_string().contains("objects have"), "{error}");
        let outcome = run(&Context::new(kernel), &check, &|_| {}).remove(0);
        assert!(!outcome.failed && outcome.looked_at > 0, "{outcome:?}");
        assert!(
            outcome
                .notes
                .iter()
                .any(|note| note.contains("memory of sockets")),
            "{outcome:?}"
        );
    }
    forged.put(size, &right.to_le_bytes());
    // No cache at all: what else there is is found.
    forged.put(slot, &[0; 8]);
    let rows = all(&forged.forged());
    let mut open = rows
        .iter()
        .filter(|row| row.protocol == "tcp" && row.status == "open");
    assert!(open.clone().any(|row| row.family == "ipv6"), "{rows:#?}");
    assert!(open.all(|row| row.family == "ipv6"), "{rows:#?}");
}
