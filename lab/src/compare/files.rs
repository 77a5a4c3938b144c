//! Open files, working and root directories, executables and mapped files.

use std::collections::{BTreeMap, BTreeSet};

use vmsight_linux::Kernel;
use vmsight_linux::file::{FileFilter, OpenFile};

use super::{Differences, spelt};
use crate::truth::{Fd, Process, Truth};

/// Compares `Kernel::open_files` with `/proc/PID/fd`, `fdinfo`, `cwd`, `root`, `exe` and the files in `/proc/PID/maps`.
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
    let mut by_pid: BTreeMap<i32, Vec<&OpenFile>> = BTreeMap::new();
    for row in &listing.rows {
        if row.tid.is_none() {
            by_pid.entry(row.pid).or_default().push(row);
        }
        // What Linux itself cannot name: a path of more than a page.
        let long = row.path.as_ref().is_some_and(|p| p.len() > 4095);
        if !long {
            out.complaints(&format!("fd {} of {}", row.fd, row.pid), &row.problems);
        }
    }
    for process in truth.processes.iter().filter(|p| !p.is_transient()) {
        let Some(rows) = by_pid.get(&i32::try_from(process.pid)?) else {
            if process.state != 'Z' && process.cwd.is_some() {
                out.differs(format!(
                    "no files of process {} ({})",
                    process.pid,
                    process.task_comm()
                ));
            }
            continue;
        };
        one_process(process, rows, &mut out);
    }
    Ok(out)
}

fn one_process(process: &Process, rows: &[&OpenFile], out: &mut Differences) {
    let at = |what: &str| format!("{what} of {} ({})", process.pid, process.task_comm());
    let special = |fd: &str| rows.iter().find(|r| r.fd == fd).and_then(|r| shown(r));
    for (fd, said) in [
        ("cwd", &process.cwd),
        ("rtd", &process.root),
        ("txt", &process.exe),
    ] {
        if let Some(said) = said {
            out.same(at(fd), special(fd), Some(spelt(said)));
        }
    }
    let numbered = |r: &&&OpenFile| r.fd.parse::<u32>().is_ok();
    let seen: BTreeSet<u32> = rows
        .iter()
        .filter(numbered)
        .filter_map(|r| r.fd.parse().ok())
        .collect();
    let said: BTreeSet<u32> = process.fds.iter().map(|f| f.fd).collect();
    out.same(at("descriptors"), seen, said);
    for fd in &process.fds {
        if let Some(row) = rows.iter().find(|r| r.fd == fd.fd.to_string()) {
            one_file(&at(&format!("fd {}", fd.fd)), row, fd, out);
        }
    }
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
    out.same(at("mapped files"), seen, said);
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
    out.same(format!("{at}, position"), row.pos, Some(fd.pos));
    out.same(
        format!("{at}, mount"),
        row.mount_id.map(i64::from),
        Some(fd.mnt_id),
    );
    out.same(format!("{at}, inode"), row.inode, Some(fd.inode));
    out.same(format!("{at}, links"), row.links.map(u64::from), Some(fd.links));
    out.same(
        format!("{at}, device"),
        row.device.clone(),
        Some(format!("{}:{}", fd.dev.0, fd.dev.1)),
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
    if let Some(size) = row.size {
        out.same(format!("{at}, size"), size, fd.size);
    }
    if let Some(rdev) = &row.rdev {
        out.same(
            format!("{at}, device number"),
            rdev.clone(),
            format!("{}:{}", fd.rdev.0, fd.rdev.1),
        );
    }
    out.same(format!("{at}, deleted"), row.links == Some(0), fd.links == 0);
    if fd.link.starts_with("socket:") {
        out.same(format!("{at}, endpoint"), row.endpoint.is_some(), true);
    }
}
