//! The root of a KVM host, which has no disk: busybox, QEMU and the libraries it needs, and what a test brings along.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cpio::Archive;
use crate::initramfs;
use crate::kernel::Fetched;

/// What QEMU reads when it starts a PC: firmware, and the code that loads a kernel.
const FIRMWARE: &[&str] = &[
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/qemu/kvmvapic.bin",
    "/usr/share/qemu/linuxboot_dma.bin",
];
const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// What scripts use of busybox.
const APPLETS: &[&str] = &[
    "sh", "mount", "mkdir", "insmod", "seq", "grep", "sleep", "tar", "sync", "poweroff", "kill", "cat",
    "timeout",
];

/// A root for this kernel, with `init` as its first program. `programs` go along into `/bin`, with the libraries they need, `script`
/// is `/script`, and `modules` are listed in `/lib/modules/order`, a path and parameters in each line.
pub(crate) fn root(
    kernel: &Fetched,
    modules: &[(&str, &str)],
    init: &str,
    programs: &[&Path],
    script: &str,
) -> Result<Archive> {
    let stripped = tempfile::tempdir()?;
    let mut archive = Archive::new();
    for name in ["dev", "proc", "sys", "tmp", "run", "out"] {
        archive.folder(name);
    }
    archive.file("init", 0o755, init.as_bytes());
    archive.file("script", 0o755, script.as_bytes());
    archive.file("bin/busybox", 0o755, &initramfs::busybox()?);
    for applet in APPLETS {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    let mut added = BTreeSet::new();
    let mut add = |archive: &mut Archive, from: &Path, to: &str| -> Result<()> {
        if added.insert(to.to_owned()) {
            let bytes = fs::read(from).with_context(|| format!("read {}", from.display()))?;
            archive.file(to.trim_start_matches('/'), 0o755, &bytes);
        }
        Ok(())
    };
    for path in FIRMWARE {
        add(&mut archive, Path::new(path), path)?;
    }
    for program in programs.iter().copied().chain([Path::new(QEMU)]) {
        for library in libraries(program)? {
            add(&mut archive, &library, &library.display().to_string())?;
        }
        let name = program
            .file_name()
            .and_then(OsStr::to_str)
            .context("a program has a name")?;
        let to = if program == Path::new(QEMU) {
            QEMU.to_owned()
        } else {
            format!("/bin/{name}")
        };
        let bare = stripped.path().join(name);
        strip(program, &bare)?;
        add(&mut archive, &bare, &to)?;
    }
    let mut order = String::new();
    for module in kernel.modules(modules)? {
        let path = format!("lib/modules/{}.ko", module.name);
        archive.file(&path, 0o644, &module.read()?);
        order.push_str(&format!("/{path} {}\n", module.parameters));
    }
    archive.file("lib/modules/order", 0o644, order.as_bytes());
    Ok(archive)
}

/// The shared libraries that a program needs, and its loader, as ldd(1) says.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("run ldd")?;
    if !output.status.success() {
        bail!(
            "ldd {}: {}",
            program.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let words = text.split_whitespace().filter(|word| word.starts_with('/'));
    Ok(words.map(PathBuf::from).collect())
}

/// A copy without what only a debugger needs: all of it is unpacked into the host's memory.
fn strip(program: &Path, to: &Path) -> Result<()> {
    let status = Command::new("strip")
        .arg("-o")
        .arg(to)
        .arg(program)
        .status()
        .context("run strip")?;
    if !status.success() {
        bail!("strip {}: {status}", program.display());
    }
    Ok(())
}
