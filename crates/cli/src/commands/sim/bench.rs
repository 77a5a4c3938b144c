//! `vmsight sim bench`: what a hook costs.

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::{Map, Value};
use vmsight_sim_image::Image;
use vmsight_sim_image::trial::{COST_ONLY, Cost, Findings, Way};

use super::machine::{Source, last};
use crate::commands::until::on_interrupt;
use crate::output::Sheet;
use crate::{Outcome, args::Global};

/// What a hook costs: through the gate into the monitor, and by a VM exit.
#[derive(Args, Debug)]
#[command(after_help = "\
A guest of vmsight's own calls the monitor's empty handler a thousand times by each way, in one run: through the gate, and by VMCALL
in the hypervisor, which is what monitoring from outside the guest costs. Counted is all from the hook to the return to it, the
hypervisor's own instructions included; \"bytes\" is the code of the gate, from the stub in the guest to the way back.

Bochs counts instructions, and nothing in it says anything about time. For time, boot an image of `vmsight sim image --bench` on
hardware, keep what it says over its serial port, and read that with --from: microseconds are shown beside those that were published
in 2009.")]
pub(super) struct Cmd {
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
    "microseconds",
    "published_microseconds",
    "published_sd",
];
const COUNTED: &[&str] = &["handler", "way", "instructions", "exits", "calls", "bytes"];
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
        let console = self.source.console(&style, &stop, "measuring", || {
            Ok(vec![(Image::trial()?.command_line(COST_ONLY), 1)])
        })?;
        let costs = Findings::parse(&console).costs();
        ensure!(
            costs.len() == 2,
            "the measurement did not come to its end; what was said last is: {}",
            last(&console)
        );
        let timed = costs.iter().any(|cost| cost.microseconds.is_some());
        let mut sheet = Sheet::with_keys(KEYS, if timed { TIMED } else { COUNTED });
        sheet.rows = costs.iter().map(row).collect();
        for cost in costs.iter().filter(|cost| !cost.held) {
            let way = cost.way.words();
            sheet.warnings.push(format!("{way}: this is not as it must be"));
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
        Ok(match costs.iter().all(|cost| cost.held) {
            true => Outcome::Fine,
            false => Outcome::Failed,
        })
    }
}

fn row(cost: &Cost) -> Map<String, Value> {
    let mut row = Map::new();
    let way = match cost.way {
        Way::Gate => "gate",
        Way::Call => "exit",
    };
    row.insert("handler".into(), "null".into());
    row.insert("way".into(), way.into());
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
