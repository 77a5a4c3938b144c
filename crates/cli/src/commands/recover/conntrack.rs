//! `vmsight recover conntrack`: the connections that netfilter tracks.

use anyhow::{Context, Result};
use clap::Args;
use vmsight_analysis::recover::conntrack::{Connection, connections};

use super::show;
use crate::{Outcome, args::Global, output::Row, session::Session};

/// Connections that netfilter tracks, also those that only go through the guest.
#[derive(Args, Debug)]
#[command(after_help = "\
The kernel keeps them where a firewall or address translation is in use: for a router or a host of containers that is who
talked to whom, for some time after a connection has ended. Where an address was rewritten, `reply_source` or
`reply_destination` is another than the connection's own.

What cannot be seen: what rules took out of tracking; connections that were forgotten. A guest that does not track
connections has no such module: that is said, and the exit code is 1. Linux before 5.11 keeps no types of its modules.")]
pub(crate) struct Cmd {
    /// What to look into
    target: String,
}

const COLUMNS: &[&str] = &[
    "namespace",
    "protocol",
    "state",
    "source",
    "destination",
    "reply_source",
    "reply_destination",
    "status",
];

impl Row for Connection {
    const COLUMNS: &'static [&'static str] = &[
        "namespace",
        "protocol",
        "state",
        "source",
        "destination",
        "reply_source",
        "reply_destination",
        "status",
        "mark",
        "address",
        "problems",
    ];
}

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let listing = connections(session.kernel()?).context("reading the table of connections")?;
        show(&session, COLUMNS, listing)
    }
}
