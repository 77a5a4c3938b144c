//! How much slower a guest becomes when its system calls are traced: a process that makes many, and one that only computes.
//!
//! Real guests do a fixed amount of work and say by their own clock how long it took, each time without hooks and with
//! `vmsight trace --syscalls -c` at work, in turns. `script/bench` runs it. QEMU is that of bookworm-backports: the older one gives the
//! agent no registers, and so no system calls.

#![allow(clippy::unwrap_used, reason = "a bench stops at the first surprise")]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use vmsight_lab::{Guest, Kernel, Memory, Qemu, Spec, Work};

/// How often each is done; the middle one counts.
const ROUNDS: usize = 3;
/// How much slower a guest that only computes may become.
const COMPUTES: f64 = 1.02;

/// By what the guest is traced.
struct Way {
    name: &'static str,
    qemu: Qemu,
    agent: bool,
    backend: &'static str,
}

const WAYS: &[Way] = &[
    Way {
        name: "gdb stub",
        qemu: Qemu::Backports,
        agent: false,
        backend: "gdb-stub",
    },
    Way {
        name: "agent",
        qemu: Qemu::Backports,
        agent: true,
        backend: "agent-tcg",
    },
];

fn main() {
    println!(
        "{:<44} {:>10} {:>10} {:>8} {:>6}",
        "ms of the guest's clock, median", "no hooks", "traced", "ratio", "goal"
    );
    for way in WAYS {
        let spec = Spec {
            memory: Memory::Memfd,
            vcpus: 2,
            qemu: way.qemu,
            agent: way.agent.then(agent),
            ..Spec::new(Kernel::V6_1).idle().orders()
        };
        let guest = Guest::boot(&spec).unwrap_or_else(|e| panic!("{e:?}"));
        measure(
            way,
            &guest,
            "1,800 system calls",
            Work::Syscalls { rounds: 300 },
            None,
        );
        // Long enough for the timer's ticks to be many.
        let computes = Work::Compute {
            rounds: 1_000_000_000,
        };
        measure(way, &guest, "computing", computes, Some(COMPUTES));
    }
}

fn measure(way: &Way, guest: &Guest, what: &str, work: Work, goal: Option<f64>) {
    let (mut plain, mut traced) = (Vec::new(), Vec::new());
    // The first one finds the guest's code untranslated.
    run(guest, &work);
    for _ in 0..ROUNDS {
        plain.push(run(guest, &work));
        let tracer = Tracer::start(guest, way.backend);
        // Hooks in, all is translated anew.
        run(guest, &Work::Syscalls { rounds: 10 });
        traced.push(run(guest, &work));
        drop(tracer);
    }
    let (plain, traced) = (median(plain), median(traced));
    let ratio = traced / plain;
    let (goal, verdict) = match goal {
        Some(goal) if ratio > goal => (format!("{goal}"), "MISSED"),
        Some(goal) => (format!("{goal}"), "ok"),
        None => (String::new(), ""),
    };
    let line = format!(
        "{:<44} {plain:>10.1} {traced:>10.1} {ratio:>8.2} {goal:>6} {verdict}",
        format!("{what}, {}", way.name)
    );
    println!("{}", line.trim_end());
}

/// Milliseconds that the guest says it took.
fn run(guest: &Guest, work: &Work) -> f64 {
    let account = guest
        .order(work.clone().on(1))
        .unwrap_or_else(|e| panic!("{e:?}"));
    account.nanoseconds.unwrap() as f64 / 1e6
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// The agent that was built with this.
fn agent() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_vmsight")).with_file_name("libvmsight_agent.so")
}

/// `vmsight trace` at work; it ends with this.
struct Tracer(Child);

impl Tracer {
    fn start(guest: &Guest, backend: &str) -> Self {
        let target = format!("qmp:{}", guest.qmp_path().unwrap().display());
        let mut child = Command::new(env!("CARGO_BIN_EXE_vmsight"))
            .args([
                "trace",
                &target,
                "--syscalls",
                "-c",
                "--for",
                "600",
                "--backend",
                backend,
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
        let begun = said.any(|line| line.unwrap().contains("tracing"));
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
