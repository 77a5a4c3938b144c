//! What changes a guest: writing, pausing; and watching it.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::{Duration, Instant};

use vmsight_lab::Format;

use crate::support::{Dump, command, ends_with, number, prepared, rows, text, vmsight};

/// A number that the kernel reads when somebody opens /proc/kallsyms, which nobody in the guest does any more.
const VARIABLE: &str = "kptr_restrict";

fn variable(target: &str) -> u64 {
    number(&rows(&["read", target, VARIABLE, "4", "--as", "u32"])[0]["value"])
}

#[test]
fn writing_needs_leave_changes_what_it_says_and_can_be_undone() {
    let vm = prepared();
    let t = vm.target.as_str();
    let before = variable(t);
    let err = ends_with(2, &["write", t, VARIABLE, "--number", "4", "--width", "4"]);
    assert!(err.contains("--write"), "{err}");
    assert_eq!(variable(t), before);

    let said = rows(&["write", "--write", t, VARIABLE, "--number", "4", "--width", "4"]).remove(0);
    assert_eq!(
        (&said["before"], &said["after"]),
        (&format!("{before:02x}000000").into(), &"04000000".into())
    );
    assert_eq!(variable(t), 4);
    // Only if what is there is what was expected.
    let err = ends_with(
        2,
        &[
            "write", "--write", t, VARIABLE, "--number", "5", "--width", "4", "--expect", "00000000",
        ],
    );
    assert!(err.contains("04000000"), "{err}");
    assert_eq!(variable(t), 4);
    let back = said["before"].as_str().unwrap();
    rows(&[
        "write", "--write", t, VARIABLE, "--hex", back, "--expect", "04000000",
    ]);
    assert_eq!(variable(t), before);
    assert_eq!(vm.status(), "running");

    let dump = Dump::of(&vm.guest, Format::Elf);
    let err = ends_with(2, &["write", "--write", dump.target(), VARIABLE, "--hex", "ff"]);
    assert!(err.contains("dump"), "{err}");
}

#[test]
fn a_pause_ends_with_the_command_and_with_its_death() {
    let vm = prepared();
    let t = vm.target.as_str();
    assert!(!rows(&["ps", t, "--pause"]).is_empty());
    assert_eq!(vm.status(), "running");

    // Killed while it watches a paused guest: whoever is left lets it run.
    let mut child = command(&["strings", t, "--pause", "-o", "jsonl"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut first = String::new();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    output.read_line(&mut first).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while vm.status() != "running" {
        assert!(Instant::now() < deadline, "the guest stays paused");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn watching_repeats_until_it_is_interrupted() {
    let vm = prepared();
    let mut child = command(&["info", &vm.target, "--watch", "0.1", "-o", "jsonl"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let first: serde_json::Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    for _ in 0..2 {
        let next: serde_json::Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        assert_eq!(next["release"], first["release"]);
    }
    let pid = i32::try_from(child.id()).unwrap();
    let status = std::process::Command::new("kill")
        .args(["-INT", &pid.to_string()])
        .status()
        .unwrap();
    assert!(status.success());
    drop(lines);
    child.wait().unwrap();
    assert_eq!(vm.status(), "running");

    let dump = Dump::of(&vm.guest, Format::Elf);
    let out = vmsight(&["info", dump.target(), "--watch", "0.1"]);
    assert_eq!(
        out.status.code(),
        Some(2),
        "a dump does not change: {}",
        text(&out.stdout)
    );
}
