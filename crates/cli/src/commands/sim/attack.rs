//! `vmsight sim attack`: whether the monitor stands.

use anyhow::{Result, ensure};
use clap::Args;
use serde_json::{Map, Value};
use vmsight_sim_image::trial::{self, Finding, Findings, TWO_PROCESSORS};
use vmsight_sim_image::{Image, Program};

use super::machine::{Source, last};
use crate::commands::until::on_interrupt;
use crate::output::Sheet;
use crate::{Outcome, args::Global};

/// Attack the monitor from a guest's kernel, and say what stopped each attack.
#[derive(Args, Debug)]
#[command(after_help = "\
A guest of vmsight's own does what an attacker can who has the guest's kernel, on one processor and then on two. \"reason\" is why the guest was left, and with that
what stopped the attack; where there is none, the attack ran into what does not need to leave, such as a handler that is called as
it should be. \"handled\" says how often the monitor's handler ran, \"hash\" whether the SHA-256 over gates, page tables and the monitor's
text is what it was before. An attack held only where all of these are as they must be.

With --controls three attacks are made on builds that lack what stops them, and must succeed there: a trial that cannot tell proves
nothing.

Exit codes: 0 all attacks were stopped; 1 one was not; 2 error, also where a control does not succeed.")]
pub(super) struct Cmd {
    #[command(flatten)]
    source: Source,
    /// Attack also three weaker builds, in which attacks must succeed
    #[arg(long, conflicts_with = "from")]
    controls: bool,
}

const KEYS: &[&str] = &[
    "attack",
    "build",
    "exit",
    "reason",
    "handled",
    "hash",
    "verdict",
    "as_it_must",
    "facts",
];
const COLUMNS: &[&str] = &["attack", "reason", "handled", "hash", "verdict"];
const WITH_BUILDS: &[&str] = &["attack", "build", "reason", "handled", "hash", "verdict"];
/// Builds without what stops an attack, which is the trial's command line.
const CONTROLS: [(Program, &str, &str); 3] = [
    (Program::TwoViews, "two views", "A1"),
    (Program::TwoViewsApt, "two views, own tables", "A3"),
    (Program::GuestTables, "three views, guest's tables", "A5"),
];

impl Cmd {
    pub(super) fn run(&self, global: &Global) -> Result<Outcome> {
        let style = global.style();
        let stop = on_interrupt()?;
        let console = self.source.console(&style, &stop, "attacking", machines)?;
        let findings = Findings::parse(&console);
        ensure!(
            findings.is_complete(),
            "the trial did not come to its end; what was said last is: {}",
            last(&console)
        );
        let mut columns = COLUMNS;
        let mut rows: Vec<_> = findings.all.iter().filter(|f| f.is_attack()).map(row).collect();
        ensure!(!rows.is_empty(), "this trial only measured, and attacked nothing");
        let mut warnings = Vec::new();
        for finding in findings.all.iter().filter(|f| !f.is_attack() && !f.held) {
            warnings.push(format!("{}: not as it must be: {}", finding.name, finding.facts));
        }
        if self.controls {
            columns = WITH_BUILDS;
            for (program, build, attack) in CONTROLS {
                let image = Image::trial()?.hypervisor(program).command_line(attack);
                let what = format!("attacking a build with {build}");
                let console = self.source.run(&style, &stop, &what, &image, 1)?;
                let reached = trial::control(&console, attack);
                if reached.unwrap_or(0) == 0 {
                    warnings.push(format!(
                        "{attack} must succeed against {build}, and did not: what is said of it proves nothing"
                    ));
                }
                rows.push(control(attack, build, reached.unwrap_or(0)));
            }
        }
        let doubtful = !warnings.is_empty();
        let mut sheet = Sheet::with_keys(KEYS, columns);
        let stopped = rows.iter().filter(|row| row["verdict"] == HELD).count();
        (sheet.rows, sheet.warnings) = (rows, warnings);
        style.print(&sheet)?;
        let attacks = findings.all.iter().filter(|f| f.is_attack());
        let succeeded = attacks.filter(|f| !f.held).count();
        style.note(&format!(
            "{stopped} attacks were stopped, {succeeded} were not; the whole trial: {} held, {} did not",
            findings.counted.unwrap_or_default().0,
            findings.counted.unwrap_or_default().1,
        ));
        Ok(match (succeeded, doubtful) {
            (1.., _) => Outcome::Found,
            (0, true) => Outcome::Failed,
            (0, false) => Outcome::Fine,
        })
    }
}

/// The trial on one processor, and what takes two.
fn machines() -> Result<Vec<(Image, u32)>> {
    let one = Image::trial()?;
    let two = one
        .clone()
        .monitor(Program::EndlessMonitor.bytes()?)
        .command_line(TWO_PROCESSORS);
    Ok(vec![(one, 1), (two, 2)])
}

const HELD: &str = "held";
const SUCCEEDED: &str = "SUCCEEDED";

fn row(finding: &Finding) -> Map<String, Value> {
    let mut row = Map::new();
    row.insert("attack".into(), finding.name.clone().into());
    row.insert("build".into(), "three views".into());
    row.insert("exit".into(), finding.reason.into());
    row.insert("reason".into(), finding.exit().into());
    row.insert("handled".into(), finding.handled.into());
    let hash = finding
        .hash_unchanged
        .map(|same| if same { "same" } else { "CHANGED" });
    row.insert("hash".into(), hash.into());
    let verdict = if finding.held { HELD } else { SUCCEEDED };
    row.insert("verdict".into(), verdict.into());
    row.insert("as_it_must".into(), finding.held.into());
    row.insert("facts".into(), finding.facts.clone().into());
    row
}

/// An attack on a build that lacks what stops it.
fn control(attack: &str, build: &str, reached: u64) -> Map<String, Value> {
    let mut row = Map::new();
    row.insert(
        "attack".into(),
        format!("{attack} (control: must succeed)").into(),
    );
    row.insert("build".into(), build.into());
    row.insert("handled".into(), reached.into());
    let verdict = if reached == 0 { HELD } else { SUCCEEDED };
    row.insert("verdict".into(), verdict.into());
    row.insert("as_it_must".into(), (reached > 0).into());
    row
}
