//! The guest's first root: busybox, the workload, and the modules of its kernel.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::cache::{self, Lock};
use crate::cpio::Archive;
use crate::kernel::Fetched;
use crate::programs;

/// The modules of every guest and their parameters.
const MODULES: &[(&str, &str)] = &[
    ("dummy", "numdummies=2"),
    ("veth", ""),
    ("bridge", ""),
    ("8021q", ""),
    ("unix_diag", ""),
    ("vsock_loopback", ""),
    ("vsock_diag", ""),
    ("overlay", ""),
    ("loop", "max_loop=4 max_part=2"),
    ("lzo_rle", ""),
    ("zram", "num_devices=2"),
    // ext4 asks for it by its algorithm's name, which no dependency tells; newer kernels have it built into a library.
    ("crc32c_generic?", ""),
    ("ext4", ""),
];

/// Modules that go along and are loaded where a test orders it: the crypto API for programs, and AES by instructions; what tracks
/// connections.
const ALONG: &[(&str, &str)] = &[("algif_skcipher", ""), ("aesni_intel?", ""), ("nf_conntrack", "")];

/// Modules that go along with our own: what honest systems have, too, and looks like what attackers do.
const WITH_OURS: &[(&str, &str)] = &[("kvm_amd", ""), ("nf_tables", "")];

/// Programs of the host which go along: static ones, by where Debian puts them.
const BUSYBOX: &[&str] = &["/bin/busybox", "/usr/bin/busybox"];
const BASH: &[&str] = &["/bin/bash-static", "/usr/bin/bash-static"];
/// A program that is linked dynamically, with all that it needs: by where it goes, and where this machine may have it.
const DYNAMIC: &[(&str, u32, &[&str])] = &[
    ("bin/sleep", 0o755, &["/bin/sleep", "/usr/bin/sleep"]),
    (
        "lib64/ld-linux-x86-64.so.2",
        0o755,
        &["/lib64/ld-linux-x86-64.so.2"],
    ),
    (
        "lib/x86_64-linux-gnu/libc.so.6",
        0o644,
        &[LIBC, "/usr/lib/x86_64-linux-gnu/libc.so.6"],
    ),
];
/// The C library of this machine, which a dynamic program of the guest has loaded.
pub const LIBC: &str = "/lib/x86_64-linux-gnu/libc.so.6";

/// The image for a kernel: from the cache, if nothing that goes into it has changed.
pub fn build(kernel: &Fetched) -> Result<PathBuf> {
    build_with(kernel, &[], false)
}

/// The same with modules of our own (see [`crate::modules`]), which are there to be loaded later, and with
/// [`programs`].
pub fn build_with(kernel: &Fetched, modules: &[PathBuf], programs: bool) -> Result<PathBuf> {
    let workload = workload()?;
    let mut archive = Archive::new();
    for folder in ["dev", "proc", "sys", "tmp", "new"] {
        archive.folder(folder);
    }
    archive.file("init", 0o755, &read(&workload)?);
    archive.file("bin/busybox", 0o755, &busybox()?);
    archive.link("bin/sh", "busybox");
    // Alice executes it by name.
    archive.link("bin/ls", "busybox");
    archive.file("bin/bash", 0o755, &read(installed(BASH, "bash-static")?)?);
    for (name, mode, places) in DYNAMIC {
        archive.file(name, *mode, &read(installed(places, "coreutils and libc6")?)?);
    }
    let mut order = String::new();
    for module in kernel.modules(MODULES)? {
        let path = format!("lib/modules/{}.ko", module.name);
        archive.file(&path, 0o644, &module.read()?);
        order.push_str(format!("/{path} {}", module.parameters).trim_end());
        order.push('\n');
    }
    for module in kernel.modules(ALONG)? {
        archive.file(&format!("lib/modules/{}.ko", module.name), 0o644, &module.read()?);
    }
    if !modules.is_empty() {
        for module in kernel.modules(WITH_OURS)? {
            archive.file(&format!("lib/modules/{}.ko", module.name), 0o644, &module.read()?);
        }
    }
    archive.file("lib/modules/order", 0o644, order.as_bytes());
    for module in modules {
        let name = module
            .file_name()
            .and_then(OsStr::to_str)
            .context("a module has a name")?;
        archive.file(&format!("lib/modules/vmsight/{name}"), 0o644, &read(module)?);
    }
    if programs {
        programs::put(&mut archive)?;
        for module in kernel.modules(programs::MODULES)? {
            archive.file(&format!("lib/modules/{}.ko", module.name), 0o644, &module.read()?);
        }
    }
    let bytes = archive.finish();
    let folder = cache::folder()?.join("initramfs");
    fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    let path = folder.join(format!("{}.cpio", blake3::hash(&bytes).to_hex()));
    if !path.exists() {
        // Whole or not at all: others may look for the same file.
        let mut file = tempfile::NamedTempFile::new_in(&folder)?;
        std::io::Write::write_all(&mut file, &bytes)?;
        file.persist(&path)?;
    }
    Ok(path)
}

/// The least root there is: the workload's program, for a guest that is to be up soon and takes orders (`vmsight.silent` on its
/// kernel command line). No kernel's modules are in it.
pub(crate) fn bare() -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for folder in ["dev", "proc", "sys", "tmp", "new"] {
        archive.folder(folder);
    }
    archive.file("init", 0o755, &read(workload()?)?);
    archive.file("lib/modules/order", 0o644, b"");
    Ok(archive.finish())
}

/// This machine's static busybox.
pub(crate) fn busybox() -> Result<Vec<u8>> {
    read(installed(BUSYBOX, "busybox-static")?)
}

fn read(path: impl AsRef<Path>) -> Result<Vec<u8>> {
    let path = path.as_ref();
    fs::read(path).with_context(|| format!("read {}", path.display()))
}

fn installed<'a>(paths: &[&'a str], package: &str) -> Result<&'a str> {
    let found = paths.iter().find(|path| Path::new(path).exists());
    found
        .copied()
        .with_context(|| format!("{} is missing: install the package {package}", paths[0]))
}

/// Builds the workload as a static program for the guests' architecture. Cargo sees to it that this costs nothing
/// where nothing has changed; a target folder of its own keeps its flags apart from everybody else's.
fn workload() -> Result<PathBuf> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let _lock = Lock::wait("workload")?;
    let folder = cache::workspace().join("target/lab-guest");
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args([
            "build",
            "--quiet",
            "--locked",
            "--release",
            "--package",
            "vmsight-workload",
            "--target",
            TARGET,
        ])
        .args([
            "--config",
            "profile.release.lto=false",
            "--config",
            "profile.release.opt-level=2",
        ])
        .args([
            "--config",
            "profile.release.strip=true",
            "--config",
            "profile.release.debug=false",
        ])
        .arg("--target-dir")
        .arg(&folder)
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("CARGO_BUILD_TARGET")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .current_dir(cache::workspace())
        .stdin(Stdio::null())
        .output()
        .context("run cargo to build the workload")?;
    if !output.status.success() {
        bail!(
            "building the workload failed:\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(folder.join(TARGET).join("release/vmsight-workload"))
}
