//! `vmsight recover elf`: what runs, as ELF files.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use vmsight_analysis::recover::elf::{ElfImage, Which, images, write};

use crate::{
    Outcome,
    args::Global,
    output::{Progress, Row, Sheet},
    session::Session,
};

/// Programs, libraries, modules and the kernel as ELF files, out of memory.
#[derive(Args, Debug)]
#[command(after_help = "\
Listed is every ELF image that a process has mapped from its begin: its program, libraries, the vdso, and those in memory
of no file, which is where injected ones are. Then come the modules and the kernel.

--into writes them to a new folder, each at the addresses that it has in the guest: an image of a process by the program
headers in its own first page, with data and bss as they are now; a module with its sections and its symbols; the kernel's
text, data and symbols. Pages that the process has not touched come from the page cache. What is in no memory is zeros:
`missing_ranges` lists it. manifest.jsonl has a line on each, with the SHA-256.

What cannot be seen: sections of a program beyond what its program headers say, for they are never loaded; what was
freed after a module or the kernel had started (.init.text); images of 32 bits, which are listed only; an image whose
first page was overwritten. A module that is in no list is none here: see `vmsight check`.")]
pub(crate) struct Cmd {
    /// What to look into
    target: String,
    /// Only this process
    #[arg(short, long, group = "which")]
    pid: Option<i32>,
    /// Only this module
    #[arg(long, value_name = "NAME", group = "which")]
    module: Option<String>,
    /// Only the kernel
    #[arg(long, group = "which")]
    kernel: bool,
    /// The new folder to write to
    #[arg(long, value_name = "DIR")]
    into: Option<PathBuf>,
}

const COLUMNS: &[&str] = &["kind", "pid", "name", "start", "end", "elf_type", "path"];
const WRITTEN: &[&str] = &["kind", "pid", "name", "written", "missing", "failure", "output"];

impl Row for ElfImage {
    const COLUMNS: &'static [&'static str] = &[
        "kind", "pid", "name", "path", "deleted", "start", "end", "elf_type", "entry", "problems",
    ];
}

impl Cmd {
    /// Whether it makes files.
    pub(super) fn writes(&self) -> bool {
        self.into.is_some()
    }

    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let which = match (self.pid, &self.module, self.kernel) {
            (Some(pid), ..) => Which::Process(pid),
            (None, Some(name), _) => Which::Module(name),
            (None, None, true) => Which::Kernel,
            (None, None, false) => Which::All,
        };
        let progress = Progress::spinner(global.quiet, "looking for images");
        let listing = images(session.kernel()?, which).context("looking for ELF images")?;
        drop(progress);
        let Some(into) = &self.into else {
            session.print(&Sheet::new(COLUMNS, &listing.rows, listing.warnings))?;
            return Ok(match listing.rows.is_empty() {
                true => Outcome::Nothing,
                false => Outcome::Fine,
            });
        };
        let progress = Progress::spinner(global.quiet, "writing images");
        let mut done = Vec::new();
        let written = write(session.kernel()?, &listing.rows, into, |image| {
            done.push(image.clone());
        });
        drop(progress);
        written.with_context(|| format!("writing images to {}", into.display()))?;
        let own = [
            "output",
            "written",
            "from_cache",
            "missing",
            "missing_ranges",
            "sha256",
            "failure",
        ];
        let sheet = Sheet::of_done(ElfImage::COLUMNS, &own, WRITTEN, &done, listing.warnings)?;
        session.print(&sheet)?;
        Ok(match done.iter().any(|image| image.failure.is_some()) {
            true => Outcome::Failed,
            false => Outcome::Fine,
        })
    }
}
