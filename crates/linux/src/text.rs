//! Bytes that a guest calls text, as Rust strings.

use compact_str::CompactString;

/// The bytes as a string: valid UTF-8 is kept as it is (control characters too; whoever prints to a terminal escapes them),
/// every other byte is written as `\xNN`, so that nothing is lost and two different names stay different to the eye.
pub fn guest_text(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => {
            let mut out = String::with_capacity(bytes.len() + 8);
            for chunk in bytes.utf8_chunks() {
                out.push_str(chunk.valid());
                for byte in chunk.invalid() {
                    use std::fmt::Write;
                    let _ = write!(out, "\\x{byte:02x}");
                }
            }
            out
        }
    }
}

/// The text before the first NUL of a fixed-size array (`comm[16]`, `nodename[65]`).
pub fn guest_array_text(bytes: &[u8]) -> String {
    guest_text(before_nul(bytes))
}

fn before_nul(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    bytes.get(..end).unwrap_or(bytes)
}

/// [`guest_text`] of what is nearly always short, and of which there is much: up to 24 bytes need no allocation.
pub(crate) fn short_text(bytes: &[u8]) -> CompactString {
    match std::str::from_utf8(bytes) {
        Ok(text) => CompactString::new(text),
        Err(_) => guest_text(bytes).into(),
    }
}

/// [`guest_array_text`] likewise.
pub(crate) fn short_array_text(bytes: &[u8]) -> CompactString {
    short_text(before_nul(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_bytes_are_spelt_out_and_the_rest_kept() {
        assert_eq!(guest_text(b"plain"), "plain");
        assert_eq!(
            guest_text("na\u{ef}ve \u{1b}[31m".as_bytes()),
            "na\u{ef}ve \u{1b}[31m"
        );
        assert_eq!(guest_text(b"a\xff\xc3b"), "a\\xff\\xc3b");
        assert_eq!(guest_array_text(b"comm\0junk"), "comm");
        assert_eq!(guest_array_text(b"no-nul"), "no-nul");
    }
}
