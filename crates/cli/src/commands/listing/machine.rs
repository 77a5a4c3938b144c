//! The machine as the kernel has it, and what was put into the kernel.

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use vmsight_linux::bpf::{BpfKind, BpfObject};

use super::print;
use crate::{Outcome, args::Global, session::Session};

/// What lies at which physical address and I/O port.
#[derive(Args, Debug)]
#[command(after_help = "\
The kernel's trees of resources, as /proc/iomem and /proc/ioports show them to root: memory, firmware, the kernel's own image, devices.
Each is followed by those that lie in it; `depth` says in how many it lies.")]
pub(crate) struct Iomem {
    /// What to look into
    target: String,
}

pub(super) const IOMEM: &[&str] = &["space", "start", "end", "depth", "name"];

impl Iomem {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let listing = session.kernel()?.resources().context("listing resources")?;
        print(&session, IOMEM, listing)?;
        Ok(Outcome::Fine)
    }
}

/// BPF programs, maps and links.
#[derive(Args, Debug)]
#[command(after_help = "\
The kernel's own tables of what was loaded with bpf(2), as bpftool lists them. `program` of a link is the program's id, `maps` of a
program those of maps. `target` is what a link is attached to or a program was made for: a function, a tracepoint, a control group, an
interface, a network namespace. `owners` have it open (PID/NAME/FD); what is attached or pinned lives on without.

What cannot be seen: classic filters of sockets and of seccomp, which have no ids; a program that somebody took out of the table: see
vmsight check.")]
pub(crate) struct Bpf {
    /// What to look into
    target: String,
    /// Only these kinds
    #[arg(short, long, value_name = "KIND,…", value_delimiter = ',')]
    kind: Vec<Kind>,
}

/// A kind of BPF's objects.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Kind {
    /// Programs
    Program,
    /// Maps
    Map,
    /// Links of programs to what they are attached to
    Link,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Program => BpfKind::Program.as_str(),
            Self::Map => BpfKind::Map.as_str(),
            Self::Link => BpfKind::Link.as_str(),
        }
    }
}

pub(super) const BPF: &[&str] = &[
    "kind",
    "id",
    "type",
    "name",
    "uid",
    "attach_type",
    "target",
    "program",
    "maps",
    "instructions",
    "load_time",
    "owners",
];

impl Bpf {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let mut listing = session.kernel()?.bpf().context("listing BPF")?;
        let wanted = |row: &BpfObject| self.kind.iter().any(|kind| kind.as_str() == row.kind);
        listing.rows.retain(|row| self.kind.is_empty() || wanted(row));
        print(&session, BPF, listing)?;
        Ok(Outcome::Fine)
    }
}

/// Perf events.
#[derive(Args, Debug)]
#[command(after_help = "\
What is counted, on which CPU or of which thread, and what is called when a count is full: profilers, tracing tools and debuggers have
such events, BPF programs hang on them. `opened_by` is the process that asked for one, `owners` have it open (PID/NAME/FD).

What cannot be seen: an event that somebody took out of its list; hardware breakpoints set past the kernel: see vmsight regs.")]
pub(crate) struct Perf {
    /// What to look into
    target: String,
}

pub(super) const PERF: &[&str] = &[
    "id",
    "type",
    "event",
    "state",
    "pid",
    "name",
    "cpu",
    "sample_period",
    "handler",
    "opened_by",
    "owners",
];

impl Perf {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let listing = session.kernel()?.perf_events().context("listing perf events")?;
        print(&session, PERF, listing)?;
        Ok(Outcome::Fine)
    }
}

/// The caches of the kernel's allocator, and what they hold.
#[derive(Args, Debug)]
#[command(after_help = "\
What /proc/slabinfo shows to root, and who lays out each cache's objects (`constructor`): a cache of a module that hides outlives it.
Objects that a CPU keeps for their next user count as in use, as they do there. `recover processes` looks for what is left in free ones.")]
pub(crate) struct Slabs {
    /// What to look into
    target: String,
}

pub(super) const SLABS: &[&str] = &["name", "object_size", "active", "objects", "slabs", "bytes"];

impl Slabs {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let listing = session
            .kernel()?
            .slab_caches()
            .context("listing the allocator's caches")?;
        print(&session, SLABS, listing)?;
        Ok(Outcome::Fine)
    }
}
