//! Datagrams that nobody reads, and what is left of a connection's packets.

use std::collections::BTreeSet;

use vmsight_analysis::recover::packets::{Packet, packets, write_pcap};
use vmsight_linux::socket::SocketFilter;

use crate::support::{Forgery, subject};

fn unread(rows: &[Packet]) -> Vec<&Packet> {
    let mut found: Vec<_> = rows
        .iter()
        .filter(|row| row.protocol == "udp" && row.destination == "127.0.0.1:5353")
        .collect();
    found.retain(|row| row.found_in == "queue");
    found
}

#[test]
fn datagrams_that_nobody_read_are_there_byte_for_byte() {
    let subject = subject();
    for (how, kernel) in subject.both() {
        let listing = packets(&kernel).unwrap();
        assert_eq!(listing.warnings, [""; 0], "{how}");
        let unread = unread(&listing.rows);
        assert_eq!(unread.len(), 3, "{how}: {:#?}", listing.rows);
        for packet in unread {
            assert_eq!(packet.source, "127.0.0.1:5354", "{how}");
            assert_eq!(packet.length, 20 + 8 + 64, "{how}");
            assert_eq!(packet.bytes()[28..], [b'd'; 64], "{how}");
            // The loopback interface leaves checksums to hardware that there is none of.
            assert_eq!(packet.checksum, "partial", "{how}");
            assert!(packet.problems.is_empty(), "{how}: {packet:?}");
            assert!(
                packet.sockets.iter().any(|s| s.starts_with("udp 0.0.0.0:5353")),
                "{how}: {packet:?}"
            );
        }
        // What nobody waits for any more proves itself.
        let others = listing.rows.iter().filter(|row| row.found_in == "slab");
        assert!(others.clone().all(|row| row.checksum != "bad"), "{how}");
        let places: BTreeSet<_> = listing.rows.iter().map(|row| row.address.0).collect();
        assert_eq!(places.len(), listing.rows.len(), "{how}");
    }
}

#[test]
fn the_capture_file_has_each_packet_behind_its_header() {
    let subject = subject();
    let rows = packets(&subject.dumped()).unwrap().rows;
    let mut file = Vec::new();
    write_pcap(&rows, &mut file).unwrap();
    assert_eq!(file[..4], [0x4d, 0x3c, 0xb2, 0xa1]);
    assert_eq!(file[20..24], [101, 0, 0, 0]);
    let mut at = 24;
    for row in &rows {
        let length = u32::from_le_bytes(file[at + 8..at + 12].try_into().unwrap()) as usize;
        assert_eq!(length, row.length);
        assert_eq!(&file[at + 16..at + 16 + length], row.bytes());
        at += 16 + length;
    }
    assert_eq!(at, file.len());
}

#[test]
fn packets_that_lie_cost_a_packet_or_a_warning() {
    let subject = subject();
    let honest = subject.dumped();
    let rows = packets(&honest).unwrap().rows;
    let address = unread(&rows)[0].address;
    let sockets = honest.sockets(SocketFilter::INET).unwrap().rows;
    let socket = sockets
        .iter()
        .find(|s| s.protocol == "udp" && s.local_port == Some(5353))
        .unwrap();
    for (member, bytes) in [
        ("head", &u64::MAX.to_le_bytes()[..]),
        ("tail", &[0; 4]),
        ("network_header", &[0xff, 0xff]),
    ] {
        let forged = Forgery::of(&subject);
        forged.put(forged.member("sk_buff", member, address), bytes);
        let listing = packets(&forged.forged()).unwrap();
        assert_eq!(unread(&listing.rows).len(), 2, "{member}");
    }
    // A queue that never comes back to its head.
    let forged = Forgery::of(&subject);
    forged.put(
        forged.member("sk_buff", "next", address),
        &address.0.to_le_bytes(),
    );
    let listing = packets(&forged.forged()).unwrap();
    assert!(
        listing
            .warnings
            .iter()
            .any(|w| w.contains("the queue of udp 0.0.0.0:5353")),
        "{:?}: {:?}",
        socket.address,
        listing.warnings
    );
}
