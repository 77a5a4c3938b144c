//! `vmsight sim bench`: what a hook costs.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::{Map, Value};
use vmsight_sim_image::Image;
use vmsight_sim_image::trial::{COST_ONLY, Cost, Findings, Way};
use vmsight_sim_image::workload::{self, Boot, Monitor};
use vmsight_sim_policy::{KernelImage, Wanted, policy};

use super::guest::read;
use super::machine::{Source, last};
use crate::commands::until::on_interrupt;
use crate::output::{Sheet, Style};
use crate::{Outcome, args::Global};

/// What a hook costs: through the gate into the monitor, and by a VM exit.
#[derive(Args, Debug)]
#[command(after_help = "\
A guest of vmsight's own calls the monitor's empty handler a thousand times by each way, in one run: through the gate, and by VMCALL
in the hypervisor, which is what monitoring from outside the guest costs. Counted is all from the hook to the return to it, the
hypervisor's own instructions included; \"bytes\" is the code of the gate, from the stub in the guest to the way back.

With --kernel, two of the monitors are measured as they watch that kernel: that of system calls while 400 files are opened, written,
read and closed, and that of processes while 16 processes are made, of which 8 execute a program. The kernel boots four times, a minute
or two each: for each monitor with its hooks through the gate, and by exits. \"workload_instructions\" is what the workload takes, without hooks
(\"none\") and with them; \"slowdown\" is that as a multiple of none; \"instructions\" is what each hook adds, \"calls\" are the hooks, \"exits\"
all exits meanwhile but for the hypervisor's own timer. Each is of the round that took least of fifteen.

Bochs counts instructions, and nothing in it says anything about time. For time, boot an image of `vmsight sim image --bench` on
hardware, keep what it says over its serial port, and read that with --from: microseconds are shown beside those that were published
in 2009.

Exit codes: 0 measured; 2 error, also where a hook was not handled, or left the guest and must not.")]
pub(super) struct Cmd {
    /// Measure monitors in this kernel, too: a bzImage, as distributions have it in /boot
    #[arg(long, value_name = "FILE", conflicts_with = "from")]
    kernel: Option<PathBuf>,
    #[command(flatten)]
    source: Source,
}

const KEYS: &[&str] = &[
    "handler",
    "way",
    "instructions",
    "exits",
    "calls",
    "bytes",
    "workload_instructions",
    "slowdown",
    "microseconds",
    "published_microseconds",
    "published_sd",
];
const COUNTED: &[&str] = &["handler", "way", "instructions", "exits", "calls", "bytes"];
const WITH_WORKLOAD: &[&str] = &[
    "handler",
    "way",
    "instructions",
    "exits",
    "calls",
    "bytes",
    "workload_instructions",
    "slowdown",
];
const TIMED: &[&str] = &[
    "handler",
    "way",
    "microseconds",
    "published_microseconds",
    "published_sd",
    "exits",
    "calls",
    "bytes",
];

impl Cmd {
    pub(super) fn run(&self, global: &Global) -> Result<Outcome> {
        let style = global.style();
        let stop = on_interrupt()?;
        let text = self.source.text(|| self.measure(&style, &stop))?;
        let costs = Findings::parse(&text).costs();
        ensure!(
            costs.len() == 2,
            "the measurement did not come to its end; what was said last is: {}",
            last(&text)
        );
        let watched = workload::costs(&Boot::parse(&text)?);
        let timed = costs.iter().any(|cost| cost.microseconds.is_some());
        let columns = match (timed, watched.is_empty()) {
            (true, _) => TIMED,
            (false, true) => COUNTED,
            (false, false) => WITH_WORKLOAD,
        };
        let mut sheet = Sheet::with_keys(KEYS, columns);
        sheet.rows = costs
            .iter()
            .map(row)
            .chain(watched.iter().map(watched_row))
            .collect();
        for cost in costs.iter().filter(|cost| !cost.held) {
            let way = cost.way.words();
            sheet.warnings.push(format!("{way}: this is not as it must be"));
        }
        for cost in watched.iter().filter(|cost| !cost.held) {
            let (monitor, way) = (cost.monitor.name(), cost.way.map_or("", Way::words));
            sheet.warnings.push(format!(
                "{monitor} {way}: not every hook was handled, or left the guest as it must"
            ));
        }
        if costs
            .iter()
            .any(|c| c.instructions.is_none() && c.microseconds.is_none())
        {
            sheet.warnings.push(
                "neither instructions nor time were measured: the counter of that machine does not count instructions, and time is \
                 measured by an image of `vmsight sim image --bench` on hardware only"
                    .to_owned(),
            );
        }
        style.print(&sheet).context("printing what a hook costs")?;
        if watched.is_empty() && !timed {
            style.note(
                "with --kernel, monitors are measured too, as they watch that kernel at a fixed workload",
            );
        }
        let held = costs.iter().all(|cost| cost.held) && watched.iter().all(|cost| cost.held);
        Ok(if held { Outcome::Fine } else { Outcome::Failed })
    }

    /// Runs all that is to be measured, and has what was said.
    fn measure(&self, style: &Style, stop: &AtomicBool) -> Result<String> {
        // What would fail does so before anything runs.
        let machines = self.machines()?;
        let trial = Image::trial()?.command_line(COST_ONLY);
        let mut text = self.source.run(style, stop, "measuring", &trial, 1)?;
        let count = machines.len();
        for (n, (monitor, way, image)) in (1..).zip(machines) {
            let (name, words) = (monitor.name(), way.words());
            let what = format!("measuring {name} {words} ({n} of {count})");
            let run = self.source.finish(style, stop, &what, &image, 1)?;
            if !text.ends_with('\n') {
                text.push('\n');
            }
            text.push_str(&workload::said(&[monitor], way, &run));
        }
        Ok(text)
    }

    /// The kernel, with each monitor by each way.
    fn machines(&self) -> Result<Vec<(Monitor, Way, Image)>> {
        let Some(file) = &self.kernel else {
            return Ok(Vec::new());
        };
        let kernel = read(file)?;
        Image::new(kernel.clone(), "").check()?;
        let found = KernelImage::read(&kernel)
            .map_err(anyhow::Error::from)
            .and_then(|found| Ok(policy(&found, &Wanted::default())?));
        let policy = found.with_context(|| format!("making a policy for {}", file.display()))?;
        let mut machines = Vec::new();
        for monitor in Monitor::ALL {
            for way in Way::ALL {
                let image = workload::image(kernel.clone(), &policy, &[monitor], way)?;
                image.check()?;
                machines.push((monitor, way, image));
            }
        }
        Ok(machines)
    }
}

fn watched_row(cost: &workload::Cost) -> Map<String, Value> {
    let mut row = Map::new();
    row.insert("handler".into(), cost.monitor.name().into());
    row.insert("way".into(), cost.way.map_or("none", Way::name).into());
    row.insert("instructions".into(), cost.each.into());
    row.insert("exits".into(), cost.exits.into());
    row.insert("calls".into(), cost.hooks.into());
    row.insert("bytes".into(), cost.way.and_then(Way::bytes).into());
    row.insert("workload_instructions".into(), cost.instructions.into());
    // More digits would say more than rounds agree on.
    row.insert(
        "slowdown".into(),
        ((cost.slowdown * 1000.0).round() / 1000.0).into(),
    );
    row
}

fn row(cost: &Cost) -> Map<String, Value> {
    let mut row = Map::new();
    row.insert("handler".into(), "null".into());
    row.insert("way".into(), cost.way.name().into());
    row.insert("instructions".into(), cost.instructions.into());
    row.insert("exits".into(), cost.exits.into());
    row.insert("calls".into(), cost.calls.into());
    row.insert("bytes".into(), cost.way.bytes().into());
    // Beside a time only: what is counted in an emulator is not to be held against a time.
    if let Some(microseconds) = cost.microseconds {
        let (mean, sd) = cost.way.published();
        row.insert("microseconds".into(), microseconds.into());
        row.insert("published_microseconds".into(), mean.into());
        row.insert("published_sd".into(), sd.into());
    }
    row
}
