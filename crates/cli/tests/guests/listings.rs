//! Every command in every format, on a running guest with a monitor, on one without, and on a dump.

use std::collections::BTreeSet;

use serde_json::{Map, Value};
use vmsight_lab::{Format, Guest};

use crate::support::{Dump, harmless, listed, objects, prepared, processes, rows, text, unprepared, vmsight};

/// Commands and what they need besides a target, and whether a dump without registers can answer them.
const COMMANDS: &[(&str, &[&str])] = &[
    ("info", &[]),
    ("ps", &[]),
    ("pstree", &[]),
    ("threads", &[]),
    ("stacks", &[]),
    ("info", &["--vmcoreinfo"]),
    ("maps", &[]),
    ("env", &[]),
    ("cgroups", &[]),
    ("lsof", &[]),
    ("lsmod", &[]),
    ("net", &[]),
    ("unix", &[]),
    ("mounts", &[]),
    ("ifaces", &[]),
    ("iomem", &[]),
    ("slabs", &[]),
    ("bpf", &[]),
    ("perf", &[]),
    ("kmsg", &[]),
    ("read", &["init_task", "64", "--as", "u64"]),
    (
        "read",
        &["init_task", "--type", "task_struct", "--fields", "comm,pid"],
    ),
    ("translate", &["init_task"]),
    ("disas", &["commit_creds", "-n", "8"]),
    ("symbols", &["commit_*"]),
    ("types", &["list_head"]),
    ("strings", &["--grep", "Linux version "]),
];

/// Where standard error says nothing, or only what is no fault of the guest: what a table leaves out.
fn quiet(args: &[&str]) -> Vec<u8> {
    let out = vmsight(args);
    let err = text(&out.stderr);
    assert_eq!(out.status.code(), Some(0), "{args:?}: {err}");
    assert!(
        !err.contains("panicked") && !err.contains("because"),
        "{args:?}: {err}"
    );
    out.stdout
}

fn every_command(target: &str, more: &[(&str, &[&str])]) {
    for (command, rest) in COMMANDS.iter().chain(more) {
        let args = [&[command, target], *rest].concat();
        let json = quiet(&[&args[..], &["-o", "json"]].concat());
        let rows = objects(&json).unwrap_or_else(|e| panic!("{args:?}: {e}"));
        assert!(!rows.is_empty(), "{args:?} shows nothing");
        // One set of keys for all rows, unless the guest's own types name them.
        let keys: Vec<&String> = rows[0].keys().collect();
        assert!(
            rows.iter().all(|row| row.keys().eq(keys.iter().copied())),
            "{args:?}: the rows' keys differ"
        );
        harmless(&format!("{args:?} as JSON"), &json);

        let lines = quiet(&[&args[..], &["-o", "jsonl"]].concat());
        let parsed = text(&lines)
            .lines()
            .map(serde_json::from_str::<serde_json::Value>)
            .filter(Result::is_ok)
            .count();
        assert_eq!(
            parsed,
            text(&lines).lines().count(),
            "{args:?}: a line is no JSON"
        );
        assert!(parsed > 0, "{args:?}");

        let csv = quiet(&[&args[..], &["-o", "csv"]].concat());
        harmless(
            &format!("{args:?} as CSV"),
            &text(&csv).replace('\r', "").into_bytes(),
        );
        assert!(
            text(&csv).lines().count() > 1,
            "{args:?}: CSV has a header and rows: {}",
            text(&csv)
        );

        let table = quiet(&args);
        assert!(!table.is_empty(), "{args:?}");
        harmless(&format!("{args:?} as a table"), &table);
    }
}

fn processes_and_modules(target: &str, guest: &Guest) {
    assert_eq!(listed(&rows(&["ps", target])), processes(guest), "ps {target}");
    let names = |rows: Vec<Map<String, Value>>| -> BTreeSet<String> {
        rows.iter()
            .map(|row| row["name"].as_str().unwrap().to_owned())
            .collect()
    };
    let said: BTreeSet<String> = guest.truth().modules.iter().map(|m| m.name.clone()).collect();
    assert_eq!(names(rows(&["lsmod", target])), said, "lsmod {target}");
}

#[test]
fn of_a_running_guest_with_a_monitor() {
    let vm = prepared();
    every_command(&vm.target, &[("regs", &[])]);
    processes_and_modules(&vm.target, &vm.guest);
}

#[test]
fn of_a_running_guest_that_nobody_prepared() {
    let vm = unprepared();
    every_command(&vm.target, &[]);
    processes_and_modules(&vm.target, &vm.guest);
}

#[test]
fn of_a_dump() {
    let vm = prepared();
    let dump = Dump::of(&vm.guest, Format::Elf);
    every_command(dump.target(), &[]);
    processes_and_modules(dump.target(), &vm.guest);
}

#[test]
fn columns_are_the_same_whatever_the_rows_hold() {
    let vm = unprepared();
    let shown = rows(&["ps", &vm.target, "--columns", "pid,problems,exe"]);
    for row in &shown {
        assert_eq!(row.keys().collect::<Vec<_>>(), ["pid", "problems", "exe"]);
    }
    assert_eq!(shown.len(), rows(&["ps", &vm.target]).len());
    let out = vmsight(&["ps", &vm.target, "--columns", "pid,nonsense"]);
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&out.stderr).contains("nonsense"), "{}", text(&out.stderr));
}

/// Of a process is read what is shown, and no more: what each column needs must be known.
#[test]
fn a_column_alone_says_what_it_says_among_all() {
    let vm = prepared();
    let dump = Dump::of(&vm.guest, Format::Elf);
    let whole = rows(&["ps", dump.target()]);
    let columns: Vec<&String> = whole[0].keys().filter(|key| *key != "problems").collect();
    // Those of `struct cred` and `struct signal_struct`, and all others.
    assert!(columns.len() > 50, "{columns:?}");
    for column in columns {
        let alone = rows(&["ps", dump.target(), "--columns", column]);
        let values = |rows: &[Map<String, Value>]| -> Vec<Value> {
            rows.iter().map(|row| row[column.as_str()].clone()).collect()
        };
        assert_eq!(values(&alone), values(&whole), "{column}");
    }
}

#[test]
fn a_running_guest_is_listed_and_found_by_its_name() {
    let vm = prepared();
    let mine = rows(&["list"])
        .into_iter()
        .find(|row| row["pid"] == vm.guest.pid())
        .expect("the guest is on the list");
    let name = mine["name"].as_str().unwrap().to_owned();
    assert_eq!(listed(&rows(&["ps", &name])), processes(&vm.guest));
}
