//! Sockets and network interfaces.

use vmsight_linux::iface::Interface;
use vmsight_linux::socket::{Socket, SocketFilter, UnixSocket};
use vmsight_linux::{Kernel, Listing};

use crate::guest::{Guest, offset};
use crate::{BAD, timed};

const NODE: &str = "__sk_common.skc_node";

fn sockets(kernel: &Kernel) -> Listing<Socket> {
    timed(|| kernel.sockets(SocketFilter::ALL).unwrap())
}

/// A TCP socket of the initial namespace, listening on 127.0.0.1.
fn tcp(guest: &mut Guest, port: u64) -> u64 {
    let sock = guest.alloc("tcp_sock");
    for (member, value) in [
        ("__sk_common.skc_family", 2),
        ("__sk_common.skc_state", 10),
        ("__sk_common.skc_num", port),
        ("__sk_common.skc_rcv_saddr", 0x0100_007f),
        ("__sk_common.skc_net.net", guest.net),
        ("sk_type", 1),
        ("sk_protocol", 6),
        ("sk_uid", 1000),
    ] {
        guest.set(sock, "sock", member, value);
    }
    sock
}

/// TCP's tables with `chains` empty chains; the sockets hang on one chain of listening ones.
fn tables(guest: &mut Guest, socks: &[u64]) -> (u64, u64) {
    let heads = guest.space(64);
    let lists = guest.space(64);
    for index in 0..8 {
        guest.put(heads + index * 8, index << 1 | 1);
    }
    let head = lists + offset("inet_listen_hashbucket", "nulls_head");
    let mut at = head;
    for sock in socks {
        let node = sock + offset("sock", NODE);
        guest.put(at, node);
        at = node;
    }
    guest.put(at, 1);
    let info = guest.make(
        "inet_hashinfo",
        &[
            ("ehash", heads),
            ("ehash_mask", 7),
            ("lhash2", lists),
            ("lhash2_mask", 0),
        ],
    );
    guest.symbol("tcp_hashinfo", info);
    (info, head)
}

fn two() -> (Guest, [u64; 2], u64) {
    let mut guest = Guest::new();
    let socks = [tcp(&mut guest, 80), tcp(&mut guest, 443)];
    let (info, _) = tables(&mut guest, &socks);
    guest.process(1, "init");
    (guest, socks, info)
}

fn ports(listing: &Listing<Socket>) -> Vec<u32> {
    listing.rows.iter().filter_map(|r| r.local_port).collect()
}

#[test]
fn honest_sockets_are_listed() {
    let (guest, ..) = two();
    let listing = sockets(&guest.kernel());
    assert_eq!(ports(&listing), [80, 443]);
    let row = &listing.rows[0];
    assert_eq!(
        (row.family.as_str(), row.protocol.as_str(), row.state.as_str()),
        ("ipv4", "tcp", "LISTEN")
    );
    assert_eq!(
        (row.local_address.as_deref(), row.uid, row.namespace),
        (Some("127.0.0.1"), Some(1000), Some(4_026_531_840))
    );
    assert!(row.listed && row.problems.is_empty(), "{row:?}");
    assert_eq!(row.endpoint(), "tcp 127.0.0.1:80 LISTEN");
}

#[test]
fn chains_that_loop_show_each_socket_once() {
    let (mut guest, [a, b], _) = two();
    for target in [a, b] {
        guest.put(b + offset("sock", NODE), target + offset("sock", NODE));
        let listing = sockets(&guest.kernel());
        assert_eq!(ports(&listing), [80, 443]);
        assert!(
            listing.warnings.iter().any(|w| w.contains("cycle")),
            "{:?}",
            listing.warnings
        );
    }
    for bad in BAD.into_iter().filter(|bad| bad & 1 == 0 && *bad != 0) {
        guest.put(a + offset("sock", NODE), bad);
        let listing = sockets(&guest.kernel());
        assert!(
            listing.warnings.iter().any(|w| w.contains("cut")),
            "{bad:#x}: {:?}",
            listing.warnings
        );
    }
}

#[test]
fn tables_of_impossible_size_are_not_believed() {
    for mask in [u64::from(u32::MAX), 1 << 30, 1 << 20] {
        let (mut guest, _, info) = two();
        guest.set(info, "inet_hashinfo", "ehash_mask", mask);
        guest.set(info, "inet_hashinfo", "lhash2_mask", mask);
        let listing = sockets(&guest.kernel());
        assert!(!listing.warnings.is_empty());
    }
    for bad in BAD {
        let (mut guest, _, info) = two();
        guest.set(info, "inet_hashinfo", "ehash", bad);
        assert_eq!(ports(&sockets(&guest.kernel())), [80, 443], "{bad:#x}");
    }
}

#[test]
fn sockets_of_unknown_kinds_and_broken_ones_are_rows() {
    for (member, value) in [
        ("__sk_common.skc_family", 0xffff),
        ("__sk_common.skc_state", 0xff),
        ("sk_protocol", 0xffff),
        ("sk_type", 0xffff),
        ("__sk_common.skc_net.net", 0xdead_0000_0000_0100),
        ("__sk_common.skc_bound_dev_if", u64::from(u32::MAX)),
        ("sk_socket", 0xdead_0000_0000_0100),
        ("__sk_common.skc_state", 12),
        ("__sk_common.skc_state", 6),
    ] {
        let (mut guest, [a, _], _) = two();
        guest.set(a, "sock", member, value);
        let listing = sockets(&guest.kernel());
        assert_eq!(listing.rows.len(), 2, "{member}");
        serde_json::to_string(&listing.rows).unwrap();
    }
}

#[test]
fn unix_names_of_any_length_and_kind_are_shown() {
    let mut guest = Guest::new();
    let heads = guest.space(512 * 8);
    guest.set(guest.net, "net", "unx.table.buckets", heads);
    let mut at = heads + 8 * 3;
    let names: [(&[u8], u64); 4] = [
        (b"/run/a.sock\0junk", 14),
        (b"\0abs\0tract", 12),
        (b"/x", 0xffff_ffff),
        (b"", 2),
    ];
    for (name, len) in names {
        let sock = guest.alloc("unix_sock");
        guest.set(sock, "sock", "__sk_common.skc_family", 1);
        guest.set(sock, "sock", "__sk_common.skc_net.net", guest.net);
        guest.set(sock, "sock", "sk_type", 1);
        let address = guest.space(256);
        guest.set(address, "unix_address", "len", len);
        guest.put_bytes(address + offset("unix_address", "name") + 2, name);
        guest.set(sock, "unix_sock", "addr", address);
        guest.put(at, sock + offset("sock", NODE));
        at = sock + offset("sock", NODE);
    }
    let kernel = guest.kernel();
    let listing: Listing<UnixSocket> = timed(|| kernel.unix_sockets().unwrap());
    let paths: Vec<_> = listing.rows.iter().map(|r| r.path.as_deref()).collect();
    assert_eq!(paths, [Some("/run/a.sock"), Some("@abs@tract"), Some("/x"), None]);
    // The last socket leads back to the first: the table must still end.
    let first = guest.get(heads + 8 * 3);
    guest.put(at, first);
    let kernel = guest.kernel();
    let listing = timed(|| kernel.unix_sockets().unwrap());
    assert_eq!(listing.rows.len(), 4);
    assert!(listing.warnings.iter().any(|w| w.contains("cycle")));
}

#[test]
fn a_netlink_table_that_lies_is_cut() {
    let mut guest = Guest::new();
    let table = guest.space(32 * 192);
    let pointer = guest.space(8);
    guest.put(pointer, table);
    guest.symbol("nl_table", pointer);
    tables(&mut guest, &[]);
    for (size, nest) in [
        (u64::from(u32::MAX), 0),
        (1 << 22, 0),
        (1 << 20, 31),
        (64, u64::from(u32::MAX)),
    ] {
        let buckets = guest.make("bucket_table", &[("size", size), ("nest", nest)]);
        guest.set(buckets, "bucket_table", "future_tbl", buckets);
        guest.set(table, "netlink_table", "hash.tbl", buckets);
        let listing = sockets(&guest.kernel());
        assert!(listing.rows.len() < 1000);
    }
}

#[test]
fn groups_of_many_netlink_sockets_do_not_fill_the_memory() {
    let mut guest = Guest::new();
    tables(&mut guest, &[]);
    let table = guest.space(32 * 208);
    let pointer = guest.space(8);
    guest.put(pointer, table);
    guest.symbol("nl_table", pointer);
    let buckets = guest.make("bucket_table", &[("size", 1)]);
    let head = guest.space(8);
    assert_eq!(head, buckets + offset("bucket_table", "buckets"));
    guest.set(table, "netlink_table", "hash.tbl", buckets);
    let groups = guest.space(8192);
    guest.put_bytes(groups, &[0xff; 8192]);
    let mut at = head;
    for port in 0..1100 {
        let sock = guest.make(
            "netlink_sock",
            &[("portid", port), ("ngroups", 65536), ("groups", groups)],
        );
        guest.set(sock, "sock", "__sk_common.skc_family", 16);
        guest.set(sock, "sock", "__sk_common.skc_net.net", guest.net);
        let node = sock + offset("netlink_sock", "node");
        guest.put(at, node);
        at = node;
    }
    let kernel = guest.kernel();
    let listing = kernel.sockets(SocketFilter::ALL).unwrap();
    assert_eq!(listing.rows.len(), 1100, "{:?}", listing.warnings);
    let (with, without): (Vec<_>, Vec<_>) = listing.rows.iter().partition(|row| !row.groups.is_empty());
    assert_eq!(with.len(), 1024, "256 MiB of groups");
    assert!(
        without
            .iter()
            .all(|row| row.problems.iter().any(|p| p.field == "groups"))
    );
    assert!(
        listing.warnings.iter().any(|w| w.contains("256 MiB")),
        "{:?}",
        listing.warnings
    );
}

fn device(guest: &mut Guest, index: u64, name: &[u8]) -> u64 {
    let device = guest.make(
        "net_device",
        &[("ifindex", index), ("mtu", 1500), ("flags", 3), ("state", 3)],
    );
    guest.put_bytes(device + offset("net_device", "name"), name);
    let upper = device + offset("net_device", "adj_list.upper");
    guest.list(upper, &[]);
    device
}

#[test]
fn interfaces_whose_lists_loop_end() {
    let mut guest = Guest::new();
    let devices = [device(&mut guest, 1, b"lo"), device(&mut guest, 2, b"eth0")];
    let head = guest.net + offset("net", "dev_base_head");
    let link = offset("net_device", "dev_list");
    guest.list(head, &devices.map(|d| d + link));
    let address = guest.make("in_ifaddr", &[("ifa_local", 0x0100_007f), ("ifa_prefixlen", 8)]);
    let in_device = guest.make("in_device", &[("ifa_list", address)]);
    guest.set(devices[0], "net_device", "ip_ptr", in_device);
    let list = |guest: &Guest| -> Listing<Interface> {
        let kernel = guest.kernel();
        timed(|| kernel.interfaces().unwrap())
    };
    let listing = list(&guest);
    assert!(listing.warnings.is_empty(), "{:?}", listing.warnings);
    assert_eq!(listing.rows[0].ipv4, ["127.0.0.1/8"]);
    assert_eq!(listing.rows[1].flags, ["up", "broadcast", "running", "lower_up"]);
    guest.set(address, "in_ifaddr", "ifa_next", address);
    guest.put(devices[1] + link, devices[0] + link);
    let listing = list(&guest);
    assert_eq!(listing.rows.len(), 2);
    assert!(listing.warnings.iter().any(|w| w.contains("cycle")));
    assert_eq!(listing.rows[0].ipv4.len(), 1);
    assert!(listing.rows[0].problems.iter().any(|p| p.field == "ipv4"));
    for bad in BAD {
        for member in ["ip_ptr", "ip6_ptr", "dev_addr", "netdev_ops", "rtnl_link_ops"] {
            guest.set(devices[0], "net_device", member, bad);
            guest.set(devices[0], "net_device", "addr_len", 0xff);
        }
        assert_eq!(list(&guest).rows.len(), 2);
    }
}
