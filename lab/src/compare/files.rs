//! Open files, working and root directories, executables and mapped files.

use std::collections::{BTreeMap, BTreeSet};

use vmsight_linux::Kernel;
use vmsight_linux::file::{FileFilter, OpenFile};

use super::holders::{self, Ends, Owners};
use super::{Differences, endpoints, spelt};
use crate::truth::{Fd, Process, Text, Truth};

/// Compares `Kernel::open_files` with `/proc/PID/fd`, `fdinfo`, `cwd`, `root`, `exe`, the files in `/proc/PID/maps`, and for threads
/// that have files of their own with `/proc/PID/task/TID`. Peers and endpoints are told from the guest's tables of sockets and from
/// who else has the same pipe open.
///
/// Nothing in /proc says what vmsight calls `unreachable`: there a path from outside of every root looks like any other.
pub fn open_files(kernel: &Kernel, truth: &Truth) -> anyhow::Result<Differences> {
    let mut out = Differences::default();
    let filter = FileFilter {
        pid: None,
        directories: true,
        mapped: true,
        peers: true,
    };
    let listing = kernel.open_files(filter)?;
    out.complaints("open files", &listing.warnings);
    let mut by_table: BTreeMap<(i32, Option<i32>), Vec<&OpenFile>> = BTreeMap::new();
    for row in &listing.rows {
        by_table.entry((row.pid, row.tid)).or_default().push(row);
        // What Linux itself cannot name: a path of more than a page.
        let long = row.path.as_ref().is_some_and(|p| p.len() > 4095);
        if !long {
            out.complaints(&format!("fd {} of {}", row.fd, row.pid), &row.problems);
        }
    }
    let other_ends = OtherEnds::new(truth);
    for process in truth.processes.iter().filter(|p| !p.is_transient()) {
        let pid = i32::try_from(process.pid)?;
        match by_table.get(&(pid, None)) {
            Some(rows) => one_process(process, rows, &other_ends, &mut out),
            None if process.state != 'Z' && process.cwd.is_some() => out.differs(format!(
                "no files of process {} ({})",
                process.pid,
                process.task_comm()
            )),
            None => {}
        }
        for thread in &process.threads {
            let table = Table {
                at: format!("of thread {} ({}) of {}", thread.tid, thread.comm, process.pid),
                pid: process.pid,
                comm: &thread.comm,
                rows: by_table
                    .get(&(pid, Some(i32::try_from(thread.tid)?)))
                    .map_or(&[][..], Vec::as_slice),
            };
            table.special("cwd", thread.cwd.as_ref(), &mut out);
            table.special("rtd", thread.root.as_ref(), &mut out);
            table.descriptors(&thread.fds, &other_ends, &mut out);
        }
    }
    Ok(out)
}

/// Where sockets and pipes lead to, by the guest's account.
struct OtherEnds {
    pipes: BTreeMap<((u32, u32), u64), Ends>,
    sockets: Owners,
    endpoints: BTreeMap<u64, String>,
    unix_peers: BTreeMap<u64, u64>,
    addresses: BTreeMap<u64, u64>,
}

impl OtherEnds {
    fn new(truth: &Truth) -> Self {
        let unix = truth.net.iter().flat_map(|n| &n.unix);
        let inet = truth.net.iter().flat_map(|n| &n.inet);
        let addresses = unix
            .clone()
            .map(|s| (s.inode, s.address))
            .chain(inet.map(|s| (s.inode, s.address)));
        Self {
            pipes: holders::of_pipes(truth),
            sockets: holders::of_sockets(truth),
            endpoints: endpoints::all(truth),
            unix_peers: unix.filter_map(|s| Some((s.inode, s.peer?))).collect(),
            addresses: addresses
                .filter(|&(inode, address)| inode != 0 && address != 0)
                .collect(),
        }
    }

    /// Who holds the other end.
    fn peers(&self, fd: &Fd, owner: &str) -> BTreeSet<String> {
        let peers = if holders::is_pipe(fd) {
            self.pipes
                .get(&(fd.dev, fd.inode))
                .map(|ends| ends.across(fd, owner))
        } else if holders::is_socket(fd) {
            let peer = self.unix_peers.get(&fd.inode);
            peer.and_then(|peer| self.sockets.get(peer)).cloned()
        } else {
            None
        };
        peers.unwrap_or_default()
    }
}

/// The rows of one table of open files, that of a process or a thread's own.
struct Table<'a> {
    at: String,
    pid: u32,
    comm: &'a Text,
    rows: &'a [&'a OpenFile],
}

impl Table<'_> {
    fn special(&self, fd: &str, said: Option<&Text>, out: &mut Differences) {
        let seen = self.rows.iter().find(|r| r.fd == fd).and_then(|r| shown(r));
        if seen.is_some() || said.is_some() {
            out.same(format!("{fd} {}", self.at), seen, said.map(spelt));
        }
    }

    fn descriptors(&self, fds: &[Fd], other_ends: &OtherEnds, out: &mut Differences) {
        let seen: BTreeSet<u32> = self.rows.iter().filter_map(|r| r.fd.parse().ok()).collect();
        let said: BTreeSet<u32> = fds.iter().map(|f| f.fd).collect();
        out.same(format!("descriptors {}", self.at), seen, said);
        for fd in fds {
            let Some(row) = self.rows.iter().find(|r| r.fd == fd.fd.to_string()) else {
                continue;
            };
            let at = format!("fd {} {}", fd.fd, self.at);
            one_file(&at, row, fd, out);
            out.same(format!("{at}, name"), row.name.to_string(), spelt(self.comm));
            let seen: BTreeSet<String> = row.peers.iter().map(owner).collect();
            let own = format!("{}/{}/{}", self.pid, spelt(self.comm), fd.fd);
            out.same(format!("{at}, peers"), seen, other_ends.peers(fd, &own));
            if holders::is_socket(fd) {
                let endpoint = row.endpoint.as_deref().map(str::trim_end);
                match other_ends.endpoints.get(&fd.inode) {
                    Some(said) => out.same(format!("{at}, endpoint"), endpoint, Some(said.as_str())),
                    None => out.same(format!("{at}, endpoint"), endpoint.is_some(), true),
                }
                if let Some(&said) = other_ends.addresses.get(&fd.inode) {
                    out.same(format!("{at}, socket"), row.socket.map(|s| s.0), Some(said));
                }
            } else {
                out.same(format!("{at}, endpoint"), row.endpoint.as_ref(), None::<&String>);
                out.same(format!("{at}, socket"), row.socket, None);
            }
        }
    }
}

/// An owner as JSON shows it.
pub(super) fn owner(owner: &vmsight_linux::file::Owner) -> String {
    format!("{}/{}/{}", owner.pid, owner.name, owner.fd)
}

fn one_process(process: &Process, rows: &[&OpenFile], other_ends: &OtherEnds, out: &mut Differences) {
    let table = Table {
        at: format!("of {} ({})", process.pid, process.task_comm()),
        pid: process.pid,
        comm: &process.comm,
        rows,
    };
    for (fd, said) in [
        ("cwd", &process.cwd),
        ("rtd", &process.root),
        ("txt", &process.exe),
    ] {
        // What a zombie has given back, and what only the kernel's own threads share, /proc does not show.
        if said.is_some() {
            table.special(fd, said.as_ref(), out);
        }
    }
    table.descriptors(&process.fds, other_ends, out);
    let said: BTreeSet<String> = process
        .maps
        .iter()
        .filter(|m| m.inode != 0 && m.path.starts_with("/"))
        .map(|m| spelt(&m.path))
        .filter(|path| process.exe.as_ref().is_none_or(|exe| *path != spelt(exe)))
        .collect();
    let seen: BTreeSet<String> = rows
        .iter()
        .filter(|r| r.fd == "mem")
        .filter_map(|r| shown(r))
        .map(|p| p.replace('\n', "\\012"))
        .collect();
    out.same(format!("mapped files {}", table.at), seen, said);
}

/// The name as `/proc` prints it.
fn shown(row: &OpenFile) -> Option<String> {
    let path = row.path.as_ref()?;
    Some(if row.deleted {
        format!("{path} (deleted)")
    } else {
        path.clone()
    })
}

fn one_file(at: &str, row: &OpenFile, fd: &Fd, out: &mut Differences) {
    out.same(format!("{at}, path"), shown(row), Some(spelt(&fd.link)));
    out.same(
        format!("{at}, flags"),
        row.flags.clone(),
        Some(format!("0{:o}", fd.flags)),
    );
    out.same(format!("{at}, access"), row.access, holders::access(fd));
    out.same(format!("{at}, position"), row.pos, Some(fd.pos));
    out.same(
        format!("{at}, mount"),
        row.mount_id.map(i64::from),
        Some(fd.mnt_id),
    );
    out.same(format!("{at}, inode"), row.inode, Some(fd.inode));
    out.same(format!("{at}, links"), row.links.map(u64::from), Some(fd.links));
    let device = |(major, minor): (u32, u32)| format!("{major}:{minor}");
    out.same(
        format!("{at}, device"),
        row.device.as_ref(),
        Some(&device(fd.dev)),
    );
    let kind = match fd.mode & 0o170_000 {
        0o100_000 => "REG",
        0o040_000 => "DIR",
        0o020_000 => "CHR",
        0o060_000 => "BLK",
        0o010_000 => "FIFO",
        0o140_000 => "sock",
        _ => "a_inode",
    };
    // Anonymous inodes have been regular files by their mode since 6.17; their names still tell.
    let kind = if fd.link.starts_with("anon_inode:") {
        "a_inode"
    } else {
        kind
    };
    out.same(format!("{at}, type"), row.kind, kind);
    let (size, rdev) = match kind {
        "REG" | "DIR" => (Some(fd.size), None),
        "CHR" | "BLK" => (None, Some(device(fd.rdev))),
        _ => (None, None),
    };
    out.same(format!("{at}, size"), row.size, size);
    out.same(format!("{at}, device number"), row.rdev.as_ref(), rdev.as_ref());
    out.same(format!("{at}, deleted"), row.deleted, fd.links == 0);
}
