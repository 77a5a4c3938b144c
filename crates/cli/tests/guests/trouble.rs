//! Targets that fail: no permission, a silent monitor, a QEMU that ends, a dump that ends too soon.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use vmsight_lab::{Format, Guest, Kernel, Memory, Spec};

use crate::support::{
    Dump, command, ends_with, listed, objects, prepared, processes, text, unprepared, utf8, vmsight,
};

/// Waits for a child that must end by itself.
fn ended(mut child: std::process::Child, what: &str) -> std::process::Output {
    let pid = child.id();
    let (tell, told) = mpsc::channel();
    let output = child.stdout.take();
    let waiter = std::thread::spawn(move || {
        drop(output);
        let output = child.wait_with_output();
        let _ = tell.send(());
        output
    });
    if told.recv_timeout(Duration::from_secs(60)).is_err() {
        let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).status();
        panic!("{what} does not end");
    }
    waiter.join().unwrap().unwrap()
}

#[test]
fn a_monitor_that_never_answers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qmp");
    let _listener = UnixListener::bind(&path).unwrap();
    let err = ends_with(2, &["ps", &format!("qmp:{}", path.display()), "--timeout", "0.5"]);
    assert!(err.contains(utf8(&path)), "it names the socket: {err}");
    assert!(err.contains("answer") || err.contains("greet"), "{err}");
}

#[test]
fn a_monitor_that_another_client_holds_is_left_alone() {
    let vm = prepared();
    let mut owner = vm.guest.qmp().unwrap();
    let err = ends_with(2, &["regs", &vm.target, "--timeout", "0.5"]);
    assert!(err.contains("client") || err.contains("busy"), "{err}");
    let status = owner.execute("query-status", serde_json::json!({})).unwrap();
    assert_eq!(status["status"], "running", "the owner's session goes on");
    // Memory needs no monitor: the layout is deduced and proven instead.
    let out = vmsight(&[
        "ps",
        &format!("pid:{}", vm.guest.pid()),
        "--timeout",
        "0.5",
        "-o",
        "json",
    ]);
    assert_eq!(
        listed(&objects(&out.stdout).unwrap()),
        processes(&vm.guest),
        "{}",
        text(&out.stderr)
    );
}

#[test]
fn without_permission() {
    let vm = unprepared();
    // The program as it is installed: where anybody may run it.
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let program = folder.path().join("vmsight");
    std::fs::copy(env!("CARGO_BIN_EXE_vmsight"), &program).unwrap();
    // As root somebody else is needed who may not; who is not root may not look into root's guests, but owns this one.
    if !rustix::process::geteuid().is_root() {
        let err = ends_with(2, &["ps", "pid:1"]);
        assert!(err.contains("pid 1") || err.contains("process 1"), "{err}");
        return;
    }
    let out = Command::new("setpriv")
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
        .arg(&program)
        .args(["ps", &vm.target])
        .env("XDG_CACHE_HOME", folder.path())
        .output()
        .unwrap();
    let err = text(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{err}");
    assert!(
        err.contains("permission") || err.contains("not permitted"),
        "{err}"
    );
    assert!(
        err.contains("root") || err.contains("CAP_SYS_PTRACE"),
        "it says what would help: {err}"
    );
}

#[test]
fn a_qemu_that_is_killed_while_it_is_watched() {
    for memory in [Memory::Private, Memory::File] {
        let mut spec = Spec {
            memory,
            qmp: false,
            ..Spec::new(Kernel::V6_1Cloud)
        };
        spec.kernel_args.push("vmsight.idle".to_owned());
        let guest = Guest::boot(&spec).unwrap_or_else(|e| panic!("{e:?}"));
        let mut child = command(&[
            "ps",
            &format!("pid:{}", guest.pid()),
            "--watch",
            "0.05",
            "-o",
            "jsonl",
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
        let mut line = String::new();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        output.read_line(&mut line).unwrap();
        assert!(line.starts_with('{'), "{line:?}");
        let reader = std::thread::spawn(move || output.lines().map_while(Result::ok).count());
        guest.stop().unwrap();
        let out = ended(child, "a watch of a VM that is gone");
        reader.join().unwrap();
        let err = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{err}");
        assert!(!err.contains("panicked"), "{err}");
        assert!(
            err.contains("ended") || err.contains("gone") || err.contains("no process"),
            "{err}"
        );
    }
}

#[test]
fn a_dump_that_ends_too_soon() {
    let vm = prepared();
    let dump = Dump::of(&vm.guest, Format::Elf);
    let whole = std::fs::metadata(&dump.path).unwrap().len();
    for percent in [99, 75, 40, 5] {
        let file = std::fs::OpenOptions::new().write(true).open(&dump.path).unwrap();
        file.set_len(whole / 100 * percent).unwrap();
        let out = vmsight(&["ps", dump.target(), "-o", "json"]);
        let err = text(&out.stderr);
        assert!(!err.contains("panicked"), "{percent} %: {err}");
        assert!(
            err.contains("lacks"),
            "{percent} %: what is missing is said: {err}"
        );
        match out.status.code() {
            // Enough is left: what is shown is a list of the guest's, marked where it is cut.
            Some(0) => assert!(!objects(&out.stdout).unwrap().is_empty(), "{percent} %"),
            Some(2) => assert!(
                out.stdout.is_empty() && err.contains("kernel"),
                "{percent} %: {err}"
            ),
            other => panic!("{percent} %: {other:?} {err}"),
        }
    }
}
