//! A guest under a stock QEMU 10 that emulates its processors, started by `vmsight launch`: the agent is a
//! plugin in it.

use serde_json::Value;
use vmsight_lab::{Guest, Kernel, Memory, Qemu, Spec, Work};

use crate::active::{is_well, start};
use crate::support::{ends_with, rows};

#[test]
fn a_guest_that_is_emulated() {
    let own = std::env::current_exe().unwrap();
    let spec = Spec {
        memory: Memory::Memfd,
        vcpus: 2,
        qemu: Qemu::Backports,
        agent: Some(own.with_file_name("libvmsight_agent.so")),
        launcher: Some(env!("CARGO_BIN_EXE_vmsight").into()),
        ..Spec::new(Kernel::V6_1Cloud).idle().orders()
    };
    let guest = Guest::boot(&spec).unwrap_or_else(|e| panic!("{e:?}"));
    let t = format!("qmp:{}", guest.qmp_path().unwrap().display());
    let t = t.as_str();

    // What can be hooked is said by the agent that is there.
    let hooks = rows(&["hooks", t]);
    let by_agent: Vec<_> = hooks.iter().filter(|r| r["backend"] == "agent-tcg").collect();
    for hook in ["execute", "physical write", "MSR write", "CPUID", "single step"] {
        let row = by_agent.iter().find(|r| r["hook"] == hook);
        assert!(row.is_some_and(|r| r["available"] == true), "{hook}: {hooks:?}");
    }
    assert!(by_agent.iter().all(|r| r["verdicts"] == "continue pause remove"));

    // System calls and programs that begin, each once.
    let orders = guest.orders().unwrap();
    let prepared = orders.prepare(Work::GetPid { count: 100 }.on(1)).unwrap();
    let pid = prepared.pid();
    let pid_text = pid.to_string();
    let args = [
        "trace",
        t,
        "--backend",
        "agent-tcg",
        "--syscalls",
        "getpid",
        "--pid",
        &pid_text,
        "-o",
        "jsonl",
    ];
    let running = start(&args);
    assert_eq!(prepared.go().unwrap().made, 100);
    let lines = running.interrupt(0);
    let events: Vec<Value> = lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(events.len(), 100);
    assert!(
        events
            .iter()
            .all(|e| e["result"] == pid && e["subject"] == "getpid")
    );

    // Counting costs no event, and misses none.
    let prepared = orders.prepare(Work::GetPid { count: 10_000 }.on(1)).unwrap();
    let pid_text = prepared.pid().to_string();
    let args = [
        "trace",
        t,
        "--syscalls",
        "--hook",
        "__x64_sys_getpid",
        "--pid",
        &pid_text,
        "--tally",
        "-o",
        "json",
    ];
    let running = start(&args);
    assert_eq!(prepared.go().unwrap().made, 10_000);
    let counts: Vec<Value> = serde_json::from_str(&running.interrupt(0)).unwrap();
    let of = |event: &str, subject: &str| {
        let mut rows = counts
            .iter()
            .filter(|r| r["event"] == event && r["subject"] == subject);
        let count = rows.next().map(|r| r["count"].clone());
        assert!(rows.next().is_none(), "{counts:?}");
        count
    };
    assert_eq!(of("syscall", "getpid"), Some(10_000.into()), "{counts:?}");
    assert_eq!(
        of("execute", "__x64_sys_getpid"),
        Some(10_000.into()),
        "{counts:?}"
    );
    assert!(
        of("syscall", "exit_group").is_some(),
        "other calls of the process: {counts:?}"
    );

    // It is the one that is used where none is named; and it says who can deny what it cannot.
    let said = ends_with(2, &["guard", t, "--deny", "kernel-text"]);
    assert!(said.contains("agent-tcg") && said.contains("gdb-stub"), "{said}");
    is_well(&guest);
}
