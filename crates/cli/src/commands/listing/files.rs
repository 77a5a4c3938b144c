//! Open files, mounts, modules.

use anyhow::{Context, Result};
use clap::Args;
use vmsight_linux::{
    file::{FileFilter, OpenFile},
    module::ModuleFields,
};

use super::{all_there, found, print};
use crate::{
    Outcome,
    args::Global,
    output::{Fields, Format, Record, Row, Sheet, Sink},
    session::Session,
};

/// Open files.
#[derive(Args, Debug)]
#[command(after_help = "\
Paths are resolved through the mounts of the guest. `deleted` files are still open but have no name any more;
`unreachable` ones lie outside what the process's root or namespace shows. For pipes and UNIX sockets, `peers` are
the processes at the other end.")]
pub(crate) struct Lsof {
    /// What to look into
    target: String,
    /// Only this process
    #[arg(short, long)]
    pid: Option<i32>,
    /// File descriptors only, without working directory, root and executable
    #[arg(short, long)]
    descriptors: bool,
    /// Mapped files too
    #[arg(short, long)]
    mapped: bool,
    /// Only sockets: their protocol, what they are bound and connected to, and who is at the other end
    #[arg(short, long)]
    sockets: bool,
    /// Only files that are open but deleted
    #[arg(long)]
    deleted: bool,
}

impl Lsof {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let wanted = |column: &str| {
            global
                .columns
                .as_ref()
                .is_none_or(|c| c.iter().any(|c| c == column || c == "all"))
        };
        let filter = FileFilter {
            pid: self.pid,
            directories: !self.descriptors,
            mapped: self.mapped,
            peers: self.sockets || wanted("peers") || wanted("endpoint"),
        };
        let mut listing = session
            .kernel()?
            .open_files(filter)
            .context("listing open files")?;
        listing
            .rows
            .retain(|f| (f.deleted || !self.deleted) && (f.kind == SOCKET || !self.sockets));
        let narrowed = self.deleted || self.sockets || self.pid.is_some();
        let any = !listing.rows.is_empty() || !narrowed;
        if !any {
            listing.warn("the guest has no such files open");
        }
        if self.sockets {
            session.print(&sockets(&listing.rows, listing.warnings))?;
        } else {
            print(&session, LSOF, listing)?;
        }
        Ok(found(any))
    }
}

/// [`OpenFile::kind`] of a socket.
const SOCKET: &str = "sock";

pub(super) const LSOF: &[&str] = &[
    "pid", "name", "fd", "type", "access", "device", "inode", "path", "endpoint", "peers",
];

/// An open socket: its protocol is a column of its own, behind the others.
struct OpenSocket<'a>(&'a OpenFile);

const PROTOCOL: &str = "protocol";

impl Record for OpenSocket<'_> {
    fn fields<S: Sink>(&self, to: &mut Fields<'_, S>) -> serde_json::Result<()> {
        self.0.fields(to)?;
        to.field(PROTOCOL, &self.0.endpoint.as_deref().and_then(protocol))
    }
}

/// Sockets as rows of their own columns: in front what tells one, then what it is connected to.
fn sockets(files: &[OpenFile], warnings: Vec<String>) -> Sheet<OpenSocket<'_>> {
    Sheet {
        keys: [OpenFile::COLUMNS, &[PROTOCOL]].concat(),
        columns: &[
            "pid", "name", "fd", PROTOCOL, "inode", "socket", "endpoint", "peers",
        ],
        rows: files.iter().map(OpenSocket).collect(),
        warnings,
    }
}

/// An endpoint begins with its protocol: `tcp 10.0.0.1:22->…`, `unix /run/x`, `unix->/run/x`.
fn protocol(endpoint: &str) -> Option<&str> {
    endpoint.split(' ').next()?.split("->").next()
}

/// Mounts.
#[derive(Args, Debug)]
#[command(after_help = "\
Every mount namespace that a process lives in, as /proc/PID/mountinfo shows it there. Options that a file system
keeps in its own way are not known from outside; super_options_known says so.")]
pub(crate) struct Mounts {
    /// What to look into
    target: String,
    /// Only the namespace of this process
    #[arg(short, long)]
    pid: Option<i32>,
}

impl Mounts {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let kernel = session.kernel()?;
        let mut listing = kernel.mounts().context("listing mounts")?;
        let mut any = true;
        if let Some(pid) = self.pid {
            let fields = vmsight_linux::ProcessFields::NAMESPACES;
            let namespace = kernel
                .process(pid, fields)
                .context("finding the process")?
                .details()
                .mnt_ns;
            listing.rows.retain(|m| Some(m.namespace) == namespace);
            any = !listing.rows.is_empty();
            if !any {
                listing.warn(format!("no mounts of process {pid} were found"));
            }
        }
        print(&session, MOUNTS, listing)?;
        Ok(found(any))
    }
}

pub(super) const MOUNTS: &[&str] = &[
    "namespace",
    "processes",
    "mount_id",
    "fs_type",
    "source",
    "mount_point",
    "options",
    "propagation",
];

/// Loaded modules.
#[derive(Args, Debug)]
#[command(after_help = "\
The kernel's list of modules is what is walked: a module that took itself off it is not shown.")]
pub(crate) struct Lsmod {
    /// What to look into
    target: String,
    /// Only these modules
    #[arg(value_name = "NAME")]
    names: Vec<String>,
}

pub(super) const LSMOD: &[&str] = &["name", "size", "refcount", "used_by", "state", "taints", "base"];

impl Lsmod {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let wanted = |column: &str| match &global.columns {
            Some(columns) => columns.iter().any(|c| c == column || c == "all"),
            None => global.output != Format::Table,
        };
        let fields = ModuleFields {
            sections: wanted("sections"),
            parameters: wanted("parameters"),
        };
        let mut listing = session.kernel()?.modules(fields).context("listing modules")?;
        listing
            .rows
            .retain(|m| self.names.is_empty() || self.names.contains(&m.name));
        let names: Vec<&str> = self.names.iter().map(String::as_str).collect();
        let all = all_there(
            &names,
            |name| listing.rows.iter().any(|m| m.name == name),
            |name| format!("no module {name} is loaded"),
            &mut listing.warnings,
        );
        print(&session, LSMOD, listing)?;
        Ok(found(all))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;
    use vmsight_linux::{Problem, file::Owner};

    fn socket(endpoint: Option<&str>) -> OpenFile {
        OpenFile {
            pid: 7,
            tid: None,
            name: "sshd".into(),
            fd: "3".into(),
            kind: SOCKET,
            access: "rw",
            flags: None,
            pos: None,
            mount_id: None,
            device: None,
            rdev: None,
            inode: Some(42),
            links: None,
            size: None,
            path: Some("socket:[42]".into()),
            deleted: false,
            unreachable: false,
            endpoint: endpoint.map(str::to_owned),
            peers: vec![Owner {
                pid: 8,
                name: "ssh".into(),
                fd: 4,
            }],
            socket: Some(vmsight_arch::Gva(0xffff_8880_0000_1000)),
            address: None,
            problems: Vec::<Problem>::new(),
        }
    }

    #[test]
    fn protocols() {
        assert_eq!(protocol("unix"), Some("unix"));
        assert_eq!(protocol("unix->/run/log sock"), Some("unix"));
        assert_eq!(protocol("family-40 :1->:2"), Some("family-40"));
    }

    #[test]
    fn a_socket_has_its_address_protocol_and_ends_in_every_row() {
        let rows = vec![
            socket(Some("tcp 127.0.0.1:22->127.0.0.1:4000 ESTABLISHED")),
            socket(Some("unix /run/x y")),
            socket(None),
        ];
        let sheet = sockets(&rows, Vec::new());
        let maps = sheet.maps();
        let of = |i: usize, key: &str| maps[i][key].clone();
        for i in 0..3 {
            assert_eq!(of(i, "socket"), "0xffff888000001000");
            assert_eq!(
                (of(i, "pid"), of(i, "fd"), of(i, "inode")),
                (7.into(), "3".into(), 42.into())
            );
            assert_eq!(of(i, "peers"), serde_json::json!(["8/ssh/4"]));
        }
        assert_eq!(
            (of(0, "protocol"), of(1, "protocol"), of(2, "protocol")),
            ("tcp".into(), "unix".into(), Value::Null)
        );
        assert!(sheet.columns.iter().all(|c| sheet.keys.contains(c)));
    }
}
