//! What the program says, all at once at its end.

use core::fmt::{self, Display, Write};

/// Lines.
pub(crate) struct Text {
    bytes: [u8; 16 << 10],
    used: usize,
}

impl Text {
    pub(crate) const fn new() -> Self {
        Self {
            bytes: [0; 16 << 10],
            used: 0,
        }
    }

    /// Adds a line; gives all there are.
    pub(crate) fn line(&mut self, what: &str, words: &[&dyn Display]) -> &[u8] {
        let _ = write!(self, "witness: {what}");
        for word in words {
            let _ = write!(self, " {word}");
        }
        let _ = self.write_str("\n");
        self.bytes.get(..self.used).unwrap_or_default()
    }

    /// Adds what a step came to.
    pub(crate) fn result(&mut self, what: &str, value: i64) {
        self.line("result", &[&what, &value]);
    }
}

impl Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = self.used + text.len();
        self.bytes
            .get_mut(self.used..end)
            .ok_or(fmt::Error)?
            .copy_from_slice(text.as_bytes());
        self.used = end;
        Ok(())
    }
}
