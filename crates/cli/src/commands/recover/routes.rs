//! `vmsight recover routes`: the routes of every network namespace.

use anyhow::{Context, Result};
use clap::Args;
use vmsight_linux::route::Route;

use super::show;
use crate::{Outcome, args::Global, output::Row, session::Session};

/// Routes of every network namespace, IPv4 and IPv6, from all tables.
#[derive(Args, Debug)]
#[command(after_help = "\
A route with several next hops is a row for each. Table `local` is the guest's own addresses; --table main leaves those
out.

What cannot be seen: the rules that choose among tables; what the kernel has only looked up and remembers (redirects,
path MTU); groups of next hops that routes share.")]
pub(crate) struct Cmd {
    /// What to look into
    target: String,
    /// Only this table: main, local, default, or a number
    #[arg(long, value_name = "TABLE")]
    table: Option<String>,
}

const COLUMNS: &[&str] = &[
    "namespace",
    "table",
    "type",
    "destination",
    "gateway",
    "interface",
    "metric",
    "protocol",
];

impl Row for Route {
    const COLUMNS: &'static [&'static str] = &[
        "namespace",
        "pid",
        "table",
        "destination",
        "type",
        "gateway",
        "interface",
        "index",
        "metric",
        "protocol",
        "source",
        "address",
        "problems",
    ];
}

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let mut listing = session.kernel()?.routes().context("reading the routes")?;
        listing
            .rows
            .retain(|row| self.table.as_ref().is_none_or(|table| *table == row.table));
        show(&session, COLUMNS, listing)
    }
}
