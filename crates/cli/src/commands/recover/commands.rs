//! `vmsight recover commands`: what shells executed by name.

use anyhow::{Context, Result};
use clap::Args;
use vmsight_analysis::recover::history::{HashedCommand, hashed_commands};

use super::show;
use crate::{
    Outcome,
    args::Global,
    output::{Progress, Row},
    session::Session,
};

/// Commands that bash executed by name, and the files that it found for them.
#[derive(Args, Debug)]
#[command(after_help = "\
bash remembers where it found a command, and how often it was used, also where no history is kept: `hash` in the shell itself shows
it. Entries are found by structure in the memory of every process, whatever it is called, and prove themselves by the hash of their
name that is in them.

What cannot be seen: commands that were typed with a path, and what is built into the shell; what `hash -r` or a change of PATH has
made it forget; what of a process is paged out; other shells' tables; mappings of more than 64 MiB; shells that have ended.")]
pub(crate) struct Cmd {
    /// What to look into
    target: String,
    /// Only this process
    #[arg(short, long)]
    pid: Option<i32>,
}

const COLUMNS: &[&str] = &["pid", "name", "command", "path", "uses"];

impl Row for HashedCommand {
    const COLUMNS: &'static [&'static str] =
        &["pid", "name", "command", "path", "uses", "address", "problems"];
}

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let progress = Progress::spinner(global.quiet, "searching processes");
        let listing = hashed_commands(session.kernel()?, self.pid).context("searching for commands")?;
        drop(progress);
        show(&session, COLUMNS, listing)
    }
}
