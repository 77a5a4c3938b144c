//! `vmsight baseline`: a trusted copy of a kernel's code, for `vmsight check --golden`.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};
use vmsight_analysis::{Baseline, Context};

use crate::{Outcome, args::Global, commands::beside::write_beside, session::Session};

/// Make a trusted copy of a kernel's code, for `vmsight check --golden`.
#[derive(Args, Debug)]
pub(crate) struct Cmd {
    #[command(subcommand)]
    command: What,
}

#[derive(Subcommand, Debug)]
enum What {
    /// Write the code of a guest's kernel and modules, as it is now, to a file
    #[command(after_help = "\
Make it when the guest is known to be good, with the modules loaded that it will have. It is for this build of the kernel, whatever
KASLR does at the next boot, on the same model of processor.")]
    Create {
        /// What to look into
        target: String,
        /// The file
        file: PathBuf,
    },
}

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let What::Create { target, file } = &self.command;
        let session = Session::open(global, target)?;
        let context = Context::new(session.kernel()?.clone());
        let (baseline, notes) = Baseline::of(&context).context("reading the kernel's code")?;
        write_beside(file, "the baseline", |out| Ok(baseline.write(out)?))?;
        notes.iter().for_each(|note| session.style().warn(note));
        let bytes: usize = baseline.parts.iter().map(|p| p.bytes.len()).sum();
        session.style().note(&format!(
            "{}: {bytes} bytes of code, of {} and {} modules",
            file.display(),
            baseline.release,
            baseline.parts.len().saturating_sub(1)
        ));
        session.finish(!notes.is_empty())?;
        Ok(Outcome::Fine)
    }
}

/// Reads a baseline.
pub(super) fn read(file: &Path) -> Result<Baseline> {
    let open = File::open(file).with_context(|| format!("opening {}", file.display()))?;
    Baseline::read(BufReader::new(open)).with_context(|| format!("reading {}", file.display()))
}
