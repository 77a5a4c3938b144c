//! Events are printed as they come, each in a piece.

use std::io::{self, Write};

use anyhow::{Result, bail};

use serde_json::{Map, Value};

use crate::output::{Format, Style, escape, field, json};

/// Something that happened, in the two forms in which it is shown.
pub(crate) trait Happening {
    /// Every key of its JSON form, in order.
    const KEYS: &'static [&'static str];

    /// A line for people. It is escaped before it is printed.
    fn line(&self) -> String;

    /// A flat object.
    fn object(&self) -> Map<String, Value>;
}

/// Where events go.
pub(crate) struct Stream {
    format: Format,
    /// The keys shown.
    keys: Vec<String>,
    /// Whether columns were asked for: a table has them then, instead of the line for people.
    chosen: bool,
    rows: u64,
}

impl Stream {
    /// For events of one kind.
    pub(crate) fn new<H: Happening>(style: &Style) -> Result<Self> {
        let keys: Vec<String> = match &style.columns {
            Some(columns) if columns.as_slice() == ["all"] => {
                H::KEYS.iter().map(|k| (*k).to_owned()).collect()
            }
            Some(columns) => {
                if let Some(unknown) = columns.iter().find(|c| !H::KEYS.contains(&c.as_str())) {
                    bail!("no column {unknown:?} here; there are: {}", H::KEYS.join(", "));
                }
                columns.clone()
            }
            None => H::KEYS.iter().map(|k| (*k).to_owned()).collect(),
        };
        let stream = Self {
            format: style.format,
            keys,
            chosen: style.columns.is_some(),
            rows: 0,
        };
        if stream.format == Format::Csv && !style.no_headers {
            stream.csv(stream.keys.iter().map(|k| k.as_str().into()).collect())?;
        }
        Ok(stream)
    }

    /// Prints one event, at once: whoever reads along wants it now.
    pub(crate) fn write<H: Happening>(&mut self, row: &H) -> Result<()> {
        let first = self.rows == 0;
        self.rows += 1;
        if self.format == Format::Table && !self.chosen {
            return self.print(format!("{}\n", escape(&row.line())).as_bytes());
        }
        let mut object = row.object();
        match self.format {
            Format::Json | Format::Jsonl => {
                object.retain(|key, _| self.keys.iter().any(|k| k == key));
                let mut text = match (self.format, first) {
                    (Format::Json, true) => b"[\n".to_vec(),
                    (Format::Json, false) => b",\n".to_vec(),
                    _ => Vec::new(),
                };
                json::write(&mut text, &object)?;
                if self.format == Format::Jsonl {
                    text.push(b'\n');
                }
                self.print(&text)
            }
            Format::Csv | Format::Table | Format::Sarif | Format::Html => {
                let cells = self.keys.iter().map(|key| match object.get(key) {
                    None | Some(Value::Null) => String::new(),
                    Some(Value::String(text)) => text.clone(),
                    Some(other) => other.to_string(),
                });
                let cells: Vec<String> = cells.collect();
                match self.format {
                    Format::Csv => self.csv(cells),
                    _ => {
                        let cells: Vec<_> = cells.iter().map(|c| escape(c)).collect();
                        self.print(format!("{}\n", cells.join("\t")).as_bytes())
                    }
                }
            }
        }
    }

    /// What ends the output.
    pub(crate) fn finish(self) -> Result<()> {
        match (self.format, self.rows) {
            (Format::Json, 0) => self.print(b"[\n]\n"),
            (Format::Json, _) => self.print(b"\n]\n"),
            _ => Ok(()),
        }
    }

    fn csv(&self, cells: Vec<String>) -> Result<()> {
        let mut csv = csv::Writer::from_writer(Vec::new());
        csv.write_record(cells.iter().map(|c| field(c)))?;
        let line = csv.into_inner().map_err(|e| e.into_error())?;
        self.print(&line)
    }

    fn print(&self, bytes: &[u8]) -> Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(bytes)?;
        Ok(out.flush()?)
    }
}
