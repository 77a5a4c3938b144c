//! JSON that a terminal can be shown. `serde_json` escapes what JSON demands, the quote, the backslash and what is
//! below a space; C1 controls, DEL and bidirectional overrides pass it, and a terminal acts on them. Here they are
//! written as `\u009b`: to whoever parses it the same text.

use std::io::{self, Write};
use std::ops::Range;

use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, Serializer};

use super::{cell::is_deceptive, fields::Sink};

/// Writes a value in one line.
pub(crate) fn write<W: Write, T: Serialize + ?Sized>(out: W, value: &T) -> serde_json::Result<()> {
    value.serialize(&mut Serializer::with_formatter(out, Ascii))
}

/// The cells of one row, one behind the other.
#[derive(Default)]
pub(super) struct Cells {
    text: Vec<u8>,
    /// By column, where there is one.
    places: Vec<Option<Range<usize>>>,
}

impl Cells {
    pub(super) fn new(columns: usize) -> Cells {
        Cells {
            text: Vec::new(),
            places: vec![None; columns],
        }
    }

    /// Begins a new row.
    pub(super) fn clear(&mut self) {
        self.text.clear();
        self.places.fill(None);
    }

    /// The value in a column, where the row has it.
    pub(super) fn get(&self, column: usize) -> Option<&[u8]> {
        self.text.get(self.places.get(column)?.clone()?)
    }
}

impl Sink for Cells {
    fn cell<T: Serialize + ?Sized>(&mut self, column: usize, value: &T) -> serde_json::Result<()> {
        let start = self.text.len();
        write(&mut self.text, value)?;
        if let Some(place) = self.places.get_mut(column) {
            *place = Some(start..self.text.len());
        }
        Ok(())
    }
}

/// The compact form, with what steers or deceives a terminal escaped.
struct Ascii;

impl Formatter for Ascii {
    fn write_string_fragment<W: ?Sized + Write>(&mut self, out: &mut W, text: &str) -> io::Result<()> {
        if text.bytes().all(|b| b < 0x7f) {
            return CompactFormatter.write_string_fragment(out, text);
        }
        let mut done = 0;
        for (at, c) in text
            .char_indices()
            .filter(|(_, c)| *c == '\x7f' || is_deceptive(*c))
        {
            CompactFormatter.write_string_fragment(out, text.get(done..at).unwrap_or_default())?;
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(out, "\\u{unit:04x}")?;
            }
            done = at + c.len_utf8();
        }
        CompactFormatter.write_string_fragment(out, text.get(done..).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn nothing_that_steers_a_terminal_gets_through_and_nothing_is_lost() {
        let value = json!({
            "csi\u{9b}31m": "\u{7f}\u{202e}exe.png\u{2066}",
            "list": ["\u{200f}", "\x1b[2J\u{85}", "größe 日本 🦀", "\u{e0041}"],
        });
        let mut cells = Cells::new(1);
        cells.cell(0, &value).unwrap();
        let text = std::str::from_utf8(cells.get(0).unwrap()).unwrap();
        assert!(
            !text.chars().any(|c| c.is_control() || is_deceptive(c)),
            "{text:?}"
        );
        assert!(
            text.contains("größe 日本 🦀") && text.contains("\\u009b31m"),
            "{text}"
        );
        assert_eq!(serde_json::from_str::<Value>(text).unwrap(), value);
    }
}
