//! `vmsight recover screen`: the texts on the virtual consoles, and framebuffers as pictures.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use vmsight_analysis::recover::DeviceMemory;
use vmsight_analysis::recover::framebuffers::{Framebuffer, framebuffers, write};
use vmsight_analysis::recover::screen::{Console, consoles};

use crate::{
    Outcome,
    args::Global,
    output::{Format, Progress, Row, Sheet, escape},
    session::Session,
};

/// What is on the screen: virtual consoles, shown or not, as text; framebuffers as pictures.
#[derive(Args, Debug)]
#[command(after_help = "\
Every console that was ever opened, tty1 to tty63, also those behind the one in front. Where consoles are drawn into a
framebuffer, their text is in memory all the time; in VGA's text mode that of the one in front is read out of the graphics
card. -o json has the attributes of the cells, too, row by row, and in text_in where the text was.

--pictures lists framebuffers instead: fbdev's (`fb0`), on which consoles are drawn, and all that programs such as X and
Wayland have made with DRM (`card0/42`), `shown` or not. --into writes them to a new folder as PNG files, and
manifest.jsonl with a line on each and the SHA-256. Pixels that are in no memory are magenta there, and counted.

What only a graphics card has (text mode; VESA's and EFI's framebuffers; what bochs shows) is read in a running VM whose
monitor tells where the card's memory lies (QMP, libvirt, gdb stub), and in dumps that have it: those of QEMU's
dump-guest-memory do, those of `vmsight dump` have the guest's memory only. Where it is out of reach, that is said.

What cannot be seen: cards that are assigned to the VM; formats that are compressed, in tiles or no plain red, green and
blue; what has scrolled away (since Linux 5.9 the kernel keeps none of it). A glyph is shown as the character that it is
in code page 437 where the kernel does not keep the character; other fonts may mean another. Linux before 5.11 keeps no types
of its modules: there, of DRM only fbdev is seen.")]
pub(crate) struct Cmd {
    /// What to look into
    target: String,
    /// Only this console: tty1
    #[arg(long, value_name = "NAME")]
    tty: Option<String>,
    /// List framebuffers
    #[arg(long, conflicts_with = "tty")]
    pictures: bool,
    /// Write framebuffers as pictures to this new folder
    #[arg(long, value_name = "DIR", conflicts_with = "tty")]
    into: Option<PathBuf>,
}

const COLUMNS: &[&str] = &["tty", "foreground", "columns", "rows", "text"];

impl Row for Console {
    const COLUMNS: &'static [&'static str] = &[
        "tty",
        "foreground",
        "columns",
        "rows",
        "cursor",
        "text",
        "attributes",
        "text_in",
        "address",
        "problems",
    ];
}

const PICTURES: &[&str] = &[
    "name",
    "driver",
    "shown",
    "width",
    "height",
    "format",
    "pixels_in",
    "problems",
];
const WRITTEN: &[&str] = &[
    "name", "driver", "shown", "width", "height", "missing", "failure", "output",
];

impl Row for Framebuffer {
    const COLUMNS: &'static [&'static str] = &[
        "name",
        "kind",
        "driver",
        "shown",
        "width",
        "height",
        "format",
        "stride",
        "pixels_in",
        "pixels_at",
        "address",
        "problems",
    ];
}

impl Cmd {
    /// Whether it makes files.
    pub(super) fn writes(&self) -> bool {
        self.into.is_some()
    }

    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        if self.pictures || self.into.is_some() {
            return pictures(&session, global, self.into.as_deref());
        }
        let mut listing =
            consoles(session.kernel()?, &devices(&session)).context("reading the virtual consoles")?;
        listing
            .rows
            .retain(|row| self.tty.as_ref().is_none_or(|tty| *tty == row.tty));
        let any = !listing.rows.is_empty();
        let style = global.style();
        if style.format != Format::Table || style.columns.is_some() {
            session.print(&Sheet::new(COLUMNS, &listing.rows, listing.warnings))?;
        } else {
            let mut out = style.out()?;
            listing
                .rows
                .iter()
                .try_for_each(|console| show(&mut out, console))?;
            out.flush()?;
            drop(out);
            listing.warnings.iter().for_each(|w| style.warn(w));
            let doubtful = listing.rows.iter().any(|row| !row.problems.is_empty());
            session.finish(doubtful || !listing.warnings.is_empty())?;
        }
        Ok(if any { Outcome::Fine } else { Outcome::Nothing })
    }
}

/// The memory of the guest's graphics cards.
fn devices(session: &Session) -> DeviceMemory<'_> {
    DeviceMemory::new(|| session.target().device_memory().map_err(|e| e.to_string()))
}

/// Lists framebuffers, and writes them where that is wanted.
fn pictures(session: &Session, global: &Global, into: Option<&Path>) -> Result<Outcome> {
    let listing = framebuffers(session.kernel()?, &devices(session)).context("looking for framebuffers")?;
    let Some(into) = into.filter(|_| !listing.rows.is_empty()) else {
        session.print(&Sheet::new(PICTURES, &listing.rows, listing.warnings))?;
        return Ok(match listing.rows.is_empty() {
            true => Outcome::Nothing,
            false => Outcome::Fine,
        });
    };
    let progress = Progress::spinner(global.quiet, "writing pictures");
    let mut done = Vec::new();
    let written = write(session.kernel()?, &listing.rows, into, |picture| {
        done.push(picture.clone());
    });
    drop(progress);
    written.with_context(|| format!("writing pictures to {}", into.display()))?;
    let own = ["output", "missing", "sha256", "failure"];
    let sheet = Sheet::of_done(Framebuffer::COLUMNS, &own, WRITTEN, &done, listing.warnings)?;
    session.print(&sheet)?;
    Ok(match done.iter().all(|picture| picture.output.is_none()) {
        true => Outcome::Failed,
        false => Outcome::Fine,
    })
}

/// A console for people: a line that says which, then its text.
fn show(out: &mut impl Write, console: &Console) -> Result<()> {
    let front = if console.foreground { ", in front" } else { "" };
    let card = match console.text_in {
        Some("device") => ", out of the graphics card",
        _ => "",
    };
    writeln!(
        out,
        "== {}: {}x{}{front}{card}",
        console.tty, console.columns, console.rows
    )?;
    match (&console.text, console.problems.first()) {
        (Some(text), _) => {
            for line in text.lines() {
                writeln!(out, "{}", escape(line))?;
            }
        }
        (None, problem) => {
            let reason = problem.map_or("unreadable", |p| p.reason.as_str());
            writeln!(out, "<{}>", escape(reason))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_says_where_it_is_from_or_why_it_is_not_there() {
        let console = |text: Option<&str>, text_in, problems| Console {
            tty: "tty1".to_owned(),
            foreground: true,
            columns: 80,
            rows: 25,
            cursor: None,
            text: text.map(str::to_owned),
            attributes: Vec::new(),
            text_in,
            address: vmsight_arch::Gva(0),
            problems,
        };
        let shown = |console| {
            let mut out = Vec::new();
            show(&mut out, &console).unwrap();
            String::from_utf8(out).unwrap()
        };
        assert_eq!(
            shown(console(Some("login: \u{1b}[2J"), Some("device"), Vec::new())),
            "== tty1: 80x25, in front, out of the graphics card\nlogin: \\x1b[2J\n"
        );
        let problems = vec![vmsight_linux::Problem::new("text", "out of reach")];
        assert_eq!(
            shown(console(None, None, problems)),
            "== tty1: 80x25, in front\n<out of reach>\n"
        );
    }
}
