//! Mounts and mount namespaces.

use vmsight_linux::Listing;
use vmsight_linux::mount::Mount;

use crate::guest::{Guest, offset};
use crate::{BAD, timed};

/// A namespace with two mounts, the second on the first, and one process.
fn two() -> (Guest, [u64; 2], [u64; 2]) {
    let mut guest = Guest::new();
    let sb = guest.filesystem("ext4");
    let inode = guest.inode(sb, 2, 0o040_755);
    let root = guest.dentry(b"/", None, inode);
    let point = guest.dentry(b"mnt", Some(root), inode);
    let top = guest.mount(1, sb, root, None);
    let other = guest.filesystem("proc");
    let inner = guest.dentry(b"/", None, inode);
    let below = guest.mount(2, other, inner, Some((top, point)));
    let nodes = [top, below].map(|m| m + offset("mount", "mnt_node"));
    // struct rb_node: parent and colour, right, left.
    guest.put(nodes[0] + 8, nodes[1]);
    guest.set(guest.mnt_ns, "mnt_namespace", "mounts", nodes[0]);
    let fs = guest.make(
        "fs_struct",
        &[("root.mnt", top + offset("mount", "mnt")), ("root.dentry", root)],
    );
    let task = guest.process(1, "init");
    guest.set(task, "task_struct", "fs", fs);
    (guest, [top, below], nodes)
}

fn mounts(guest: &Guest) -> Listing<Mount> {
    let kernel = guest.kernel();
    timed(|| kernel.mounts().unwrap())
}

#[test]
fn an_honest_namespace_is_listed_whole() {
    let (mut guest, [top, below], _) = two();
    guest.set(top, "mount", "mnt.mnt_flags", 0x1000 | 0x21);
    guest.set(top, "mount", "mnt_group_id", 5);
    guest.set(below, "mount", "mnt_master", top);
    let source = guest.text(b"/dev/vda1");
    guest.set(top, "mount", "mnt_devname", source);
    let listing = mounts(&guest);
    assert!(listing.warnings.is_empty(), "{:?}", listing.warnings);
    let [first, second] = listing.rows.as_slice() else {
        panic!("{:?}", listing.rows)
    };
    assert_eq!(
        (
            first.mount_id,
            first.mount_point.as_deref(),
            first.root.as_deref()
        ),
        (1, Some("/"), Some("/"))
    );
    assert_eq!(
        (first.options.as_deref(), first.source.as_deref()),
        (Some("rw,nosuid,relatime"), Some("/dev/vda1"))
    );
    assert_eq!(
        (first.propagation.as_slice(), first.device.as_deref()),
        (["shared:5".to_owned()].as_slice(), Some("0:42"))
    );
    assert_eq!(
        (second.parent_id, second.mount_point.as_deref()),
        (Some(1), Some("/mnt"))
    );
    assert_eq!(
        (second.fs_type.as_deref(), second.source.as_deref()),
        (Some("proc"), Some("none"))
    );
    assert_eq!(second.propagation, ["master:5"]);
    assert!(
        listing
            .rows
            .iter()
            .all(|r| !r.unreachable && r.namespace == 4_026_531_841 && r.pid == Some(1))
    );
}

#[test]
fn a_tree_of_mounts_that_loops_is_cut() {
    let (mut guest, _, nodes) = two();
    for child in [8, 16] {
        guest.put(nodes[1] + child, nodes[0]);
        let listing = mounts(&guest);
        assert!(
            listing.warnings.iter().any(|w| w.contains("mounts of namespace")),
            "{:?}",
            listing.warnings
        );
        assert!(listing.rows.len() <= 2);
        guest.put(nodes[1] + child, 0);
    }
}

#[test]
fn broken_mounts_are_marked_and_the_others_kept() {
    for bad in BAD {
        for member in [
            "mnt_parent",
            "mnt_mountpoint",
            "mnt.mnt_root",
            "mnt.mnt_sb",
            "mnt_devname",
            "mnt_master",
        ] {
            let (mut guest, [_, below], _) = two();
            guest.set(below, "mount", member, bad);
            let listing = mounts(&guest);
            assert_eq!(listing.rows.len(), 2, "{member} {bad:#x}");
            assert_eq!(listing.rows[0].mount_point.as_deref(), Some("/"));
            let fine = bad == 0 && matches!(member, "mnt_devname" | "mnt_master");
            let row = &listing.rows[1];
            assert!(
                fine || !row.problems.is_empty() || row.unreachable,
                "{member} {bad:#x}: {row:?}"
            );
        }
    }
}

#[test]
fn masters_that_are_their_own_masters_end() {
    let (mut guest, [top, below], _) = two();
    guest.set(top, "mount", "mnt_master", below);
    guest.set(below, "mount", "mnt_master", top);
    let listing = mounts(&guest);
    assert_eq!(listing.rows.len(), 2);
    assert!(
        listing
            .rows
            .iter()
            .all(|r| r.problems.iter().any(|p| p.field == "propagation"))
    );
}

#[test]
fn what_lies_above_the_root_of_its_processes_is_unreachable() {
    let (mut guest, [_, below], _) = two();
    let jail = guest.get(below + offset("mount", "mnt.mnt_root"));
    let task = guest.get(guest.init + offset("task_struct", "tasks")) - offset("task_struct", "tasks");
    let fs = guest.get(task + offset("task_struct", "fs"));
    guest.set(fs, "fs_struct", "root.mnt", below + offset("mount", "mnt"));
    guest.set(fs, "fs_struct", "root.dentry", jail);
    let listing = mounts(&guest);
    let seen: Vec<_> = listing
        .rows
        .iter()
        .map(|r| (r.mount_id, r.unreachable, r.mount_point.as_deref()))
        .collect();
    assert_eq!(seen, [(1, true, Some("/")), (2, false, Some("/"))]);
}

#[test]
fn a_namespace_that_only_a_file_holds_is_found_by_its_inode() {
    let (mut guest, [top, _], nodes) = two();
    let operations = guest.space(8);
    guest.symbol("mntns_operations", operations);
    // The same mounts again, in a namespace of no process; beside it an inode of a namespace of another kind.
    let hidden = guest.make(
        "mnt_namespace",
        &[("ns.inum", 4_026_532_999), ("mounts", nodes[0])],
    );
    guest.set(
        hidden + offset("mnt_namespace", "ns"),
        "ns_common",
        "ops",
        operations,
    );
    let other = guest.alloc("net");
    let nsfs = guest.filesystem("nsfs");
    let inodes = [
        guest.inode(nsfs, 4_026_532_999, 0o100_444),
        guest.inode(nsfs, 1, 0o100_444),
    ];
    guest.set(
        inodes[0],
        "inode",
        "i_private",
        hidden + offset("mnt_namespace", "ns"),
    );
    guest.set(inodes[1], "inode", "i_private", other);
    let links = inodes.map(|inode| inode + offset("inode", "i_sb_list"));
    let head = nsfs + offset("super_block", "s_inodes");
    guest.list(head, &links);
    let mount = guest.make("vfsmount", &[("mnt_sb", nsfs)]);
    let pointer = guest.space(8);
    guest.put(pointer, mount);
    guest.symbol("nsfs_mnt", pointer);
    let listing = mounts(&guest);
    assert!(listing.warnings.is_empty(), "{:?}", listing.warnings);
    let seen: Vec<_> = listing
        .rows
        .iter()
        .map(|r| (r.namespace, r.mount_id, r.pid, r.processes))
        .collect();
    let (own, hidden) = (4_026_531_841, 4_026_532_999);
    assert_eq!(
        seen,
        [
            (own, 1, Some(1), 1),
            (own, 2, Some(1), 1),
            (hidden, 1, None, 0),
            (hidden, 2, None, 0)
        ]
    );
    assert!(listing.rows.iter().any(|r| r.address.0 == top));
    guest.put(links[1], links[0]);
    let listing = mounts(&guest);
    assert_eq!(listing.rows.len(), 4);
    assert!(
        listing.warnings.iter().any(|w| w.contains("cycle")),
        "{:?}",
        listing.warnings
    );
}

#[test]
fn namespaces_that_share_long_paths_do_not_fill_the_memory() {
    const NAMESPACES: u64 = 80;
    const MOUNTS: u64 = 80;
    let mut guest = Guest::new();
    let sb = guest.filesystem("ext4");
    let inode = guest.inode(sb, 2, 0o040_755);
    let root = guest.dentry(b"/", None, inode);
    let mut deep = root;
    for _ in 0..30 {
        deep = guest.dentry(&[b'd'; 1020], Some(deep), inode);
    }
    let top = guest.mount(1, sb, root, None);
    let mut last: Option<u64> = None;
    let mut tree = 0;
    for id in 0..MOUNTS {
        let node = guest.mount(2 + id, sb, deep, Some((top, deep))) + offset("mount", "mnt_node");
        match last {
            Some(last) => guest.put(last + 8, node),
            None => tree = node,
        }
        last = Some(node);
    }
    let mut last = guest.space(8);
    guest.symbol("mnt_ns_tree", last);
    for inum in 0..NAMESPACES {
        let namespace = guest.make("mnt_namespace", &[("ns.inum", 100 + inum), ("mounts", tree)]);
        let node = namespace + offset("mnt_namespace", "mnt_ns_tree_node");
        guest.put(last, node);
        last = node + 8;
    }
    let kernel = guest.kernel();
    let listing = kernel.mounts().unwrap();
    let held: usize = listing
        .rows
        .iter()
        .flat_map(|row| [&row.root, &row.mount_point])
        .flatten()
        .map(String::len)
        .sum();
    assert!(held > 200 << 20 && held <= 256 << 20, "{held} bytes");
    for said in ["256 MiB", "namespaces are left out"] {
        assert!(
            listing.warnings.iter().any(|w| w.contains(said)),
            "{:?}",
            listing.warnings
        );
    }
}
