//! Symbols and types from files, for kernels that carry none or to see what somebody else's table says.
//!
//! Read are Volatility 3's symbol tables (ISF: JSON, plain or compressed by xz, gzip or bzip2), vmlinux with DWARF or
//! BTF, bare BTF, and System.map. Which of them a file is, is seen from its first bytes, never from its name.
//!
//! Such files are trusted no more than a guest: sizes are capped, also after decompression, nesting is bounded, and
//! what makes no sense is left out and said.

pub(crate) mod base64;
mod check;
mod dwarf;
mod elf;
mod isf;
mod source;
mod system_map;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::types::TypesError;
use crate::{SymbolTable, Types};

pub(crate) use check::text_of;
pub use check::{Checked, Identity, WrongFile};
pub use isf::from_slice as isf_from_slice;

/// What sort of file it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileKind {
    /// A symbol table of Volatility 3.
    Isf,
    /// An ELF file with DWARF.
    Dwarf,
    /// An ELF file with a `.BTF` section.
    ElfBtf,
    /// An ELF file with symbols alone.
    Elf,
    /// BTF without anything around it, as in `/sys/kernel/btf/vmlinux`.
    Btf,
    /// `System.map`, or a copy of `/proc/kallsyms`.
    SystemMap,
}

impl fmt::Display for FileKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Isf => "ISF symbol table",
            Self::Dwarf => "ELF file with DWARF",
            Self::ElfBtf => "ELF file with BTF",
            Self::Elf => "ELF file without types",
            Self::Btf => "BTF",
            Self::SystemMap => "System.map",
        })
    }
}

/// What a file gave.
#[derive(Clone, Debug)]
pub struct Imported {
    /// The file.
    pub path: PathBuf,
    /// Its sort.
    pub kind: FileKind,
    /// Its symbols by link-time address.
    pub symbols: Option<SymbolTable>,
    /// Its types. From ISF and DWARF with the types of global variables: see [`Types::variable`].
    pub types: Option<Types>,
    /// The kernel's GNU build-id, where the file says it.
    pub build_id: Option<Vec<u8>>,
    /// The kernel's banner ("Linux version …") without newline, where the file says it.
    pub banner: Option<String>,
    /// What was left out or looked odd.
    pub notes: Vec<String>,
}

/// Why a file could not be read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ImportError {
    /// The system could not read it, or it is broken as a compressed file.
    #[error("reading {path}: {cause}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// It is none of the known sorts.
    #[error(
        "reading {path}: neither an ISF symbol table (JSON, plain or .xz, .gz, .bz2), an ELF file (vmlinux), BTF nor \
         a System.map"
    )]
    Unknown {
        /// The file.
        path: PathBuf,
    },
    /// It is larger than anything of its sort can honestly be.
    #[error("reading {path}: it has more than {limit} MiB{}, which no real {kind} has", if *.unpacked { " when unpacked" } else { "" })]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// What it seemed to be.
        kind: FileKind,
        /// The limit in MiB.
        limit: u64,
        /// The limit was met while decompressing.
        unpacked: bool,
    },
    /// Its contents make no sense.
    #[error("reading {path} as {kind}: {why}")]
    Broken {
        /// The file.
        path: PathBuf,
        /// What it seemed to be.
        kind: FileKind,
        /// What is wrong.
        why: String,
    },
    /// Its BTF makes no sense.
    #[error("reading {path} as {kind}: {cause}")]
    Types {
        /// The file.
        path: PathBuf,
        /// What it seemed to be.
        kind: FileKind,
        /// What is wrong.
        cause: TypesError,
    },
}

/// Reads a file of symbols or types.
pub fn open(path: &Path) -> Result<Imported, ImportError> {
    let source = source::Source::open(path)?;
    match source.sort() {
        source::Sort::Elf => elf::read(path),
        source::Sort::Btf => btf(path, source),
        source::Sort::Json => isf::read(path, source),
        source::Sort::Text => system_map::read(path, source),
        source::Sort::Unknown => Err(ImportError::Unknown {
            path: path.to_owned(),
        }),
    }
}

/// Largest bare BTF that is read. A kernel with every driver built in has some 20 MiB.
const MAX_BTF: u64 = 256;

fn btf(path: &Path, source: source::Source) -> Result<Imported, ImportError> {
    let bytes = source.all(path, FileKind::Btf, MAX_BTF)?;
    let types = Types::from_btf(bytes).map_err(|cause| ImportError::Types {
        path: path.to_owned(),
        kind: FileKind::Btf,
        cause,
    })?;
    Ok(Imported {
        types: Some(types),
        ..Imported::nothing(path, FileKind::Btf)
    })
}

impl Imported {
    fn nothing(path: &Path, kind: FileKind) -> Self {
        Self {
            path: path.to_owned(),
            kind,
            symbols: None,
            types: None,
            build_id: None,
            banner: None,
            notes: Vec::new(),
        }
    }
}
