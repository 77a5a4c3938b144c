//! Baselines as files: a header, then everything else compressed (zlib, whose checksum notices damage).
//!
//! Numbers are little-endian. A text or a run of bytes is its length in 8 bytes, then itself. Compressed: release, build-id,
//! number of parts; of each part module, build-id, base, number of areas, their kinds and bases, bytes.

use std::io::{self, Read, Write};

use flate2::Compression;
use flate2::read::ZlibDecoder;
use flate2::write::ZlibEncoder;
use vmsight_arch::Gva;

use super::{Baseline, Part};

/// What a file begins with; the last byte is the form's version.
pub(super) const MAGIC: &[u8; 8] = b"VMSBASE\x01";
/// The longest text in it.
const MAX_TEXT: u64 = 4096;
/// The most code in it, kernel and modules together.
const MAX_CODE: u64 = 512 << 20;
/// The most areas of a module.
const MAX_AREAS: u64 = 64;
/// The most modules.
const MAX_PARTS: u64 = 1 << 16;

/// Why a file is no baseline.
#[derive(Debug)]
#[non_exhaustive]
pub enum BaselineError {
    /// It cannot be read, or ends too soon, or is damaged.
    Io(io::Error),
    /// It is something else, or of a newer version.
    Foreign,
    /// It says what cannot be.
    Implausible(&'static str),
}

impl std::fmt::Display for BaselineError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            BaselineError::Io(error) => write!(f, "the baseline cannot be read: {error}"),
            BaselineError::Foreign => f.write_str("the file is no baseline of this version of vmsight"),
            BaselineError::Implausible(what) => write!(f, "the baseline is damaged: {what}"),
        }
    }
}

impl std::error::Error for BaselineError {}

impl From<io::Error> for BaselineError {
    fn from(error: io::Error) -> Self {
        BaselineError::Io(error)
    }
}

/// Whether what begins so is a baseline's file, of whatever version.
pub(super) fn is_baseline(begin: &[u8]) -> bool {
    MAGIC
        .split_last()
        .is_some_and(|(_, name)| begin.starts_with(name))
}

impl Baseline {
    /// Writes it.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write(&self, mut out: impl Write) -> io::Result<()> {
        out.write_all(MAGIC)?;
        let mut out = ZlibEncoder::new(out, Compression::fast());
        put(&mut out, self.release.as_bytes())?;
        put(&mut out, self.build_id.as_bytes())?;
        out.write_all(&(self.parts.len() as u64).to_le_bytes())?;
        for part in &self.parts {
            put(&mut out, part.module.as_bytes())?;
            put(&mut out, part.build_id.as_bytes())?;
            out.write_all(&part.base.0.to_le_bytes())?;
            out.write_all(&(part.areas.len() as u64).to_le_bytes())?;
            for (kind, base) in &part.areas {
                put(&mut out, kind.as_bytes())?;
                out.write_all(&base.0.to_le_bytes())?;
            }
            put(&mut out, &part.bytes)?;
        }
        out.finish()?.flush()
    }

    /// Reads one. Memory grows with what is there, not with what it claims.
    ///
    /// # Errors
    /// If it is none, or damaged.
    pub fn read(mut from: impl Read) -> Result<Self, BaselineError> {
        let mut magic = [0; 8];
        from.read_exact(&mut magic)?;
        if magic != *MAGIC {
            return Err(BaselineError::Foreign);
        }
        let mut from = ZlibDecoder::new(from);
        let release = text(&mut from)?;
        let build_id = text(&mut from)?;
        let count = number(&mut from)?;
        if count > MAX_PARTS {
            return Err(BaselineError::Implausible("it has too many modules"));
        }
        let mut parts = Vec::new();
        let mut left = MAX_CODE;
        for _ in 0..count {
            let module = text(&mut from)?;
            let build_id = text(&mut from)?;
            let base = Gva(number(&mut from)?);
            let count = number(&mut from)?;
            if count > MAX_AREAS {
                return Err(BaselineError::Implausible("a module has too many areas"));
            }
            let mut areas = Vec::new();
            for _ in 0..count {
                areas.push((text(&mut from)?, Gva(number(&mut from)?)));
            }
            let bytes = bytes(&mut from, left)?;
            left -= bytes.len() as u64;
            parts.push(Part {
                module,
                build_id,
                base,
                areas,
                bytes,
            });
        }
        // The checksum lies behind the last byte.
        if from.read(&mut [0])? != 0 {
            return Err(BaselineError::Implausible("it goes on where it should end"));
        }
        Ok(Self {
            release,
            build_id,
            parts,
        })
    }
}

fn put(out: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    out.write_all(&(bytes.len() as u64).to_le_bytes())?;
    out.write_all(bytes)
}

fn number(from: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    from.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

fn bytes(from: &mut impl Read, most: u64) -> Result<Vec<u8>, BaselineError> {
    let length = number(from)?;
    if length > most {
        return Err(BaselineError::Implausible("a part of it is too large"));
    }
    let mut bytes = Vec::new();
    if from.take(length).read_to_end(&mut bytes)? as u64 != length {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    Ok(bytes)
}

fn text(from: &mut impl Read) -> Result<String, BaselineError> {
    String::from_utf8(bytes(from, MAX_TEXT)?).map_err(|_| BaselineError::Implausible("a name is no text"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some() -> Baseline {
        let part = |module: &str, base, bytes| Part {
            module: module.to_owned(),
            build_id: "ab".to_owned(),
            base: Gva(base),
            areas: vec![("data".to_owned(), Gva(base + 4096))],
            bytes,
        };
        Baseline {
            release: "6.1.0".to_owned(),
            build_id: String::new(),
            parts: vec![
                part(
                    "",
                    0xffff_ffff_8100_0000,
                    (0..10_000u32).map(|n| n as u8).collect(),
                ),
                part("ext4", 0xffff_ffff_c000_0000, vec![1, 2, 3]),
            ],
        }
    }

    fn written() -> Vec<u8> {
        let mut file = Vec::new();
        some().write(&mut file).unwrap();
        file
    }

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(Baseline::read(written().as_slice()).unwrap(), some());
    }

    #[test]
    fn damage_is_noticed() {
        let file = written();
        for end in [0, 7, 8, 20, file.len() - 1] {
            assert!(Baseline::read(&file[..end]).is_err(), "cut at {end}");
        }
        let mut other = file.clone();
        other[7] = 2;
        assert!(matches!(
            Baseline::read(other.as_slice()),
            Err(BaselineError::Foreign)
        ));
        let last = file.len() - 1;
        let mut damaged = file;
        damaged[last] ^= 1;
        assert!(Baseline::read(damaged.as_slice()).is_err());
    }
}
