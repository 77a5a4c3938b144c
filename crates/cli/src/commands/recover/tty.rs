//! `vmsight recover tty`: what went through terminals.

use anyhow::{Context, Result};
use clap::Args;
use vmsight_analysis::recover::tty::{TerminalText, terminals};

use super::show;
use crate::{Outcome, args::Global, output::Row, session::Session};

/// What was typed at terminals and what programs wrote to them, as far as it still is in their buffers.
#[derive(Args, Debug)]
#[command(after_help = "\
For consoles, serial lines and pseudo-terminals: the line discipline's buffer, which keeps the last 4096 bytes, and the
driver's flip buffers. `waiting` is what nobody has read yet; all else has been read and is left over. Typed passwords are
in there like everything else.

What cannot be seen: bytes in whose place others came; lines whose discipline is not the usual one (PPP, SLIP, …); what
serial hardware has not handed over; keys in the input layer, for which see `vmsight recover input`.")]
pub(crate) struct Cmd {
    /// What to look into
    target: String,
    /// Only this terminal: ttyS0, pts/0, ptm0
    #[arg(long, value_name = "NAME")]
    tty: Option<String>,
    /// Only what nobody has read yet
    #[arg(long)]
    waiting: bool,
}

const COLUMNS: &[&str] = &[
    "tty", "what", "buffer", "waiting", "echo", "length", "pids", "text",
];

impl Row for TerminalText {
    const COLUMNS: &'static [&'static str] = &[
        "tty",
        "what",
        "buffer",
        "waiting",
        "length",
        "text",
        "canonical",
        "echo",
        "pids",
        "address",
        "problems",
    ];
}

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let mut listing = terminals(session.kernel()?).context("reading the terminals")?;
        listing.rows.retain(|row| {
            self.tty.as_ref().is_none_or(|tty| *tty == row.tty) && (row.waiting || !self.waiting)
        });
        show(&session, COLUMNS, listing)
    }
}
