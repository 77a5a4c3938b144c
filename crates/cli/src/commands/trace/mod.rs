//! `vmsight trace`: what happens in a guest, as it happens.

mod plain;
pub(crate) mod row;
mod summary;
mod tally;

use anyhow::{Context, Result, bail};
use clap::Args;
use vmsight_events::linux::{Lifecycle, LifecycleTrace, SyscallTrace};
use vmsight_events::{EventError, Monitor, Occurrence};
use vmsight_hooks::{Delivery, Expiry, Verdict};
use vmsight_linux::Kernel;

use super::stream::Stream;
use super::until::{DEADLINE, Until};
use crate::{Outcome, args::Global, session::Session};
use plain::PlainTrace;
use row::Row;
use summary::Summary;
use tally::Tally;

/// What happens in a running guest, as it happens: system calls, programs, modules, any function, writes to memory.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  vmsight trace web1 --syscalls openat,execve          strace for a whole guest, from outside
  vmsight trace web1 --syscalls --pid 812 --follow     one process and its children
  vmsight trace web1 --syscalls -c --for 10            counts and times over ten seconds
  vmsight trace web1 --syscalls --tally --for 10       how often each, without holding the guest
  vmsight trace web1 --exec --modules -o jsonl         programs and modules, one JSON object a line
  vmsight trace web1 --hook commit_creds               every call of a kernel function
  vmsight trace web1 --hook vfs_read --pid 8 --inside  one process's; those of others make no exit
  vmsight trace web1 --write sys_call_table,4096       who writes there, and what

The guest stands still at each event until it has been read; `vmsight hooks TARGET` says by what means. What is traced ends
with Ctrl-C, and the guest goes on without hooks, also if vmsight is killed. Times are the host's, and those of system
calls include what the hooks cost. A system call that was under way when tracing began is not shown. Where a backend cannot hook
control registers themselves, --cr hooks the instructions of the kernel and its loaded modules that write them: code that is
loaded later is not seen.

--inside takes an agent under KVM (see `vmsight hooks`). The function's first instruction becomes a jump to code that vmsight adds to the
guest, which the guest's kernel can find and go around, as it can any breakpoint. The instruction is put back at the end; the room
for the code stays mapped, in a place that the kernel does not use, until the machine is reset.")]
pub(crate) struct Cmd {
    /// What to look into: a running VM
    target: String,
    /// System calls, all or those named
    #[arg(long, value_name = "NAME,…", num_args = 0..=1, default_missing_value = "", help_heading = "What")]
    syscalls: Option<String>,
    /// Programs that are executed
    #[arg(long, help_heading = "What")]
    exec: bool,
    /// Processes and threads that start and end, and programs that are executed
    #[arg(long, help_heading = "What")]
    processes: bool,
    /// Modules that are loaded and unloaded
    #[arg(long, help_heading = "What")]
    modules: bool,
    /// Execution of the instruction at PLACE: a function's name, SYMBOL+0x10, 0xffff…
    #[arg(long, value_name = "PLACE", help_heading = "What")]
    hook: Vec<String>,
    /// Writes to LENGTH bytes (8 where not said) from PLACE on
    #[arg(long, value_name = "PLACE[,LENGTH]", help_heading = "What")]
    write: Vec<String>,
    /// Reads and writes there
    #[arg(long, value_name = "PLACE[,LENGTH]", help_heading = "What")]
    access: Vec<String>,
    /// Writes of model-specific registers, by name (LSTAR) or number
    #[arg(long, value_name = "MSR,…", value_delimiter = ',', help_heading = "What")]
    msr: Vec<String>,
    /// Writes of control registers: 0, 3, 4
    #[arg(long, value_name = "N,…", value_delimiter = ',', help_heading = "What")]
    cr: Vec<u8>,
    /// Only what these processes do (root namespace)
    #[arg(long, value_name = "PID,…", value_delimiter = ',', help_heading = "Whose")]
    pid: Vec<i32>,
    /// And their children, from now on
    #[arg(long, requires = "pid", help_heading = "Whose")]
    follow: bool,
    /// Ask for --pid in the guest, before there is an exit: calls of a --hook by others cost some instructions
    #[arg(long, requires_all = ["pid", "hook"], conflicts_with = "tally", help_heading = "How")]
    inside: bool,
    /// Count instead of showing: what, how often, how long
    #[arg(short = 'c', long, help_heading = "How")]
    summary: bool,
    /// Count where it happens, in the VMM where an agent is in it: how often, and nothing else. The guest is not held
    #[arg(long, help_heading = "How", conflicts_with_all = ["summary", "exec", "processes", "modules", "follow", "count"])]
    tally: bool,
    #[command(flatten)]
    until: Until,
}

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        if !self.asks_for_something() {
            bail!(
                "nothing to trace: say what with --syscalls, --exec, --processes, --modules, --hook, --write, --access, --msr \
                 or --cr"
            );
        }
        let waiting = self.until.begin()?;
        let session = Session::open(global, &self.target)?;
        let monitor = self.until.open(global, &session)?;
        if self.tally {
            let tally = Tally::arm(self, &session, &monitor)?;
            session
                .style()
                .note(&format!("counting in {}; Ctrl-C ends it", session.name()));
            while let Some(occurrence) = waiting.next(&session, &monitor)? {
                drop(occurrence); // there is none: nothing is told
            }
            return tally.finish(&session);
        }
        let mut traces = self.arm(&session, &monitor)?;
        session
            .style()
            .note(&format!("tracing {}; Ctrl-C ends it", session.name()));
        let mut shown = Shown {
            stream: (!self.summary)
                .then(|| Stream::new::<Row>(session.style()))
                .transpose()?,
            summary: Summary::default(),
            left: self.until.count.unwrap_or(u64::MAX),
            troubles: 0,
        };
        while shown.left > 0 {
            let Some(occurrence) = waiting.next(&session, &monitor)? else {
                break;
            };
            shown.take(&session, &mut traces, occurrence)?;
        }
        // The hooks go before anything is printed that may have to wait for its reader.
        drop(traces);
        drop(monitor);
        shown.finish(&session)
    }

    fn asks_for_something(&self) -> bool {
        self.syscalls.is_some()
            || self.exec
            || self.processes
            || self.modules
            || [&self.hook, &self.write, &self.access, &self.msr]
                .iter()
                .any(|list| !list.is_empty())
            || !self.cr.is_empty()
    }

    /// What follows the system calls that were named, all where none was.
    fn syscall_trace(&self, kernel: &Kernel, names: &str) -> Result<SyscallTrace> {
        let names: Vec<String> = names
            .split(',')
            .filter(|n| !n.is_empty())
            .map(str::to_owned)
            .collect();
        let trace = SyscallTrace::new(kernel, &names)?;
        Ok(match self.pid.is_empty() {
            true => trace,
            false => trace.of(self.pid.iter().copied(), self.follow),
        })
    }

    fn arm(&self, session: &Session, monitor: &Monitor) -> Result<Traces> {
        let kernel = session.kernel()?;
        let delivery = Delivery::Held {
            deadline: DEADLINE,
            expiry: Expiry::Open,
        };
        let mut traces = Traces {
            syscalls: None,
            lifecycle: None,
            plain: PlainTrace::new(kernel, &self.pid, self.inside),
        };
        if let Some(names) = &self.syscalls {
            let mut trace = self.syscall_trace(kernel, names)?;
            trace.arm(monitor, delivery).context("hooking system calls")?;
            traces.syscalls = Some(trace);
        }
        let wanted = Lifecycle::ALL.into_iter().filter(|what| match what {
            Lifecycle::Exec => self.exec || self.processes,
            Lifecycle::Start | Lifecycle::Exit => self.processes,
            Lifecycle::ModuleLoad | Lifecycle::ModuleUnload => self.modules,
        });
        for what in wanted {
            if traces.lifecycle.is_none() {
                let mut trace = LifecycleTrace::new(kernel)?;
                if !self.pid.is_empty() {
                    trace = trace.of(self.pid.iter().copied(), self.follow);
                }
                traces.lifecycle = Some(trace);
            }
            if let Some(trace) = &mut traces.lifecycle {
                trace
                    .arm(monitor, what, delivery)
                    .with_context(|| format!("hooking {}", what.name()))?;
            }
        }
        for (kind, name) in self.plain(session)? {
            traces.plain.arm(kernel, monitor, kind, name, delivery)?;
        }
        if !self.cr.is_empty() {
            let registers = plain::control_registers(&self.cr)?;
            traces.plain.arm_control(kernel, monitor, registers, delivery)?;
        }
        Ok(traces)
    }
}

/// What was armed.
struct Traces {
    syscalls: Option<SyscallTrace>,
    lifecycle: Option<LifecycleTrace>,
    plain: PlainTrace,
}

impl Traces {
    /// What an event means; `None` where it is nothing to be shown.
    fn read(&mut self, session: &Session, occurrence: &Occurrence) -> Result<Option<Row>> {
        let id = occurrence.event().hook;
        if let Some(trace) = self.syscalls.as_mut().filter(|t| t.owns(id)) {
            return Ok(trace.take(occurrence)?.map(Row::Syscall));
        }
        if let Some(trace) = self.lifecycle.as_mut().filter(|t| t.owns(id)) {
            return Ok(trace.take(occurrence)?.map(Row::Lifecycle));
        }
        Ok(self.plain.take(session, occurrence)?.map(Row::Plain))
    }
}

/// What becomes of the events.
struct Shown {
    stream: Option<Stream>,
    summary: Summary,
    left: u64,
    /// Events that could not be read.
    troubles: u64,
}

impl Shown {
    fn take(&mut self, session: &Session, traces: &mut Traces, occurrence: Occurrence) -> Result<()> {
        let read = traces.read(session, &occurrence);
        // All has been read: the guest need not wait until it is printed.
        match occurrence.answer(Verdict::Continue) {
            Ok(()) | Err(EventError::Gone) => {}
            Err(error) => return Err(error).context("letting the guest go on"),
        }
        match read {
            Ok(None) => {}
            Ok(Some(row)) => {
                self.left = self.left.saturating_sub(1);
                self.summary.add(&row);
                if let Some(stream) = &mut self.stream {
                    stream.write(&row)?;
                }
            }
            Err(error) => {
                self.troubles += 1;
                if self.troubles == 1 {
                    session
                        .style()
                        .warn(&format!("an event could not be read: {error:#}"));
                }
            }
        }
        Ok(())
    }

    fn finish(self, session: &Session) -> Result<Outcome> {
        let events = self.summary.events();
        match self.stream {
            Some(stream) => stream.finish()?,
            None => session.style().print(&self.summary.sheet())?,
        }
        if self.troubles > 1 {
            session
                .style()
                .warn(&format!("{} events could not be read", self.troubles));
        }
        Ok(if events == 0 {
            Outcome::Nothing
        } else {
            Outcome::Fine
        })
    }
}
