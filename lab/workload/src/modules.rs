//! Loads the modules that the initramfs brings along.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File};

use anyhow::{Context, Result};
use nix::kmod::{ModuleInitFlags, finit_module, init_module};

/// Written by whoever builds the initramfs: one module a line in loading order, its path and then its parameters.
const LIST: &str = "/lib/modules/order";
/// Loaded as `modprobe --force` does, without a look at the version it was built for: the kernel then marks the module and
/// itself as tainted.
const FORCED: &str = "/lib/modules/8021q.ko";

/// Loads them all.
pub(crate) fn load() -> Result<()> {
    for line in fs::read_to_string(LIST).context(LIST)?.lines() {
        let (path, parameters) = line.split_once(' ').unwrap_or((line, ""));
        let arguments = CString::new(parameters)?;
        let outcome = if path == FORCED {
            let file = File::open(path).with_context(|| path.to_owned())?;
            finit_module(&file, &arguments, ModuleInitFlags::MODULE_INIT_IGNORE_VERMAGIC)
        } else {
            init_module(&fs::read(path).with_context(|| path.to_owned())?, &arguments)
        };
        match outcome {
            Ok(()) | Err(nix::errno::Errno::EEXIST) => {}
            Err(error) => return Err(error).with_context(|| format!("load {path} '{parameters}'")),
        }
    }
    Ok(())
}

/// The parameters that each module was loaded with, by its name.
pub(crate) fn arguments() -> Result<BTreeMap<String, String>> {
    let list = fs::read_to_string(LIST).context(LIST)?;
    Ok(list
        .lines()
        .map(|line| line.split_once(' ').unwrap_or((line, "")))
        .map(|(path, parameters)| {
            let file = path.rsplit('/').next().unwrap_or_default();
            let name = file.strip_suffix(".ko").unwrap_or(file).replace('-', "_");
            (name, parameters.to_owned())
        })
        .collect())
}
