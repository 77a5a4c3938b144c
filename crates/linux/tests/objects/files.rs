//! Paths and file descriptors.

use vmsight_arch::Gva;
use vmsight_linux::file::{FileFilter, OpenFile};
use vmsight_linux::path::{self, PathResolver};
use vmsight_linux::{Kernel, Listing};

use crate::guest::{Guest, offset};
use crate::{BAD, timed};

const REG: u64 = 0o100_644;
const DIR: u64 = 0o040_755;

/// `/`, with `/data` on it, and a second filesystem mounted there.
struct Tree {
    guest: Guest,
    root: u64,
    data: u64,
    inner_mount: u64,
    inner: u64,
    root_mount: u64,
    inode: u64,
}

fn tree() -> Tree {
    let mut guest = Guest::new();
    let sb = guest.filesystem("ext4");
    let (dir, inode) = (guest.inode(sb, 2, DIR), guest.inode(sb, 77, REG));
    let root = guest.dentry(b"/", None, dir);
    let data = guest.dentry(b"data", Some(root), dir);
    let root_mount = guest.mount(1, sb, root, None);
    let inner = guest.dentry(b"/", None, dir);
    let inner_mount = guest.mount(2, sb, inner, Some((root_mount, data)));
    Tree {
        guest,
        root,
        data,
        inner_mount,
        inner,
        root_mount,
        inode,
    }
}

fn files(kernel: &Kernel) -> Listing<OpenFile> {
    timed(|| kernel.open_files(FileFilter::default()).unwrap())
}

#[test]
fn an_honest_path_goes_through_its_mounts() {
    let mut t = tree();
    let log = t.guest.dentry(b"l\xff\x1bog", Some(t.inner), t.inode);
    let gone = t.guest.dentry(b"gone", Some(t.inner), t.inode);
    t.guest.set(gone, "dentry", "d_hash.pprev", 0);
    let (a, b) = (
        t.guest.file(t.inner_mount, log),
        t.guest.file(t.inner_mount, gone),
    );
    let task = t.guest.process(7, "reader");
    t.guest.open(task, &[a, 0, b]);
    let listing = files(&t.guest.kernel());
    assert!(listing.warnings.is_empty(), "{:?}", listing.warnings);
    let [first, second] = listing.rows.as_slice() else {
        panic!("{:?}", listing.rows)
    };
    assert_eq!(first.path.as_deref(), Some("/data/l\\xff\u{1b}og"));
    assert_eq!(
        (first.pid, first.fd.as_str(), first.kind, first.access),
        (7, "0", "REG", "rw")
    );
    assert_eq!(
        (first.inode, first.device.as_deref(), first.mount_id),
        (Some(77), Some("0:42"), Some(2))
    );
    assert_eq!(first.flags.as_deref(), Some("0100002"));
    assert!(!first.deleted && first.problems.is_empty());
    assert_eq!(
        (second.path.as_deref(), second.fd.as_str(), second.deleted),
        (Some("/data/gone"), "2", true)
    );
    assert!(path::resolve(&t.guest.kernel(), Gva(1)).is_err());
}

#[test]
fn directories_that_contain_themselves_end() {
    let mut t = tree();
    let a = t.guest.dentry(b"a", Some(t.inner), t.inode);
    let b = t.guest.dentry(b"b", Some(a), t.inode);
    t.guest.set(a, "dentry", "d_parent", b);
    let file = t.guest.file(t.inner_mount, b);
    let resolver = PathResolver::new(&t.guest.kernel()).unwrap();
    let path = timed(|| resolver.file(Gva(file)).unwrap());
    assert!(
        path.problem.as_ref().is_some_and(|p| p.contains("cycle")),
        "{:?}",
        path.problem
    );
    assert!(
        path.path.starts_with('?') && path.path.ends_with("/a/b"),
        "{:.40}",
        path.path
    );
    assert!(path.path.len() < 64 << 10);
}

#[test]
fn mounts_that_are_mounted_on_themselves_end() {
    let mut t = tree();
    // Each mount lies on the root of the other.
    t.guest.set(t.root_mount, "mount", "mnt_parent", t.inner_mount);
    t.guest.set(t.root_mount, "mount", "mnt_mountpoint", t.inner);
    t.guest.set(t.inner_mount, "mount", "mnt_mountpoint", t.root);
    let name = t.guest.dentry(b"x", Some(t.inner), t.inode);
    let file = t.guest.file(t.inner_mount, name);
    let path = timed(|| {
        PathResolver::new(&t.guest.kernel())
            .unwrap()
            .file(Gva(file))
            .unwrap()
    });
    assert!(
        path.problem.as_ref().is_some_and(|p| p.contains("cycle")),
        "{path:?}"
    );
    assert_eq!(path.path, "?/x");
}

#[test]
fn a_directory_outside_of_its_mount_and_a_detached_mount_are_said() {
    let mut t = tree();
    let stray = t.guest.dentry(b"/", None, t.inode);
    let name = t.guest.dentry(b"x", Some(stray), t.inode);
    let file = t.guest.file(t.inner_mount, name);
    t.guest.set(t.root_mount, "mount", "mnt_ns", 0);
    let detached = t.guest.file(t.root_mount, t.data);
    let resolver = PathResolver::new(&t.guest.kernel()).unwrap();
    let path = resolver.file(Gva(file)).unwrap();
    assert!(
        path.unreachable && path.problem.is_some() && path.path == "?/x",
        "{path:?}"
    );
    let path = resolver.file(Gva(detached)).unwrap();
    assert!(path.unreachable && path.path == "/data", "{path:?}");
}

#[test]
fn broken_names_and_parents_cost_one_path() {
    for bad in BAD {
        for member in ["d_parent", "d_name.name", "d_inode", "d_op", "d_sb"] {
            let mut t = tree();
            let dir = t.guest.dentry(b"dir", Some(t.inner), t.inode);
            let (x, y) = (
                t.guest.dentry(b"x", Some(dir), t.inode),
                t.guest.dentry(b"y", Some(t.inner), t.inode),
            );
            let (a, b) = (t.guest.file(t.inner_mount, x), t.guest.file(t.inner_mount, y));
            t.guest.set(dir, "dentry", member, bad);
            t.guest.set(x, "dentry", "d_name.len", u64::from(u32::MAX));
            let task = t.guest.process(7, "reader");
            t.guest.open(task, &[a, b]);
            let listing = files(&t.guest.kernel());
            assert_eq!(listing.rows.len(), 2, "{member} {bad:#x}");
            assert!(
                listing.rows[0].path.as_ref().is_some_and(|p| p.ends_with("/x")),
                "{member} {bad:#x}"
            );
            assert_eq!(listing.rows[1].path.as_deref(), Some("/data/y"));
            if matches!(member, "d_parent" | "d_name.name") {
                assert!(
                    !listing.rows[0].problems.is_empty(),
                    "{member} {bad:#x}: {:?}",
                    listing.rows[0]
                );
            }
        }
    }
}

#[test]
fn a_table_of_two_thousand_million_files_is_cut() {
    for claimed in [1u64 << 31, u64::from(u32::MAX), 1 << 22] {
        let mut t = tree();
        let file = t.guest.file(t.inner_mount, t.inner);
        let task = t.guest.process(7, "reader");
        let table = t.guest.open(task, &[file, file]);
        t.guest.set(table, "fdtable", "max_fds", claimed);
        let listing = files(&t.guest.kernel());
        assert!(listing.rows.len() >= 2);
        assert_eq!(listing.rows[0].path.as_deref(), Some("/data"));
        assert!(
            listing.warnings.iter().any(|w| w.contains("cut")),
            "{:?}",
            listing.warnings
        );
    }
}

#[test]
fn a_table_full_of_garbage_is_given_up() {
    let mut t = tree();
    let task = t.guest.process(7, "reader");
    let table = t.guest.open(task, &vec![0xdead_0000_0000_0100; 4096]);
    let listing = files(&t.guest.kernel());
    assert!(listing.rows.len() < 1000, "{}", listing.rows.len());
    assert!(listing.rows.iter().all(|r| !r.problems.is_empty()));
    assert!(
        listing.warnings.iter().any(|w| w.contains("lead to no file")),
        "{:?}",
        listing.warnings
    );
    for member in ["fd", "open_fds", "close_on_exec"] {
        for bad in BAD {
            t.guest.set(table, "fdtable", member, bad);
            files(&t.guest.kernel());
        }
    }
}

#[test]
fn one_process_is_listed_alone_and_one_that_is_not_there_is_an_error() {
    let mut t = tree();
    let file = t.guest.file(t.inner_mount, t.inner);
    for pid in [7, 8] {
        let task = t.guest.process(pid, "reader");
        t.guest.open(task, &[file]);
    }
    let kernel = t.guest.kernel();
    let listing = kernel
        .open_files(FileFilter {
            pid: Some(8),
            ..FileFilter::default()
        })
        .unwrap();
    assert_eq!(listing.rows.iter().map(|r| r.pid).collect::<Vec<_>>(), [8]);
    assert!(
        kernel
            .open_files(FileFilter {
                pid: Some(9),
                ..FileFilter::default()
            })
            .is_err()
    );
}

#[test]
fn the_other_ends_of_a_pipe_are_named_and_not_by_the_thousand() {
    let mut t = tree();
    let sb = t.guest.filesystem("pipefs");
    let inode = t.guest.inode(sb, 500, 0o010_600);
    t.guest.set(inode, "inode", "i_pipe", 0x1234_5678);
    let dname = 0xffff_8880_0000_f000;
    t.guest.symbol("pipefs_dname", dname);
    let ops = t.guest.make("dentry_operations", &[("d_dname", dname)]);
    let dentry = t.guest.dentry(b"", None, inode);
    t.guest.set(dentry, "dentry", "d_op", ops);
    let (reader, writer) = (
        t.guest.file(t.root_mount, dentry),
        t.guest.file(t.root_mount, dentry),
    );
    t.guest.set(reader, "file", "f_mode", 1);
    t.guest.set(writer, "file", "f_mode", 2);
    let (a, b) = (t.guest.process(7, "reader"), t.guest.process(8, "writer"));
    t.guest.open(a, &[reader]);
    t.guest.open(b, &vec![writer; 500]);
    let listing = files(&t.guest.kernel());
    assert_eq!(listing.rows.len(), 501);
    let first = &listing.rows[0];
    assert_eq!((first.path.as_deref(), first.kind), (Some("pipe:[500]"), "FIFO"));
    assert_eq!(first.peers.len(), 64);
    assert!(first.problems.iter().any(|p| p.field == "peers"));
    assert_eq!(
        serde_json::to_value(&listing.rows[1].peers).unwrap(),
        serde_json::json!(["7/reader/0"])
    );
}

#[test]
fn a_process_without_a_table_or_with_a_broken_one_is_said() {
    for bad in BAD {
        let mut t = tree();
        let task = t.guest.process(7, "reader");
        t.guest.set(task, "task_struct", "files", bad);
        t.guest.set(task, "task_struct", "fs", bad);
        t.guest.set(task, "task_struct", "mm", bad);
        let listing = files(&t.guest.kernel());
        assert!(bad == 0 || !listing.warnings.is_empty(), "{bad:#x}");
        let _ = offset("file", "f_mode");
    }
}

#[test]
fn processes_that_share_their_threads_do_not_multiply_their_files() {
    const COUNT: u64 = 30;
    let mut t = tree();
    let name = t.guest.dentry(b"log", Some(t.root), t.inode);
    let file = t.guest.file(t.root_mount, name);
    let signal = t.guest.make("signal_struct", &[("nr_threads", COUNT)]);
    let mut nodes = Vec::new();
    for tid in 0..COUNT {
        let thread = t.guest.make("task_struct", &[("pid", 100 + tid), ("tgid", 1)]);
        t.guest.open(thread, &[file]);
        nodes.push(thread + offset("task_struct", "thread_node"));
    }
    t.guest
        .list(signal + offset("signal_struct", "thread_head"), &nodes);
    for pid in 1..=COUNT {
        let task = t.guest.process(pid, "sharing");
        t.guest.set(task, "task_struct", "signal", signal);
    }
    let listing = files(&t.guest.kernel());
    assert_eq!(
        listing.rows.len() as u64,
        COUNT,
        "a descriptor of each thread, once"
    );
    assert!(
        listing
            .warnings
            .iter()
            .any(|w| w.contains("29 processes have a list of threads that is another's")),
        "{:?}",
        listing.warnings
    );
}
