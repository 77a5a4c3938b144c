//! What the shell and `man` need, made from the same definitions as the command line itself.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use clap_complete::Shell;

use crate::{Outcome, help};

/// Print a completion script.
#[derive(Args, Debug)]
#[command(
    after_help = "Example: vmsight completions bash > ~/.local/share/bash-completion/completions/vmsight"
)]
pub(crate) struct Completions {
    /// Which shell
    shell: Shell,
}

impl Completions {
    pub(crate) fn run(&self) -> Result<Outcome> {
        // Into memory first: the generators panic where they cannot write.
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut help::command(), "vmsight", &mut script);
        let mut out = io::stdout().lock();
        out.write_all(&script)?;
        out.flush()?;
        Ok(Outcome::Fine)
    }
}

/// Write the manual pages, one per command.
#[derive(Args, Debug)]
pub(crate) struct Man {
    /// The folder they are written to
    #[arg(default_value = "man")]
    dir: PathBuf,
}

impl Man {
    pub(crate) fn run(&self) -> Result<Outcome> {
        std::fs::create_dir_all(&self.dir).with_context(|| format!("making {}", self.dir.display()))?;
        clap_mangen::generate_to(help::command(), &self.dir)
            .with_context(|| format!("writing manual pages to {}", self.dir.display()))?;
        Ok(Outcome::Fine)
    }
}
