//! `vmsight sim image`: what a machine, or Bochs, can boot.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde_json::Map;
use vmsight_sim_image::Image;
use vmsight_sim_image::rescue::Firmware;
use vmsight_sim_image::trial::COST_ON_HARDWARE;

use super::guest::Guest;
use crate::commands::beside::write_beside;
use crate::output::Sheet;
use crate::{Outcome, args::Global};

/// Make a bootable image: the hypervisor, a monitor, and a kernel that is to run under them.
#[derive(Args, Debug)]
#[command(after_help = "\
The image boots from a CD or, written to it as it is, from a USB stick (dd if=OUT of=/dev/sdX). It takes Intel processors with VT-x,
EPT and VMFUNC, four at most: others are to be switched off in the firmware's setup. The hypervisor says on the screen and on
the first serial port what a machine lacks. On hardware it has not been tried yet.

An image made with --bench measures on the machine that it is booted on, and says in microseconds what a hook costs; in an
emulator or virtual machine it says no time. What it and --attack say comes over the first serial port (115200 baud); kept in a
file, `vmsight sim bench --from FILE` and `vmsight sim attack --from FILE` read it.")]
pub(super) struct Cmd {
    /// The file to write
    out: PathBuf,
    #[command(flatten)]
    guest: Guest,
    /// With a guest that measures what a hook costs, instead of a kernel
    #[arg(long, conflicts_with_all = ["kernel", "attack"])]
    bench: bool,
    /// With a guest that attacks the monitor, instead of a kernel
    #[arg(long, conflicts_with = "kernel")]
    attack: bool,
    /// Replace OUT if it is there
    #[arg(long)]
    force: bool,
}

const KEYS: &[&str] = &["file", "bytes", "boots_by", "lacks"];

impl Cmd {
    pub(super) fn run(&self, global: &Global) -> Result<Outcome> {
        let out = &self.out;
        ensure!(!out.is_dir(), "{} is a directory", out.display());
        ensure!(
            self.force || !out.exists(),
            "{} is there already: --force replaces it",
            out.display()
        );
        let image = match &self.guest.kernel {
            Some(kernel) => self.guest.image(kernel)?,
            None if self.bench => Image::trial()?.command_line(COST_ON_HARDWARE),
            None if self.attack => Image::trial()?,
            None => bail!("what is to run under the hypervisor? --kernel FILE, or --bench, or --attack"),
        };
        let bytes = write(&image, out)?;
        let installed = Firmware::installed();
        let names = |firmware: &[Firmware]| -> Vec<&str> {
            let name = |f: &Firmware| match f {
                Firmware::Bios => "BIOS",
                Firmware::Uefi => "UEFI",
            };
            firmware.iter().map(name).collect()
        };
        let lacks: Vec<Firmware> = [Firmware::Bios, Firmware::Uefi]
            .into_iter()
            .filter(|firmware| !installed.contains(firmware))
            .collect();
        let mut row = Map::new();
        row.insert("file".into(), out.display().to_string().into());
        row.insert("bytes".into(), bytes.into());
        row.insert("boots_by".into(), names(&installed).into());
        row.insert("lacks".into(), names(&lacks).into());
        let mut sheet = Sheet::with_keys(KEYS, &["file", "bytes", "boots_by"]);
        sheet.rows.push(row);
        for (firmware, name) in lacks.iter().zip(names(&lacks)) {
            let package = firmware.package();
            sheet.warnings.push(format!(
                "it does not boot by {name}: GRUB's part for it is in Debian's package {package}"
            ));
        }
        global.style().print(&sheet)?;
        Ok(Outcome::Fine)
    }
}

/// Writes the image, whole or not at all. How many bytes it has.
fn write(image: &Image, out: &Path) -> Result<u64> {
    let folder = tempfile::tempdir().context("making a temporary folder")?;
    let made = folder.path().join("image.iso");
    image.write(&made)?;
    let mut made = std::fs::File::open(&made).context("reading what GRUB made")?;
    write_beside(out, "the image", |file| Ok(io::copy(&mut made, file)?))
}
