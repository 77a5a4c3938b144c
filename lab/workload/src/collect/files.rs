//! Reading the small files of /proc and /sys.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use anyhow::{Context, Result};
use vmsight_workload::Text;

/// A file's bytes.
pub(super) fn bytes(path: impl AsRef<Path>) -> Result<Vec<u8>> {
    let path = path.as_ref();
    std::fs::read(path).with_context(|| format!("read {}", path.display()))
}

/// A file's text, without the white space around it.
pub(super) fn string(path: impl AsRef<Path>) -> Result<String> {
    Ok(String::from_utf8_lossy(&bytes(path)?).trim().to_owned())
}

/// A file's lines.
pub(super) fn lines(path: impl AsRef<Path>) -> Result<Vec<Text>> {
    Ok(bytes(path)?
        .split(|b| *b == b'\n')
        .filter(|line| !line.is_empty())
        .map(Text::from)
        .collect())
}

/// Where a link points, if it is one that can be read.
pub(super) fn link(path: impl AsRef<Path>) -> Option<Text> {
    Some(Text(std::fs::read_link(path).ok()?.into_os_string().into_vec()))
}

/// The names in a folder, sorted.
pub(super) fn names(path: impl AsRef<Path>) -> Result<Vec<OsString>> {
    let path = path.as_ref();
    let mut names = Vec::new();
    for entry in std::fs::read_dir(path).with_context(|| format!("list {}", path.display()))? {
        names.push(
            entry
                .with_context(|| format!("list {}", path.display()))?
                .file_name(),
        );
    }
    names.sort();
    Ok(names)
}

/// The entries of a folder that are numbers, in order.
pub(super) fn numbers(path: impl AsRef<Path>) -> Result<Vec<u32>> {
    let mut found: Vec<u32> = names(path)?
        .iter()
        .filter_map(|n| n.to_str()?.parse().ok())
        .collect();
    found.sort_unstable();
    Ok(found)
}

/// Undoes the kernel's octal escapes (`\040`).
pub(super) fn unescape_octal(bytes: &[u8]) -> Vec<u8> {
    unescape(bytes, |rest| {
        let digits = rest.get(1..4)?;
        let value = digits.iter().try_fold(0u32, |v, d| {
            matches!(d, b'0'..=b'7').then(|| v * 8 + u32::from(d - b'0'))
        })?;
        Some((u8::try_from(value).ok()?, 4))
    })
}

/// Undoes the escapes of `/dev/kmsg` (`\x1b`).
pub(super) fn unescape_hex(bytes: &[u8]) -> Vec<u8> {
    unescape(bytes, |rest| {
        let digits = rest.strip_prefix(b"\\x")?.get(..2)?;
        Some((u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?, 4))
    })
}

fn unescape(bytes: &[u8], one: impl Fn(&[u8]) -> Option<(u8, usize)>) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let found = if bytes[at] == b'\\' {
            one(&bytes[at..])
        } else {
            None
        };
        let (byte, used) = found.unwrap_or((bytes[at], 1));
        out.push(byte);
        at += used;
    }
    out
}

/// The GNU build id (hex) in a block of ELF notes.
pub(super) fn build_id(notes: &[u8]) -> Option<String> {
    let word = |at: usize| Some(u32::from_le_bytes(notes.get(at..at + 4)?.try_into().ok()?) as usize);
    let mut at = 0;
    loop {
        let (name_size, size, kind) = (word(at)?, word(at + 4)?, word(at + 8)?);
        let name = at + 12;
        let body = name + name_size.next_multiple_of(4);
        if kind == 3 && notes.get(name..name + name_size)? == b"GNU\0" {
            return Some(
                notes
                    .get(body..body + size)?
                    .iter()
                    .map(|b| format!("{b:02x}"))
                    .collect(),
            );
        }
        at = body + size.next_multiple_of(4);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_come_undone() {
        assert_eq!(unescape_octal(b"/a\\040b\\134c\\12"), b"/a b\\c\\12");
        assert_eq!(unescape_hex(b"\\x1b[31m \\x5c \\xzz \\"), b"\x1b[31m \\ \\xzz \\");
    }

    #[test]
    fn the_build_id_is_found_behind_other_notes() {
        let mut notes = Vec::new();
        for (name, kind, body) in [
            (&b"Linux\0"[..], 0x101u32, &[1u8, 2, 3][..]),
            (b"GNU\0", 3, &[0xab, 0xcd]),
        ] {
            notes.extend((name.len() as u32).to_le_bytes());
            notes.extend((body.len() as u32).to_le_bytes());
            notes.extend(kind.to_le_bytes());
            for part in [name, body] {
                notes.extend(part);
                notes.resize(notes.len().next_multiple_of(4), 0);
            }
        }
        assert_eq!(build_id(&notes).as_deref(), Some("abcd"));
        assert_eq!(build_id(&notes[..20]), None);
    }
}
