//! How much slower a guest becomes when its system calls are traced: a process that makes many, and one that only computes.
//!
//! Real guests do a fixed amount of work, in turns: without hooks, and with each way to follow system calls at work. Two things are
//! measured of each: what the guest's clock says that it took, and the processor time that QEMU's threads were given meanwhile. Of both
//! what it takes to do nothing is taken off: a process that is let go reads the clock twice, writes a line and ends, in some ten
//! system calls that are followed like all others. `script/bench` runs it. QEMU is that of bookworm-backports: the older one gives the
//! agent no registers, and so no system calls. `VMSIGHT_BENCH_ROUNDS` is how often everything is run.
//!
//! The guest's clock goes on while somebody else has the processor, so it says something on an idle machine only. Processor time does not:
//! it is what the vCPUs' threads executed, with whatever hooks have them execute. That a vCPU waits for a verdict is not in it. So who
//! computes, and waits for nobody, is judged by processor time, and who makes system calls by the clock.

#![allow(clippy::unwrap_used, reason = "a bench stops at the first surprise")]

mod processor;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use vmsight_lab::{Guest, Kernel, Memory, Qemu, Spec, Work};

use processor::Meter;

/// How often each is done, where nothing else is said.
const ROUNDS: usize = 9;
/// How much slower a guest that only computes may become.
const COMPUTES: f64 = 1.02;

/// A guest that is measured.
struct Machine {
    guest: Guest,
    meter: Meter,
}

/// How system calls are followed.
struct Way {
    name: &'static str,
    /// Whether it is the guest with the agent.
    agent: bool,
    /// What `vmsight trace` is told; not run at all where empty.
    arguments: &'static [&'static str],
    /// The way, by its place, with which it is compared.
    beside: usize,
}

const WAYS: &[Way] = &[
    Way {
        name: "no hooks",
        agent: false,
        arguments: &[],
        beside: 0,
    },
    Way {
        name: "gdb stub, trace --syscalls",
        agent: false,
        arguments: &["--backend", "gdb-stub"],
        beside: 0,
    },
    Way {
        name: "agent in QEMU, no hooks",
        agent: true,
        arguments: &[],
        beside: 0,
    },
    Way {
        name: "agent, trace --syscalls",
        agent: true,
        arguments: &["--backend", "agent-tcg"],
        beside: 2,
    },
    Way {
        name: "agent, trace --syscalls --tally",
        agent: true,
        arguments: &["--backend", "agent-tcg", "--tally"],
        beside: 2,
    },
];

/// What one run took, in milliseconds.
#[derive(Clone, Copy)]
struct Took {
    /// By the guest's clock.
    clock: f64,
    /// Of processors, by the vCPUs, by the rest of QEMU, by vmsight.
    vcpus: f64,
    rest: f64,
    monitor: f64,
}

/// Which of the two figures a work is judged by.
#[derive(Clone, Copy)]
enum Judged {
    ByClock,
    ByProcessor(f64),
}

fn main() {
    let rounds = std::env::var("VMSIGHT_BENCH_ROUNDS").map_or(ROUNDS, |n| n.parse().unwrap());
    let machines = [false, true].map(|agent| {
        let spec = Spec {
            memory: Memory::Memfd,
            vcpus: 2,
            qemu: Qemu::Backports,
            agent: agent.then(self::agent),
            ..Spec::new(Kernel::V6_1).idle().orders()
        };
        let guest = Guest::boot(&spec).unwrap_or_else(|e| panic!("{e:?}"));
        let meter = Meter::of(&guest);
        Machine { guest, meter }
    });
    println!(
        "ms, medians of {rounds} rounds{:>40} {:>38} {:>10}",
        "guest's clock", "processor time of the", "rest"
    );
    println!(
        "{:<34} {:>9} {:>8} {:>9} {:>8} {:>13} {:>9} {:>8} {:>8} {:>8} {:>5}",
        "", "", "×", "vCPUs", "×", "quartiles", "least", "×", "of QEMU", "vmsight", "goal"
    );
    let computes = |rounds| Work::Compute { rounds };
    let judged = Judged::ByProcessor(COMPUTES);
    measure(
        &machines,
        rounds,
        "computing",
        [computes(1), computes(1_500_000_000)],
        judged,
    );
    let calls = |rounds| Work::Syscalls { rounds };
    measure(
        &machines,
        rounds,
        "1,800 system calls",
        [calls(1), calls(301)],
        Judged::ByClock,
    );
}

/// The difference between a little work and much.
fn measure(machines: &[Machine; 2], rounds: usize, what: &str, [little, much]: [Work; 2], judged: Judged) {
    println!("{what}");
    let mut runs: Vec<Vec<Took>> = WAYS.iter().map(|_| Vec::new()).collect();
    for _ in 0..rounds {
        for (way, runs) in WAYS.iter().zip(&mut runs) {
            let [without, with] = machines;
            let machine = if way.agent { with } else { without };
            let tracer = (!way.arguments.is_empty()).then(|| Tracer::start(&machine.guest, way.arguments));
            // When hooks come and go, all is translated anew: that is not measured.
            run(machine, &little, tracer.as_ref());
            let before = run(machine, &little, tracer.as_ref());
            runs.push(run(machine, &much, tracer.as_ref()).without(before));
        }
    }
    for (way, its) in WAYS.iter().zip(&runs) {
        // Each to the one of the same round: what the machine does to one it is likely to do to the next.
        let ratios = |of: fn(&Took) -> f64| {
            let pairs = its.iter().zip(&runs[way.beside]);
            sorted(pairs.map(|(a, b)| of(a) / of(b)))
        };
        let (clock, vcpus) = (ratios(|t| t.clock), ratios(|t| t.vcpus));
        let of = |of: fn(&Took) -> f64| middle(&sorted(its.iter().map(of)));
        // Whoever else uses the machine only ever adds to what the same instructions take.
        let least = |its: &[Took]| {
            sorted(its.iter().map(|t| t.vcpus))
                .first()
                .copied()
                .unwrap_or(f64::NAN)
        };
        let at_best = least(its) / least(&runs[way.beside]);
        let (low, high) = match judged {
            Judged::ByClock => quartiles(&clock),
            Judged::ByProcessor(_) => quartiles(&vcpus),
        };
        let hooked = !way.arguments.is_empty();
        let (goal, verdict) = match judged {
            Judged::ByProcessor(goal) if hooked && at_best > goal => (goal.to_string(), "MISSED"),
            Judged::ByProcessor(goal) if hooked => (goal.to_string(), "ok"),
            _ => (String::new(), ""),
        };
        let line = format!(
            "  {:<32} {:>9.1} {:>8.3} {:>9.1} {:>8.3} {:>13} {:>9.1} {at_best:>8.3} {:>8.1} {:>8.1} {goal:>5} {verdict}",
            way.name,
            of(|t| t.clock),
            middle(&clock),
            of(|t| t.vcpus),
            middle(&vcpus),
            format!("{low:.3}-{high:.3}"),
            least(its),
            of(|t| t.rest),
            of(|t| t.monitor),
        );
        println!("{}", line.trim_end());
    }
}

impl Took {
    fn without(self, other: Self) -> Self {
        Self {
            clock: self.clock - other.clock,
            vcpus: self.vcpus - other.vcpus,
            rest: self.rest - other.rest,
            monitor: self.monitor - other.monitor,
        }
    }
}

fn run(machine: &Machine, work: &Work, tracer: Option<&Tracer>) -> Took {
    let monitor = tracer.map(|tracer| tracer.0.id());
    let prepared = machine
        .guest
        .prepare(work.clone().on(1))
        .unwrap_or_else(|e| panic!("{e:?}"));
    let before = machine.meter.read(monitor);
    let account = prepared.go().unwrap_or_else(|e| panic!("{e:?}"));
    let [vcpus, rest, monitor] = machine.meter.read(monitor).since(before);
    Took {
        clock: account.nanoseconds.unwrap() as f64 / 1e6,
        vcpus,
        rest,
        monitor,
    }
}

fn sorted(figures: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut figures: Vec<f64> = figures.collect();
    figures.sort_by(f64::total_cmp);
    figures
}

fn middle(sorted: &[f64]) -> f64 {
    sorted[sorted.len() / 2]
}

fn quartiles(sorted: &[f64]) -> (f64, f64) {
    (sorted[sorted.len() / 4], sorted[sorted.len() * 3 / 4])
}

/// The agent that was built with this.
fn agent() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_vmsight")).with_file_name("libvmsight_agent.so")
}

/// `vmsight trace` at work; it ends with this.
struct Tracer(Child);

impl Tracer {
    fn start(guest: &Guest, arguments: &[&str]) -> Self {
        let target = format!("qmp:{}", guest.qmp_path().unwrap().display());
        let mut child = Command::new(env!("CARGO_BIN_EXE_vmsight"))
            .args(["trace", &target, "--syscalls", "--for", "3600"])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
        let begun = said.any(|line| line.unwrap().contains("; Ctrl-C ends it"));
        assert!(begun, "it did not begin");
        // What it says later is not to fill the pipe.
        std::thread::spawn(move || said.count());
        Self(child)
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        // As Ctrl-C.
        let pid = self.0.id().to_string();
        let _ = Command::new("kill").args(["-INT", &pid]).status();
        let _ = self.0.wait();
    }
}
