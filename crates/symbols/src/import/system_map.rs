//! System.map and copies of /proc/kallsyms: an address, nm's letter and a name per line.

use std::io::{BufRead, BufReader};
use std::path::Path;

use super::source::{Source, failed};
use super::{FileKind, ImportError, Imported};
use crate::SymbolTableBuilder;

/// Largest file that is read, in MiB.
const MAX: u64 = 256;
/// Longest line that is looked at; names have at most 512 bytes.
const MAX_LINE: usize = 4096;

pub(super) fn read(path: &Path, source: Source) -> Result<Imported, ImportError> {
    const KIND: FileKind = FileKind::SystemMap;
    let packed = source.is_packed();
    let mut reader = BufReader::new(source.reader(MAX));
    let mut symbols = SymbolTableBuilder::new();
    let (mut lines, mut odd, mut modules, mut zero) = (0usize, 0usize, 0usize, 0usize);
    let mut text = Vec::new();
    loop {
        text.clear();
        let n = read_line(&mut reader, &mut text).map_err(|cause| failed(path, KIND, MAX, packed, cause))?;
        if n == 0 {
            break;
        }
        if text.trim_ascii().is_empty() {
            continue;
        }
        lines += 1;
        match line(&text) {
            // A module's symbols are where that guest had loaded it; they are no part of the kernel's image.
            Some(found) if found.module => modules += 1,
            Some(found) => {
                zero += usize::from(found.address == 0);
                if !symbols.push(found.name, found.address, found.kind) {
                    odd += 1;
                }
            }
            None => odd += 1,
        }
    }
    let broken = |why: &str| ImportError::Broken {
        path: path.to_owned(),
        kind: KIND,
        why: why.to_owned(),
    };
    let kept = lines - odd - modules;
    if kept == 0 {
        return Err(broken("it has no symbols"));
    }
    if zero * 2 > kept {
        return Err(broken(
            "its addresses are zero: it was copied from /proc/kallsyms without the right to see them",
        ));
    }
    let mut imported = Imported::nothing(path, KIND);
    if odd > 0 {
        imported.notes.push(format!(
            "{odd} of {lines} lines are not \"address letter name\" and were left out"
        ));
    }
    if modules > 0 {
        imported
            .notes
            .push(format!("{modules} symbols of modules were left out"));
    }
    imported.symbols = Some(symbols.finish());
    Ok(imported)
}

/// Reads a line, of which no more than [`MAX_LINE`] bytes are kept. 0 at the end.
fn read_line(reader: &mut impl BufRead, text: &mut Vec<u8>) -> std::io::Result<usize> {
    let mut read = 0;
    loop {
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            return Ok(read);
        }
        let (n, done) = match memchr::memchr(b'\n', buffer) {
            Some(at) => (at + 1, true),
            None => (buffer.len(), false),
        };
        let room = MAX_LINE.saturating_sub(text.len()).min(n);
        text.extend_from_slice(buffer.get(..room).unwrap_or(&[]));
        reader.consume(n);
        read += n;
        if done {
            return Ok(read);
        }
    }
}

/// A line taken apart.
pub(super) struct Line<'a> {
    address: u64,
    kind: u8,
    name: &'a str,
    module: bool,
}

/// `ffffffff81000000 T _text`, in a copy of /proc/kallsyms also with `[module]` at the end.
pub(super) fn line(text: &[u8]) -> Option<Line<'_>> {
    let mut words = std::str::from_utf8(text).ok()?.split_ascii_whitespace();
    let address = words.next()?;
    // System.map has 8 or 16 digits; one or two alone would be any list of words.
    if address.len() < 8 || address.len() > 16 || !address.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let address = u64::from_str_radix(address, 16).ok()?;
    let &[kind] = words.next()?.as_bytes() else {
        return None;
    };
    let name = words.next()?;
    let module = words.next().is_some_and(|w| w.starts_with('['));
    (kind.is_ascii_graphic() && words.next().is_none()).then_some(Line {
        address,
        kind,
        name,
        module,
    })
}
