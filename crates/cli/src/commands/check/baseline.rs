//! `vmsight baseline`: a trusted copy of a kernel's code, for `vmsight check --golden`.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};
use vmsight_analysis::baseline::{Source, Trusted};
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

/// What `--golden` gave, kept for the next look: a package takes seconds to read.
#[derive(Debug, Default)]
pub(super) struct Golden(Mutex<Option<Kept>>);

#[derive(Debug)]
struct Kept {
    trusted: Arc<Trusted>,
    /// The modules that were looked for.
    modules: BTreeSet<String>,
}

impl Golden {
    /// Opens what is given, if that has not been read yet: what is of no use is said before a target is opened.
    pub(super) fn open(&self, paths: &[PathBuf]) -> Result<Option<Vec<Source>>> {
        match *self.kept() {
            Some(_) => Ok(None),
            None => open(paths).map(Some),
        }
    }

    /// What the guest's code is to be; read anew where modules have been loaded since.
    pub(super) fn of(
        &self,
        context: &Context,
        paths: &[PathBuf],
        sources: Option<Vec<Source>>,
    ) -> Result<Arc<Trusted>> {
        let mut kept = self.kept();
        let modules = || context.modules().iter().map(|module| &module.name);
        if let Some(kept) = &*kept
            && modules().all(|name| kept.modules.contains(name))
        {
            return Ok(kept.trusted.clone());
        }
        let sources = sources.map_or_else(|| open(paths), Ok)?;
        let trusted = Arc::new(Trusted::read(context, sources)?);
        tracing::info!("golden: {} modules have a file", trusted.module_files());
        *kept = Some(Kept {
            trusted: trusted.clone(),
            modules: modules().cloned().collect(),
        });
        Ok(trusted)
    }

    fn kept(&self) -> MutexGuard<'_, Option<Kept>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn open(paths: &[PathBuf]) -> Result<Vec<Source>> {
    Ok(paths
        .iter()
        .map(|path| Source::open(path))
        .collect::<Result<_, _>>()?)
}
