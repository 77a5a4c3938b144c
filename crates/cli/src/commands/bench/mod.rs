//! `vmsight bench`: what vmsight costs a guest, measured on this machine.

mod connection;
mod hooks;
mod machine;
mod survival;
mod switches;
mod table;

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use rustix::process::{Signal, set_parent_process_death_signal};
use vmsight_gauge::vmm::Privilege;

use crate::{Outcome, args::Global};

/// Measure what hooks cost on this machine.
#[derive(Args, Debug)]
pub(crate) struct Cmd {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Debug)]
enum What {
    /// What a hook with an empty handler costs: from the hooked instruction until the guest goes on
    Hooks(hooks::Cmd),
    /// A machine of this bench's own: what follows is started, and ends with its parent
    #[command(hide = true)]
    Child {
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    /// A monitor that is going to fail its guest
    #[command(hide = true)]
    Hold(survival::Cmd),
    /// The least VMM, with its guest's memory in a file
    #[command(hide = true)]
    Vmm {
        memory: PathBuf,
        /// The guest is a program's code, not a kernel's
        #[arg(long)]
        program: bool,
    },
}

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        match &self.what {
            What::Hooks(cmd) => cmd.run(global),
            What::Child { command } => {
                set_parent_process_death_signal(Some(Signal::KILL)).context("binding it to its parent")?;
                let (program, arguments) = command.split_first().context("no command is given")?;
                let error = Command::new(program).args(arguments).exec();
                Err(error).with_context(|| format!("starting {}", program.display()))
            }
            What::Hold(cmd) => cmd.run().map(|()| Outcome::Fine),
            What::Vmm { memory, program } => {
                let privilege = match program {
                    true => Privilege::Program,
                    false => Privilege::Kernel,
                };
                let file = File::options()
                    .read(true)
                    .write(true)
                    .open(memory)
                    .with_context(|| format!("opening {}", memory.display()))?;
                let error = vmsight_gauge::vmm::run(&file, privilege).unwrap_err();
                Err(error).context("running a guest in the least VMM")
            }
        }
    }
}
