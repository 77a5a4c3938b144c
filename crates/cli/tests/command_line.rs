//! The command line without a guest: help, errors, exit codes, what a broken file gets told.

#![allow(clippy::unwrap_used)] // a helper that fails fails its test

use std::io::Write;
use std::process::{Command, Output};

fn vmsight(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vmsight"))
        .args(args)
        .env_remove("VMSIGHT_LOG")
        .env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"))
        .output()
        .expect("vmsight can be started")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A file in the test's own folder, gone with the guard.
fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

const COMMANDS: &[&str] = &[
    "list",
    "info",
    "ps",
    "pstree",
    "threads",
    "stacks",
    "maps",
    "lsof",
    "lsmod",
    "net",
    "unix",
    "mounts",
    "kmsg",
    "env",
    "cgroups",
    "ifaces",
    "iomem",
    "slabs",
    "bpf",
    "perf",
    "regs",
    "read",
    "write",
    "dump",
    "scan",
    "timeline",
    "report",
    "translate",
    "disas",
    "strings",
    "symbols",
    "types",
    "sim",
    "completions",
    "man",
];

#[test]
fn every_command_explains_itself() {
    let help = text(&vmsight(&["--help"]).stdout);
    for command in COMMANDS {
        assert!(
            help.contains(&format!("\n  {command} ")),
            "--help does not name {command}"
        );
        let out = vmsight(&[command, "--help"]);
        assert!(out.status.success(), "{command} --help fails");
        assert!(
            text(&out.stdout).contains("Usage: vmsight"),
            "{command} --help says too little"
        );
    }
}

#[test]
fn completions_and_manual_pages_cover_every_command() {
    for shell in ["bash", "zsh", "fish"] {
        let script = text(&vmsight(&["completions", shell]).stdout);
        assert!(COMMANDS.iter().all(|c| script.contains(c)), "{shell}");
    }
    let dir = tempfile::tempdir().unwrap();
    let out = vmsight(&["man", dir.path().to_str().unwrap()]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    for command in COMMANDS {
        let page = std::fs::read_to_string(dir.path().join(format!("vmsight-{command}.1"))).unwrap();
        assert!(page.contains(".SH NAME"), "{command}");
    }
}

#[test]
fn wrong_usage_is_exit_2() {
    for args in [
        &["ps"][..],
        &["nonsense"],
        &["read", "x"],
        &["write", "x", "phys:0", "--hex", "00", "--number", "1"],
    ] {
        assert_eq!(vmsight(args).status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn a_target_that_is_not_there() {
    for target in [
        "no-such-vm",
        "pid:4194305",
        "qmp:/nonexistent/qmp",
        "/nonexistent/dump",
        "gdb:/nonexistent/gdb",
    ] {
        let out = vmsight(&["ps", target]);
        let err = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{target}: {err}");
        assert!(err.starts_with("vmsight: attaching to "), "{err}");
        assert!(
            err.contains(target.split_once(':').map_or(target, |(_, t)| t)),
            "the error does not name it: {err}"
        );
        assert!(out.stdout.is_empty());
    }
}

#[test]
fn files_without_a_kernel_are_refused_and_say_what_was_tried() {
    let zeros = file(&vec![0; 1 << 20]);
    let noise: Vec<u8> = (0u64..1 << 17)
        .flat_map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_le_bytes())
        .collect();
    let noise = file(&noise);
    for f in [zeros, noise] {
        let out = vmsight(&["ps", f.path().to_str().unwrap()]);
        let err = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{err}");
        assert!(err.contains("kernel"), "{err}");
        assert!(err.lines().count() < 20, "{err}");
    }
}

#[test]
fn empty_and_tiny_files() {
    for bytes in [&b""[..], b"\x7fELF", b"EMiL", b"EMiL\x01\0\0\0", &[0xff; 100]] {
        let f = file(bytes);
        for command in ["ps", "info", "strings", "regs"] {
            let out = vmsight(&[command, f.path().to_str().unwrap()]);
            let err = text(&out.stderr);
            assert!(
                matches!(out.status.code(), Some(0..=2)),
                "{command} {bytes:?}: {:?} {err}",
                out.status
            );
            assert!(!err.contains("panicked"), "{err}");
        }
    }
}

#[test]
fn strings_of_a_raw_file_need_no_kernel() {
    let mut bytes = vec![0; 1 << 16];
    bytes[0x1234..0x1234 + 12].copy_from_slice(b"hello, guest");
    bytes[0x2000..0x2000 + 9].copy_from_slice(b"\x1b]0;bad\x07\0");
    let f = file(&bytes);
    let out = vmsight(&["strings", f.path().to_str().unwrap(), "-o", "jsonl"]);
    assert_eq!(
        text(&out.stdout).lines().next(),
        Some(r#"{"address":"0x1234","text":"hello, guest"}"#)
    );
    let out = vmsight(&["strings", f.path().to_str().unwrap(), "--grep", "absent"]);
    assert_eq!(out.status.code(), Some(1));
    let json = vmsight(&["strings", f.path().to_str().unwrap(), "-o", "json", "-n", "3"]);
    let rows: serde_json::Value = serde_json::from_slice(&json.stdout).expect("one JSON document");
    assert_eq!(rows.as_array().map(Vec::len), Some(2));
}

#[test]
fn physical_reads_need_no_kernel() {
    let mut bytes = vec![0; 1 << 16];
    bytes[0x1000..0x1008].copy_from_slice(&0x1122_3344_5566_7788u64.to_le_bytes());
    let f = file(&bytes);
    let path = f.path().to_str().unwrap();
    let out = vmsight(&["read", path, "phys:0x1000", "16"]);
    assert!(
        text(&out.stdout).starts_with("0000000000001000  88 77 66 55 44 33 22 11  00"),
        "{}",
        text(&out.stdout)
    );
    let out = vmsight(&["read", path, "phys:0x1000", "8", "--as", "u64", "-o", "json"]);
    let rows: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(rows[0]["value"], "0x1122334455667788");
    // Past the end: the part that is there, the rest marked, exit code 1.
    let out = vmsight(&["read", path, "phys:0xfff8", "16"]);
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stdout).contains("?? ??"), "{}", text(&out.stdout));
    // Nothing there at all is an error with its reason.
    let out = vmsight(&["read", path, "phys:0x100000000", "16"]);
    assert_eq!(out.status.code(), Some(2), "{}", text(&out.stderr));
}

#[test]
fn a_dump_is_never_written_to() {
    let f = file(&vec![0; 1 << 16]);
    let path = f.path().to_str().unwrap();
    let out = vmsight(&["write", path, "phys:0", "--hex", "ff"]);
    assert!(text(&out.stderr).contains("--write"), "{}", text(&out.stderr));
    let out = vmsight(&["write", "--write", path, "phys:0", "--hex", "ff"]);
    assert_eq!(out.status.code(), Some(2));
    assert_eq!(std::fs::read(f.path()).unwrap()[0], 0);
}

#[test]
fn list_is_json_whatever_runs_here() {
    let out = vmsight(&["list", "-o", "json"]);
    let rows: serde_json::Value = serde_json::from_slice(&out.stdout).expect("one JSON document");
    assert!(rows.is_array());
}

#[test]
fn a_closed_pipe_is_no_error() {
    let f = file(&b"some printable text\0".repeat(20_480));
    let status = Command::new("sh")
        .arg("-c")
        .arg(format!(
            "set -e; {} strings {} | head -n 1 >/dev/null",
            env!("CARGO_BIN_EXE_vmsight"),
            f.path().display()
        ))
        .output()
        .unwrap();
    assert!(
        status.status.success() && status.stderr.is_empty(),
        "{}",
        text(&status.stderr)
    );
}

/// Starts vmsight, closes its standard output before it can write, and gives what it said and how it ended.
fn with_closed_output(args: &[&str]) -> Output {
    use std::process::Stdio;
    let mut child = Command::new(env!("CARGO_BIN_EXE_vmsight"))
        .args(args)
        .env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    child.wait_with_output().unwrap()
}

#[test]
fn a_reader_that_is_gone_is_no_error_and_no_panic() {
    let f = file(&b"some printable text\0".repeat(20_480));
    let path = f.path().to_str().unwrap();
    for args in [
        &["completions", "bash"][..],
        &["completions", "zsh"],
        &["read", path, "phys:0", "--as", "string"],
        &["read", path, "phys:0", "64K"],
        &["read", path, "phys:0", "64K", "--as", "bytes"],
        &["read", path, "phys:0", "64K", "--as", "u8", "-o", "csv"],
        &["read", path, "phys:0", "64K", "--as", "u8", "-o", "json"],
        &["strings", path, "-o", "csv"],
        &["strings", path, "-o", "json"],
    ] {
        let out = with_closed_output(args);
        assert_eq!(out.status.code(), Some(0), "{args:?}: {}", text(&out.stderr));
        assert!(out.stderr.is_empty(), "{args:?}: {}", text(&out.stderr));
    }
}

#[test]
fn strings_as_csv_have_a_header_and_no_formula() {
    let mut bytes = vec![0; 1 << 16];
    bytes[0x100..0x10e].copy_from_slice(b"=cmd|'/C calc'");
    bytes[0x200..0x20b].copy_from_slice("csi\u{9b}31mred".as_bytes());
    let f = file(&bytes);
    let path = f.path().to_str().unwrap();
    let out = text(&vmsight(&["strings", path, "-o", "csv"]).stdout);
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(
        lines,
        ["address,text", "0x100,'=cmd|'/C calc'", "0x200,csi\\u{9b}31mred"]
    );
    let out = text(&vmsight(&["strings", path, "-o", "csv", "--no-headers"]).stdout);
    assert!(out.starts_with("0x100,"), "{out}");
    let none = vmsight(&["strings", path, "-o", "csv", "--grep", "absent"]);
    assert_eq!(
        (text(&none.stdout).as_str(), none.status.code()),
        ("address,text\n", Some(1))
    );
    // The same text for whoever parses it, and nothing for a terminal to act on.
    let out = text(&vmsight(&["strings", path, "-o", "jsonl"]).stdout);
    assert!(
        !out.contains('\u{9b}') && out.contains("csi\\u009b31mred"),
        "{out}"
    );
    let last: serde_json::Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
    assert_eq!(last["text"], "csi\u{9b}31mred");
}

#[test]
fn columns_are_known_whatever_the_rows() {
    let f = file(&vec![0; 1 << 16]);
    let path = f.path().to_str().unwrap();
    for length in ["0", "8"] {
        let read = |columns| {
            let args = [
                "read",
                path,
                "phys:0",
                length,
                "--as",
                "u64",
                "-o",
                "json",
                "--columns",
                columns,
            ];
            vmsight(&args)
        };
        assert_eq!(read("address,problems").status.code(), Some(0));
        let out = read("nonsense");
        assert_eq!(out.status.code(), Some(2));
        assert!(
            text(&out.stderr).contains("address, value, decimal, problems"),
            "{}",
            text(&out.stderr)
        );
        assert!(out.stdout.is_empty());
    }
    let out = vmsight(&["list", "--columns", "nonsense"]);
    assert_eq!(out.status.code(), Some(2), "{}", text(&out.stderr));
}

#[test]
fn what_cannot_be_read_is_marked_in_every_format() {
    let f = file(&vec![0x41; 1 << 16]);
    let path = f.path().to_str().unwrap();
    let read = |args: &[&str]| vmsight(&[&["read", path, "phys:0xfff8", "16"], args].concat());
    let json = |out: &Output| -> serde_json::Value { serde_json::from_slice(&out.stdout).unwrap() };

    let out = read(&["-o", "json"]);
    assert_eq!(out.status.code(), Some(1));
    let rows = json(&out);
    assert_eq!(rows[0]["bytes"], format!("{}{}", "41".repeat(8), "??".repeat(8)));
    assert_eq!(rows[0]["problems"].as_array().map(Vec::len), Some(1));

    let rows = json(&read(&["--as", "u64", "-o", "json"]));
    assert_eq!(rows[0]["problems"], serde_json::json!([]));
    assert!(rows[1]["value"].is_null() && rows[1]["decimal"].is_null());
    assert_eq!(rows[1]["problems"].as_array().map(Vec::len), Some(1));

    let rows = json(&read(&["--as", "string", "-o", "json"]));
    assert_eq!(rows[0]["text"], "A".repeat(8));
    assert_eq!(rows[0]["problems"].as_array().map(Vec::len), Some(1));
}

#[test]
fn quiet_is_quiet() {
    let f = file(&vec![0; 1 << 16]);
    let path = f.path().to_str().unwrap();
    let loud = vmsight(&["read", path, "phys:0xfff8", "16"]);
    assert!(
        text(&loud.stderr).contains("warning: 1 of 2 pages"),
        "{}",
        text(&loud.stderr)
    );
    let quiet = vmsight(&["read", "--quiet", path, "phys:0xfff8", "16"]);
    assert_eq!(quiet.status.code(), Some(1));
    assert!(quiet.stderr.is_empty(), "{}", text(&quiet.stderr));
}

#[test]
fn watch_is_for_running_vms_and_for_looking() {
    let f = file(&vec![0; 1 << 16]);
    let path = f.path().to_str().unwrap();
    for (args, why) in [
        (&["read", path, "phys:0"][..], "a dump"),
        (&["strings", path], "a dump"),
        (
            &["write", "--write", path, "phys:0", "--hex", "00"],
            "--watch repeats",
        ),
        (&["completions", "bash"], "--watch repeats"),
        (&["symbols", "export", path, "--isf", "x.json"], "--watch repeats"),
    ] {
        let out = vmsight(&[args, &["--watch", "0.1"]].concat());
        assert_eq!(out.status.code(), Some(2), "{args:?}");
        assert!(text(&out.stderr).contains(why), "{args:?}: {}", text(&out.stderr));
        assert!(out.stdout.is_empty(), "{args:?}: {}", text(&out.stdout));
    }
    // What cannot be attached to is told once; a screen is not cleared for it.
    let out = vmsight(&["ps", "no-such-vm", "--watch", "0.1"]);
    assert_eq!((out.status.code(), out.stdout.len()), (Some(2), 0));
}

#[test]
fn nothing_but_results_on_standard_output_and_no_progress_where_nobody_watches() {
    let f = file(&b"some printable text\0".repeat(20_480));
    let out = vmsight(&["strings", f.path().to_str().unwrap()]);
    assert!(out.stderr.is_empty(), "{}", text(&out.stderr));
}

/// A run on a terminal, after something else was done to that: how it ended, and what was shown.
fn on_a_terminal(before: &str, arguments: &str) -> (Option<i32>, String) {
    let line = format!("{before} {} {arguments}", env!("CARGO_BIN_EXE_vmsight"));
    let out = Command::new("script").args(["-qec", &line, "/dev/null"]).output();
    let out = out.expect("script(1) of bsdutils, which every Debian has");
    (out.status.code(), text(&out.stdout).replace("\r\n", "\n"))
}

#[test]
fn a_table_is_as_wide_as_its_terminal() {
    let f = file(&vec![b'Q'; 1 << 16]);
    let path = f.path().to_str().unwrap();
    let whole = text(&vmsight(&["read", path, "phys:0", "16", "--as", "u64"]).stdout);
    let longest = whole.lines().map(str::len).max().unwrap();
    let on = |columns: usize| {
        let arguments = format!("read {path} phys:0 16 --as u64 --color never");
        let (code, out) = on_a_terminal(&format!("stty cols {columns};"), &arguments);
        assert_eq!(code, Some(0), "{out}");
        out
    };
    assert_eq!(on(longest), whole);
    let cut = on(longest - 5);
    assert!(cut.contains('…'), "{cut}");
    assert!(cut.lines().all(|l| l.chars().count() <= longest - 5), "{cut}");
    // A serial console says that it has no columns at all: nobody knows how many.
    assert_eq!(on(0), whole);
}

#[test]
fn raw_bytes_go_to_a_terminal_only_when_forced() {
    let f = file(&vec![b'Q'; 1 << 16]);
    let on_a_terminal = |more: &str| {
        let path = f.path().display();
        on_a_terminal("", &format!("read {path} phys:0 8 --as bytes {more}"))
    };
    let (code, out) = on_a_terminal("");
    assert_eq!(code, Some(2));
    assert!(out.contains("--force") && !out.contains("QQQQQQQQ"), "{out}");
    assert_eq!(on_a_terminal("--force"), (Some(0), "QQQQQQQQ".to_owned()));
    // A pipe is none.
    let out = vmsight(&["read", f.path().to_str().unwrap(), "phys:0", "8", "--as", "bytes"]);
    assert_eq!(text(&out.stdout), "QQQQQQQQ");
}
