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
