//! The life of a guest: how it starts, ends, fails and is dumped.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use vmsight_lab::{Format, Guest, Kernel, Memory, Spec};

fn idle(mut spec: Spec) -> Spec {
    spec.kernel_args.push("vmsight.idle".to_owned());
    spec
}

/// Whether a process of this pid is a QEMU that has not ended.
fn runs(pid: u32) -> bool {
    let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    state.contains("(qemu-system") && !state.contains(") Z ")
}

fn wait_until_gone(pid: u32) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while runs(pid) {
        assert!(Instant::now() < deadline, "QEMU {pid} is still there");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn dumps_hold_the_memory_and_the_guest_goes_on() {
    let guest = Guest::boot(&idle(Spec::new(Kernel::V6_1Cloud))).unwrap_or_else(|e| panic!("{e:?}"));
    let (raw, elf) = (guest.folder().join("dump.raw"), guest.folder().join("dump.elf"));
    let live = guest
        .paused(|qmp| {
            guest.dump_paused(qmp, Format::Raw, &raw)?;
            guest.dump_paused(qmp, Format::Elf, &elf)?;
            Ok(std::fs::read(guest.memory_path().unwrap())?)
        })
        .unwrap();
    let memory = std::fs::read(&raw).unwrap();
    assert_eq!((memory.len(), live.len()), (512 << 20, 512 << 20));
    // Below 1 MiB the guest sees its firmware, the file what is under it.
    assert!(
        memory[1 << 20..] == live[1 << 20..],
        "the dump differs from the memory"
    );
    assert_eq!(std::fs::read(&elf).unwrap()[..4], *b"\x7fELF");
    let banner = guest.truth().system.version.as_bytes();
    assert!(
        memory.windows(banner.len()).any(|w| w == banner),
        "the dump does not hold the kernel's banner"
    );
    let status = guest
        .qmp()
        .unwrap()
        .execute("query-status", serde_json::json!({}))
        .unwrap();
    assert_eq!(status["status"], "running");
    let pid = guest.pid();
    assert!(runs(pid));
    let folder = guest.folder().to_path_buf();
    drop(guest);
    assert!(!runs(pid) && !folder.exists());
}

#[test]
fn an_unprepared_guest_offers_nothing() {
    let guest = Guest::boot(&idle(Spec::unprepared(Kernel::V6_1Cloud))).unwrap_or_else(|e| panic!("{e:?}"));
    assert_eq!((guest.qmp_path(), guest.memory_path()), (None, None));
    let refusal = guest
        .dump(Format::Raw, Path::new("never"))
        .unwrap_err()
        .to_string();
    assert!(refusal.contains("no QMP socket"), "{refusal}");
    let line = std::fs::read_to_string(format!("/proc/{}/cmdline", guest.pid())).unwrap();
    for word in ["-qmp", "memory-backend", "-gdb", "-monitor"] {
        assert!(!line.contains(word), "{word} is in {line:?}");
    }
}

#[test]
fn sleepers_are_there_and_counted_apart() {
    let spec = Spec {
        memory: Memory::Memfd,
        vcpus: 2,
        ..idle(Spec::new(Kernel::V6_1Cloud))
    }
    .sleepers(1000);
    let guest = Guest::boot(&spec).unwrap_or_else(|e| panic!("{e:?}"));
    let truth = guest.truth();
    assert_eq!(truth.sleepers.len(), 1000);
    assert_eq!(truth.system.cpus, 2);
    assert!(truth.named("sleeper").is_none() && truth.named("sleepers").is_some());
}

#[test]
fn a_guest_that_fails_to_boot_shows_its_console() {
    let mut spec = Spec::new(Kernel::V6_1Cloud);
    spec.kernel_args
        .push("rdinit=/not/there root=/dev/nothing".to_owned());
    let error = format!("{:#}", Guest::boot(&spec).unwrap_err());
    assert!(error.contains("Kernel panic") && error.contains("6.1"), "{error}");
}

#[test]
fn a_qemu_that_does_not_start_says_why() {
    let mut spec = Spec::new(Kernel::V6_1Cloud);
    spec.qemu_args.push("-no-such-option".to_owned());
    let error = format!("{:#}", Guest::boot(&spec).unwrap_err());
    assert!(error.contains("no-such-option"), "{error}");
}

#[test]
fn a_guest_dies_with_whoever_started_it() {
    let mut lab = Command::new(env!("CARGO_BIN_EXE_vmsight-lab"))
        .args(["boot", "--kernel", "6.1", "--idle", "--json"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(lab.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let facts: serde_json::Value = serde_json::from_str(&line).unwrap();
    let pid = u32::try_from(facts["pid"].as_u64().unwrap()).unwrap();
    assert!(runs(pid));
    // Not asked, but killed: nothing of it gets to run any more.
    lab.kill().unwrap();
    lab.wait().unwrap();
    wait_until_gone(pid);
    // What is left of it goes when the next one starts.
    let left = PathBuf::from(facts["console"].as_str().unwrap());
    let mut next = Spec::new(Kernel::V6_1Cloud);
    next.qemu_args.push("-no-such-option".to_owned());
    Guest::boot(&next).unwrap_err();
    assert!(!left.exists(), "{} is still there", left.display());
}

#[test]
fn the_command_ends_the_guest_when_its_input_closes() {
    let mut lab = Command::new(env!("CARGO_BIN_EXE_vmsight-lab"))
        .args(["boot", "--kernel", "6.1", "--idle"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(lab.stdout.take().unwrap());
    let mut pid = None;
    let mut line = String::new();
    while output.read_line(&mut line).unwrap() > 0 {
        if let Some(number) = line.strip_prefix("pid") {
            pid = number.trim().parse::<u32>().ok();
        }
        if line.starts_with("seconds") {
            break;
        }
        line.clear();
    }
    let pid = pid.expect("no pid was printed");
    assert!(runs(pid));
    drop(lab.stdin.take());
    output.read_to_string(&mut line).unwrap();
    assert!(lab.wait().unwrap().success());
    assert!(!runs(pid));
}
