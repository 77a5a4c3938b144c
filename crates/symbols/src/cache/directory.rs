//! The cache's directory: ours alone, files written whole or not at all.

use std::ffi::OsStr;
use std::fs::{DirBuilder, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{self, AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat, Timestamps};
use vmsight_arch::Gpa;
use vmsight_memory::{GuestMemory, Mapping};

use super::{CacheError, format};
use crate::Bytes;

/// No profile is larger: symbols, types and their sources have about 15 MB.
const MAX_FILE: u64 = 256 << 20;

/// Files beyond these are not looked at, whoever has put them there.
const MAX_LISTED: usize = 4096;

/// Temporary files that nobody can be writing any more.
const STALE: i64 = 3600;

/// Opens the directory, makes it if need be, and refuses it if it is not ours alone.
pub(super) fn open(path: &Path) -> Result<OwnedFd, CacheError> {
    let error = |what| {
        let path = path.to_owned();
        move |source: io::Error| CacheError::Io { path, what, source }
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(error("make the directory"))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd =
        fs::openat(CWD, path, flags, Mode::empty()).map_err(|e| error("open the directory")(e.into()))?;
    let stat = fs::fstat(&fd).map_err(|e| error("examine the directory")(e.into()))?;
    match trouble(&stat) {
        None => Ok(fd),
        Some(why) => Err(CacheError::Unsafe {
            path: path.to_owned(),
            why,
        }),
    }
}

/// What is wrong with the owner or the rights of a file or directory.
fn trouble(stat: &Stat) -> Option<String> {
    let us = rustix::process::geteuid().as_raw();
    if stat.st_uid != us {
        return Some(format!("it belongs to user {}, and we are {us}", stat.st_uid));
    }
    (stat.st_mode & 0o022 != 0).then(|| format!("others may write it (mode {:o})", stat.st_mode & 0o7777))
}

/// The names of all profiles, the last used first.
pub(super) fn newest(directory: &OwnedFd) -> Vec<String> {
    let mut files: Vec<(i64, i64, String)> = list(directory)
        .into_iter()
        .filter(|name| format::is_profile(name))
        .filter_map(|name| {
            let stat = fs::statat(directory, &name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
            Some((-stat.st_mtime, -(stat.st_mtime_nsec as i64), name))
        })
        .collect();
    files.sort();
    files.into_iter().map(|(_, _, name)| name).collect()
}

fn list(directory: &OwnedFd) -> Vec<String> {
    let Ok(entries) = Dir::read_from(directory) else {
        return Vec::new();
    };
    entries
        .filter_map(|e| e.ok()?.file_name().to_str().ok().map(str::to_owned))
        .filter(|name| !name.starts_with("..") && name != ".")
        .take(MAX_LISTED)
        .collect()
}

/// A profile, mapped into memory.
pub(super) fn map(directory: &OwnedFd, name: &str) -> Result<Bytes, String> {
    // NONBLOCK: a pipe in our place must not hold us up.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file =
        fs::openat(directory, name, flags, Mode::empty()).map_err(|e| format!("cannot open it: {e}"))?;
    let stat = fs::fstat(&file).map_err(|e| format!("cannot examine it: {e}"))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err("it is no plain file".to_owned());
    }
    if let Some(why) = trouble(&stat) {
        return Err(why);
    }
    let len = u64::try_from(stat.st_size).unwrap_or(0);
    if len == 0 || len > MAX_FILE {
        return Err(format!("it has {len} bytes"));
    }
    let mapping = Mapping::frozen(&File::from(file), 0, len).map_err(|e| format!("cannot map it: {e}"))?;
    let memory = GuestMemory::builder()
        .mapped(Gpa(0), len, &mapping, 0)
        .build()
        .map_err(|e| format!("cannot map it: {e}"))?;
    Ok(Bytes::new(MappedFile {
        memory,
        len: len as usize,
    }))
}

/// A file looked at in place. Bytes that somebody cuts off while we look read as zero.
struct MappedFile {
    memory: GuestMemory,
    len: usize,
}

impl AsRef<[u8]> for MappedFile {
    fn as_ref(&self) -> &[u8] {
        self.memory.frozen(Gpa(0), self.len).unwrap_or(&[])
    }
}

/// Writes a file so that nobody ever sees half of it: under another name, and then renamed. The disk is not waited for: what a
/// crash leaves of the file does not have the checksum, is not used, and is replaced the next time.
pub(super) fn write<'a>(
    directory: &OwnedFd,
    name: &str,
    mut parts: impl Iterator<Item = &'a [u8]>,
) -> io::Result<()> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let temporary = format!("{}{}-{count}", format::TEMPORARY, std::process::id());
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    // Left by a process that had our number and died.
    let _ = fs::unlinkat(directory, &temporary, AtFlags::empty());
    let mut file = File::from(fs::openat(directory, &temporary, flags, mode)?);
    let done = parts
        .try_for_each(|part| file.write_all(part))
        .and_then(|()| Ok(fs::renameat(directory, &temporary, directory, name)?));
    if done.is_err() {
        let _ = fs::unlinkat(directory, &temporary, AtFlags::empty());
    }
    done
}

/// Notes that a profile was used. It is no loss if that fails.
pub(super) fn touch(directory: &OwnedFd, name: &str) {
    let now = rustix::fs::Timespec {
        tv_sec: 0,
        tv_nsec: fs::UTIME_NOW,
    };
    let times = Timestamps {
        last_access: now,
        last_modification: now,
    };
    let _ = fs::utimensat(
        directory.as_fd(),
        OsStr::new(name),
        &times,
        AtFlags::SYMLINK_NOFOLLOW,
    );
}

/// Removes what was used least, and temporary files that were left behind.
pub(super) fn evict(directory: &OwnedFd, most: usize, most_per_build: usize) {
    let mut seen: Vec<(String, usize)> = Vec::new();
    for (i, name) in newest(directory).into_iter().enumerate() {
        let build = format::build_of(&name).to_owned();
        let of_build = match seen.iter_mut().find(|(b, _)| *b == build) {
            Some((_, n)) => {
                *n += 1;
                *n
            }
            None => {
                seen.push((build, 1));
                1
            }
        };
        if i >= most || of_build > most_per_build {
            let _ = fs::unlinkat(directory, &name, AtFlags::empty());
        }
    }
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| d.as_secs() as i64);
    for name in list(directory)
        .into_iter()
        .filter(|n| n.starts_with(format::TEMPORARY))
    {
        let stale =
            fs::statat(directory, &name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|s| now - s.st_mtime > STALE);
        if stale {
            let _ = fs::unlinkat(directory, &name, AtFlags::empty());
        }
    }
}
