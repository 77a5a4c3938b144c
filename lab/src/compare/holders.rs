//! Who holds which file open, by the guest's account: what owners, peers and endpoints are told from.

use std::collections::{BTreeMap, BTreeSet};

use super::spelt;
use crate::truth::{Fd, Process, Text, Truth};

/// Who has each socket open: its inode number to `PID/NAME/FD`, as vmsight writes an owner.
pub(super) type Owners = BTreeMap<u64, BTreeSet<String>>;

/// `O_*` (include/uapi/asm-generic/fcntl.h).
const O_PATH: u32 = 0o10_000_000;

/// The tables of open files: the process, the name of the thread whose table it is, and the files.
fn tables(truth: &Truth) -> impl Iterator<Item = (&Process, &Text, &[Fd])> {
    truth.processes.iter().flat_map(|process| {
        let threads = process.threads.iter().map(|t| (&t.comm, t.fds.as_slice()));
        let all = std::iter::once((&process.comm, process.fds.as_slice())).chain(threads);
        all.map(move |(comm, fds)| (process, comm, fds))
    })
}

/// The owners of all sockets.
pub(super) fn of_sockets(truth: &Truth) -> Owners {
    let mut owners = Owners::new();
    for (process, comm, fds) in tables(truth) {
        for fd in fds.iter().filter(|f| is_socket(f)) {
            owners
                .entry(fd.inode)
                .or_default()
                .insert(format!("{}/{}/{}", process.pid, spelt(comm), fd.fd));
        }
    }
    owners
}

/// The owners of BPF's objects, by kind and id.
pub(super) fn of_bpf(truth: &Truth) -> BTreeMap<(&'static str, u32), BTreeSet<String>> {
    let mut owners: BTreeMap<(&'static str, u32), BTreeSet<String>> = BTreeMap::new();
    for (process, comm, fds) in tables(truth) {
        for fd in fds {
            let (kind, key) = match spelt(&fd.link).as_str() {
                "anon_inode:bpf-prog" => ("program", "prog_id:"),
                "anon_inode:bpf-map" => ("map", "map_id:"),
                "anon_inode:bpf_link" => ("link", "link_id:"),
                _ => continue,
            };
            let mut details = fd.details.iter();
            let id = details.find_map(|line| line.strip_prefix(key)?.trim().parse().ok());
            if let Some(id) = id {
                let owner = format!("{}/{}/{}", process.pid, spelt(comm), fd.fd);
                owners.entry((kind, id)).or_default().insert(owner);
            }
        }
    }
    owners
}

/// The uid that a socket acts for: the owner of its inode, by everybody who has it open.
pub(super) fn uids_of_sockets(truth: &Truth) -> BTreeMap<u64, u32> {
    tables(truth)
        .flat_map(|(_, _, fds)| fds)
        .filter(|f| is_socket(f))
        .map(|f| (f.inode, f.uid))
        .collect()
}

/// Who can write to a pipe and who can read from it.
#[derive(Debug, Default)]
pub(super) struct Ends {
    readers: BTreeSet<String>,
    writers: BTreeSet<String>,
}

/// The ends of all pipes and named pipes, by device and inode.
pub(super) fn of_pipes(truth: &Truth) -> BTreeMap<((u32, u32), u64), Ends> {
    let mut pipes: BTreeMap<((u32, u32), u64), Ends> = BTreeMap::new();
    for (process, comm, fds) in tables(truth) {
        for fd in fds.iter().filter(|f| is_pipe(f)) {
            let ends = pipes.entry((fd.dev, fd.inode)).or_default();
            let owner = format!("{}/{}/{}", process.pid, spelt(comm), fd.fd);
            let (reads, writes) = directions(fd);
            if reads {
                ends.readers.insert(owner.clone());
            }
            if writes {
                ends.writers.insert(owner);
            }
        }
    }
    pipes
}

impl Ends {
    /// Who is at the other end of `fd`, which `owner` holds.
    pub(super) fn across(&self, fd: &Fd, owner: &str) -> BTreeSet<String> {
        let (reads, writes) = directions(fd);
        let none = BTreeSet::new();
        let (writers, readers) = (
            if reads { &self.writers } else { &none },
            if writes { &self.readers } else { &none },
        );
        writers
            .union(readers)
            .filter(|other| *other != owner)
            .cloned()
            .collect()
    }
}

/// Whether it is a socket. What else has its inode's number is a file of another file system.
pub(super) fn is_socket(fd: &Fd) -> bool {
    fd.link.starts_with("socket:[")
}

/// Whether it is a pipe, named or not.
pub(super) fn is_pipe(fd: &Fd) -> bool {
    fd.mode & 0o170_000 == 0o010_000
}

/// Whether it was opened for reading, and for writing.
fn directions(fd: &Fd) -> (bool, bool) {
    match (fd.flags & O_PATH != 0, fd.flags & 3) {
        (true, _) => (false, false),
        (_, mode) => (mode == 0 || mode == 2, mode == 1 || mode == 2),
    }
}

/// What it was opened for, in vmsight's letters.
pub(super) fn access(fd: &Fd) -> &'static str {
    match (fd.flags & O_PATH != 0, directions(fd)) {
        (true, _) => "path",
        (_, (true, true)) => "rw",
        (_, (true, false)) => "r",
        (_, (false, true)) => "w",
        (_, (false, false)) => "",
    }
}
