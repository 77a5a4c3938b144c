//! `vmsight recover`: what can be got back out of a guest's memory.

mod files;
mod history;
mod processes;

use anyhow::Result;
use clap::{Args, Subcommand};

use crate::{Outcome, args::Global};

/// Get back what is in a guest's memory: files, and what people and programs left behind.
#[derive(Args, Debug)]
pub(crate) struct Cmd {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Debug)]
enum What {
    /// Files in the page cache, deleted ones too: list them, write them out
    Files(files::Cmd),
    /// What was typed into shells, with times
    History(history::Cmd),
    /// Processes and threads that have ended, as far as their remains were not used again
    Processes(processes::Cmd),
}

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        match &self.what {
            What::Files(c) => c.run(global),
            What::History(c) => c.run(global),
            What::Processes(c) => c.run(global),
        }
    }

    /// Whether it shows something and writes nothing.
    pub(crate) fn can_repeat(&self) -> bool {
        match &self.what {
            What::Files(c) => !c.writes(),
            What::History(_) | What::Processes(_) => true,
        }
    }
}
