//! Open files, mounts, modules.

use anyhow::{Context, Result};
use clap::Args;
use vmsight_linux::{file::FileFilter, module::ModuleFields};

use super::{found, print};
use crate::{Outcome, args::Global, output::Format, session::Session};

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
    /// Only sockets, with what they are bound and connected to
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
            peers: wanted("peers") || wanted("endpoint"),
        };
        let mut listing = session
            .kernel()?
            .open_files(filter)
            .context("listing open files")?;
        if self.deleted {
            listing.rows.retain(|f| f.deleted);
        }
        let any = !listing.rows.is_empty() || !self.deleted;
        let columns = &[
            "pid", "name", "fd", "type", "access", "device", "inode", "path", "endpoint", "peers",
        ];
        Ok(found(any, print(global, columns, listing)?))
    }
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
        if let Some(pid) = self.pid {
            let fields = vmsight_linux::ProcessFields::NAMESPACES;
            let namespace = kernel.process(pid, fields).context("finding the process")?.mnt_ns;
            listing.rows.retain(|m| Some(m.namespace) == namespace);
        }
        let columns = &[
            "namespace",
            "processes",
            "mount_id",
            "fs_type",
            "source",
            "mount_point",
            "options",
            "propagation",
        ];
        print(global, columns, listing)
    }
}

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

const LSMOD: &[&str] = &["name", "size", "refcount", "used_by", "state", "taints", "base"];

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
        let any = self.names.is_empty() || !listing.rows.is_empty();
        Ok(found(any, print(global, LSMOD, listing)?))
    }
}
