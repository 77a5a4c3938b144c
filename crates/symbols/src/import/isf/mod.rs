//! Reads Volatility 3's symbol tables, schemas 4 to 6: types become BTF, symbols a table.
//!
//! The file is read once, from front to back, and never held whole; its parts may come in any order.

mod convert;
mod json;

use std::io::Read;
use std::path::Path;

use serde::de::DeserializeSeed;

use super::source::{Source, failed};
use super::{FileKind, ImportError, Imported};
use convert::Convert;

/// Most JSON that is read, in MiB. A table of a distribution's kernel has 30 to 60.
const MAX: u64 = 512;

pub(super) fn read(path: &Path, source: Source) -> Result<Imported, ImportError> {
    let packed = source.is_packed();
    let mut convert = Convert::default();
    if let Err(error) = parse(source.reader(MAX), &mut convert) {
        if error.is_io() {
            return Err(failed(path, FileKind::Isf, MAX, packed, error.into()));
        }
        let why = error.to_string();
        return Err(ImportError::Broken {
            path: path.to_owned(),
            kind: FileKind::Isf,
            why,
        });
    }
    convert.finish(path)
}

/// Reads JSON into `convert`.
fn parse(reader: impl Read, convert: &mut Convert) -> Result<(), serde_json::Error> {
    let mut json = serde_json::Deserializer::from_reader(reader);
    json::Table(convert).deserialize(&mut json)?;
    json.end()
}

/// Reads a symbol table that lies in memory: what the fuzzer feeds.
pub fn from_slice(bytes: &[u8]) -> Result<Imported, ImportError> {
    let path = Path::new("(memory)");
    let mut convert = Convert::default();
    match parse(bytes, &mut convert) {
        Ok(()) => convert.finish(path),
        Err(e) => {
            let why = e.to_string();
            Err(ImportError::Broken {
                path: path.to_owned(),
                kind: FileKind::Isf,
                why,
            })
        }
    }
}
