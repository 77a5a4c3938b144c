//! What is to run under the hypervisor.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use vmsight_sim_image::{Image, Program};

/// A kernel, and what goes along with it.
#[derive(Args, Debug)]
pub(super) struct Guest {
    /// The kernel: a bzImage, as distributions have it in /boot
    #[arg(long, value_name = "FILE", help_heading = "Guest")]
    pub(super) kernel: Option<PathBuf>,
    /// Its first root
    #[arg(long, value_name = "FILE", requires = "kernel", help_heading = "Guest")]
    initrd: Option<PathBuf>,
    /// Its command line
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "console=ttyS0",
        requires = "kernel",
        help_heading = "Guest"
    )]
    command_line: String,
    /// Another monitor than vmsight's own
    #[arg(long, value_name = "FILE", requires = "kernel", help_heading = "Guest")]
    monitor: Option<PathBuf>,
}

impl Guest {
    /// An image with this kernel.
    pub(super) fn image(&self, kernel: &Path) -> Result<Image> {
        let monitor = match &self.monitor {
            Some(file) => read(file)?,
            None => Program::Monitor.bytes()?,
        };
        let mut image = Image::new(read(kernel)?, &self.command_line).monitor(monitor);
        if let Some(file) = &self.initrd {
            image = image.initrd(read(file)?);
        }
        image.check()?;
        Ok(image)
    }
}

fn read(file: &Path) -> Result<Vec<u8>> {
    fs::read(file).with_context(|| format!("reading {}", file.display()))
}
