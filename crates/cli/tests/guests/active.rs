//! What happens in a guest and what must not: `hooks`, `trace` and `guard`.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use vmsight_lab::orders::{WITNESS, checksum};
use vmsight_lab::{Format, Guest, Kernel, Memory, Spec, Work};

use crate::support::{Dump, command, ends_with, number, objects, rows, text, vmsight};

fn boot() -> (Guest, String) {
    let spec = Spec {
        memory: Memory::Memfd,
        vcpus: 2,
        ..Spec::new(Kernel::V6_1Cloud).idle().orders()
    };
    let guest = Guest::boot(&spec).unwrap_or_else(|e| panic!("{e:?}"));
    let target = format!("qmp:{}", guest.qmp_path().unwrap().display());
    (guest, target)
}

/// The program, at work: it has said that its hooks are in.
pub(crate) struct Running {
    child: Child,
    err: BufReader<std::process::ChildStderr>,
}

pub(crate) fn start(args: &[&str]) -> Running {
    // A test that waits for what never comes must end.
    let mut child = command(args)
        .args(["--for", "60"].iter().filter(|_| !args.contains(&"--for")))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut err = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    err.read_line(&mut line).unwrap();
    assert!(line.contains("Ctrl-C ends it"), "{args:?}: {line}");
    Running { child, err }
}

impl Running {
    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(
            Command::new("kill")
                .args([name, &pid])
                .status()
                .unwrap()
                .success()
        );
    }

    /// Its output, after Ctrl-C.
    pub(crate) fn interrupt(self, code: i32) -> String {
        self.signal("-INT");
        self.finish(code)
    }

    fn finish(mut self, code: i32) -> String {
        let mut out = String::new();
        self.child
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut out)
            .unwrap();
        let mut said = String::new();
        self.err.read_to_string(&mut said).unwrap();
        let status = self.child.wait().unwrap();
        assert_eq!(status.code(), Some(code), "{said}");
        assert_eq!(said, "", "nothing to complain about");
        out
    }
}

pub(crate) fn is_well(guest: &Guest) {
    let account = guest.order(Work::Compute { rounds: 1000 }).unwrap();
    assert_eq!(account.checksum, Some(checksum(1000)));
    let mut qmp = guest.qmp().unwrap();
    let status = qmp.execute("query-status", serde_json::json!({})).unwrap();
    assert_eq!(status["status"], "running");
}

#[test]
fn what_happens_is_shown_and_counted_and_leaves_no_trace() {
    let (guest, t) = boot();
    let t = t.as_str();
    let hooks = rows(&["hooks", t]);
    let execute = hooks.iter().find(|r| r["hook"] == "execute").unwrap();
    assert_eq!(
        (&execute["backend"], &execute["available"], &execute["filters"]),
        (&"gdb-stub".into(), &true.into(), &"monitor".into())
    );
    let all = vmsight(&["hooks", t, "--all", "-o", "json"]);
    assert!(objects(&all.stdout).unwrap().len() > hooks.len());
    assert!(
        text(&all.stderr).contains("vmsight launch"),
        "why there is no agent"
    );

    // JSON lines, as they come.
    let running = start(&["trace", t, "--syscalls", "getpid,openat", "-o", "jsonl"]);
    let account = guest.order(Work::GetPid { count: 100 }.on(1)).unwrap();
    let lines = running.interrupt(0);
    let events: Vec<Value> = lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let own = events
        .iter()
        .filter(|e| e["subject"] == "getpid" && e["pid"] == account.pid);
    let own: Vec<_> = own.collect();
    assert_eq!(own.len(), 100);
    assert!(
        own.iter()
            .all(|e| e["result"] == account.pid && e["event"] == "syscall")
    );

    // A table of counts.
    let running = start(&["trace", t, "--syscalls", "-c", "-o", "json"]);
    guest.order(Work::GetPid { count: 50 }).unwrap();
    let counts: Vec<Value> = serde_json::from_str(&running.interrupt(0)).unwrap();
    let getpid = counts.iter().find(|c| c["subject"] == "getpid").unwrap();
    assert!(number(&getpid["count"]) >= 50);
    assert!(number(&getpid["total_us"]) >= number(&getpid["max_us"]));

    // The same without an event for each.
    let running = start(&["trace", t, "--syscalls", "getpid", "--tally", "-o", "json"]);
    let account = guest.order(Work::GetPid { count: 50 }).unwrap();
    let counts: Vec<Value> = serde_json::from_str(&running.interrupt(0)).unwrap();
    let [getpid] = counts.as_slice() else {
        panic!("{counts:?} of {account:?}")
    };
    assert_eq!(
        (&getpid["event"], &getpid["subject"]),
        (&"syscall".into(), &"getpid".into())
    );
    assert!(number(&getpid["count"]) >= 50, "{getpid:?}");
    let err = ends_with(2, &["trace", t, "--cr", "3", "--tally"]);
    assert!(err.contains("--tally") && err.contains("vmsight hooks"), "{err}");

    // Lines for people, and an end after so many events.
    let running = start(&["trace", t, "--exec", "--count", "1"]);
    let exec = Work::Exec {
        path: WITNESS.into(),
        argv: vec!["wit\u{1b}ness".into()],
        envp: Vec::new(),
    };
    guest.order(exec).unwrap();
    let line = running.finish(0);
    assert!(line.contains(&format!("exec {WITNESS} [\"wit")), "{line}");
    assert!(!line.contains('\u{1b}'), "{line:?}");

    // Functions, memory, control registers.
    let running = start(&[
        "trace",
        t,
        "--hook",
        "__x64_sys_getpid",
        "--count",
        "3",
        "-o",
        "json",
    ]);
    let account = guest.order(Work::GetPid { count: 3 }).unwrap();
    let events: Vec<Value> = serde_json::from_str(&running.finish(0)).unwrap();
    assert_eq!(events.len(), 3);
    assert!(
        events
            .iter()
            .all(|e| e["event"] == "execute" && e["pid"] == account.pid)
    );
    // Whose calls they are is asked before they are events: five of another process are none.
    let prepared = guest.orders().unwrap().prepare(Work::GetPid { count: 3 });
    let prepared = prepared.unwrap();
    let pid = prepared.pid();
    let text = pid.to_string();
    let own = ["trace", t, "--hook", "__x64_sys_getpid", "--pid", &text];
    let running = start(&[&own[..], &["--count", "3", "-o", "json"]].concat());
    guest.order(Work::GetPid { count: 5 }).unwrap();
    prepared.go().unwrap();
    let events: Vec<Value> = serde_json::from_str(&running.finish(0)).unwrap();
    assert_eq!(events.len(), 3);
    assert!(events.iter().all(|e| e["pid"] == pid), "{events:?}");
    let err = ends_with(2, &[&own[..], &["--inside"]].concat());
    assert!(err.contains("agent-kvm"), "{err}");
    let events = rows(&["trace", t, "--write", "jiffies", "--count", "3", "-q"]);
    let values: Vec<_> = events
        .iter()
        .map(|e| (number(&e["args"]["old"]), number(&e["args"]["new"])))
        .collect();
    assert_eq!(values.len(), 3);
    assert!(values.iter().all(|(old, new)| new > old));
    assert!(
        values.windows(2).all(|w| w[0].1 == w[1].0),
        "none is missed: {values:x?}"
    );
    let running = start(&["trace", t, "--cr", "3", "--count", "2", "-o", "json"]);
    guest.order(Work::Fork { count: 2 }).unwrap();
    let events: Vec<Value> = serde_json::from_str(&running.finish(0)).unwrap();
    assert_eq!(events.len(), 2);
    assert!(
        events
            .iter()
            .all(|e| e["event"] == "cr" && number(&e["args"]["new"]) != 0)
    );
    is_well(&guest);

    // What cannot be is said.
    let err = ends_with(2, &["trace", t]);
    assert!(err.contains("--syscalls"), "{err}");
    let err = ends_with(2, &["trace", t, "--syscalls", "opennat"]);
    assert!(err.contains("did you mean open"), "{err}");
    let err = ends_with(2, &["trace", t, "--msr", "LSTAR"]);
    assert!(err.contains("gdb-stub") && err.contains("agent-kvm"), "{err}");
    let err = ends_with(2, &["guard", t, "--deny", "everything"]);
    assert!(err.contains("syscall-table"), "{err}");
    let dump = Dump::of(&guest, Format::Elf);
    let err = ends_with(2, &["trace", dump.target(), "--exec"]);
    assert!(err.contains("dump"), "{err}");
    assert_eq!(
        ends_with(1, &["hooks", dump.target()])
            .matches("it is a dump")
            .count(),
        1
    );
}

#[test]
fn a_guest_survives_the_death_of_its_monitor() {
    let (guest, t) = boot();
    let t = t.as_str();
    for round in 0..5 {
        let mut running = start(&["trace", t, "--syscalls", "-o", "jsonl"]);
        let work = guest
            .orders()
            .unwrap()
            .prepare(Work::Syscalls { rounds: 200 }.on(round % 2));
        let sent = work.unwrap().send_go().unwrap();
        // In the midst of it.
        let mut first = String::new();
        let mut out = BufReader::new(running.child.stdout.take().unwrap());
        out.read_line(&mut first).unwrap();
        running.signal("-KILL");
        let killed = Instant::now();
        running.child.wait().unwrap();
        let accounts = sent.wait_all(Duration::from_secs(60)).unwrap();
        assert_eq!(accounts[0].failed, 0, "round {round}");
        // Hooked, this many calls take far longer.
        assert!(killed.elapsed() < Duration::from_secs(30), "round {round}");
        is_well(&guest);
    }
}

/// Ctrl-Z would have the guest wait at its next event for as long as somebody is away.
#[test]
fn a_monitor_is_not_suspended_by_its_terminal() {
    let (guest, t) = boot();
    let args = [
        "trace",
        &t,
        "--hook",
        "__x64_sys_getpid",
        "--count",
        "3",
        "-o",
        "json",
    ];
    let mut running = start(&args);
    running.signal("-TSTP");
    let mut said = String::new();
    running.err.read_line(&mut said).unwrap();
    assert!(said.contains("not suspended"), "{said}");
    guest.order(Work::GetPid { count: 3 }).unwrap();
    let events: Vec<Value> = serde_json::from_str(&running.finish(0)).unwrap();
    assert_eq!(events.len(), 3);
    is_well(&guest);
}

#[test]
fn what_is_forbidden_does_not_happen() {
    let (guest, t) = boot();
    let t = t.as_str();
    let exec = || Work::Exec {
        path: WITNESS.into(),
        argv: vec!["witness".into()],
        envp: Vec::new(),
    };
    let rule = format!("exec={WITNESS}");
    let running = start(&["guard", t, "--deny", &rule, "-o", "jsonl"]);
    let denied = guest.order(exec()).unwrap();
    assert_eq!(denied.returned, Some(-13));
    let told: Value = serde_json::from_str(&running.interrupt(1)).unwrap();
    assert_eq!(
        (&told["rule"], &told["denied"], &told["pid"]),
        (&rule.into(), &true.into(), &denied.pid.into())
    );
    assert_eq!(guest.order(exec()).unwrap().returned, None, "without a guard");

    let running = start(&["guard", t, "--deny", "exec=/srv/*", "--dry-run", "-o", "jsonl"]);
    assert_eq!(guest.order(exec()).unwrap().returned, None, "only told");
    let told: Value = serde_json::from_str(&running.interrupt(1)).unwrap();
    assert_eq!(told["denied"], false);

    let running = start(&["guard", t, "--deny", "modules", "--for", "1", "-o", "json"]);
    assert_eq!(
        running.finish(0).trim().replace('\n', ""),
        "[]",
        "nothing was tried"
    );
    is_well(&guest);
}
