//! `vmsight baseline`: a trusted copy of a kernel's code, for `vmsight check --golden`.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
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

/// What a baseline's file begins with, whatever its version.
const BASELINE: &[u8] = b"VMSBASE";
/// No kernel's file is longer.
const MAX_FILE: u64 = 1 << 30;

/// A file to hold a kernel's code against.
pub(super) enum Golden {
    /// One that `vmsight baseline create` made.
    Baseline(Baseline),
    /// A kernel's own file.
    Kernel(Vec<u8>),
}

impl Golden {
    /// Reads it.
    pub(super) fn read(file: &Path) -> Result<Self> {
        let open = File::open(file).with_context(|| format!("opening {}", file.display()))?;
        let mut open = BufReader::new(open);
        let begin = open
            .fill_buf()
            .with_context(|| format!("reading {}", file.display()))?;
        if begin.starts_with(BASELINE) {
            let read = Baseline::read(open);
            return Ok(Self::Baseline(
                read.with_context(|| format!("reading {}", file.display()))?,
            ));
        }
        let mut bytes = Vec::new();
        open.take(MAX_FILE)
            .read_to_end(&mut bytes)
            .with_context(|| format!("reading {}", file.display()))?;
        if !Baseline::is_kernel_file(&bytes) {
            bail!("{} is neither a baseline nor a kernel", file.display());
        }
        Ok(Self::Kernel(bytes))
    }

    /// What the guest's code is to be.
    pub(super) fn of(self, context: &Context) -> Result<Baseline> {
        match self {
            Self::Baseline(baseline) => Ok(baseline),
            Self::Kernel(file) => {
                Baseline::of_kernel_file(context, &file).context("holding the kernel against its file")
            }
        }
    }
}
