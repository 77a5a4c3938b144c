//! What hooks cost: the table is there, and each figure in it was measured by events that were counted.

use std::path::Path;

use rustix::thread::sched_getaffinity;
use serde_json::Value;

use crate::support::{ends_with, rows};

#[test]
fn hooks_are_measured_by_every_way_there_is() {
    let rows = rows(&["--quiet", "bench", "hooks", "--samples", "50"]);
    let text =
        |row: &serde_json::Map<String, Value>, key: &str| row[key].as_str().unwrap_or_default().to_owned();
    let measured = |host: &str, by: &str, hook: &str| {
        let found = rows.iter().find(|row| {
            text(row, "host").ends_with(host) && text(row, "by") == by && text(row, "hook") == hook
        });
        let row = found.unwrap_or_else(|| panic!("no row {host}, {by}, {hook}: {rows:?}"));
        assert_eq!(row["samples"], 50, "{row:?}");
        let figure = |key: &str| row[key].as_f64().unwrap();
        assert!(figure("min_ns") <= figure("median_ns"), "{row:?}");
        figure("median_ns")
    };
    // How long a guest stands still whose monitor failed it: it went on each time, and what is wanted was looked at.
    let survived = |host: &str, by: &str| {
        for end in ["killed", "cut", "hung", "full"] {
            let found = rows.iter().find(|row| {
                text(row, "host").ends_with(host) && text(row, "by") == by && text(row, "delivery") == end
            });
            let row = found.unwrap_or_else(|| panic!("no row of {host}, {by}, {end}: {rows:?}"));
            let samples = if (by, end) == ("gdb-stub", "full") { 5 } else { 20 };
            assert_eq!(
                (&row["samples"], &row["of"]),
                (&samples.into(), &"100 ms".into()),
                "{row:?}"
            );
            let max = row["max_ns"].as_f64().unwrap();
            assert!(0.0 < max && row["median_ns"].as_f64().unwrap() <= max, "{row:?}");
            assert_eq!(row["met"], max <= 1e8, "{row:?}");
        }
    };
    survived("tcg", "gdb-stub");
    let mut switches = vec!["one processor"];
    if sched_getaffinity(None).unwrap().count() > 1 {
        switches.push("two processors");
    }
    for place in &switches {
        assert!(measured("program", "-", &format!("two context switches, {place}")) > 0.0);
    }
    let call = measured("tcg", "-", "none (call)");
    for hook in ["execute", "virtual write"] {
        // Out of QEMU and back costs more than a call in the guest, on any machine.
        assert!(measured("tcg", "gdb-stub", hook) > call);
    }
    if Path::new("/dev/kvm").exists() {
        let exit = measured("least VMM, kvm", "-", "none (port)");
        for hook in ["execute", "virtual write", "physical write", "MSR write", "port"] {
            assert!(measured("least VMM, kvm", "agent-kvm", hook) > 0.0);
        }
        assert!(exit > 0.0);
        // There is no stub to compare it with.
        let held = rows.iter().find(|row| {
            (text(row, "by"), text(row, "hook"), text(row, "delivery"))
                == ("agent-kvm".into(), "execute".into(), "held".into())
                && text(row, "host").starts_with("least VMM")
        });
        assert_eq!(held.unwrap()["of"], *switches.last().unwrap());
        survived("least VMM, kvm", "agent-kvm");
    }
}

#[test]
fn a_qemu_that_is_not_there_is_said() {
    let args = [
        "bench",
        "hooks",
        "--samples",
        "20",
        "--accelerator",
        "tcg",
        "--qemu",
        "/nowhere/qemu",
    ];
    let said = ends_with(0, &args);
    assert!(said.contains("/nowhere/qemu"), "{said}");
    let said = ends_with(2, &["bench", "hooks", "--samples", "3"]);
    assert!(said.contains("--samples takes 10 to"), "{said}");
}
