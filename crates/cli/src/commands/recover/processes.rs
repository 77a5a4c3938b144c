//! `vmsight recover processes`: tasks that are in no list.

use anyhow::{Context, Result};
use clap::Args;
use vmsight_analysis::recover::processes::{RemovedTask, removed_tasks};

use super::show;
use crate::{
    Outcome,
    args::Global,
    output::{Progress, Row},
    session::Session,
};

/// Processes and threads that have ended, as far as their remains were not used again.
#[derive(Args, Debug)]
#[command(after_help = "\
Every object in the kernel's slabs of tasks is looked at, and then all other memory for what slabs that were given back
have left. `certainty` says how much of it agrees: certain, likely, doubtful. `unlisted` is a task that looks alive and is
in no list: somebody may have hidden it.

What cannot be seen: tasks whose place was used again, which on a busy system is a matter of seconds; arguments, files and
users of what has ended, for they are let go first. In memory that is no slab of tasks, a process of the guest can have
laid out what looks like a task: such rows are never certain.")]
pub(crate) struct Cmd {
    /// What to look into
    target: String,
    /// Leave threads out
    #[arg(long)]
    no_threads: bool,
}

const COLUMNS: &[&str] = &[
    "pid",
    "ppid",
    "state",
    "certainty",
    "exit_code",
    "signal",
    "start_time",
    "loginuid",
    "name",
];

impl Row for RemovedTask {
    const COLUMNS: &'static [&'static str] = &[
        "pid",
        "tgid",
        "ppid",
        "name",
        "state",
        "certainty",
        "found_in",
        "start_time",
        "exit_code",
        "signal",
        "loginuid",
        "utime_us",
        "stime_us",
        "task",
    ];
}

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let progress = Progress::spinner(global.quiet, "searching memory for tasks");
        let mut listing = removed_tasks(session.kernel()?).context("searching for tasks")?;
        drop(progress);
        listing.rows.retain(|row| !self.no_threads || row.pid == row.tgid);
        show(&session, COLUMNS, listing)
    }
}
