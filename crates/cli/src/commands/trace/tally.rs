//! `--tally`: counting where it happens, without an event.

use anyhow::{Context, Result, bail};
use serde_json::Map;
use vmsight_events::linux::{SyscallCounter, current_pid};
use vmsight_events::{EventError, HookGuard, Monitor};
use vmsight_hooks::{Access, Delivery, Filter, Hook, HookKind};
use vmsight_linux::syscall::Abi;

use super::{Cmd, plain};
use crate::output::Sheet;
use crate::{Outcome, session::Session};

/// What is counted.
pub(super) struct Tally {
    syscalls: Option<SyscallCounter>,
    /// With the event and its subject, as in the rows of a trace.
    hooks: Vec<(&'static str, String, HookGuard)>,
}

impl Tally {
    pub(super) fn arm(cmd: &Cmd, session: &Session, monitor: &Monitor) -> Result<Self> {
        let kernel = session.kernel()?;
        let syscalls = match &cmd.syscalls {
            Some(names) => Some(
                cmd.syscall_trace(kernel, names)?
                    .count(monitor)
                    .context("hooking system calls")?,
            ),
            None => None,
        };
        let mut kinds = cmd.plain(session)?;
        let registers = plain::control_registers(&cmd.cr)?;
        if !registers.is_empty() && !plain::hooks_control(monitor) {
            bail!(
                "--tally counts writes of control registers where a backend hooks them itself, which this one does not \
                 (vmsight hooks {}); without --tally, the instructions that write them are hooked",
                cmd.target
            );
        }
        kinds.extend(registers.into_iter().map(plain::control_hook));
        let filter = match cmd.pid.is_empty() {
            true => Filter::none(),
            false => {
                let pids = cmd.pid.iter().map(|pid| u64::from(pid.cast_unsigned()));
                let condition = current_pid(&kernel.current()?).is_one_of(pids);
                Filter::only(&condition).context("--pid")?
            }
        };
        let mut hooks = Vec::new();
        for (kind, name) in kinds {
            let hook = Hook::new(kind)
                .delivered(Delivery::Counted)
                .filtered(filter.clone());
            let guard = monitor.hook(&hook).with_context(|| format!("hooking {name}"))?;
            hooks.push((event(kind), name, guard));
        }
        Ok(Self { syscalls, hooks })
    }

    /// Reads the counts, takes the hooks out, and prints.
    pub(super) fn finish(self, session: &Session) -> Result<Outcome> {
        let mut rows = Vec::new();
        match self.rows(session, &mut rows) {
            Ok(()) => {}
            // What was counted went with it.
            Err(error) if matches!(error.downcast_ref(), Some(EventError::Gone)) => {
                bail!("the VM ended, and the counts with it")
            }
            Err(error) => return Err(error).context("asking for the counts"),
        }
        drop(self);
        rows.sort_by(|a, b| (b.2, a.0, &a.1).cmp(&(a.2, b.0, &b.1)));
        let columns = &["event", "subject", "count"];
        let mut sheet = Sheet::with_keys(columns, columns);
        let total: u64 = rows.iter().map(|row| row.2).fold(0, u64::saturating_add);
        for (event, subject, count) in rows {
            let mut row = Map::new();
            row.insert("event".into(), event.into());
            row.insert("subject".into(), subject.into());
            row.insert("count".into(), count.into());
            sheet.rows.push(row);
        }
        session.style().print(&sheet)?;
        Ok(if total == 0 {
            Outcome::Nothing
        } else {
            Outcome::Fine
        })
    }

    fn rows(&self, session: &Session, rows: &mut Vec<(&'static str, String, u64)>) -> Result<()> {
        let mut undecided = 0;
        for (event, subject, guard) in &self.hooks {
            let counts = guard.counts()?;
            undecided += counts.undecided;
            rows.push((event, subject.clone(), counts.matched()));
        }
        if let Some(counter) = &self.syscalls {
            let counted = counter.counted()?;
            undecided += counted.undecided;
            for call in counted.calls {
                let subject = match call.abi {
                    Abi::X64 => call.name,
                    Abi::Ia32 => format!("{} (32-bit)", call.name),
                };
                rows.push(("syscall", subject, call.calls));
            }
            for (subject, count) in [("(others)", counted.others), ("(unreadable)", counted.unknown)] {
                if count > 0 {
                    rows.push(("syscall", subject.into(), count));
                }
            }
        }
        if undecided > 0 {
            session.style().warn(&format!(
                "of {undecided} it could not be read whose they are; they are counted"
            ));
        }
        Ok(())
    }
}

/// What rows of a trace call it.
fn event(kind: HookKind) -> &'static str {
    match kind {
        HookKind::Execute { .. } => "execute",
        HookKind::Memory { access, .. } if access.contains(Access::READ) => "access",
        HookKind::Memory { .. } => "write",
        HookKind::Msr { .. } => "msr",
        HookKind::ControlRegister { .. } => "cr",
        _ => "event",
    }
}
