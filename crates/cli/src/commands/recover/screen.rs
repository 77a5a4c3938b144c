//! `vmsight recover screen`: the texts on the virtual consoles.

use std::io::Write;

use anyhow::{Context, Result};
use clap::Args;
use vmsight_analysis::recover::screen::{Console, consoles};

use crate::{
    Outcome,
    args::Global,
    output::{Format, Row, Sheet, escape},
    session::Session,
};

/// What is on the virtual consoles, shown or not, as text.
#[derive(Args, Debug)]
#[command(after_help = "\
Every console that was ever opened, tty1 to tty63, also those behind the one in front. Where consoles are drawn into a
framebuffer, their text is in memory all the time. -o json has the attributes of the cells, too, row by row.

What cannot be seen: in VGA's text mode the console in front, which is in the graphics card's memory; graphics, as of X
and Wayland; what has scrolled away (since Linux 5.9 the kernel keeps none of it). A glyph is shown as the character that
it is in code page 437 where the kernel does not keep the character; other fonts may mean another.")]
pub(crate) struct Cmd {
    /// What to look into
    target: String,
    /// Only this console: tty1
    #[arg(long, value_name = "NAME")]
    tty: Option<String>,
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
        "address",
        "problems",
    ];
}

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let mut listing = consoles(session.kernel()?).context("reading the virtual consoles")?;
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

/// A console for people: a line that says which, then its text.
fn show(out: &mut impl Write, console: &Console) -> Result<()> {
    let front = if console.foreground { ", in front" } else { "" };
    writeln!(
        out,
        "== {}: {}x{}{front}",
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
