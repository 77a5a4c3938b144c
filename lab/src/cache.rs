//! The folder that holds what is worth keeping between runs, outside the repository.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};

/// `$VMSIGHT_CACHE`, else `vmsight` in the user's cache folder. `lab/setup` goes by the same rule.
pub fn folder() -> Result<PathBuf> {
    let set = |name| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    set("VMSIGHT_CACHE")
        .or_else(|| Some(set("XDG_CACHE_HOME")?.join("vmsight")))
        .or_else(|| Some(set("HOME")?.join(".cache/vmsight")))
        .context("neither VMSIGHT_CACHE nor XDG_CACHE_HOME nor HOME says where to keep things")
}

/// The top of the source tree that this lab was built from.
pub fn workspace() -> &'static Path {
    let lab = Path::new(env!("CARGO_MANIFEST_DIR"));
    lab.parent().unwrap_or(lab)
}

/// A lock between processes, held until it is dropped or its process ends.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Waits for the lock `name`.
    pub fn wait(name: &str) -> Result<Lock> {
        let (path, file) = open(name)?;
        flock(&file, FlockOperation::LockExclusive).with_context(|| format!("lock {}", path.display()))?;
        Ok(Lock { _file: file })
    }

    /// Waits until any of `count` places under `name` is free.
    pub fn wait_for_place(name: &str, count: usize) -> Result<Lock> {
        loop {
            for place in 0..count {
                let (_, file) = open(&format!("{name}-{place}"))?;
                if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                    return Ok(Lock { _file: file });
                }
            }
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
    }
}

fn open(name: &str) -> Result<(PathBuf, File)> {
    let folder = folder()?.join("locks");
    fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    let path = folder.join(name);
    let file = File::create(&path).with_context(|| format!("open {}", path.display()))?;
    Ok((path, file))
}
