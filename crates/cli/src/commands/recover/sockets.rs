//! `vmsight recover sockets`: sockets that were closed, and those that nobody lists.

use anyhow::{Context, Result};
use clap::Args;
use vmsight_analysis::recover::sockets::{RecoveredSocket, sockets};

use super::show;
use crate::{
    Outcome,
    args::Global,
    output::{Progress, Row},
    session::Session,
};

/// Sockets that were closed, as far as their remains were not used again, and those that nobody lists.
#[derive(Args, Debug)]
#[command(after_help = "\
Every object in the slabs that TCP, UDP, raw and ping sockets are made in is looked at, and then other memory for what slabs that were
given back have left. `closed` is a connection that ended, or a port that was given up: whom it was to is kept, when it was is
not. `unlisted` is a socket that looks alive and that no table and no process has: somebody may have hidden it, see vmsight check.
`certainty` says how much agrees: certain, likely.

What cannot be seen: sockets whose place was used again; UNIX sockets, whose names go before they do; which process had a socket that was
closed. In memory that is no slab of sockets, a process of the guest can have laid out what looks like one: such rows are never certain.")]
pub(crate) struct Cmd {
    /// What to look into
    target: String,
    /// Those too that are open, which `vmsight net` lists
    #[arg(long)]
    all: bool,
}

const COLUMNS: &[&str] = &[
    "status",
    "certainty",
    "protocol",
    "local_address",
    "local_port",
    "remote_address",
    "remote_port",
    "received_bytes",
    "sent_bytes",
    "uid",
    "namespace",
];

impl Row for RecoveredSocket {
    const COLUMNS: &'static [&'static str] = &[
        "status",
        "certainty",
        "found_in",
        "family",
        "protocol",
        "state",
        "local_address",
        "local_port",
        "remote_address",
        "remote_port",
        "received_bytes",
        "sent_bytes",
        "uid",
        "namespace",
        "address",
    ];
}

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let progress = Progress::spinner(global.quiet, "searching memory for sockets");
        let mut listing = sockets(session.kernel()?).context("searching for sockets")?;
        drop(progress);
        listing.rows.retain(|row| self.all || row.status != "open");
        show(&session, COLUMNS, listing)
    }
}
