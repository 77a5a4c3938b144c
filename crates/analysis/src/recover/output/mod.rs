//! A folder for what comes out of a guest: new, for its owner alone, and with no name that leads out of it.

pub(crate) mod name;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufWriter, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::Serialize;
use sha2::{Digest, Sha256};
use thiserror::Error;
use vmsight_linux::LinuxError;

/// The list of what was written.
const MANIFEST: &str = "manifest.jsonl";

/// Why files could not be written out at all.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ExtractError {
    /// The folder is not new.
    #[error("{0} is there and not empty: files of a guest go into a new folder only")]
    NotEmpty(PathBuf),
    /// Something could not be made or written here.
    #[error("cannot write {path}")]
    Write {
        /// What.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The guest's kernel could not be read.
    #[error(transparent)]
    Guest(#[from] LinuxError),
}

/// Why one of the files could not be written, if so; an error where none that follows would fare better. `output` is its name in `into`.
pub(crate) fn failure(
    result: io::Result<()>,
    into: &Path,
    output: Option<&Path>,
) -> Result<Option<String>, ExtractError> {
    match result {
        Err(source) if matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => {
            let path = output.map_or(into.to_owned(), |at| into.join(at));
            Err(ExtractError::Write { path, source })
        }
        Err(error) => Ok(Some(error.to_string())),
        Ok(()) => Ok(None),
    }
}

/// The list of what was written: a line of JSON on each.
pub(crate) struct Manifest {
    at: PathBuf,
    out: BufWriter<File>,
}

impl Manifest {
    /// In the folder `into`, which is made and must be new or empty.
    pub(crate) fn new(into: &Path) -> Result<Self, ExtractError> {
        new_folder(into)?;
        let at = into.join(MANIFEST);
        match create(&at) {
            Ok(file) => Ok(Self {
                at,
                out: BufWriter::new(file),
            }),
            Err(source) => Err(ExtractError::Write { path: at, source }),
        }
    }

    pub(crate) fn add(&mut self, row: &impl Serialize) -> Result<(), ExtractError> {
        let line = serde_json::to_writer(&mut self.out, row).map_err(io::Error::from);
        line.and_then(|()| self.out.write_all(b"\n"))
            .map_err(|source| self.failed(source))
    }

    pub(crate) fn finish(mut self) -> Result<(), ExtractError> {
        self.out.flush().map_err(|source| self.failed(source))
    }

    fn failed(&self, source: io::Error) -> ExtractError {
        ExtractError::Write {
            path: self.at.clone(),
            source,
        }
    }
}

/// The folder itself: whoever may read a guest's memory decides who else may.
fn new_folder(into: &Path) -> Result<(), ExtractError> {
    let failed = |source| ExtractError::Write {
        path: into.to_owned(),
        source,
    };
    match folder(into) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            match fs::read_dir(into).map_err(failed)?.next() {
                None => Ok(()),
                Some(_) => Err(ExtractError::NotEmpty(into.to_owned())),
            }
        }
        made => made.map_err(failed),
    }
}

fn folder(at: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(at)
}

/// A file that was not there before.
pub(crate) fn create(at: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(at)
}

/// Makes the folder `relative` below `into`, and those above it. Each must be a folder of ours, no link.
pub(crate) fn folders(into: &Path, relative: &Path) -> io::Result<()> {
    let mut at = into.to_owned();
    for part in relative.components() {
        at.push(part);
        match folder(&at) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                if !fs::symlink_metadata(&at)?.is_dir() {
                    return Err(ErrorKind::NotADirectory.into());
                }
            }
            made => made?,
        }
    }
    Ok(())
}

/// The SHA-256 of a file, from where it stands to its end.
pub(crate) fn digest(file: &mut File) -> io::Result<String> {
    let mut sha = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            n => sha.update(buffer.get(..n).unwrap_or(&[])),
        }
    }
    Ok(sha.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
