//! Kernel modules of our own (`lab/modules`), which do inside a guest what attackers do there: built against the headers of the
//! guest's kernel, and kept in the cache for as long as nothing that they are made of changes.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::cache::{self, Lock};
use crate::kernel::Fetched;

/// The first gcc that knows `-fmin-function-alignment`.
const KNOWS_MINIMUM: u32 = 14;

/// The modules built for a kernel: files that end in `.ko`, in the order of their names.
pub fn build(kernel: &Fetched) -> Result<Vec<PathBuf>> {
    let headers = kernel.headers()?;
    let source = cache::workspace().join("lab/modules");
    let _lock = Lock::wait("modules")?;
    let folder = cache::folder()?.join("modules").join(digest(&source, &headers)?);
    if !folder.exists() {
        make(&source, &headers, &folder).with_context(|| format!("build modules for {}", kernel.package))?;
    }
    let mut found = files(&folder, "ko")?;
    if found.is_empty() {
        bail!("no modules in {}", folder.display());
    }
    found.sort();
    Ok(found)
}

/// What the modules are made of, and with what.
fn digest(source: &Path, headers: &Path) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut sources = files(source, "c")?;
    sources.sort();
    for path in sources.iter().chain([&headers.join("package")]) {
        let bytes = fs::read(path).with_context(|| format!("read {}", path.display()))?;
        hasher.update(path.file_name().unwrap_or_default().as_encoded_bytes());
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(&bytes);
    }
    hasher.update(gcc("-dumpfullversion")?.as_bytes());
    Ok(hasher.finalize().to_hex().to_string())
}

fn files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?;
    let paths = entries
        .map(|entry| Ok(entry?.path()))
        .collect::<std::io::Result<Vec<_>>>()?;
    Ok(paths
        .into_iter()
        .filter(|path| path.extension() == Some(OsStr::new(extension)))
        .collect())
}

fn gcc(argument: &str) -> Result<String> {
    let output = Command::new("gcc").arg(argument).output().context("run gcc")?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn make(source: &Path, headers: &Path, to: &Path) -> Result<()> {
    let top = to.parent().context("a folder in the cache")?;
    fs::create_dir_all(top)?;
    let work = tempfile::tempdir_in(top)?;
    let mut objects = String::from("obj-m :=");
    for path in files(source, "c")? {
        let name = path.file_name().context("a source has a name")?;
        fs::copy(&path, work.path().join(name))?;
        objects.push_str(&format!(" {}", Path::new(name).with_extension("o").display()));
    }
    fs::write(work.path().join("Kbuild"), objects)?;
    let major = gcc("-dumpversion")?;
    let major = major.split('.').next().unwrap_or_default().parse::<u32>();
    let mut command = Command::new("make");
    command
        .arg("-C")
        .arg(headers.join("build"))
        .arg(format!("M={}", work.path().display()))
        // This machine's compiler, not the one that the kernel was built with: modules of plain C do not mind.
        .args(["CC=gcc", "CONFIG_DEBUG_INFO_BTF_MODULES=", "modules"])
        .env_remove("MAKEFLAGS")
        .env_remove("MAKELEVEL");
    if major.context("the version of gcc")? < KNOWS_MINIMUM {
        command.arg("CONFIG_CC_HAS_MIN_FUNCTION_ALIGNMENT=");
    }
    run(&mut command)?;
    let built = tempfile::tempdir_in(top)?;
    for path in files(work.path(), "ko")? {
        let name = path.file_name().context("a module has a name")?;
        run(Command::new("strip")
            .args(["--strip-debug", "-o"])
            .arg(built.path().join(name))
            .arg(&path))?;
    }
    // Whole or not at all.
    fs::rename(built.keep(), to).with_context(|| format!("make {}", to.display()))
}

fn run(command: &mut Command) -> Result<()> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("run {}", command.get_program().display()))?;
    if !output.status.success() {
        bail!(
            "{}: {}\n{}{}",
            command.get_program().display(),
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}
