//! What a person or a program gets to see: one listing model, four ways to print it.

mod cell;
pub(crate) mod json;
mod progress;
mod sheet;
mod table;

pub(crate) use cell::{escape, field};
pub(crate) use progress::Progress;
pub(crate) use sheet::{PROBLEMS, Row, Sheet, to_map};

use std::io::{self, IsTerminal, Write};

use anyhow::Result;
use clap::ValueEnum;

/// How a listing is printed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub(crate) enum Format {
    /// Aligned columns for people
    #[default]
    Table,
    /// One array of flat objects
    Json,
    /// One object a line
    Jsonl,
    /// Comma-separated values with a header line
    Csv,
}

/// Whether colours are used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub(crate) enum Color {
    /// On a terminal, unless NO_COLOR is set
    #[default]
    Auto,
    /// Always
    Always,
    /// Never
    Never,
}

impl Color {
    /// Whether standard output should carry colours now.
    pub(crate) fn enabled(self) -> bool {
        match self {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => {
                std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()) && io::stdout().is_terminal()
            }
        }
    }
}

/// How everything is printed in this run.
#[derive(Clone, Debug, Default)]
pub(crate) struct Style {
    pub(crate) format: Format,
    pub(crate) color: Color,
    /// Columns asked for by name, in this order; the view's own where `None`.
    pub(crate) columns: Option<Vec<String>>,
    pub(crate) no_headers: bool,
    /// Never shorten cells to the terminal's width.
    pub(crate) wide: bool,
    /// Errors only, no warnings.
    pub(crate) quiet: bool,
    /// Clear the terminal before anything is shown: `--watch`.
    pub(crate) clear: bool,
}

/// Standard output for one command's results.
pub(crate) type Out = io::BufWriter<io::StdoutLock<'static>>;

impl Style {
    /// Where a command's results go. What was shown last is cleared away only now that there is something new.
    pub(crate) fn out(&self) -> io::Result<Out> {
        let mut out = io::BufWriter::with_capacity(1 << 16, io::stdout().lock());
        if self.clear && io::stdout().is_terminal() {
            // Home and clear to the end: no flicker, and the scroll-back stays.
            out.write_all(b"\x1b[H\x1b[2J")?;
        }
        Ok(out)
    }

    /// Prints a sheet to standard output, its warnings to standard error.
    pub(crate) fn print(&self, sheet: &Sheet) -> Result<()> {
        // What is wrong with the columns asked for is said before anything is printed.
        sheet.shown(self)?;
        let mut out = self.out()?;
        self.write(sheet, &mut out)?;
        out.flush()?;
        drop(out);
        sheet.warnings.iter().for_each(|w| self.warn(w));
        if self.format == Format::Table {
            let shown = sheet.shown(self)?;
            let marked = sheet
                .rows
                .iter()
                .filter(|r| sheet::hides_problems(r, &shown))
                .count();
            if marked > 0 {
                let rows = if marked == 1 { "row has" } else { "rows have" };
                self.warn(&format!(
                    "{marked} {rows} problems (marked !): -o json shows them, or --columns problems"
                ));
            }
        }
        Ok(())
    }

    /// Prints a warning on standard error unless only errors are wanted; results stay clean on standard output.
    pub(crate) fn warn(&self, message: &str) {
        if !self.quiet {
            warn(message);
        }
    }

    /// Writes a sheet in the chosen format.
    pub(crate) fn write(&self, sheet: &Sheet, out: &mut dyn Write) -> Result<()> {
        match self.format {
            Format::Table => table::write(sheet, self, out)?,
            Format::Json => {
                // One object a line inside the array: still one JSON document, yet diffable and greppable.
                let keys = sheet.shown(self)?;
                out.write_all(b"[")?;
                for (i, row) in sheet.rows.iter().enumerate() {
                    out.write_all(if i == 0 { b"\n" } else { b",\n" })?;
                    json::write(out, &*sheet.pick(row, &keys))?;
                }
                out.write_all(b"\n]\n")?;
            }
            Format::Jsonl => {
                let keys = sheet.shown(self)?;
                for row in &sheet.rows {
                    json::write(out, &*sheet.pick(row, &keys))?;
                    out.write_all(b"\n")?;
                }
            }
            Format::Csv => {
                let keys = sheet.shown(self)?;
                let mut csv = csv::Writer::from_writer(out);
                if !self.no_headers {
                    csv.write_record(keys.iter().map(|k| field(k)))?;
                }
                for row in &sheet.rows {
                    let row = sheet.pick(row, &keys);
                    csv.write_record(row.values().map(cell::plain))?;
                }
                csv.flush()?;
            }
        }
        Ok(())
    }
}

/// Prints a warning on standard error, for those who know that it is wanted.
pub(crate) fn warn(message: &str) {
    let _ = writeln!(io::stderr(), "vmsight: warning: {}", escape(message));
}
