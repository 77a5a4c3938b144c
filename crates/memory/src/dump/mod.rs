//! Memory dumps: raw images, LiME files and AVML's, ELF cores of QEMU, libvirt, VirtualBox and Xen, compressed kdump files,
//! QEMU's migration streams, VMware's states. [`write`](mod@write) makes them.
//!
//! The file is mapped whole and read in place; pages that are packed are unpacked when they are asked for. What is missing of it
//! is said in [`Dump::notes`] and by the error of a read there; the rest is read.

mod avml;
mod bytes;
mod coding;
mod cover;
mod elf;
mod headers;
mod kdump;
mod lime;
mod migration;
mod notes;
mod pages;
mod raw;
mod view;
mod vmware;
pub mod write;
mod xen;

pub use coding::Coding;
pub use cover::Segment;
pub use headers::{Headers, parse_headers, parse_vmware, sniff};
pub use pages::{Pages, Unit};
pub use raw::{RawLayout, raw_layouts};

use crate::{BuildError, GuestMemory, Mapping, MappingKind, Source};
use pages::PageSource;
use std::fmt;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use thiserror::Error;
use vmsight_arch::{Gpa, Registers};

/// Smaller than this no machine's memory is.
const SMALLEST: u64 = 4096;

/// The format of a dump.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum DumpFormat {
    /// Bytes without a header.
    Raw(RawLayout),
    /// LiME, version 1.
    Lime,
    /// An ELF core file with physical addresses.
    Elf,
    /// A compressed kdump file, flattened or not.
    Kdump,
    /// AVML's compressed LiME, version 2.
    Avml,
    /// A QEMU migration stream.
    Migration,
    /// A state of VMware and its memory.
    Vmware,
}

impl DumpFormat {
    /// The formats by the names that force them.
    pub const NAMED: [(&'static str, Self); 7] = [
        ("raw", Self::Raw(RawLayout::Flat)),
        ("lime", Self::Lime),
        ("elf", Self::Elf),
        ("kdump", Self::Kdump),
        ("avml", Self::Avml),
        ("migration", Self::Migration),
        ("vmware", Self::Vmware),
    ];
}

impl fmt::Display for DumpFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Raw(RawLayout::Flat) => write!(f, "raw image"),
            Self::Raw(layout) => write!(f, "raw image, {layout}"),
            Self::Lime => write!(f, "LiME"),
            Self::Elf => write!(f, "ELF core"),
            Self::Kdump => write!(f, "kdump"),
            Self::Avml => write!(f, "AVML"),
            Self::Migration => write!(f, "QEMU migration stream"),
            Self::Vmware => write!(f, "VMware state"),
        }
    }
}

/// Why a dump could not be opened.
#[derive(Debug, Error)]
pub enum DumpError {
    /// The system would not open, map or measure the file.
    #[error("cannot open {}: {source}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A directory, pipe, socket or terminal.
    #[error("{} is neither a file nor a block device", .0.display())]
    NotAFile(PathBuf),
    /// Too small to be a machine's memory.
    #[error("{} has {len} bytes: too small for a memory dump", path.display())]
    TooSmall {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
    },
    /// A format that is known, but not read here.
    #[error("this is {what}, which vmsight does not read: {instead}")]
    Foreign {
        /// What it is.
        what: &'static str,
        /// What to do instead.
        instead: &'static str,
    },
    /// Not what the format asks for.
    #[error("not a memory dump: {0}")]
    Broken(Box<str>),
    /// The parts of the file do not make a memory: a fault of ours, for parsing makes them disjoint.
    #[error(transparent)]
    Build(#[from] BuildError),
}

impl DumpError {
    fn broken(what: &str) -> Self {
        Self::Broken(what.into())
    }
}

/// An open dump.
#[derive(Clone, Debug)]
pub struct Dump {
    /// The memory.
    pub memory: GuestMemory,
    /// The format it was read in.
    pub format: DumpFormat,
    /// What the vCPUs held, where the file says; empty where not.
    pub registers: Vec<Registers>,
    /// What is missing and what was guessed, for the user.
    pub notes: Vec<String>,
    /// The guest kernel's VMCOREINFO, where the file has it.
    pub vmcoreinfo: Option<String>,
    mapping: Arc<Mapping>,
}

/// Opens a dump. Without a format the file's first bytes tell; what has no signature is a raw image, laid out flat (see
/// [`Dump::with_layout`]), or a `.vmem` of VMware where its state lies beside it.
///
/// # Errors
/// A file that cannot be mapped, or that is no dump.
pub fn open(path: &Path, format: Option<DumpFormat>) -> Result<Dump, DumpError> {
    let failed = |source| DumpError::Open {
        path: path.to_owned(),
        source,
    };
    let (file, len) = open_file(path)?;
    if len < SMALLEST {
        return Err(DumpError::TooSmall {
            path: path.to_owned(),
            len,
        });
    }
    let mut start = [0; 64];
    file.read_exact_at(&mut start, 0).map_err(failed)?;
    let sniffed = || match sniff(&start)? {
        DumpFormat::Raw(layout) => Ok::<_, DumpError>(match vmware_state_of(path) {
            Some(_) => DumpFormat::Vmware,
            None => DumpFormat::Raw(layout),
        }),
        other => Ok(other),
    };
    let format = match format {
        Some(format) => format,
        None => sniffed()?,
    };
    if format == DumpFormat::Vmware {
        // Whichever of the two was named: the state, and the file beside it that has the memory.
        let (state, memory) = match vmware::is_state(&start) {
            true => (Some(path.to_owned()), vmware::beside(path, &["vmem"])),
            false => (vmware_state_of(path), Some(path.to_owned())),
        };
        let state = state
            .ok_or_else(|| DumpError::broken("there is no .vmss or .vmsn of the same name beside it"))?;
        if let Some(memory) = memory {
            return open_vmware(&state, &memory);
        }
    }
    open_one(&file, len, format).map_err(|error| match error {
        OpenError::System(source) => failed(source),
        OpenError::Dump(error) => error,
    })
}

fn open_file(path: &Path) -> Result<(File, u64), DumpError> {
    let failed = |source| DumpError::Open {
        path: path.to_owned(),
        source,
    };
    // Before opening: to open a pipe is to wait for its other end.
    let kind = std::fs::metadata(path).map_err(failed)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(DumpError::NotAFile(path.to_owned()));
    }
    let mut file = File::open(path).map_err(failed)?;
    // The length of a block device is not in its metadata.
    let len = file.seek(SeekFrom::End(0)).map_err(failed)?;
    Ok((file, len))
}

/// The state beside a `.vmem` file.
fn vmware_state_of(path: &Path) -> Option<PathBuf> {
    let extension = path.extension()?;
    extension
        .eq_ignore_ascii_case("vmem")
        .then(|| vmware::beside(path, &["vmss", "vmsn"]))?
}

/// Opens a state of VMware and the memory that it describes.
fn open_vmware(state: &Path, memory: &Path) -> Result<Dump, DumpError> {
    let map = |path: &Path| {
        let (file, len) = open_file(path)?;
        Mapping::frozen(&file, 0, len).map_err(|source| DumpError::Open {
            path: path.to_owned(),
            source,
        })
    };
    let (state, mapping) = (map(state)?, map(memory)?);
    let whole = GuestMemory::builder()
        .mapped(Gpa(0), state.len(), &state, 0)
        .build()?;
    let data = usize::try_from(state.len())
        .ok()
        .and_then(|len| whole.frozen(Gpa(0), len))
        .unwrap_or_default();
    let headers = parse_vmware(data, mapping.len())?;
    assemble(headers, mapping)
}

/// Why a file could not be opened as a dump.
enum OpenError {
    System(io::Error),
    Dump(DumpError),
}

/// Opens a dump that is one file.
fn open_one(file: &File, len: u64, format: DumpFormat) -> Result<Dump, OpenError> {
    let change = may_change(file);
    // A file with headers is no VM's memory: at worst it is still being written.
    let live = change.is_some() && matches!(format, DumpFormat::Raw(_));
    let mapping = if live {
        Mapping::live(file, 0, len, false)
    } else {
        Mapping::frozen(file, 0, len)
    };
    let mapping = mapping.map_err(OpenError::System)?;
    let mut dump = read(mapping, format).map_err(OpenError::Dump)?;
    match change {
        Some(Change::Written) if live => {
            dump.notes
                .push("the file is open for writing elsewhere: read as memory that may change".to_owned());
        }
        Some(Change::Written) => {
            dump.notes
                .push("the file is open for writing elsewhere: it may not be complete".to_owned());
        }
        Some(Change::Unknown) | None => {}
    }
    Ok(dump)
}

/// Which signal tells of a lease that somebody wants broken (fcntl(2); the same number on all architectures).
const F_SETSIG: libc::c_int = 10;

/// Why a file may change.
enum Change {
    /// Somebody has it open for writing.
    Written,
    /// The kernel does not say whether somebody has it open: it is another user's, or on a file system without leases.
    Unknown,
}

/// Whether somebody may be writing to the file, and how that looks. A VM's memory backend is a file like any other and may
/// be opened by name, but must then be taken for what it is: memory that lives.
fn may_change(file: &File) -> Option<Change> {
    // SAFETY: plain system calls on a descriptor that lives.
    unsafe {
        let fd = file.as_raw_fd();
        // Whoever opens the file for writing while we have the lease makes the kernel send us a signal. The default one
        // would end us; this one is ignored unless somebody asks for it.
        if libc::fcntl(fd, F_SETSIG, libc::SIGURG) != 0 {
            return Some(Change::Unknown);
        }
        // A read lease is refused while anybody has the file open, or mapped, for writing (fcntl(2), F_SETLEASE).
        if libc::fcntl(fd, libc::F_SETLEASE, libc::F_RDLCK) == 0 {
            libc::fcntl(fd, libc::F_SETLEASE, libc::F_UNLCK);
            return None;
        }
        // EAGAIN is that; any other error tells nothing of the file.
        match io::Error::last_os_error().raw_os_error() {
            Some(libc::EAGAIN) => Some(Change::Written),
            _ => Some(Change::Unknown),
        }
    }
}

/// Reads the headers and makes the memory.
fn read(mapping: Arc<Mapping>, format: DumpFormat) -> Result<Dump, DumpError> {
    let len = mapping.len();
    let whole = GuestMemory::builder().mapped(Gpa(0), len, &mapping, 0).build()?;
    let headers = match usize::try_from(len)
        .ok()
        .and_then(|len| whole.frozen(Gpa(0), len))
    {
        Some(data) => parse_headers(data, len, Some(format))?,
        // Only raw images are live, and of those only the beginning counts.
        None => {
            let mut start = [0; 64];
            whole
                .read(Gpa(0), &mut start)
                .map_err(|error| DumpError::broken(&error.to_string()))?;
            parse_headers(&start, len, Some(format))?
        }
    };
    assemble(headers, mapping)
}

/// Makes the memory that the headers describe of the file that has it.
fn assemble(headers: Headers, mapping: Arc<Mapping>) -> Result<Dump, DumpError> {
    let Headers {
        format,
        segments,
        paged,
        missing,
        registers,
        vmcoreinfo,
        notes,
    } = headers;
    let mut builder = GuestMemory::builder();
    for segment in &segments {
        builder = builder.mapped(segment.gpa, segment.len, &mapping, segment.offset);
    }
    if let Some((runs, pages)) = paged {
        let file = GuestMemory::builder()
            .mapped(Gpa(0), mapping.len(), &mapping, 0)
            .build()?;
        let source: Arc<dyn Source> = Arc::new(PageSource::new(file, pages));
        for run in runs {
            builder = builder.custom(run.start, run.len, Arc::clone(&source), run.start.0);
        }
    }
    for region in missing {
        builder = builder.missing(region);
    }
    for note in &notes {
        builder = builder.note(note.clone());
    }
    Ok(Dump {
        memory: builder.build()?,
        format,
        registers,
        notes,
        vmcoreinfo,
        mapping,
    })
}

impl Dump {
    /// The same raw image in another layout; the file is not opened again. For a dump with headers, which say where its
    /// memory is, this is an error.
    ///
    /// # Errors
    /// Not a raw image.
    pub fn with_layout(&self, layout: RawLayout) -> Result<Self, DumpError> {
        if !matches!(self.format, DumpFormat::Raw(_)) {
            return Err(DumpError::broken(&format!(
                "the layout of a dump in {} format is fixed",
                self.format
            )));
        }
        read(Arc::clone(&self.mapping), DumpFormat::Raw(layout))
    }

    /// The layouts this dump can have: see [`raw_layouts`]. None to be tried for a dump with headers.
    pub fn layouts(&self) -> Vec<RawLayout> {
        match self.format {
            DumpFormat::Raw(_) => raw_layouts(self.mapping.len()),
            _ => Vec::new(),
        }
    }

    /// Whether the file can still change.
    pub fn is_live(&self) -> bool {
        self.mapping.kind() != MappingKind::Frozen
    }
}
