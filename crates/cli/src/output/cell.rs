//! One value as text. Everything that comes out of a guest is written by somebody who may want to own the
//! terminal it is shown on, so nothing but printable characters leaves here.

use std::borrow::Cow;
use std::fmt::Write;

use serde_json::Value;

/// The text with every control, format and invisible character made visible as `\n`, `\x1b`, `\u{202e}` ….
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    escape_into(&mut out, text);
    out
}

/// Appends the text as [`escape`] shows it.
pub(super) fn escape_into(out: &mut String, text: &str) {
    if text.bytes().all(|b| matches!(b, b' '..=b'~') && b != b'\\') {
        out.push_str(text);
        return;
    }
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if (c as u32) < 0x20 || c as u32 == 0x7f => {
                let _ = write!(out, "\\x{:02x}", c as u32);
            }
            c if is_deceptive(c) => {
                let _ = write!(out, "\\u{{{:x}}}", c as u32);
            }
            c => out.push(c),
        }
    }
}

/// Characters that change how others look, or cannot be seen: C1 controls, bidirectional overrides, zero-width
/// and line separators, variation selectors, tags, and private-use ones.
pub(super) fn is_deceptive(c: char) -> bool {
    matches!(c as u32,
        0x80..=0x9f | 0xad | 0x34f | 0x61c | 0x115f..=0x1160 | 0x17b4..=0x17b5 | 0x180b..=0x180f
        | 0x200b..=0x200f | 0x2028..=0x202e | 0x2060..=0x206f | 0x3164 | 0xfe00..=0xfe0f | 0xfeff | 0xffa0
        | 0xfff0..=0xfffb | 0xe000..=0xf8ff | 0x1d173..=0x1d17a | 0xe0000..=0xe0fff | 0xf0000..=0x10ffff)
}

/// A value as one table cell; nested values in a short form.
pub(crate) fn shown(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        Value::Number(n) => n.to_string(),
        Value::String(s) => escape(s),
        Value::Array(a) => a.iter().map(shown).collect::<Vec<_>>().join(","),
        Value::Object(o) => o
            .iter()
            .map(|(k, v)| format!("{}={}", escape(k), shown(v)))
            .collect::<Vec<_>>()
            .join(" "),
    }
}

/// A value, in its JSON form, as one CSV field: null is empty, nested values are JSON. A spreadsheet would run a field
/// that begins like a formula, and the text may be an attacker's: such a field is led by an apostrophe.
pub(super) fn plain(json: &str) -> Result<Cow<'_, str>, serde_json::Error> {
    if json == "null" {
        return Ok(Cow::Borrowed(""));
    }
    let Some(text) = json.strip_prefix('"').and_then(|text| text.strip_suffix('"')) else {
        return Ok(Cow::Borrowed(json));
    };
    Ok(Cow::Owned(if text.contains('\\') {
        field(&serde_json::from_str::<String>(json)?)
    } else {
        field(text)
    }))
}

/// Text as one CSV field, also where it stands in the header.
pub(crate) fn field(text: &str) -> String {
    let text = escape(text);
    if text.starts_with(['=', '+', '-', '@']) && text.len() > 1 {
        format!("'{text}")
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_steers_a_terminal_gets_through() {
        assert_eq!(escape("\x1b]0;owned\x07"), "\\x1b]0;owned\\x07");
        assert_eq!(escape("a\nb\\"), "a\\nb\\\\");
        assert_eq!(escape("gnp.\u{202e}exe"), "gnp.\\u{202e}exe");
        assert_eq!(escape("\u{9b}31m"), "\\u{9b}31m");
        assert_eq!(escape("größe 日本 🦀"), "größe 日本 🦀");
    }

    #[test]
    fn a_formula_is_text_in_csv() {
        assert_eq!(plain("\"=cmd|' /C calc'!A0\"").unwrap(), "'=cmd|' /C calc'!A0");
        assert_eq!(plain("-3").unwrap(), "-3");
        assert_eq!(plain("null").unwrap(), "");
        assert_eq!(plain(r#""null""#).unwrap(), "null");
        assert_eq!(field("=1+1"), "'=1+1");
    }

    #[test]
    fn a_text_in_csv_is_escaped_once() {
        assert_eq!(plain(r#""a\"b\\c\u009b""#).unwrap(), "a\"b\\\\c\\u{9b}");
    }
}
