//! The machine as the kernel has it.

use anyhow::{Context, Result};
use clap::Args;

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
