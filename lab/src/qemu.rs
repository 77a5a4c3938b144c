//! The QEMUs that guests run in.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::cache;

/// What a guest runs in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Qemu {
    /// The system's own: 7.2 on Debian 12.
    System,
    /// That of bookworm-backports, 10.x, unpacked into the cache.
    Backports,
}

impl Qemu {
    /// The program, and the arguments with which it finds what belongs to it. It is fetched where it is missing.
    pub fn command(self) -> Result<Vec<OsString>> {
        if self == Self::System {
            return Ok(vec!["qemu-system-x86_64".into()]);
        }
        let folder = cache::folder()?.join("qemu");
        if !folder.join("package").exists() {
            set_up()?;
        }
        let at = |path: &str| -> OsString { folder.join(path).into() };
        // What is not its own, SeaBIOS among it, it finds where the system's packages are.
        Ok(vec![
            at("usr/bin/qemu-system-x86_64"),
            "-L".into(),
            at("usr/share/qemu"),
            "-L".into(),
            PathBuf::from("/usr/share/seabios").into(),
        ])
    }
}

fn set_up() -> Result<()> {
    let script = cache::workspace().join("lab/setup");
    let output = Command::new(&script)
        .arg("--qemu")
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("run {}", script.display()))?;
    if !output.status.success() {
        bail!(
            "{} --qemu: {}",
            script.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
