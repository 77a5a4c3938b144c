//! `vmsight sim`: Secure In-VM Monitoring. Images of it, running them in Bochs, and what they say.

mod attack;
mod bench;
mod control;
mod event;
mod guest;
mod image;
mod machine;
mod rules;
mod run;

use anyhow::Result;
use clap::{Args, Subcommand};

use crate::{Outcome, args::Global};

/// A monitor inside the guest, which the guest can neither reach nor leave out: images, runs, cost, attacks.
#[derive(Args, Debug)]
#[command(after_help = "\
A thin VT-x hypervisor boots by GRUB, starts the machine's own kernel, and keeps a monitor inside it: hooks call it through a gate
without a VM exit, and the guest's kernel can neither read nor write it, nor enter it but through the gate. The hypervisor, the monitor
and a guest that attacks it are part of vmsight.

Runs take Bochs, an emulator that has VT-x and counts instructions (Debian's packages bochs, bochs-term, bochsbios and vgabios);
images take GRUB (grub-pc-bin, grub-common, xorriso and mtools). The machine's screen is shown nowhere, and nothing of a run listens on
the network but on this host's loopback. What is measured in Bochs are instructions and exits, never time.")]
pub(crate) struct Cmd {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Debug)]
enum What {
    /// Make a bootable image: the hypervisor, a monitor, and a kernel that is to run under them
    Image(image::Cmd),
    /// Run an image, or a kernel, in Bochs: its console, what the monitor tells, and its exits
    Run(run::Cmd),
    /// What a hook costs: through the gate into the monitor, and by a VM exit
    Bench(bench::Cmd),
    /// Attack the monitor from a guest's kernel, and say what stopped each attack
    Attack(attack::Cmd),
}

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        match &self.what {
            What::Image(c) => c.run(global),
            What::Run(c) => c.run(global),
            What::Bench(c) => c.run(global),
            What::Attack(c) => c.run(global),
        }
    }
}
