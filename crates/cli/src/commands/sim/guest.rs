//! What is to run under the hypervisor.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use vmsight_sim_image::{Image, Program};

use super::rules::Rules;

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
    #[arg(long, value_name = "FILE", requires = "kernel", help_heading = "Monitor")]
    monitor: Option<PathBuf>,
    /// A policy that was saved, instead of one that is made for the kernel
    #[arg(
        long,
        value_name = "FILE",
        requires = "kernel",
        conflicts_with_all = ["save_policy", "no_hooks"],
        help_heading = "Monitor"
    )]
    policy: Option<PathBuf>,
    /// Save the policy that is made in FILE, which must not be there yet
    #[arg(
        long,
        value_name = "FILE",
        requires = "kernel",
        conflicts_with = "no_hooks",
        help_heading = "Monitor"
    )]
    save_policy: Option<PathBuf>,
    /// Hook nothing: the kernel runs under the hypervisor, and the monitor is not called
    #[arg(long, requires = "kernel", help_heading = "Monitor")]
    no_hooks: bool,
    /// Have the hypervisor run the handlers, with an exit for each hook, as a monitor outside of the guest would be called
    #[arg(
        long,
        requires = "kernel",
        conflicts_with = "no_hooks",
        help_heading = "Monitor"
    )]
    out_of_guest: bool,
    #[command(flatten)]
    rules: Rules,
}

impl Guest {
    /// Whether there is a kernel, and it will be hooked.
    pub(super) fn is_hooked(&self) -> bool {
        self.kernel.is_some() && !self.no_hooks
    }

    /// An image with this kernel.
    pub(super) fn image(&self, kernel: &Path) -> Result<Image> {
        let bytes = read(kernel)?;
        let monitor = match &self.monitor {
            Some(file) => read(file)?,
            None => Program::Monitor.bytes()?,
        };
        let mut image = Image::new(bytes.clone(), &self.command_line).monitor(monitor);
        if let Some(file) = &self.initrd {
            image = image.initrd(read(file)?);
        }
        image.check()?;
        if let Some(policy) = self.policy(kernel, &bytes)? {
            image = image.policy(policy, if self.out_of_guest { "exits" } else { "" });
            image.check()?;
        }
        Ok(image)
    }

    /// What of the kernel is hooked, and what is not let pass.
    fn policy(&self, kernel: &Path, bytes: &[u8]) -> Result<Option<Vec<u8>>> {
        if let Some(file) = &self.policy {
            if self.rules.are_any() {
                bail!("a policy that was saved has its rules; those that were given would be left out");
            }
            return Ok(Some(read(file)?));
        }
        if self.no_hooks {
            if self.rules.are_any() {
                bail!("rules are nothing without hooks");
            }
            return Ok(None);
        }
        let policy = self.rules.policy(bytes).with_context(|| {
            format!(
                "making a policy for {} (--no-hooks runs it without)",
                kernel.display()
            )
        })?;
        if let Some(file) = &self.save_policy {
            let mut out = fs::File::create_new(file).with_context(|| format!("making {}", file.display()))?;
            std::io::Write::write_all(&mut out, &policy)
                .with_context(|| format!("writing {}", file.display()))?;
        }
        Ok(Some(policy))
    }
}

pub(super) fn read(file: &Path) -> Result<Vec<u8>> {
    fs::read(file).with_context(|| format!("reading {}", file.display()))
}
