//! `vmsight dump` of a running guest, of a paused one, and of a dump; what it refuses, and what it leaves behind when it fails.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use vmsight_lab::Format;

use crate::support::{Dump, command, ends_with, listed, prepared, processes, rows, text, utf8, vmsight};

/// What stands beside a dump.
fn account(out: &Path) -> Value {
    let text = std::fs::read_to_string(format!("{}.json", out.display())).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn sha256sum(path: &Path) -> String {
    let out = Command::new("sha256sum").arg(path).output().unwrap();
    text(&out.stdout).split_whitespace().next().unwrap().to_owned()
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect()
}

#[test]
fn of_a_paused_guest_in_every_format() {
    let vm = prepared();
    let folder = tempfile::tempdir().unwrap();
    let mut digests = None;
    // All of one moment.
    vm.guest
        .qmp()
        .unwrap()
        .execute("stop", serde_json::json!({}))
        .unwrap();
    for format in [
        "elf",
        "lime",
        "avml",
        "kdump-zstd",
        "kdump-zlib",
        "kdump-snappy",
        "raw",
    ] {
        let out = folder.path().join(format);
        let shown = rows(&[
            "dump",
            &vm.target,
            utf8(&out),
            "--format",
            format,
            "--pause",
            "-q",
        ]);
        let account = account(&out);
        assert_eq!(shown[0]["sha256"], sha256sum(&out), "{format}");
        assert_eq!(account["sha256"], shown[0]["sha256"], "{format}");
        assert_eq!(
            account["bytes"],
            std::fs::metadata(&out).unwrap().len(),
            "{format}"
        );
        assert_eq!(account["pid"], vm.guest.pid(), "{format}");
        assert_eq!(
            (&account["live"], &account["paused"]),
            (&true.into(), &true.into())
        );
        assert_eq!(
            std::fs::metadata(&out).unwrap().permissions().mode() & 0o777,
            0o600
        );
        // The RAM is the same whatever the format makes of it.
        let ram = account["regions"][0]["sha256"].clone();
        assert_eq!(*digests.get_or_insert_with(|| ram.clone()), ram, "{format}");

        assert_eq!(
            listed(&rows(&["ps", utf8(&out)])),
            processes(&vm.guest),
            "{format}"
        );
        if ["elf", "kdump-zstd"].contains(&format) {
            let kept = ["cr3", "cr4", "rip", "rsp", "gs_base"];
            let of = |target: &str| -> Vec<_> {
                let rows = rows(&["regs", target]);
                let kept = rows
                    .into_iter()
                    .filter(|row| kept.iter().any(|k| row["register"] == *k));
                kept.map(|row| row["value"].clone()).collect()
            };
            assert_eq!(of(utf8(&out)), of(&vm.target), "{format}");
            assert_ne!(account["vmcoreinfo"], Value::Null);
        }
        if format != "elf" {
            std::fs::remove_file(&out).unwrap();
        }
    }
    assert_eq!(vm.status(), "paused", "its owner had paused it");
    vm.guest
        .qmp()
        .unwrap()
        .execute("cont", serde_json::json!({}))
        .unwrap();
}

#[test]
fn of_a_running_guest_and_of_what_was_made_of_it() {
    let vm = prepared();
    let folder = tempfile::tempdir().unwrap();
    let (live, again) = (folder.path().join("live.kdump"), folder.path().join("again.lime"));
    let shown = rows(&["dump", &vm.target, utf8(&live)]);
    assert_eq!(shown[0]["format"], "kdump-zstd", "the name says it");
    assert_eq!(
        (vm.status().as_str(), &account(&live)["paused"]),
        ("running", &false.into())
    );
    assert_eq!(listed(&rows(&["ps", utf8(&live)])), processes(&vm.guest));
    let converted = rows(&["dump", utf8(&live), utf8(&again)]);
    assert_eq!(converted[0]["format"], "lime");
    let (first, second) = (account(&live), account(&again));
    assert_eq!(first["regions"], second["regions"]);
    assert_eq!(
        (&second["live"], &second["kind"]),
        (&false.into(), &"kdump".into())
    );
    assert_eq!(
        listed(&rows(&["ps", &format!("lime:{}", again.display())])),
        processes(&vm.guest)
    );
    ends_with(2, &["ps", &format!("elf:{}", again.display())]);

    // What is there is not replaced, nor what lies beside it, unless that is said.
    let err = ends_with(2, &["dump", utf8(&live), utf8(&again)]);
    assert!(
        err.contains("again.lime is there already") && err.contains("--force"),
        "{err}"
    );
    std::fs::remove_file(&again).unwrap();
    let err = ends_with(2, &["dump", utf8(&live), utf8(&again)]);
    assert!(err.contains("again.lime.json is there already"), "{err}");
    assert!(
        vmsight(&["dump", utf8(&live), utf8(&again), "--force", "-q"])
            .status
            .success()
    );
    assert_eq!(account(&again)["regions"], first["regions"]);
    let err = ends_with(2, &["dump", utf8(&live), utf8(folder.path())]);
    assert!(err.contains("is a directory"), "{err}");
    let err = ends_with(2, &["dump", utf8(&live), "x", "--format", "vhs"]);
    assert!(err.contains("kdump-zstd"), "the formats are named: {err}");
}

#[test]
fn what_is_not_whole_leaves_nothing_behind() {
    let vm = prepared();
    let dump = Dump::of(&vm.guest, Format::Elf);
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("half");
    let mut child = command(&["dump", dump.target(), utf8(&out), "--format", "kdump-zlib"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // It has begun when there is a file; packing takes it longer than a signal does.
    while names(folder.path()).is_empty() {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it began");
        std::thread::yield_now();
    }
    let sent = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status()
        .unwrap();
    assert!(sent.success());
    let ended = child.wait_with_output().unwrap();
    let err = text(&ended.stderr);
    assert_eq!(ended.status.code(), Some(2), "{err}");
    assert!(err.contains("interrupted"), "{err}");
    assert_eq!(names(folder.path()), [""; 0]);

    // A file system of its own, with no room.
    let script = "mount -t tmpfs -o size=8m none \"$1\" && shift && \"$@\"; code=$?; ls -A \"$OLDPWD\" >&2; exit $code";
    let full = Command::new("unshare")
        .args(["--mount", "sh", "-c", script, "sh", utf8(folder.path())])
        .arg(env!("CARGO_BIN_EXE_vmsight"))
        .args(["dump", dump.target(), utf8(&out)])
        .env("OLDPWD", folder.path())
        .output()
        .unwrap();
    let err = text(&full.stderr);
    assert_eq!(full.status.code(), Some(2), "{err}");
    assert!(
        err.contains("no room is left there") && err.contains("half"),
        "{err}"
    );
    assert!(!err.contains(".vmsight-"), "nothing is left: {err}");
}
