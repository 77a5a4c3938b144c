//! The bytes of a file, decompressed as they are read, and what they seem to be.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use bzip2::bufread::MultiBzDecoder;
use flate2::bufread::MultiGzDecoder;
use liblzma::bufread::XzDecoder;

use super::{FileKind, ImportError};

/// Bytes that are looked at to tell what a file is.
const HEAD: usize = 4096;
/// Memory that xz may take for its dictionary: what its highest level uses is 64 MiB.
const XZ_MEMORY: u64 = 128 << 20;

/// What the first bytes look like, after decompression.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sort {
    Elf,
    Btf,
    Json,
    Text,
    Unknown,
}

/// A file opened for reading from front to back.
pub(super) struct Source {
    /// Read already, to tell the sort.
    head: Vec<u8>,
    rest: Box<dyn Read>,
    packed: bool,
}

impl Source {
    pub(super) fn open(path: &Path) -> Result<Self, ImportError> {
        let io = |cause| ImportError::Io {
            path: path.to_owned(),
            cause,
        };
        let file = File::open(path).map_err(io)?;
        if !file.metadata().map_err(io)?.is_file() {
            return Err(io(io::Error::other("it is not a regular file")));
        }
        let mut file = BufReader::with_capacity(1 << 16, file);
        let magic = file.fill_buf().map_err(io)?;
        let mut packed = true;
        let mut rest: Box<dyn Read> = if magic.starts_with(b"\xfd7zXZ\0") {
            let stream =
                liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY, liblzma::stream::CONCATENATED);
            Box::new(XzDecoder::new_stream(file, stream.map_err(|e| io(e.into()))?))
        } else if magic.starts_with(b"\x1f\x8b") {
            Box::new(MultiGzDecoder::new(file))
        } else if magic.starts_with(b"BZh") {
            Box::new(MultiBzDecoder::new(file))
        } else {
            packed = false;
            Box::new(file)
        };
        let mut head = Vec::with_capacity(HEAD);
        (&mut rest).take(HEAD as u64).read_to_end(&mut head).map_err(io)?;
        Ok(Self { head, rest, packed })
    }

    pub(super) fn sort(&self) -> Sort {
        let head = self.head.as_slice();
        if head.starts_with(b"\x7fELF") {
            // ELF is read from the file itself, here and there; a compressed one would have to be unpacked whole.
            return if self.packed { Sort::Unknown } else { Sort::Elf };
        }
        if head.starts_with(&[0x9f, 0xeb]) || head.starts_with(&[0xeb, 0x9f]) {
            return Sort::Btf;
        }
        let text = head.trim_ascii_start();
        if text.starts_with(b"{") {
            return Sort::Json;
        }
        let line = text.split(|&b| b == b'\n').next().unwrap_or(&[]);
        if super::system_map::line(line).is_some() {
            Sort::Text
        } else {
            Sort::Unknown
        }
    }

    /// The whole of it from the start; an error of kind `FileTooLarge` after `limit` MiB.
    pub(super) fn reader(self, limit: u64) -> impl Read {
        let left = limit.saturating_mul(1 << 20);
        BufReader::with_capacity(
            1 << 16,
            Capped {
                source: io::Cursor::new(self.head).chain(self.rest),
                left,
            },
        )
    }

    /// All bytes.
    pub(super) fn all(self, path: &Path, kind: FileKind, limit: u64) -> Result<Vec<u8>, ImportError> {
        let unpacked = self.packed;
        let mut bytes = Vec::new();
        match self.reader(limit).read_to_end(&mut bytes) {
            Ok(_) => Ok(bytes),
            Err(cause) => Err(failed(path, kind, limit, unpacked, cause)),
        }
    }

    pub(super) fn is_packed(&self) -> bool {
        self.packed
    }
}

/// What a failed read means.
pub(super) fn failed(
    path: &Path,
    kind: FileKind,
    limit: u64,
    unpacked: bool,
    cause: io::Error,
) -> ImportError {
    let path = path.to_owned();
    if cause.kind() == io::ErrorKind::FileTooLarge {
        return ImportError::TooLarge {
            path,
            kind,
            limit,
            unpacked,
        };
    }
    ImportError::Io { path, cause }
}

/// Fails where more is read than may be, so that a small file cannot unpack into all memory.
struct Capped<R> {
    source: R,
    left: u64,
}

impl<R: Read> Read for Capped<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.source.read(buf)?;
        match self.left.checked_sub(n as u64) {
            Some(left) => self.left = left,
            None => return Err(io::ErrorKind::FileTooLarge.into()),
        }
        Ok(n)
    }
}
