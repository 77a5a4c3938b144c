//! What a person or a program gets to see: one listing model, four ways to print it.

mod cell;
mod sheet;
mod table;

pub(crate) use cell::escape;
pub(crate) use sheet::{Sheet, View};

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
}

impl Style {
    /// Prints a sheet to standard output, its warnings to standard error.
    pub(crate) fn print(&self, sheet: &Sheet) -> Result<()> {
        let mut out = io::BufWriter::new(io::stdout().lock());
        self.write(sheet, &mut out)?;
        out.flush()?;
        drop(out);
        for warning in &sheet.warnings {
            warn(warning);
        }
        Ok(())
    }

    /// Writes a sheet in the chosen format.
    pub(crate) fn write(&self, sheet: &Sheet, out: &mut dyn Write) -> Result<()> {
        match self.format {
            Format::Table => table::write(sheet, self, out)?,
            Format::Json => {
                // One object a line inside the array: still one JSON document, yet diffable and greppable.
                let keys = sheet.keys(self)?;
                out.write_all(b"[")?;
                for (i, row) in sheet.rows.iter().enumerate() {
                    out.write_all(if i == 0 { b"\n" } else { b",\n" })?;
                    serde_json::to_writer(&mut *out, &sheet.pick(row, keys.as_deref()))?;
                }
                out.write_all(b"\n]\n")?;
            }
            Format::Jsonl => {
                let keys = sheet.keys(self)?;
                for row in &sheet.rows {
                    serde_json::to_writer(&mut *out, &sheet.pick(row, keys.as_deref()))?;
                    out.write_all(b"\n")?;
                }
            }
            Format::Csv => {
                let keys = sheet.keys(self)?.unwrap_or_else(|| sheet.all_keys());
                let mut csv = csv::Writer::from_writer(out);
                if !self.no_headers {
                    csv.write_record(&keys)?;
                }
                for row in &sheet.rows {
                    csv.write_record(
                        keys.iter()
                            .map(|k| row.get(k).map(cell::plain).unwrap_or_default()),
                    )?;
                }
                csv.flush()?;
            }
        }
        Ok(())
    }
}

/// Prints a warning on standard error; results stay clean on standard output.
pub(crate) fn warn(message: &str) {
    let _ = writeln!(io::stderr(), "vmsight: warning: {}", escape(message));
}
