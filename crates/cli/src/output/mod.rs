//! What a person or a program gets to see: one listing model, four ways to print it.

mod cell;
mod fields;
pub(crate) mod json;
mod progress;
mod sheet;
mod table;
mod terminal;
mod text;

pub(crate) use cell::{escape, field, shown};
pub(crate) use fields::{Fields, Record, Sink};
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
    /// Findings as SARIF 2.1.0
    Sarif,
    /// A page for a browser: `vmsight report`
    Html,
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

    /// Where more of the same results goes.
    pub(crate) fn out_again(&self) -> Out {
        io::BufWriter::with_capacity(1 << 16, io::stdout().lock())
    }

    /// Prints a sheet to standard output, its warnings to standard error.
    pub(crate) fn print<R: Record>(&self, sheet: &Sheet<R>) -> Result<()> {
        // What is wrong with the columns asked for is said before anything is printed.
        sheet.shown(self)?;
        let mut out = self.out()?;
        let marked = self.write(sheet, &mut out)?;
        out.flush()?;
        drop(out);
        sheet.warnings.iter().for_each(|w| self.warn(w));
        if marked > 0 {
            let rows = if marked == 1 { "row has" } else { "rows have" };
            self.warn(&format!(
                "{marked} {rows} problems (marked !): -o json shows them, or --columns problems"
            ));
        }
        Ok(())
    }

    /// Prints a warning on standard error unless only errors are wanted; results stay clean on standard output.
    pub(crate) fn warn(&self, message: &str) {
        if !self.quiet {
            warn(message);
        }
    }

    /// Says on standard error what is being done, unless only errors are wanted.
    pub(crate) fn note(&self, message: &str) {
        if !self.quiet {
            let _ = writeln!(io::stderr(), "vmsight: {}", escape(message));
        }
    }

    /// Writes a sheet in the chosen format. How many rows are marked: they have problems that are not shown.
    pub(crate) fn write<R: Record>(&self, sheet: &Sheet<R>, out: &mut dyn Write) -> Result<usize> {
        match self.format {
            Format::Table => return table::write(sheet, self, out),
            Format::Json => {
                // One object a line inside the array: still one JSON document, yet diffable and greppable.
                out.write_all(b"[")?;
                let mut before: &[u8] = b"\n";
                self.objects(sheet, |object| {
                    out.write_all(std::mem::replace(&mut before, b",\n"))?;
                    out.write_all(object)
                })?;
                out.write_all(b"\n]\n")?;
            }
            Format::Jsonl => self.objects(sheet, |object| {
                out.write_all(object)?;
                out.write_all(b"\n")
            })?,
            Format::Csv => self.csv(sheet, out)?,
            Format::Sarif | Format::Html => {
                anyhow::bail!("a listing has no form in SARIF or HTML; this is a bug in vmsight")
            }
        }
        Ok(0)
    }

    /// Each row as a JSON object.
    fn objects<R: Record>(
        &self,
        sheet: &Sheet<R>,
        mut write: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<()> {
        // Up to a value: the comma before its key, the key and the colon.
        let mut columns: Vec<(usize, Vec<u8>)> = Vec::new();
        for key in sheet.shown(self)? {
            let column = sheet.column(key)?;
            // An object has each key once.
            if columns.iter().all(|(c, _)| *c != column) {
                let mut before = Vec::new();
                if !columns.is_empty() {
                    before.push(b',');
                }
                json::write(&mut before, key)?;
                before.push(b':');
                columns.push((column, before));
            }
        }
        let mut object = Vec::new();
        self.each(sheet, |cells| {
            object.clear();
            object.push(b'{');
            for (column, before) in &columns {
                object.extend_from_slice(before);
                object.extend_from_slice(cells.get(*column).unwrap_or(sheet.absent(*column)));
            }
            object.push(b'}');
            Ok(write(&object)?)
        })
    }

    fn csv<R: Record>(&self, sheet: &Sheet<R>, out: &mut dyn Write) -> Result<()> {
        let keys = sheet.shown(self)?;
        let columns = keys.iter().map(|k| sheet.column(k)).collect::<Result<Vec<_>>>()?;
        let mut csv = csv::Writer::from_writer(out);
        if !self.no_headers {
            csv.write_record(keys.iter().map(|k| field(k)))?;
        }
        self.each(sheet, |cells| {
            for column in &columns {
                let value = cells.get(*column).unwrap_or(sheet.absent(*column));
                csv.write_field(cell::plain(std::str::from_utf8(value)?)?.as_bytes())?;
            }
            Ok(csv.write_record(None::<&[u8]>)?)
        })?;
        csv.flush()?;
        Ok(())
    }

    /// Each row's shown cells in their JSON form.
    fn each<R: Record>(
        &self,
        sheet: &Sheet<R>,
        mut done: impl FnMut(&json::Cells) -> Result<()>,
    ) -> Result<()> {
        let keys = sheet.shown(self)?;
        let cells = json::Cells::new(sheet.keys.len());
        let mut fields = Fields::new(&sheet.keys, |key| keys.contains(&key), cells);
        for row in &sheet.rows {
            fields.sink.clear();
            fields.take(row)?;
            done(&fields.sink)?;
        }
        Ok(())
    }
}

/// Prints a warning on standard error, for those who know that it is wanted.
pub(crate) fn warn(message: &str) {
    let _ = writeln!(io::stderr(), "vmsight: warning: {}", escape(message));
}

#[cfg(test)]
mod forms_tests;
