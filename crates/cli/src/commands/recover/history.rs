//! `vmsight recover history`: what was typed into shells.

use anyhow::{Context, Result};
use clap::Args;
use vmsight_analysis::recover::history::{HistoryEntry, history};

use super::show;
use crate::{
    Outcome,
    args::Global,
    output::{Progress, Row},
    session::Session,
};

/// What was typed into shells, with times.
#[derive(Args, Debug)]
#[command(after_help = "\
Found by structure in the memory of every process, whatever it is called: lines that bash and other users of GNU readline
(gdb, mysql, psql, python, sqlite3 …) keep with their times, and those that zsh does, which also knows when a command had
`ended`. `number` is the place in the process's own list, or the number that zsh gave it; a line without one is in no list
any more. Lines that a shell read from a file without times bear the time at which it did.

What cannot be seen: lines that were deleted and whose memory was used again; what of a process is paged out; histories
of other kinds (fish, libedit); of zsh's, a line that is the only one; mappings of more than 64 MiB. Shells that have
ended took theirs along: their files may still be in the page cache, see `vmsight recover files`.")]
pub(crate) struct Cmd {
    /// What to look into
    target: String,
    /// Only this process
    #[arg(short, long)]
    pid: Option<i32>,
}

const COLUMNS: &[&str] = &["pid", "name", "number", "time", "command"];

impl Row for HistoryEntry {
    const COLUMNS: &'static [&'static str] = &[
        "pid", "name", "form", "number", "time", "ended", "command", "address", "problems",
    ];
}

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let progress = Progress::spinner(global.quiet, "searching processes");
        let listing = history(session.kernel()?, self.pid).context("searching for histories")?;
        drop(progress);
        show(&session, COLUMNS, listing)
    }
}
