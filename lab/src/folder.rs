//! The folder of a running guest: its sockets, its logs, maybe its memory.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};

use crate::cache::Lock;

/// What the names of these folders start with.
const PREFIX: &str = "vmsight-lab-";
/// Held by the owner as long as it lives.
const OWNED: &str = "owned";

/// A guest's folder; dropping it removes it, unless it is to be kept.
#[derive(Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    keep: bool,
    _owned: File,
}

impl Folder {
    /// Makes a folder with room for `memory_mib` MiB beside the logs.
    pub(crate) fn make(memory_mib: u32, keep: bool) -> Result<Folder> {
        // Nobody may take a folder for a left one before its owner holds it.
        let _making = Lock::wait("folders")?;
        let top = place(u64::from(memory_mib) << 20);
        sweep(&top);
        let path = tempfile::Builder::new()
            .prefix(PREFIX)
            .tempdir_in(&top)
            .with_context(|| format!("make a folder in {}", top.display()))?
            .keep();
        let owned = File::create(path.join(OWNED)).with_context(|| format!("own {}", path.display()))?;
        flock(&owned, FlockOperation::LockExclusive).with_context(|| format!("own {}", path.display()))?;
        Ok(Folder {
            path,
            keep,
            _owned: owned,
        })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !self.keep {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Memory-backed where there is such a place with room enough (containers often have a tiny one): the guest's memory may
/// be in it. Either path is short, as paths of sockets must be.
fn place(room: u64) -> PathBuf {
    const LOGS: u64 = 16 << 20;
    let shm = Path::new("/dev/shm");
    let free = rustix::fs::statvfs(shm).map_or(0, |s| s.f_bavail.saturating_mul(s.f_frsize));
    if free >= room + LOGS {
        shm.to_path_buf()
    } else {
        std::env::temp_dir()
    }
}

/// Removes the folders of owners that were killed. One that a process was started on is in use, owner or not.
fn sweep(top: &Path) {
    let Ok(entries) = fs::read_dir(top) else { return };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        let named = path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with(PREFIX));
        // One without the file is no folder of ours, or of another user's.
        let Ok(owned) = File::open(path.join(OWNED)) else {
            continue;
        };
        if named && flock(&owned, FlockOperation::NonBlockingLockExclusive).is_ok() && !in_use(&path) {
            let _ = fs::remove_dir_all(&path);
        }
    }
}

/// Whether a process has the folder in its arguments.
fn in_use(path: &Path) -> bool {
    let needle = path.as_os_str().as_encoded_bytes();
    let Ok(processes) = fs::read_dir("/proc") else {
        return true;
    };
    processes
        .filter_map(|entry| fs::read(entry.ok()?.path().join("cmdline")).ok())
        .any(|line| line.windows(needle.len()).any(|window| window == needle))
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    use super::*;

    fn make_in(top: &Path) -> PathBuf {
        let path = top.join(format!("{PREFIX}test"));
        fs::create_dir(&path).unwrap();
        File::create(path.join(OWNED)).unwrap();
        path
    }

    #[test]
    fn a_left_folder_is_swept_and_no_other() {
        let top = tempfile::tempdir().unwrap();
        let path = make_in(top.path());
        let other = top.path().join("other");
        fs::create_dir(&other).unwrap();
        File::create(other.join(OWNED)).unwrap();

        let owner = File::open(path.join(OWNED)).unwrap();
        flock(&owner, FlockOperation::LockExclusive).unwrap();
        sweep(top.path());
        assert!(path.exists(), "its owner lives");
        drop(owner);

        // The path shows in the arguments, and means nothing to the program.
        let mut user = Command::new("sleep").arg0(&path).arg("100").spawn().unwrap();
        // A parent goes on before the kernel has noted the arguments of the program that its child starts.
        let shown = (0..500).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            in_use(&path)
        });
        sweep(top.path());
        let kept = shown && path.exists();
        user.kill().unwrap();
        user.wait().unwrap();
        assert!(kept, "somebody uses it");

        sweep(top.path());
        assert!(!path.exists() && other.exists());
    }

    #[test]
    fn a_folder_goes_with_its_owner() {
        let folder = Folder::make(1, false).unwrap();
        let path = folder.path().to_path_buf();
        assert!(path.exists());
        drop(folder);
        assert!(!path.exists());
    }
}
