//! `vmsight kmsg`: the kernel's log.

use std::io::Write;

use anyhow::{Context, Result};
use clap::Args;

use crate::{
    Outcome,
    args::Global,
    output::{Format, Sheet, escape},
    session::Session,
};

/// The kernel's log, as dmesg shows it.
#[derive(Args, Debug)]
#[command(after_help = "Read out of the ring buffer itself; what was overwritten there is gone.")]
pub(crate) struct Cmd {
    /// What to look into
    target: String,
    /// Only messages of this level or more urgent: 0 emergency … 7 debug
    #[arg(short, long, value_name = "LEVEL", value_parser = clap::value_parser!(u8).range(0..=7))]
    level: Option<u8>,
    /// Only the last N messages
    #[arg(short = 'n', long, value_name = "N")]
    last: Option<usize>,
}

const COLUMNS: &[&str] = &["time_us", "level", "text"];

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let mut listing = session.kernel()?.kmsg().context("reading the kernel log")?;
        listing.rows.retain(|m| self.level.is_none_or(|l| m.level <= l));
        if let Some(n) = self.last {
            let cut = listing.rows.len().saturating_sub(n);
            listing.rows.drain(..cut);
        }
        let style = global.style();
        if global.output != Format::Table || style.columns.is_some() {
            session.print(&Sheet::new(COLUMNS, &listing.rows, listing.warnings))?;
            return Ok(Outcome::Fine);
        }
        let mut out = style.out()?;
        for m in &listing.rows {
            let (seconds, micros) = (m.time_us / 1_000_000, m.time_us % 1_000_000);
            write!(out, "[{seconds:5}.{micros:06}] ")?;
            match &m.text {
                Some(text) => writeln!(out, "{}", escape(text))?,
                None => writeln!(
                    out,
                    "<{}>",
                    m.problems.first().map_or("unreadable", |p| p.reason.as_str())
                )?,
            }
        }
        out.flush()?;
        drop(out);
        listing.warnings.iter().for_each(|w| style.warn(w));
        session.finish(!listing.warnings.is_empty())?;
        Ok(Outcome::Fine)
    }
}
