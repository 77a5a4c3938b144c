//! Programs of Debian's that guests run beside the workload, each with its libraries: what keeps keys in the field keeps them here.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::cache;
use crate::cpio::Archive;

/// Modules that go along for them, to be loaded where a test orders it: what an encrypted disk is made of, graphics cards of QEMU's, and
/// what programs read a keyboard by.
pub(crate) const MODULES: &[(&str, &str)] = &[
    ("dm_crypt", ""),
    ("xts?", ""),
    ("essiv?", ""),
    ("bochs", ""),
    ("virtio_pci", ""),
    ("virtio_gpu", ""),
    ("evdev", ""),
];

/// Where a guest has the programs.
const BIN: &str = "usr/bin";
/// Where a guest has the libraries: as Debian does, so that the loader finds them.
const LIB: &str = "lib/x86_64-linux-gnu";
/// The loader, by the name that programs ask for it.
const LOADER: &str = "ld-linux-x86-64.so.2";

/// Puts them into a guest's first root. They are fetched where they are missing.
pub(crate) fn put(archive: &mut Archive) -> Result<()> {
    let folder = cache::folder()?.join("programs");
    set_up()?;
    all(archive, &folder.join("bin"), BIN)?;
    all(archive, &folder.join("lib"), LIB)?;
    // A file, for links stay behind where a guest moves to its second root.
    let loader = folder.join("lib").join(LOADER);
    let bytes = fs::read(&loader).with_context(|| format!("read {}", loader.display()))?;
    archive.file(&format!("lib64/{LOADER}"), 0o755, &bytes);
    Ok(())
}

fn all(archive: &mut Archive, from: &Path, to: &str) -> Result<()> {
    let entries = fs::read_dir(from).with_context(|| format!("read {}", from.display()))?;
    let mut paths = entries
        .map(|entry| Ok(entry?.path()))
        .collect::<std::io::Result<Vec<_>>>()?;
    paths.sort();
    for path in paths {
        let name = path.file_name().context("a file has a name")?.to_string_lossy();
        let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        archive.file(&format!("{to}/{name}"), 0o755, &bytes);
    }
    Ok(())
}

/// Costs nothing where all of them are there.
fn set_up() -> Result<()> {
    let script = cache::workspace().join("lab/setup");
    let output = Command::new(&script)
        .arg("--programs")
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("run {}", script.display()))?;
    if !output.status.success() {
        bail!(
            "{} --programs: {}",
            script.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
