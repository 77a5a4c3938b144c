//! `vmsight strings`: printable text in physical, kernel or process memory.

use std::io::Write;

use anyhow::Result;
use clap::Args;
use serde_json::json;

use crate::{
    Outcome,
    args::Global,
    output::{Format, escape, field, json},
    session::Session,
};

/// Printable strings, with where they lie.
#[derive(Args, Debug)]
#[command(after_help = "\
Without --pid all of physical memory is searched; with it, what the process has mapped, by virtual address.
ASCII and UTF-8 by default. A string is cut where its page ends in memory that is not mapped, and where it
passes 64 KiB. --columns does not apply: a string has an address and a text.")]
pub(crate) struct Cmd {
    /// What to look into
    target: String,
    /// Only memory of this process
    #[arg(long, value_name = "PID")]
    pid: Option<u32>,
    /// Shortest string to show, in characters
    #[arg(short = 'n', long, value_name = "N", default_value_t = 6)]
    min: usize,
    /// Only strings that contain TEXT
    #[arg(short, long, value_name = "TEXT")]
    grep: Option<String>,
    /// Search UTF-16 little-endian text instead
    #[arg(long)]
    utf16: bool,
}

/// A longer run of text is cut here, so that a page of `A`s as large as memory stays bounded.
const LONGEST: usize = 64 << 10;

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let style = global.style();
        let mut out = style.out()?;
        if style.format == Format::Csv && !style.no_headers {
            writeln!(out, "address,text")?;
        }
        let mut finder = Finder::new(self.min.max(1), self.utf16);
        let mut found = false;
        let mut first = true;
        let mut print = |address: u64, text: &str| -> Result<()> {
            if self.grep.as_ref().is_some_and(|g| !text.contains(g.as_str())) {
                return Ok(());
            }
            found = true;
            match global.output {
                Format::Table | Format::Sarif | Format::Html => {
                    writeln!(out, "{address:#018x}  {}", escape(text))?
                }
                Format::Csv => {
                    // For one row no more room than a row needs: there may be millions.
                    let mut csv = csv::WriterBuilder::new()
                        .buffer_capacity(256)
                        .from_writer(&mut out);
                    csv.write_record([format!("{address:#x}"), field(text)])?;
                    csv.flush()?;
                }
                Format::Json | Format::Jsonl => {
                    if global.output == Format::Json {
                        out.write_all(if first { b"[\n" } else { b",\n" })?;
                    }
                    json::write(
                        &mut out,
                        &json!({ "address": format!("{address:#x}"), "text": text }),
                    )?;
                    if global.output == Format::Jsonl {
                        out.write_all(b"\n")?;
                    }
                }
            }
            first = false;
            Ok(())
        };
        match self.pid {
            None => {
                let session = Session::without_kernel(global, &self.target)?;
                session.each_physical_chunk(&mut |gpa, bytes| finder.feed(gpa.0, bytes, &mut print))?;
                session.finish(false)?;
            }
            Some(pid) => {
                let session = Session::open(global, &self.target)?;
                session.each_process_chunk(pid, &mut |gva, bytes| finder.feed(gva.0, bytes, &mut print))?;
                session.finish(false)?;
            }
        }
        finder.finish(&mut print)?;
        if global.output == Format::Json {
            out.write_all(if first { b"[]\n" } else { b"\n]\n" })?;
        }
        out.flush()?;
        Ok(if found { Outcome::Fine } else { Outcome::Nothing })
    }
}

/// Collects text over consecutive chunks.
struct Finder {
    min: usize,
    utf16: bool,
    start: u64,
    next: u64,
    text: Vec<u8>,
    /// The first byte of a UTF-16 unit whose second lies in the next chunk.
    half: Option<u8>,
}

type Print<'p> = dyn FnMut(u64, &str) -> Result<()> + 'p;

impl Finder {
    fn new(min: usize, utf16: bool) -> Finder {
        Finder {
            min,
            utf16,
            start: 0,
            next: 0,
            text: Vec::new(),
            half: None,
        }
    }

    fn feed(&mut self, address: u64, bytes: &[u8], print: &mut Print<'_>) -> Result<()> {
        if address != self.next {
            self.finish(print)?;
        }
        self.next = address.wrapping_add(bytes.len() as u64);
        if self.utf16 {
            return self.feed_utf16(address, bytes, print);
        }
        for (i, &byte) in bytes.iter().enumerate() {
            if is_text(byte) && self.text.len() < LONGEST {
                if self.text.is_empty() {
                    self.start = address.wrapping_add(i as u64);
                }
                self.text.push(byte);
            } else if !self.text.is_empty() {
                self.flush(print)?;
                if is_text(byte) {
                    self.start = address.wrapping_add(i as u64);
                    self.text.push(byte);
                }
            }
        }
        Ok(())
    }

    /// UTF-16 of the Latin range, at even and odd addresses alike: a unit is a printable byte and a zero.
    fn feed_utf16(&mut self, address: u64, bytes: &[u8], print: &mut Print<'_>) -> Result<()> {
        for (i, &byte) in bytes.iter().enumerate() {
            let here = address.wrapping_add(i as u64);
            match (self.half.take(), byte) {
                (Some(half), 0) if self.text.len() < LONGEST => {
                    if self.text.is_empty() {
                        self.start = here.wrapping_sub(1);
                    }
                    self.text.push(half);
                }
                (half, 0x20..0x7f) => {
                    if half.is_some() {
                        // The unit before was no Latin letter after all: what went before it ends there.
                        self.flush(print)?;
                    }
                    self.half = Some(byte);
                }
                _ => self.flush(print)?,
            }
        }
        Ok(())
    }

    fn finish(&mut self, print: &mut Print<'_>) -> Result<()> {
        self.half = None;
        self.flush(print)
    }

    /// Prints what was collected where it is valid text and long enough; invalid UTF-8 splits it.
    fn flush(&mut self, print: &mut Print<'_>) -> Result<()> {
        let mut at = self.start;
        for chunk in self.text.utf8_chunks() {
            let valid = chunk.valid();
            if valid.len() >= self.min && valid.chars().count() >= self.min {
                print(at, valid)?;
            }
            at = at.wrapping_add((valid.len() + chunk.invalid().len()) as u64);
        }
        self.text.clear();
        Ok(())
    }
}

/// Printable ASCII, tab, and everything that can be part of UTF-8.
fn is_text(byte: u8) -> bool {
    (0x20..0x7f).contains(&byte) || byte == b'\t' || byte >= 0xc2 || (0x80..0xc0).contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(min: usize, utf16: bool, chunks: &[(u64, &[u8])]) -> Vec<(u64, String)> {
        let mut found = Vec::new();
        let mut print = |a: u64, t: &str| {
            found.push((a, t.to_owned()));
            Ok(())
        };
        let mut finder = Finder::new(min, utf16);
        for (address, bytes) in chunks {
            finder.feed(*address, bytes, &mut print).unwrap();
        }
        finder.finish(&mut print).unwrap();
        found
    }

    #[test]
    fn text_across_chunks_is_one_string_and_across_holes_two() {
        assert_eq!(
            all(4, false, &[(0, b"\0pass"), (5, b"word\0")]),
            [(1, "password".to_owned())]
        );
        assert_eq!(
            all(4, false, &[(0, b"\0pass"), (0x1000, b"word\0")]),
            [(1, "pass".to_owned()), (0x1000, "word".to_owned())]
        );
    }

    #[test]
    fn invalid_utf8_splits() {
        assert_eq!(
            all(3, false, &[(0, b"abc\xff\xffdef")]),
            [(0, "abc".to_owned()), (5, "def".to_owned())]
        );
        assert_eq!(
            all(3, false, &[(8, "größe".as_bytes())]),
            [(8, "größe".to_owned())]
        );
    }

    #[test]
    fn wide_text_at_odd_addresses() {
        assert_eq!(
            all(3, true, &[(0, b"\x01a\0b\0"), (5, b"c\0\0\0")]),
            [(1, "abc".to_owned())]
        );
    }

    #[test]
    fn no_text_grows_without_bound() {
        let long = vec![b'A'; LONGEST * 2 + 3];
        let found = all(4, false, &[(0, &long)]);
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].1.len(), LONGEST);
    }
}
