//! From a layout to guest memory: mapped where the VMM shares it, through the process where not.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use vmsight_arch::Gpa;
use vmsight_memory::{BuildError, GuestMemory, Mapping as MappedMemory, ProcessMemory};

use super::HostRange;
use crate::host::maps::Mapping;
use crate::host::process::Process;

/// The memory, and how it is reached, in words.
pub(crate) struct Built {
    pub(crate) memory: GuestMemory,
    pub(crate) notes: Vec<String>,
}

/// The files behind a process's mappings that are mapped here already, or why one cannot be.
#[derive(Debug, Default)]
pub(crate) struct Opened(BTreeMap<Place, Result<Arc<MappedMemory>, String>>);

/// A mapping by its start, end, offset and inode.
type Place = (u64, u64, u64, u64);

/// Builds the memory of `ranges`. `maps` are the mappings of `process`, not joined. Files are opened for writing
/// only where `write` asks for it.
pub(crate) fn build(
    process: Process,
    maps: &[Mapping],
    ranges: &[HostRange],
    write: bool,
    opened: &mut Opened,
) -> Result<Built, BuildError> {
    let of_process = Arc::new(
        ProcessMemory::open(process.pid).map_err(|source| BuildError::Process {
            pid: process.pid,
            source,
        })?,
    );
    let mut notes: Vec<String> = Vec::new();
    let (mut mapped, mut copied) = (0_u64, 0_u64);
    let mut builder = GuestMemory::builder();
    for range in ranges {
        let end = range.hva.saturating_add(range.len);
        let mut at = range.hva;
        while at < end {
            let gpa = Gpa(range.gpa.saturating_add(at - range.hva));
            let found = maps.iter().find(|m| m.start <= at && at < m.end);
            let len = found.map_or(end, |m| m.end.min(end)) - at;
            let shared = found.filter(|m| m.shared && m.inode != 0).and_then(|m| {
                let key = (m.start, m.end, m.offset, m.inode);
                let entry = opened.0.entry(key).or_insert_with(|| {
                    map_file(process, m, write).map_err(|e| {
                        format!(
                            "{} is shared but cannot be mapped ({e}); it is read through the process",
                            m.path
                        )
                    })
                });
                match entry {
                    Ok(mapping) => Some((Arc::clone(mapping), at - m.start)),
                    Err(note) => {
                        if !notes.contains(note) {
                            notes.push(note.clone());
                        }
                        None
                    }
                }
            });
            builder = match shared {
                Some((mapping, offset)) => {
                    mapped = mapped.saturating_add(len);
                    builder.mapped(gpa, len, &mapping, offset)
                }
                None => {
                    copied = copied.saturating_add(len);
                    builder.process(gpa, len, &of_process, at, write)
                }
            };
            at += len;
        }
    }
    for note in &notes {
        builder = builder.note(note.clone());
    }
    tracing::debug!(pid = process.pid, mapped, copied, "guest memory is put together");
    Ok(Built {
        memory: builder.build()?,
        notes,
    })
}

/// Maps the whole of a shared mapping a second time: the same file, offset and length, so that the kernel's rules
/// for huge pages are kept.
fn map_file(process: Process, mapping: &Mapping, write: bool) -> io::Result<Arc<MappedMemory>> {
    let file = open_file(process, mapping, write)?;
    MappedMemory::live(&file, mapping.offset, mapping.len(), write)
}

/// Opens the very file behind a mapping: by the kernel's link for the mapping, by a descriptor the process holds, or
/// by its path. The last two are checked by inode and size.
fn open_file(process: Process, mapping: &Mapping, write: bool) -> io::Result<File> {
    let open = |path: &Path| OpenOptions::new().read(true).write(write).open(path);
    let link = process.path(&format!("map_files/{:x}-{:x}", mapping.start, mapping.end));
    // CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN is needed to follow it.
    let first = match open(&link) {
        Ok(file) => return Ok(file),
        Err(e) => e,
    };
    let needed = mapping.offset.saturating_add(mapping.len());
    let same = |file: &File| {
        file.metadata()
            .is_ok_and(|m| m.is_file() && m.ino() == mapping.inode && m.len() >= needed)
    };
    let mut last = first;
    for descriptor in process.descriptors()? {
        let path = process.path(&format!("fd/{}", descriptor.fd));
        // A link that has this text is no pipe or device; what it leads to is looked at again once it is open.
        let is_it = descriptor.link == mapping.path
            && fs::metadata(&path).is_ok_and(|m| m.is_file() && m.ino() == mapping.inode);
        if is_it {
            match open(&path) {
                Ok(file) if same(&file) => return Ok(file),
                Ok(_) => {}
                Err(e) => last = e,
            }
        }
    }
    if mapping.path.starts_with('/')
        && !mapping.path.starts_with("/memfd:")
        && !mapping.path.ends_with(" (deleted)")
    {
        let opened = process
            .own_file(Path::new(&mapping.path))
            .and_then(|file| open(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd()))));
        match opened {
            Ok(file) if same(&file) => return Ok(file),
            Ok(_) => {}
            Err(e) => last = e,
        }
    }
    Err(last)
}
