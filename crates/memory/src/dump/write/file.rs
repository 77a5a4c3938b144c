//! The file a dump is written into.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::digest::Digester;
use super::{PAGE, WriteError, digester};

/// After so many bytes the system is told to begin to bring them to the disk, so that it does not all wait for the end.
const BEHIND: u64 = 8 << 20;

/// A file that is written from its beginning to its end, with holes where there are zeros.
pub(super) struct OutFile<'a> {
    file: &'a File,
    at: u64,
    stored: u64,
    begun: u64,
    digest: Option<Digester>,
}

impl<'a> OutFile<'a> {
    /// Hashed while it is written.
    pub(super) fn hashed(file: &'a File) -> Result<Self, WriteError> {
        let digest = Some(digester()?);
        Ok(Self {
            digest,
            ..Self::unhashed(file, 0)
        })
    }

    /// From `at` on, not hashed.
    pub(super) fn unhashed(file: &'a File, at: u64) -> Self {
        Self {
            file,
            at,
            stored: 0,
            begun: at,
            digest: None,
        }
    }

    /// Where the next byte goes.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// Headers, and whatever else is new.
    pub(super) fn put(&mut self, bytes: Vec<u8>) -> Result<(), WriteError> {
        self.store(&bytes)?;
        match &self.digest {
            Some(digest) => digest.owned(bytes),
            None => Ok(()),
        }
    }

    /// Memory. Its zero pages are left out of the file.
    pub(super) fn put_memory(&mut self, bytes: &Arc<Vec<u8>>) -> Result<(), WriteError> {
        if let Some(digest) = &self.digest {
            digest.shared(bytes, 0..bytes.len())?;
        }
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let zeros = run(rest, true);
            self.at += zeros as u64;
            let (_, tail) = rest.split_at(zeros);
            let data = run(tail, false);
            let (data, tail) = tail.split_at(data);
            self.store(data)?;
            rest = tail;
        }
        Ok(())
    }

    /// So many zeros.
    pub(super) fn zeros(&mut self, len: u64) -> Result<(), WriteError> {
        self.at += len;
        match &self.digest {
            Some(digest) => digest.zeros(len),
            None => Ok(()),
        }
    }

    /// Zeros up to a multiple of `step`.
    pub(super) fn pad(&mut self, step: u64) -> Result<(), WriteError> {
        self.zeros(self.at.next_multiple_of(step) - self.at)
    }

    fn store(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        if bytes.is_empty() {
            return Ok(());
        }
        let at = self.at;
        self.file
            .write_all_at(bytes, at)
            .map_err(|source| WriteError::Write { at, source })?;
        self.at += bytes.len() as u64;
        self.stored += bytes.len() as u64;
        if self.at - self.begun >= BEHIND {
            begin_writing(self.file, self.begun, self.at - self.begun);
            self.begun = self.at;
        }
        Ok(())
    }

    /// Length, bytes stored and digest; zeros for one that was not hashed.
    pub(super) fn finish(self) -> Result<(u64, u64, [u8; 32]), WriteError> {
        let at = self.at;
        self.file
            .set_len(at)
            .map_err(|source| WriteError::Write { at, source })?;
        let sha256 = match self.digest {
            Some(digest) => {
                digest.end()?;
                digest.finish()?.first().copied().ok_or(WriteError::Hashing)?
            }
            None => [0; 32],
        };
        Ok((at, self.stored, sha256))
    }
}

/// How many bytes at the start are whole pages of zeros, or of something else.
fn run(bytes: &[u8], zero: bool) -> usize {
    bytes
        .chunks(PAGE as usize)
        .take_while(|page| is_zero(page) == zero)
        .map(<[u8]>::len)
        .sum()
}

/// Whether all bytes are zero.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    let (blocks, rest) = bytes.as_chunks::<64>();
    blocks.iter().all(|block| *block == [0; 64]) && rest.iter().all(|byte| *byte == 0)
}

/// Has the system begin to bring part of a file to the disk. Where it cannot, nothing is lost but time.
fn begin_writing(file: &File, at: u64, len: u64) {
    let (Ok(at), Ok(len)) = (i64::try_from(at), i64::try_from(len)) else {
        return;
    };
    // SAFETY: a plain system call on a descriptor that lives.
    unsafe { libc::sync_file_range(file.as_raw_fd(), at, len, libc::SYNC_FILE_RANGE_WRITE) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_zeros_are_zero() {
        assert!(is_zero(&[]) && is_zero(&[0; 4096]) && is_zero(&[0; 65]));
        for at in [0, 63, 64, 4000, 4095] {
            let mut page = [0; 4096];
            page[at] = 1;
            assert!(!is_zero(&page), "{at}");
        }
    }

    #[test]
    fn zero_pages_are_not_stored_and_read_as_zeros() {
        let file = tempfile::tempfile().unwrap();
        let mut out = OutFile::hashed(&file).unwrap();
        out.put(vec![7; 32]).unwrap();
        let mut memory = vec![0; 5 * 4096 + 10];
        memory[4096] = 1;
        memory[5 * 4096 + 3] = 2;
        out.put_memory(&Arc::new(memory.clone())).unwrap();
        out.zeros(100).unwrap();
        let (len, stored, _) = out.finish().unwrap();
        assert_eq!((len, stored), (32 + memory.len() as u64 + 100, 32 + 4096 + 10));
        let mut read = vec![1; len as usize];
        file.read_exact_at(&mut read, 0).unwrap();
        assert_eq!(read, [vec![7; 32], memory, vec![0; 100]].concat());
    }
}
