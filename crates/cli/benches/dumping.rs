//! `vmsight dump` of a guest, running and paused, next to plain copying of the same memory to the same disk: `script/bench` runs it.
//!
//! Dumps are written to `VMSIGHT_BENCH_DUMPS`, by default to a folder of the build's. Everything is timed from start to end, until the
//! disk has it, with both SHA-256 sums, in turns; the best of each counts.

#![allow(clippy::unwrap_used, reason = "a bench stops at the first surprise")]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use vmsight_lab::{Guest, Kernel, Spec};

const MEMORY_MIB: u32 = 1024;
const ROUNDS: usize = 5;
/// Of plain copying's speed.
const GOAL: f64 = 0.8;
/// What is written, and whether the goal is for it: who asks for zlib must have it, at whatever speed.
const FORMATS: [(&str, bool); 7] = [
    ("elf", true),
    ("lime", true),
    ("raw", true),
    ("avml", true),
    ("kdump-snappy", true),
    ("kdump-zstd", true),
    ("kdump-zlib", false),
];

/// Reads and writes, as any program copies memory that is no file to it.
fn copy(from: &Path, to: &Path) {
    let (mut from, mut to) = (File::open(from).unwrap(), File::create_new(to).unwrap());
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = from.read(&mut buffer).unwrap();
        if read == 0 {
            break;
        }
        to.write_all(&buffer[..read]).unwrap();
    }
    to.sync_all().unwrap();
}

fn dump(target: &str, to: &Path, format: &str, paused: bool) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmsight"));
    command
        .args(["dump", target, "--quiet", "--format", format])
        .arg(to);
    if paused {
        command.arg("--pause");
    }
    let status = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success(), "{command:?}: {status}");
}

fn timed(folder: &Path, work: impl FnOnce(&Path)) -> Duration {
    let out = folder.join("out");
    let begun = Instant::now();
    work(&out);
    let took = begun.elapsed();
    for name in ["out", "out.json"] {
        let _ = fs::remove_file(folder.join(name));
    }
    took
}

fn main() {
    // Run as a test, nothing is measured to be believed.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let folder = std::env::var_os("VMSIGHT_BENCH_DUMPS");
    let folder = folder.map_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")), PathBuf::from);
    let folder = tempfile::tempdir_in(folder).unwrap();
    let spec = Spec::new(Kernel::V6_1).memory_mib(MEMORY_MIB);
    let guest = Guest::boot(&spec).unwrap_or_else(|e| panic!("{e:?}"));
    let memory = guest.memory_path().unwrap();
    let target = format!("qmp:{}", guest.qmp_path().unwrap().display());

    let ways: Vec<_> = FORMATS
        .into_iter()
        .flat_map(|format| [false, true].map(|paused| (format, paused)))
        .collect();
    let mut best = vec![Duration::MAX; ways.len() + 1];
    for _ in 0..ROUNDS {
        let plain = timed(folder.path(), |out| copy(&memory, out));
        let all = std::iter::once(plain)
            .chain(ways.iter().map(|((format, _), paused)| {
                timed(folder.path(), |out| dump(&target, out, format, *paused))
            }));
        for (best, took) in best.iter_mut().zip(all) {
            *best = took.min(*best);
        }
    }
    let (plain, best) = best.split_first().unwrap();
    println!(
        "{:<24} {:>9} {:>8} {:>6}",
        format!("{MEMORY_MIB} MiB"),
        "best, ms",
        "ratio",
        "goal"
    );
    println!("{:<24} {:>9.0}", "plain copying", plain.as_secs_f64() * 1e3);
    for (((format, has_goal), paused), took) in ways.iter().zip(best) {
        let ratio = plain.as_secs_f64() / took.as_secs_f64();
        let goal = match has_goal {
            true if ratio >= GOAL => format!("{GOAL:>6.1}  ok"),
            true => format!("{GOAL:>6.1}  MISSED"),
            false => String::new(),
        };
        let how = if *paused { "paused" } else { "running" };
        println!(
            "{:<24} {:>9.0} {ratio:>8.2} {goal}",
            format!("{format}, {how}"),
            took.as_secs_f64() * 1e3
        );
    }
}
