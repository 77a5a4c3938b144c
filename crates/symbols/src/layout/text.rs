//! The C text of a layout.

use std::fmt::{self, Display, Formatter, Write};

use super::Layout;
use super::walk::Line;
use crate::types::Kind;

/// Where the comment with offset and size begins.
const COLUMN: usize = 56;

impl Display for Layout {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if let Some(declaration) = &self.declaration {
            writeln!(f, "{declaration};")?;
            return match self.size {
                Some(size) if self.kind != Kind::Func => writeln!(f, "/* size: {size} */"),
                _ => Ok(()),
            };
        }
        writeln!(f, "{} {{", self.name)?;
        for value in &self.values {
            writeln!(f, "    {:<40} = {},", value.name, value.value)?;
        }
        for line in &self.lines {
            self.line(f, line)?;
        }
        if self.cut {
            writeln!(
                f,
                "    /* cut: it nests deeper or has more members than any real type */"
            )?;
        }
        self.sums(f)?;
        writeln!(f, "}};")
    }
}

impl Layout {
    fn line(&self, f: &mut Formatter<'_>, line: &Line) -> fmt::Result {
        match line {
            Line::Open { depth, keyword } => writeln!(f, "{}{keyword} {{", Indent(*depth)),
            Line::Close {
                depth,
                name,
                offset,
                size,
            } => {
                let gap = if name.is_empty() { "" } else { " " };
                let text = format!("{}}}{gap}{name};", Indent(*depth));
                writeln!(f, "{text:<COLUMN$} /* {offset:>6} {size:>6} */")
            }
            Line::Member {
                depth,
                declaration,
                row,
            } => {
                let text = format!("{}{declaration};", Indent(*depth));
                write!(f, "{text:<COLUMN$} /* {:>6}", row.offset)?;
                match row.bit_offset {
                    Some(bit) => writeln!(f, ":{bit:>2} {:>3} */", row.size),
                    None => writeln!(f, " {:>6} */", row.size),
                }
            }
            Line::Hole { depth, bits } => writeln!(f, "{}/* hole: {} */", Indent(*depth), Amount(*bits)),
            Line::Cacheline { number, offset } => {
                writeln!(f, "    /* --- cache line {number} begins ({offset} bytes) --- */")
            }
        }
    }

    fn sums(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut text = String::new();
        if let Some(size) = self.size {
            write!(text, "size: {size}")?;
        }
        if self.kind.is_composite() {
            let totals = &self.totals;
            write!(text, ", members: {}", totals.members)?;
            if totals.holes > 0 {
                write!(text, ", holes: {} ({})", totals.holes, Amount(totals.hole_bits))?;
            }
            if totals.padding_bits > 0 {
                write!(text, ", padding: {}", Amount(totals.padding_bits))?;
            }
        }
        if text.is_empty() {
            Ok(())
        } else {
            writeln!(f, "    /* {text} */")
        }
    }
}

struct Indent(u32);

impl Display for Indent {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        (0..self.0).try_for_each(|_| f.write_str("    "))
    }
}

/// A number of bits as bytes where it is whole bytes.
struct Amount(u64);

impl Display for Amount {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match (self.0 / 8, self.0 % 8) {
            (1, 0) => f.write_str("1 byte"),
            (bytes, 0) => write!(f, "{bytes} bytes"),
            (0, 1) => f.write_str("1 bit"),
            (bytes @ 2.., bits) => write!(
                f,
                "{bytes} bytes and {bits} {}",
                if bits == 1 { "bit" } else { "bits" }
            ),
            _ => write!(f, "{} bits", self.0),
        }
    }
}
