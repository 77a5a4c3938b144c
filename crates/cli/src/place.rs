//! Where in the guest: `init_task+0x10`, `0xffff888000001000`, `phys:0x1000`.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// An address as a person writes it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Place {
    /// Physical where true, else virtual.
    pub(crate) physical: bool,
    /// What the offset is added to.
    pub(crate) base: Base,
    /// Added to the base, modulo 2^64.
    pub(crate) offset: u64,
}

/// The beginning of an address expression.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Base {
    /// A number.
    Number(u64),
    /// A symbol of the kernel, or `module:symbol`.
    Symbol(String),
}

/// An address expression that cannot be understood.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{text:?} is no address: {why}; write SYMBOL, SYMBOL+0x10, 0xffff…, or phys:0x1000")]
pub(crate) struct PlaceError {
    text: String,
    why: &'static str,
}

/// Parses `0x…` or decimal, with `_` allowed between digits.
pub(crate) fn number(text: &str) -> Option<u64> {
    let text = text.replace('_', "");
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

/// For clap: a number, or a number with K, M or G (powers of 1024).
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((i, 'k' | 'K')) => (&text[..i], 10),
        Some((i, 'm' | 'M')) => (&text[..i], 20),
        Some((i, 'g' | 'G')) => (&text[..i], 30),
        _ => (text, 0),
    };
    number(digits)
        .and_then(|n| n.checked_mul(1 << shift))
        .ok_or_else(|| format!("{text:?} is no size: write 64, 0x40, 4K, 2M or 1G"))
}

impl FromStr for Place {
    type Err = PlaceError;

    fn from_str(text: &str) -> Result<Self, PlaceError> {
        let error = |why| PlaceError {
            text: text.to_owned(),
            why,
        };
        let (physical, rest) = match text.strip_prefix("phys:") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        // A sign inside a symbol's name does not occur; the first one ends the base.
        let end = rest.find(['+', '-']).unwrap_or(rest.len());
        let (head, mut tail) = rest.split_at(end);
        let head = head.trim();
        let base = if head.is_empty() {
            return Err(error("nothing before the offset"));
        } else if head.starts_with(|c: char| c.is_ascii_digit()) {
            Base::Number(number(head).ok_or_else(|| error("not a number of at most 64 bits"))?)
        } else {
            Base::Symbol(head.to_owned())
        };
        if physical && matches!(base, Base::Symbol(_)) {
            return Err(error("a symbol has a virtual address; leave phys: out"));
        }
        let mut offset = 0u64;
        while !tail.is_empty() {
            let (sign, rest) = tail.split_at(1);
            let end = rest.find(['+', '-']).unwrap_or(rest.len());
            let value = number(rest[..end].trim()).ok_or_else(|| error("the offset is not a number"))?;
            offset = if sign == "+" {
                offset.wrapping_add(value)
            } else {
                offset.wrapping_sub(value)
            };
            tail = &rest[end..];
        }
        Ok(Place {
            physical,
            base,
            offset,
        })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.physical {
            f.write_str("phys:")?;
        }
        match &self.base {
            Base::Number(n) => write!(f, "{n:#x}")?,
            Base::Symbol(s) => f.write_str(s)?,
        }
        match self.offset as i64 {
            0 => Ok(()),
            o if o > 0 => write!(f, "+{o:#x}"),
            o => write!(f, "-{:#x}", o.unsigned_abs()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_write() {
        let p: Place = "init_task+0x10-8".parse().unwrap();
        assert_eq!(
            p,
            Place {
                physical: false,
                base: Base::Symbol("init_task".into()),
                offset: 8
            }
        );
        let p: Place = "phys:0x1000".parse().unwrap();
        assert_eq!(
            p,
            Place {
                physical: true,
                base: Base::Number(0x1000),
                offset: 0
            }
        );
        assert_eq!(
            "0xffff_8880_0000_0000".parse::<Place>().unwrap().base,
            Base::Number(0xffff_8880_0000_0000)
        );
        assert_eq!(
            "init_task-0x10".parse::<Place>().unwrap().to_string(),
            "init_task-0x10"
        );
        for bad in ["", "+3", "phys:init_task", "0xfffffffffffffffff", "a+", "a+b"] {
            assert!(bad.parse::<Place>().is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(size("4K"), Ok(4096));
        assert_eq!(size("0x40"), Ok(64));
        assert!(size("99999999999G").is_err());
        assert!(size("G").is_err());
    }
}
