//! Decoded arguments.

use std::fmt::{self, Write};

use serde::{Serialize, Serializer};

/// What an argument or result is, as far as its type and name in the kernel's source tell.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Value {
    /// A number with a sign: a descriptor, a pid, an error.
    Signed(i64),
    /// A size, an offset, an identifier.
    Unsigned(u64),
    /// Permissions, written in octal.
    Octal(u64),
    /// An address, or something that has no better form.
    Pointer(u64),
    /// Text or data out of the caller's memory; `cut` where there is more of it.
    Text {
        /// The text, invalid bytes written as `\xNN`. Escape it before a terminal.
        text: String,
        /// Whether there is more.
        cut: bool,
    },
    /// Several texts: argv, envp.
    List {
        /// The texts.
        items: Vec<Value>,
        /// Whether there are more.
        cut: bool,
    },
    /// Flags and constants by name: `O_RDONLY|O_CLOEXEC`.
    Symbolic(String),
    /// A socket address: `inet 127.0.0.1:80`, `unix /run/x`.
    Address(String),
    /// An address whose memory could not be read: not there, paged out, or nonsense.
    Unreadable(u64),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signed(v) => write!(f, "{v}"),
            Self::Unsigned(v) => write!(f, "{v}"),
            Self::Octal(v) => write!(f, "{v:#o}"),
            Self::Pointer(0) => f.write_str("NULL"),
            Self::Pointer(v) => write!(f, "{v:#x}"),
            Self::Text { text, cut } => {
                quoted(f, text)?;
                f.write_str(if *cut { "..." } else { "" })
            }
            Self::List { items, cut } => {
                f.write_char('[')?;
                for (i, item) in items.iter().enumerate() {
                    if i > 0 {
                        f.write_str(", ")?;
                    }
                    item.fmt(f)?;
                }
                f.write_str(if *cut { ", ...]" } else { "]" })
            }
            Self::Symbolic(text) => f.write_str(text),
            Self::Address(text) => {
                f.write_char('{')?;
                escaped(f, text)?;
                f.write_char('}')
            }
            Self::Unreadable(at) => write!(f, "{at:#x} (unreadable)"),
        }
    }
}

/// In quotes, with nothing in it that a terminal would obey.
fn quoted(f: &mut fmt::Formatter<'_>, text: &str) -> fmt::Result {
    f.write_char('"')?;
    escaped(f, text)?;
    f.write_char('"')
}

fn escaped(f: &mut fmt::Formatter<'_>, text: &str) -> fmt::Result {
    for c in text.chars() {
        match c {
            // What is written as \xNN already stays so.
            '\\' => f.write_char(c)?,
            '"' => f.write_str("\\\"")?,
            c => write!(f, "{}", c.escape_debug())?,
        }
    }
    Ok(())
}

impl Serialize for Value {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Signed(v) => serializer.serialize_i64(*v),
            Self::Unsigned(v) => serializer.serialize_u64(*v),
            Self::Octal(v) => serializer.collect_str(&format_args!("{v:#o}")),
            Self::Pointer(0) => serializer.serialize_none(),
            Self::Pointer(v) => serializer.collect_str(&format_args!("{v:#x}")),
            Self::Text { text, .. } | Self::Symbolic(text) | Self::Address(text) => {
                serializer.serialize_str(text)
            }
            Self::List { items, .. } => items.serialize(serializer),
            Self::Unreadable(_) => serializer.serialize_none(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_reaches_a_terminal_that_it_would_obey() {
        let text = |s: &str| Value::Text {
            text: s.to_owned(),
            cut: false,
        };
        assert_eq!(text("/etc/passwd").to_string(), "\"/etc/passwd\"");
        assert_eq!(text("a\u{1b}[31m\"b\n").to_string(), r#""a\u{1b}[31m\"b\n""#);
        assert_eq!(text("\\xff").to_string(), "\"\\xff\"");
        assert_eq!(
            Value::Address("unix \u{9b}x".into()).to_string(),
            "{unix \\u{9b}x}"
        );
        let list = Value::List {
            items: vec![text("a"), text("b")],
            cut: true,
        };
        assert_eq!(list.to_string(), r#"["a", "b", ...]"#);
        assert_eq!(serde_json::to_string(&list).unwrap(), r#"["a","b"]"#);
        assert_eq!(Value::Pointer(0).to_string(), "NULL");
    }
}
