//! `vmsight sim run`: a guest under the hypervisor, in Bochs.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use clap::Args;
use serde_json::Map;
use vmsight_sim_image::bochs::{Hardware, News, refusal};
use vmsight_sim_image::exits::{self, Exits};
use vmsight_sim_image::{Image, Machine};

use super::control::Control;
use super::event::{Event, Lines, events};
use super::guest::Guest;
use super::machine::{hardware, is_disc, plain};
use crate::commands::stream::Stream;
use crate::commands::until::on_interrupt;
use crate::output::{Format, Progress, Sheet, Style};
use crate::{Outcome, args::Global};

/// Run an image, or a kernel, in Bochs: its console, what the monitor tells, and its exits.
#[derive(Args, Debug)]
#[command(after_help = "\
Without an image and without a kernel the guest is vmsight's own, which attacks the monitor (`vmsight sim attack` shows that as a
table). The console is the first serial port: a Linux guest takes console=ttyS0. It ends when the guest powers off, or with Ctrl-C.

A kernel is hooked, for which a policy is made out of its own symbols and types (Linux with BTF and function tracing): the monitor counts
system calls, and tells processes, programs, modules, and who becomes root. The hypervisor puts the hooks in as the kernel boots;
what was refused is told, too.

Bochs does some 50 million instructions a second: a distribution's kernel boots in minutes, so take a small initrd. With two processors
it does them in turns.

With --control, lines of standard input are orders to the hypervisor: \"unhook\" takes the hooks out of the running kernel, \"hook\" puts
them in again, \"stats\" asks how often the monitor was called and why the guest was left. Each is answered among the events. Hooks can be
ordered about once the kernel is hooked, which is told as \"installed\".

As a table (the default), console, events and exits are printed as they come. As json, jsonl or csv, standard output has the monitor's
events and the exits, and the console goes to standard error.

Exit codes: 0 the guest powered off; 2 error, also where the hypervisor found a reason not to start it.")]
pub(super) struct Cmd {
    /// An image of `vmsight sim image`
    #[arg(value_name = "IMAGE", conflicts_with = "kernel")]
    image: Option<PathBuf>,
    #[command(flatten)]
    guest: Guest,
    /// Memory of the machine, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(192..=2048))]
    memory: u32,
    /// Processors of the machine: 1 or 2
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=2))]
    processors: u32,
    /// Take orders from standard input, a line each: stats, hook, unhook
    #[arg(long)]
    control: bool,
    /// End after this many seconds
    #[arg(long = "for", value_name = "SECONDS")]
    seconds: Option<u64>,
}

/// Longer than anything runs.
const FOREVER: u64 = 10 * 365 * 86_400;

impl Cmd {
    pub(super) fn run(&self, global: &Global) -> Result<Outcome> {
        let style = global.style();
        let stop = on_interrupt()?;
        let stream = Stream::new::<Event>(&style)?;
        let hooked = self.image.is_some() || self.guest.is_hooked();
        ensure!(
            !self.control || hooked,
            "--control is of use for a guest with hooks alone: one of --kernel, or an image of one"
        );
        let hardware = Hardware {
            memory: self.memory,
            processors: self.processors,
            ..hardware()?
        };
        let progress = Progress::spinner(style.quiet, "booting");
        let machine = self.start(&hardware)?;
        let mut view = View {
            style: &style,
            stream,
            console: Lines::default(),
            events: Lines::default(),
            progress: Some(progress),
            exits: Vec::new(),
            account: None,
            failed: None,
        };
        let control = self.control.then(|| Control::begin(machine.channel().orders()));
        let limit = Duration::from_secs(self.seconds.unwrap_or(FOREVER).min(FOREVER));
        let run = machine.watch(limit, |news| {
            let on = view.show(news, &stop);
            if let Some(control) = &control {
                control.pass(&style);
            }
            on
        })?;
        let stopped = stop.load(Ordering::Relaxed);
        view.finish(&run.serial)?;
        if let Some(why) = refusal(&run.serial) {
            bail!("the guest was not started: {why}");
        }
        if !run.off {
            ensure!(
                stopped || self.seconds.is_some(),
                "Bochs ended without the guest having powered off"
            );
            style.note("the guest had not powered off yet");
        }
        Ok(Outcome::Fine)
    }

    fn start(&self, hardware: &Hardware) -> Result<Machine> {
        if let Some(disc) = &self.image {
            ensure!(
                is_disc(disc)?,
                "{} is no image of a disc, as `vmsight sim image` makes it; a kernel is given with --kernel",
                disc.display()
            );
            return Ok(Machine::boot(disc, hardware)?);
        }
        let image = match &self.guest.kernel {
            Some(kernel) => self.guest.image(kernel)?,
            None => Image::trial()?,
        };
        Ok(Machine::new(&image, hardware)?)
    }
}

/// What is shown of a machine that runs.
struct View<'a> {
    style: &'a Style,
    stream: Stream,
    console: Lines,
    events: Lines,
    /// Until the machine says something.
    progress: Option<Progress>,
    /// As the hypervisor has said it last.
    exits: Vec<Exits>,
    /// The last that the hypervisor said of the monitor.
    account: Option<String>,
    /// Why nothing can be shown any more.
    failed: Option<anyhow::Error>,
}

impl View<'_> {
    /// Shows what is new; whether to go on.
    fn show(&mut self, news: &News, stop: &AtomicBool) -> bool {
        if !news.console.is_empty() {
            self.progress = None;
        }
        let console = self.console.add(&news.console);
        let told = self.events.add(&news.channel);
        self.failed = self.print(console, told).err();
        self.failed.is_none() && !stop.load(Ordering::Relaxed)
    }

    fn print(&mut self, console: Vec<Vec<u8>>, told: Vec<Vec<u8>>) -> Result<()> {
        for line in console {
            // A guest's console is what the guest makes of it: nothing of it may steer a terminal.
            let line = format!("{}\n", plain(&line));
            match self.style.format {
                Format::Table => {
                    let mut out = io::stdout().lock();
                    out.write_all(line.as_bytes())?;
                    out.flush()?;
                }
                _ => io::stderr().lock().write_all(line.as_bytes())?,
            }
        }
        for event in events(told) {
            match event {
                Ok(event) => {
                    if let Some(exits) = event.exits_so_far() {
                        self.exits = exits;
                        self.account = Some(event.account());
                    }
                    // For people it is a table, at the end.
                    if !(event.is_account() && self.style.format == Format::Table) {
                        self.stream.write(&event)?;
                    }
                }
                Err(line) => self
                    .style
                    .warn(&format!("the hypervisor sent what is no event: {line}")),
            }
        }
        Ok(())
    }

    /// Shows what is left, and the exits.
    fn finish(mut self, console: &str) -> Result<()> {
        self.progress = None;
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        let rest = self.console.rest().into_iter().collect();
        let told = self.events.rest().into_iter().collect();
        self.print(rest, told)?;
        let mut exits = exits::parse(console);
        if exits.is_empty() {
            exits = std::mem::take(&mut self.exits);
            exits.sort_by_key(|exits| exits.reason);
        }
        if self.style.format != Format::Table {
            for exits in &exits {
                self.stream.write(&Event::exits(exits))?;
            }
            return self.stream.finish();
        }
        if exits.is_empty() {
            self.style
                .note("nobody asked for the table of exits: without hooks it is the guest's to do (VMCALL with RAX = 0x73696d02)");
            return Ok(());
        }
        let mut sheet = Sheet::with_keys(&["exit", "reason", "count"], &["exit", "reason", "count"]);
        for exits in &exits {
            let mut row = Map::new();
            row.insert("exit".into(), exits.reason.into());
            row.insert("reason".into(), exits.name.into());
            row.insert("count".into(), exits.count.into());
            sheet.rows.push(row);
        }
        // The columns that were asked for are those of events.
        let style = Style {
            columns: None,
            clear: false,
            ..self.style.clone()
        };
        style.print(&sheet)?;
        if let Some(account) = &self.account {
            style.note(account);
        }
        Ok(())
    }
}
