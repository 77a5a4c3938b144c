//! `vmsight hooks`: what can be hooked in a VM, by which means, and what each means does not see.

use anyhow::Result;
use clap::Args;
use serde_json::{Map, Value};
use vmsight_events::survey;
use vmsight_hooks::{Feature, FilterPlace};

use crate::{Outcome, args::Global, output::Sheet, session::Session};

/// What can be hooked in a VM: each kind of hook, by each backend, with its means, limits and verdicts.
#[derive(Args, Debug)]
#[command(after_help = "\
Backends:
  agent-kvm   the agent in a QEMU that was started by `vmsight launch` and runs its guest with KVM
  agent-tcg   the same in one that emulates its guest's processors: what can be hooked depends on
              QEMU's version; without registers before 9.2, which is said at each hook
  gdb-stub    QEMU's gdb stub, opened at run time through QMP: on any running QEMU, with nothing
              prepared

The guest is not stopped for this. A stub that a debugger holds is found out when it is opened. Verdicts are what can be done at an
event: continue; skip the instruction; deny it (a write is undone or dropped); return from the function at once; change registers or
data; pause the VM; step; remove the hook. FILTERS says where it is decided which events are wanted (--pid, --syscalls NAME): in the
guest, before there is an event (\"filter inside\": trace --inside), in the VMM, where they happen, or in this process, to which each
is brought first.")]
pub(crate) struct Cmd {
    /// What to look into
    target: String,
    /// Also what a backend cannot hook, and why one does not reach the target
    #[arg(long)]
    all: bool,
}

const COLUMNS: &[&str] = &[
    "hook",
    "backend",
    "available",
    "mechanism",
    "verdicts",
    "filters",
    "limits",
];

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::without_kernel(global, &self.target)?;
        let surveys = survey(session.target());
        let mut sheet = Sheet::with_keys(COLUMNS, COLUMNS);
        for feature in Feature::ALL {
            for survey in &surveys {
                let capability = survey.capabilities.iter().find(|c| c.feature == *feature);
                let Some(capability) = capability else {
                    if self.all {
                        let mut row = Map::new();
                        row.insert("hook".into(), feature.name().into());
                        row.insert("backend".into(), survey.backend.name().into());
                        row.insert("available".into(), false.into());
                        let lack = survey.lacks.iter().find(|l| l.feature == *feature);
                        row.insert(
                            "limits".into(),
                            lack.map_or(Value::Null, |l| l.why.clone().into()),
                        );
                        sheet.rows.push(row);
                    }
                    continue;
                };
                let verdicts: Vec<&str> = capability.verdicts.iter().map(|v| v.name()).collect();
                let mut row = Map::new();
                row.insert("hook".into(), feature.name().into());
                row.insert("backend".into(), survey.backend.name().into());
                row.insert("available".into(), survey.obstacle.is_none().into());
                row.insert("mechanism".into(), capability.mechanism.clone().into());
                row.insert("verdicts".into(), verdicts.join(" ").into());
                let filters = match feature {
                    Feature::Inside => FilterPlace::Guest,
                    _ => survey.backend.filters(),
                };
                row.insert("filters".into(), filters.to_string().into());
                let limits = &capability.limits;
                let limits = (!limits.is_empty()).then(|| limits.clone());
                row.insert("limits".into(), limits.map_or(Value::Null, Value::from));
                sheet.rows.push(row);
            }
        }
        let reached = surveys.iter().any(|s| s.obstacle.is_none());
        for survey in &surveys {
            // Where one reaches, that another one does not is of interest only to those who ask for all.
            if let Some(obstacle) = survey.obstacle.as_ref().filter(|_| self.all || !reached) {
                sheet.warnings.push(format!(
                    "{} does not reach this target: {obstacle}",
                    survey.backend
                ));
            }
        }
        session.style().print(&sheet)?;
        Ok(if reached { Outcome::Fine } else { Outcome::Nothing })
    }
}
