//! `vmsight recover arp`: the neighbours of every network namespace.

use anyhow::{Context, Result};
use clap::Args;
use vmsight_linux::neighbour::Neighbour;

use super::show;
use crate::{Outcome, args::Global, output::Row, session::Session};

/// Who is on the links: hardware addresses by IP address, of every network namespace (ARP and neighbour discovery).
#[derive(Args, Debug)]
#[command(after_help = "\
With whom the guest has talked on its own networks: FAILED and INCOMPLETE are those that did not answer. PERMANENT was
written down by somebody; one for a router may be there to send packets elsewhere.

What cannot be seen: entries that were removed, which on a busy system is a matter of minutes; for whom the guest answers
in place of others (proxies).")]
pub(crate) struct Cmd {
    /// What to look into
    target: String,
    /// Only this interface
    #[arg(long, value_name = "NAME")]
    interface: Option<String>,
}

const COLUMNS: &[&str] = &["namespace", "interface", "ip", "mac", "state"];

impl Row for Neighbour {
    const COLUMNS: &'static [&'static str] = &[
        "namespace",
        "pid",
        "ip",
        "mac",
        "state",
        "interface",
        "index",
        "address",
        "problems",
    ];
}

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let listing = session.kernel()?.neighbours();
        let mut listing = listing.context("reading the neighbours")?;
        listing
            .rows
            .retain(|row| self.interface.is_none() || row.interface == self.interface);
        show(&session, COLUMNS, listing)
    }
}
