//! Loads the modules that the initramfs brings along.

use std::ffi::CString;
use std::fs;

use anyhow::{Context, Result};

/// Written by whoever builds the initramfs: one module a line in loading order, its path and then its parameters.
const LIST: &str = "/lib/modules/order";

/// Loads them all.
pub(crate) fn load() -> Result<()> {
    for line in fs::read_to_string(LIST).context(LIST)?.lines() {
        let (path, parameters) = line.split_once(' ').unwrap_or((line, ""));
        let image = fs::read(path).with_context(|| path.to_owned())?;
        match nix::kmod::init_module(&image, &CString::new(parameters)?) {
            Ok(()) | Err(nix::errno::Errno::EEXIST) => {}
            Err(error) => return Err(error).with_context(|| format!("load {path} '{parameters}'")),
        }
    }
    Ok(())
}
