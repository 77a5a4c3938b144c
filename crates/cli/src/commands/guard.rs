//! `vmsight guard`: what a guest is not allowed to do does not happen.

use anyhow::{Context, Result};
use clap::Args;
use serde_json::{Map, Value, json};
use vmsight_events::EventError;
use vmsight_events::linux::{Guard, Incident, Judgement, Rule};
use vmsight_hooks::{Delivery, Expiry, Verdict};

use super::stream::{Happening, Stream};
use super::trace::row::{line, timestamp};
use super::until::{DEADLINE, Until};
use crate::{Outcome, args::Global, session::Session};

/// Holds a running guest to rules: what they forbid does not happen, and who tried it is told.
#[derive(Args, Debug)]
#[command(after_help = "\
Rules:
  kernel-text     writes to the kernel's code, but for the kernel's own patching of itself
  rodata          writes to the kernel's read-only data
  syscall-table   writes to the table of 64-bit system calls
  idt             writes to the interrupt descriptor table
  cr0.wp          clearing CR0.WP            cr4.smep, cr4.smap   clearing these bits of CR4
  lstar           another entry point of system calls (MSR LSTAR)
  modules         loading kernel modules: init_module and finit_module fail with EPERM
  exec=PATH       executing this file: EACCES. The path is that of the file which was opened, links
                  followed; a * at the end stands for anything. A copy under another name is another
                  file

What it cannot see: see `vmsight hooks TARGET` for the means and limits of each backend. Through the gdb stub, writes to memory
are seen by the kernel's own addresses only, after they happened, and are undone before the guest goes on (of kernel text and
read-only data, what was there when guarding began is put back); control registers are
guarded at the instructions of the kernel and its modules that write them, those of modules loaded later included; MSRs cannot be
guarded. The kernel's own patching is told by the address space that it keeps for that (poking_mm).

The guest goes on unguarded when this ends, however it ends; with --fail-closed it is paused, and stays so, where vmsight was
killed. Exit codes: 0 nothing was tried,
1 something was tried and denied, 2 error.")]
pub(crate) struct Cmd {
    /// What to guard: a running VM
    target: String,
    /// What to deny
    #[arg(long, value_name = "RULE,…", value_delimiter = ',', required = true)]
    deny: Vec<Rule>,
    /// Only tell, deny nothing
    #[arg(long)]
    dry_run: bool,
    /// Pause the VM, rather than let it go on, where no judgement was made in time, or vmsight was killed. Through the gdb stub
    /// the latter takes some milliseconds in which the guest may run unguarded
    #[arg(long)]
    fail_closed: bool,
    #[command(flatten)]
    until: Until,
}

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let waiting = self.until.begin()?;
        // Verdicts change the guest.
        let session = Session::for_writing(global, &self.target, true)?;
        let monitor = self.until.open(global, &session)?;
        let expiry = match self.fail_closed {
            true => {
                abort_on_panic();
                Expiry::Closed
            }
            false => Expiry::Open,
        };
        let delivery = Delivery::Held {
            deadline: DEADLINE,
            expiry,
        };
        let mut guard =
            Guard::arm(session.kernel()?, &monitor, &self.deny, delivery).context("arming the guard")?;
        let mut stream = Stream::new::<Denied>(session.style())?;
        session
            .style()
            .note(&format!("guarding {}; Ctrl-C ends it", session.name()));
        let mut incidents = 0;
        while incidents < self.until.count.unwrap_or(u64::MAX) {
            let Some(occurrence) = waiting.next(&session, &monitor)? else {
                break;
            };
            let judgement = guard.judge(&monitor, &occurrence);
            let (incident, verdict) = match judgement {
                Ok(Judgement::Allowed) => (None, Verdict::Continue),
                Ok(Judgement::Denied(incident, verdict)) => (Some(incident), verdict),
                Err(error) => {
                    session
                        .style()
                        .warn(&format!("an event could not be judged: {error}"));
                    let verdict = match self.fail_closed {
                        true => Verdict::Pause,
                        false => Verdict::Continue,
                    };
                    (None, verdict)
                }
            };
            let denied = incident.is_some() && !self.dry_run;
            let given = occurrence.answer(match (&incident, self.dry_run) {
                (Some(_), true) => Verdict::Continue,
                _ => verdict,
            });
            let failed = match given {
                Ok(()) | Err(EventError::Gone) => None,
                Err(error @ EventError::Verdict { .. }) => Some(error.to_string()),
                Err(error) => return Err(error).context("answering an event"),
            };
            if let Some(incident) = incident {
                incidents += 1;
                stream.write(&Denied {
                    incident,
                    denied: denied && failed.is_none(),
                })?;
            }
            if let Some(failed) = failed {
                session.style().warn(&failed);
            }
        }
        drop(guard);
        drop(monitor);
        stream.finish()?;
        Ok(if incidents > 0 {
            Outcome::Nothing
        } else {
            Outcome::Fine
        })
    }
}

/// From now on a panic ends the program like a kill, which pauses the VM: unwound it would take the hooks out first.
fn abort_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        print(info);
        std::process::abort();
    }));
}

/// An incident, and whether it was prevented.
struct Denied {
    incident: Incident,
    denied: bool,
}

impl Happening for Denied {
    const KEYS: &'static [&'static str] = &[
        "time", "rule", "denied", "vcpu", "pid", "tid", "name", "uid", "rip", "what",
    ];

    fn line(&self) -> String {
        let incident = &self.incident;
        let verb = if self.denied { "denied" } else { "seen" };
        let text = format!("{verb} {}: {}", incident.rule, incident.what);
        line(incident.time, incident.vcpu, incident.current.as_ref(), &text)
    }

    fn object(&self) -> Map<String, Value> {
        let incident = &self.incident;
        let current = incident.current.as_ref();
        let mut map = Map::new();
        map.insert("time".into(), timestamp(incident.time).into());
        map.insert("rule".into(), incident.rule.to_string().into());
        map.insert("denied".into(), self.denied.into());
        map.insert("vcpu".into(), incident.vcpu.into());
        map.insert("pid".into(), json!(current.map(|c| c.pid)));
        map.insert("tid".into(), json!(current.map(|c| c.tid)));
        map.insert("name".into(), json!(current.map(|c| &c.name)));
        map.insert("uid".into(), json!(current.and_then(|c| c.uid)));
        map.insert("rip".into(), format!("{:#x}", incident.rip).into());
        map.insert("what".into(), incident.what.clone().into());
        map
    }
}
