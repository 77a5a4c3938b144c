//! `vmsight bench hooks`: one table, in one run, of what an event costs by each way that there is here.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use vmsight_arch::{Gpa, Gva};
use vmsight_events::Monitor;
use vmsight_gauge::image::{MOST, PORT, ROOM, WATCHED};
use vmsight_gauge::vmm::Privilege;
use vmsight_gauge::{Operation, Summary};
use vmsight_hooks::{Access, Delivery, Expiry, Hook, HookKind, Overflow, Range, Register, Verdict};
use vmsight_hooks::{BackendKind, Feature, Filter, Value};

use super::machine::{self, Host, Machine};
use super::survival::{END, survived};
use super::switches::two_switches;
use super::table::{Row, print};
use crate::output::Progress;
use crate::{Outcome, args::Global};

/// How long the guest may take for its rounds.
const PATIENCE: Duration = Duration::from_secs(120);
/// MSR LSTAR (SDM vol. 4).
const LSTAR: u32 = 0xc000_0082;
/// Within what a guest is to run whose monitor failed it.
const SURVIVAL: (&str, f64, Option<f64>) = ("100 ms", 1e8, Some(1.0));

#[derive(Args, Debug)]
#[command(after_help = "\
A guest of our own, of some hundred bytes, times itself by its time-stamp counter: a round calls a function, writes a word of
memory, an MSR or a port. The same round is done without a hook, with one whose handler does nothing, and by each backend. \"held\"
means that the vCPU waits for the handler's verdict, \"told\" that it goes on at once, \"filtered\" that a filter in the VMM puts it
away, \"inside\" that one in the guest does, before there is an exit; \"counted\" that nobody is told.

Four rows say how long the guest stands still, by the host's clock, when its monitor fails it; the longest of twenty counts (through
the stub, of five of \"full\"):
  killed  it holds the guest and is killed with -9
  cut     it holds the guest, and its connection is shut while it lives
  hung    it holds the guest and gives no verdict: how long beyond the hook's deadline
  full    it takes no events, none may be lost, and there is no more room: it is killed with -9

The guest runs in stock QEMU, and on /dev/kvm in a VMM that does nothing else. Floors: what the exit to that VMM costs (a port is
written), and what it costs that two threads wake each other (two context switches): both on one processor, and each on a processor
of its own. A held event is compared with the latter, where there are two: the vCPU's thread and the monitor's run at the same time,
and each is woken from the other's processor. Where KVM itself runs in a VM, or on an emulated processor, its figures are those of
that machine and not of hardware. There it may emulate a kernel's code and run a program's as it is: the guest in the VMM is measured
as both.")]
pub(crate) struct Cmd {
    /// Rounds of each row
    #[arg(long, value_name = "N", default_value_t = 1000)]
    samples: u64,
    /// The QEMU to measure; may be given several times
    #[arg(long, value_name = "PROGRAM", default_value = "qemu-system-x86_64")]
    qemu: Vec<PathBuf>,
    /// Only guests of this accelerator: tcg or kvm
    #[arg(long, value_name = "NAME")]
    accelerator: Option<String>,
}

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        ensure!(
            (10..=MOST).contains(&self.samples),
            "--samples takes 10 to {MOST}"
        );
        let style = global.style();
        let progress = Progress::spinner(style.quiet, "measuring");
        let mut rows = Vec::new();
        let mut switches = None;
        for (place, outcome) in two_switches(self.samples) {
            rows.push(Row {
                host: "this program".to_owned(),
                by: "-",
                hook: place.row(),
                delivery: "-",
                outcome: outcome.map_err(|error| format!("{error:#}")),
                against: None,
            });
            // Those of two processors come last.
            switches = rows
                .last()
                .and_then(median)
                .map(|took| (place.name(), took))
                .or(switches);
        }
        let mut warnings = Vec::new();
        for host in self.hosts() {
            match measure(&host, self.samples, switches) {
                Ok(measured) => rows.extend(measured),
                Err(error) => warnings.push(format!("no guest in {host}: {error:#}")),
            }
        }
        drop(progress);
        print(&style, &rows, warnings)?;
        Ok(Outcome::Fine)
    }

    fn hosts(&self) -> Vec<Host> {
        let wanted = |name: &str| self.accelerator.as_deref().is_none_or(|only| only == name);
        let kvm = wanted("kvm") && Path::new("/dev/kvm").exists();
        let qemu = |accelerator: &'static str| {
            self.qemu.iter().map(move |program| Host::Qemu {
                program: program.clone(),
                accelerator: accelerator.to_owned(),
            })
        };
        let both = [Privilege::Kernel, Privilege::Program];
        let least = both.into_iter().filter(|_| kvm).map(Host::Vmm);
        let by_kvm = qemu("kvm").filter(|_| kvm);
        let by_tcg = qemu("tcg").filter(|_| wanted("tcg"));
        least.chain(by_kvm).chain(by_tcg).collect()
    }
}

/// Everything about one host. `switches` is what two context switches take where a held event has its own, and what that is called.
fn measure(host: &Host, samples: u64, switches: Option<(&'static str, f64)>) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let name = host.to_string();
    let plain = Machine::start(host, false)?;
    let row = |by, hook, delivery, outcome: Result<Summary>, against| Row {
        host: name.clone(),
        by,
        hook,
        delivery,
        outcome: outcome.map_err(|error| format!("{error:#}")),
        against,
    };
    for (hook, operation) in [("none (call)", Operation::Call), ("none (port)", Operation::Port)] {
        rows.push(row("-", hook, "-", rounds(&plain, operation, samples), None));
    }
    let exit = rows.last().and_then(median);
    // The stub, where there is one: by execution and by a write.
    let mut stub = None;
    if let Host::Qemu { .. } = host {
        let monitor = machine::by_stub(plain.pid())?;
        for (hook, operation) in [("execute", Operation::Call), ("virtual write", Operation::Write)] {
            let asked = asked(&plain, hook).delivered(HELD);
            let outcome = hooked(&plain, &monitor, &asked, operation, samples);
            rows.push(row(
                "gdb-stub",
                hook,
                "held",
                outcome,
                exit.map(|e| ("exit", e, None)),
            ));
            if hook == "execute" {
                stub = rows.last().and_then(median);
            }
        }
        drop(monitor);
        for end in END {
            let outcome = survived(&plain, false, Operation::Call, end, samples);
            rows.push(row("gdb-stub", "execute", end.name(), outcome, Some(SURVIVAL)));
        }
    }
    drop(plain);
    let machine = match Machine::start(host, true) {
        Ok(machine) => machine,
        Err(error) => {
            rows.push(row("agent", "-", "-", Err(error), None));
            return Ok(rows);
        }
    };
    let monitor = match machine::by_agent(&machine.socket()) {
        Ok(monitor) => monitor,
        Err(error) => {
            rows.push(row("agent", "-", "-", Err(error), None));
            return Ok(rows);
        }
    };
    let by = monitor.backend().name();
    for (hook, operation) in [("none (call)", Operation::Call), ("none (port)", Operation::Port)] {
        rows.push(row(by, hook, "-", rounds(&machine, operation, samples), None));
    }
    let program = matches!(host, Host::Vmm(Privilege::Program));
    let (mut held, mut port_held) = (None, None);
    for (hook, delivery, operation) in [
        ("execute", "held", Operation::Call),
        ("execute", "told", Operation::Call),
        ("execute", "filtered", Operation::Call),
        ("execute", "counted", Operation::Call),
        ("virtual write", "held", Operation::Write),
        ("physical write", "held", Operation::Write),
        ("MSR write", "held", Operation::Msr),
        ("port", "held", Operation::Port),
        ("port", "filtered", Operation::Port),
        ("port", "counted", Operation::Port),
        ("execute", "inside", Operation::Call),
    ] {
        let wanted = match delivery {
            "inside" => monitor
                .capabilities()
                .iter()
                .any(|c| c.feature == Feature::Inside),
            // What makes a difference to a program: the rest is the VMM's, and the same.
            _ => !program || matches!(hook, "execute" | "port") && matches!(delivery, "held" | "filtered"),
        };
        if !wanted {
            continue;
        }
        let how = match delivery {
            "held" => HELD,
            "told" => Delivery::Told {
                overflow: Overflow::Block,
            },
            "filtered" | "inside" => HELD,
            _ => Delivery::Counted,
        };
        let mut asked = asked(&machine, hook).delivered(how);
        if matches!(delivery, "filtered" | "inside") {
            asked = asked.filtered(nothing()?);
        }
        if delivery == "inside" {
            asked = asked.inside(Gva(ROOM));
        }
        let outcome = hooked(&machine, &monitor, &asked, operation, samples);
        let against = match (hook, delivery) {
            ("execute", "held") => stub
                .map(|stub| ("gdb-stub", stub, Some(0.1)))
                .or(switches.map(|(name, took)| (name, took, Some(3.0)))),
            // Where each event is an exit none costs a tenth: there the filter inside is to.
            ("execute", "filtered") if by == BackendKind::AgentKvm.name() => {
                held.map(|held| ("held", held, None))
            }
            ("execute", "filtered") => held.map(|held| ("held", held, Some(0.1))),
            ("execute", "inside") => match held {
                Some(held) => Some(("held", held, Some(0.1))),
                None => port_held.map(|held| ("port held", held, Some(0.1))),
            },
            ("execute", _) => held.map(|held| ("held", held, None)),
            _ => exit.map(|exit| ("exit", exit, None)),
        };
        rows.push(row(by, hook, delivery, outcome, against));
        match (hook, delivery) {
            ("execute", "held") => held = rows.last().and_then(median),
            ("port", "held") => port_held = rows.last().and_then(median),
            _ => {}
        }
    }
    // An agent that QEMU gives no registers cannot hook the function.
    let executes = held.is_some();
    drop(monitor);
    let (hook, operation) = match executes {
        true => ("execute", Operation::Call),
        false => ("virtual write", Operation::Write),
    };
    for end in END.into_iter().filter(|_| !program) {
        let outcome = survived(&machine, true, operation, end, samples);
        rows.push(row(by, hook, end.name(), outcome, Some(SURVIVAL)));
    }
    Ok(rows)
}

const HELD: Delivery = Delivery::Held {
    deadline: Duration::from_secs(5),
    expiry: Expiry::Open,
};

fn median(row: &Row) -> Option<f64> {
    row.outcome.as_ref().ok().map(|summary| summary.median)
}

/// A filter that wants no event of this guest's: its rounds are counted in RBX, and it does not do so many.
fn nothing() -> Result<Filter> {
    let never = Value::register(Register::Gpr(3)).is(u64::MAX);
    Filter::only(&never).context("making a filter")
}

/// The hook of a name.
fn asked(machine: &Machine, hook: &str) -> Hook {
    let memory = |range| HookKind::Memory {
        range,
        access: Access::WRITE,
    };
    let start = WATCHED;
    Hook::new(match hook {
        "virtual write" => memory(Range::Virtual {
            start: Gva(start),
            len: 8,
        }),
        "physical write" => memory(Range::Physical {
            start: Gpa(start),
            len: 8,
        }),
        "MSR write" => HookKind::Msr {
            index: LSTAR,
            access: Access::WRITE,
        },
        "port" => HookKind::Port {
            first: PORT,
            last: PORT,
            access: Access::WRITE,
        },
        _ => HookKind::Execute {
            at: Gva(machine.timer.image().function),
        },
    })
}

/// What the rounds take. As many as a tenth are done before, for what is done only once.
fn rounds(machine: &Machine, operation: Operation, samples: u64) -> Result<Summary> {
    let timer = &machine.timer;
    timer.run(operation, samples / 10, PATIENCE)?;
    let took = timer.run(operation, samples, PATIENCE)?;
    Summary::of(&took.nanoseconds).context("no round was done")
}

/// The same with a hook, whose handler lets the guest go on.
fn hooked(
    machine: &Machine,
    monitor: &Monitor,
    hook: &Hook,
    operation: Operation,
    samples: u64,
) -> Result<Summary> {
    let guard = monitor.on(hook, |_| Verdict::Continue)?;
    let done = AtomicBool::new(false);
    let measured = std::thread::scope(|scope| {
        let serving = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                monitor.serve(Duration::from_millis(200))?;
            }
            anyhow::Ok(())
        });
        let measured = rounds(machine, operation, samples);
        done.store(true, Ordering::Relaxed);
        monitor.wake();
        match serving.join() {
            Ok(served) => served.and(measured),
            Err(_) => measured,
        }
    })?;
    // A figure is worth something only where each round was an event, and was told or not as it should.
    let counts = guard.counts()?;
    let expected = samples + samples / 10;
    let filtered = if hook.filter.is_none() { 0 } else { expected };
    ensure!(
        (counts.occurred, counts.filtered) == (expected, filtered),
        "of {expected} rounds {} were events, {} of them filtered out",
        counts.occurred,
        counts.filtered
    );
    Ok(measured)
}
