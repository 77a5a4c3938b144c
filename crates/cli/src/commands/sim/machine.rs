//! Bochs, as long as this program runs and no longer.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use vmsight_sim_image::bochs::{Hardware, Run, refusal};
use vmsight_sim_image::{Image, Machine};

use crate::commands::beside::write_beside;
use crate::output::{Progress, Style, escape};

/// Where what the trial says comes from.
#[derive(Args, Debug)]
pub(super) struct Source {
    /// Run nothing: read what a machine said from FILE, as --save wrote it, or as it came over the serial port of one that was
    /// booted from an image of `vmsight sim image`
    #[arg(long, value_name = "FILE", conflicts_with_all = ["save", "limit"])]
    pub(super) from: Option<PathBuf>,
    /// Save what the machine says in FILE, which must not be there yet
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    /// The longest that a run may take, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 1800)]
    limit: u64,
}

/// The longest line of the console that progress is looked for in.
const LONGEST: usize = 1 << 16;

impl Source {
    /// What the trial said: read, or run and read. Images, and how many processors each is to
    /// have, are made only where they are to be run.
    pub(super) fn console(
        &self,
        style: &Style,
        stop: &AtomicBool,
        what: &str,
        machines: impl FnOnce() -> Result<Vec<(Image, u32)>>,
    ) -> Result<String> {
        self.text(|| {
            let mut console = String::new();
            for (image, processors) in machines()? {
                console.push_str(&self.run(style, stop, what, &image, processors)?);
            }
            Ok(console)
        })
    }

    /// What machines said: read, or what `run` has, saved where that is wanted.
    pub(super) fn text(&self, run: impl FnOnce() -> Result<String>) -> Result<String> {
        if let Some(file) = &self.from {
            let bytes = std::fs::read(file).with_context(|| format!("reading {}", file.display()))?;
            return Ok(String::from_utf8_lossy(&bytes).into_owned());
        }
        if let Some(file) = &self.save {
            ensure!(!file.exists(), "{} is there already", file.display());
        }
        let text = run()?;
        if let Some(file) = &self.save {
            write_beside(file, "what the machine said", |out| {
                Ok(std::io::Write::write_all(out, text.as_bytes())?)
            })?;
        }
        Ok(text)
    }

    /// Runs an image until its machine is switched off, and has what it said on its console.
    pub(super) fn run(
        &self,
        style: &Style,
        stop: &AtomicBool,
        what: &str,
        image: &Image,
        processors: u32,
    ) -> Result<String> {
        Ok(self.finish(style, stop, what, image, processors)?.serial)
    }

    /// The same, and has all that it said.
    pub(super) fn finish(
        &self,
        style: &Style,
        stop: &AtomicBool,
        what: &str,
        image: &Image,
        processors: u32,
    ) -> Result<Run> {
        let progress = Progress::spinner(style.quiet, what);
        let machine = Machine::new(
            image,
            &Hardware {
                processors,
                ..hardware()?
            },
        )?;
        let mut findings = 0;
        let mut line = Vec::new();
        let run = machine.watch(Duration::from_secs(self.limit), |news| {
            for &byte in &news.console {
                match byte {
                    b'\n' => {
                        findings += u64::from(line.starts_with(b"trial: "));
                        line.clear();
                    }
                    _ if line.len() < LONGEST => line.push(byte),
                    _ => {}
                }
            }
            if findings != 0 {
                progress.say(&format!("{what}, {findings} findings so far,"));
            }
            !stop.load(Ordering::Relaxed)
        })?;
        drop(progress);
        ensure!(!stop.load(Ordering::Relaxed), "interrupted");
        if let Some(why) = refusal(&run.serial) {
            bail!("the guest was not started: {why}");
        }
        ensure!(
            run.off,
            "the machine was not done after {} seconds, and said last: {}",
            self.limit,
            last(&run.serial)
        );
        Ok(run)
    }
}

/// A machine that ends with this process, however it ends.
pub(super) fn hardware() -> Result<Hardware> {
    let own = std::env::current_exe().context("finding this program")?;
    let mut through = vec![own.into_os_string()];
    through.extend(["bench", "child", "--"].map(OsString::from));
    Ok(Hardware {
        through,
        ..Hardware::default()
    })
}

/// A console's line without what steers a terminal: the sequences that ECMA-48 has for that (CSI), which loaders and guests
/// send, go; all else that might is escaped.
pub(super) fn plain(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    let mut pieces = text.split("\x1b[");
    let mut kept = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        // Parameters, then one letter or the like.
        let end = piece
            .find(|c: char| !matches!(c, ' '..='?'))
            .unwrap_or(piece.len());
        let mut rest = piece.get(end..).unwrap_or_default().chars();
        rest.next();
        kept.push_str(rest.as_str());
    }
    escape(&kept)
}

/// The last line that was said.
pub(super) fn last(console: &str) -> &str {
    console.trim_end().lines().next_back().unwrap_or("nothing")
}

/// Whether a file is a disc's image: the magic of ISO 9660 (ECMA-119, 8.4) in its first volume descriptor.
pub(super) fn is_disc(file: &Path) -> Result<bool> {
    use std::io::{Read, Seek, SeekFrom};
    const MAGIC: (u64, &[u8; 5]) = (0x8001, b"CD001");
    let open = || -> std::io::Result<Vec<u8>> {
        let mut disc = std::fs::File::open(file)?;
        disc.seek(SeekFrom::Start(MAGIC.0))?;
        let mut found = Vec::new();
        disc.take(MAGIC.1.len() as u64).read_to_end(&mut found)?;
        Ok(found)
    };
    let found = open().with_context(|| format!("reading {}", file.display()))?;
    Ok(found == MAGIC.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_steers_no_terminal() {
        let line = b"\x1b[H\x1b[J\x1b[1;1Hone\x1b[0;32mtwo\x1b]0;title\x07\x1b[";
        assert_eq!(plain(line), r"onetwo\x1b]0;title\x07");
    }

    #[test]
    fn the_last_line_is_found() {
        assert_eq!((last("one\r\ntwo\r\n"), last("")), ("two", "nothing"));
    }
}
