//! System calls and lives of processes, on every kernel of the lab.

use std::collections::HashMap;

use vmsight_events::linux::{
    Lifecycle, LifecycleRecord, LifecycleTrace, SyscallRecord, SyscallTrace, Value, control_sites,
};
use vmsight_hooks::{ControlRegister, Verdict};
use vmsight_lab::orders::{WITNESS, checksum};
use vmsight_lab::{Kernel, Work};
use vmsight_linux::syscall::Abi;

use crate::support::{HELD, Watched};

fn check(version: Kernel, calls: u64) {
    let watched = Watched::boot(version, false);
    let text = watched.text();
    counts(&watched, calls);
    of_32_bits(&watched, 20);
    arguments(&watched);
    lives(&watched);
    children(&watched);
    sites(&watched);
    assert!(watched.text() == text, "the code that was hooked is as it was");
    let account = watched.order(Work::Compute { rounds: 1000 });
    assert_eq!(account.checksum, Some(checksum(1000)), "the guest is well");
}

/// Each call once, on both vCPUs at the same time, with its caller and result.
fn counts(watched: &Watched, calls: u64) {
    let monitor = watched.monitor();
    let mut trace = SyscallTrace::new(&watched.kernel, &["getpid".into()]).unwrap();
    trace.arm(&monitor, HELD).unwrap();
    let mut records: Vec<SyscallRecord> = Vec::new();
    let accounts = watched.during(
        &monitor,
        |occurrence| {
            records.extend(trace.take(occurrence).unwrap());
            Verdict::Continue
        },
        |guest| {
            let orders = guest.orders().unwrap();
            let both = [0, 1].map(|cpu| orders.prepare(Work::GetPid { count: calls }.on(cpu)).unwrap());
            orders.go(both).unwrap()
        },
    );
    assert_eq!(accounts.len(), 2);
    for account in &accounts {
        assert_eq!((account.made, account.failed), (calls, 0));
        let own: Vec<_> = records
            .iter()
            .filter(|r| r.current.pid == account.pid as i32)
            .collect();
        assert_eq!(own.len() as u64, calls, "of {} in all", records.len());
        assert!(own.iter().all(|r| r.result == Some(account.pid.into())));
        assert!(own.iter().all(|r| r.current.uid == Some(0) && r.name == "getpid"));
    }
    let vcpus = |pid: u32| {
        let own = records.iter().filter(|r| r.current.pid == pid as i32);
        own.map(|r| r.vcpu).collect::<std::collections::BTreeSet<_>>()
    };
    assert_eq!(vcpus(accounts[0].pid), [0].into());
    assert_eq!(vcpus(accounts[1].pid), [1].into());
}

/// Calls by INT 0x80: each once, by its own number and name, and none taken for one of 64-bit code. Those that are not asked for are
/// put away by a filter that finds their number where it is then.
fn of_32_bits(watched: &Watched, calls: u64) {
    /// arch/x86/entry/syscalls/syscall_32.tbl.
    const GETPID: u32 = 20;
    const DUP2: u32 = 63;
    const GETPPID: u32 = 64;
    const NOBODYS: [u32; 2] = [0x1234, 0xffff_fff0];
    let int80 = |number, arguments, count| Work::Int80 {
        number,
        arguments,
        count,
    };
    let monitor = watched.monitor();
    let names = ["getpid".to_owned(), "dup2".to_owned()];
    let mut trace = SyscallTrace::new(&watched.kernel, &names).unwrap();
    trace.arm(&monitor, HELD).unwrap();
    let counter = trace.count(&monitor).unwrap();
    let mut records: Vec<SyscallRecord> = Vec::new();
    let [getpid, dup2, getppid] = watched.during(
        &monitor,
        |occurrence| {
            records.extend(trace.take(occurrence).unwrap());
            Verdict::Continue
        },
        |guest| {
            [(GETPID, [0; 2]), (DUP2, NOBODYS), (GETPPID, [0; 2])]
                .map(|(number, arguments)| guest.order(int80(number, arguments, calls).on(1)).unwrap())
        },
    );
    assert_eq!(
        (getpid.failed, getpid.returned, dup2.failed, getppid.failed),
        (0, Some(getpid.pid.into()), calls, 0)
    );
    let of = |pid: u32| {
        let own = records
            .iter()
            .filter(|r| r.current.pid == pid as i32 && r.abi == Abi::Ia32);
        own.collect::<Vec<_>>()
    };
    let [got, doubled, others] = [&getpid, &dup2, &getppid].map(|account| of(account.pid));
    assert_eq!(
        (got.len() as u64, doubled.len() as u64, others.len()),
        (calls, calls, 0)
    );
    let returned = Some(getpid.pid.into());
    assert!(got.iter().all(|r| r.name == "getpid" && r.result == returned));
    for record in doubled {
        let line = record.to_string();
        assert!(
            line.starts_with("dup2(0x1234, 0xfffffff0, ") && line.ends_with(") = -1 EBADF"),
            "{line}"
        );
    }
    let counted = counter.counted().unwrap().calls;
    let counted = |name| {
        let mut own = counted.iter().filter(|c| c.abi == Abi::Ia32 && c.name == name);
        own.next().map(|c| c.calls)
    };
    assert_eq!(
        [counted("getpid"), counted("dup2"), counted("getppid")],
        [Some(calls), Some(calls), None]
    );
}

/// What calls were given and what they gave.
fn arguments(watched: &Watched) {
    let monitor = watched.monitor();
    let names = [
        "openat",
        "open",
        "connect",
        "execve",
        "kill",
        "setresuid",
        "exit_group",
    ]
    .map(str::to_owned);
    let mut trace = SyscallTrace::new(&watched.kernel, &names).unwrap();
    trace.arm(&monitor, HELD).unwrap();
    let mut lines: HashMap<i32, Vec<String>> = HashMap::new();
    let accounts = watched.during(
        &monitor,
        |occurrence| {
            if let Some(record) = trace.take(occurrence).unwrap() {
                lines
                    .entry(record.current.pid)
                    .or_default()
                    .push(record.to_string());
            }
            Verdict::Continue
        },
        |guest| {
            let works = [
                Work::Open {
                    path: "/etc/no\u{1b}thing".into(),
                    flags: 0o2_000_000,
                    count: 1,
                },
                Work::Connect {
                    address: "127.0.0.1:81".into(),
                    listen: false,
                },
                Work::Exec {
                    path: WITNESS.into(),
                    argv: vec!["wit".into(), "--exit=7".into(), "a \"b\"".into()],
                    envp: vec!["K=v".into()],
                },
                Work::SetUid { uid: 1234 },
            ];
            works.map(|work| guest.order(work).unwrap())
        },
    );
    let has = |index: usize, line: &str| {
        let pid = accounts[index].pid as i32;
        let own = lines.get(&pid).map(Vec::as_slice).unwrap_or_default();
        assert!(own.iter().any(|l| l == line), "{line}\nis not among\n{own:#?}");
    };
    has(
        0,
        r#"openat(AT_FDCWD, "/etc/no\u{1b}thing", O_RDONLY|O_CLOEXEC, 0o600) = -1 ENOENT"#,
    );
    let own = &lines[&(accounts[1].pid as i32)];
    let connect = own.iter().find(|l| l.starts_with("connect(")).expect("a connect");
    assert!(
        connect.ends_with(", {inet 127.0.0.1:81}, 16) = -1 ECONNREFUSED"),
        "{connect}"
    );
    has(
        2,
        &format!(r#"execve("{WITNESS}", ["wit", "--exit=7", "a \"b\""], ["K=v"]) = 0"#),
    );
    has(2, "exit_group(7) = ?");
    has(3, "setresuid(1234, 1234, 1234) = 0");
}

/// Processes that begin, become another program and end.
fn lives(watched: &Watched) {
    let monitor = watched.monitor();
    let mut trace = LifecycleTrace::new(&watched.kernel).unwrap();
    for what in [Lifecycle::Start, Lifecycle::Exec, Lifecycle::Exit] {
        trace.arm(&monitor, what, HELD).unwrap();
    }
    let mut records: Vec<LifecycleRecord> = Vec::new();
    let (exec, fork) = watched.during(
        &monitor,
        |occurrence| {
            records.extend(trace.take(occurrence).unwrap());
            Verdict::Continue
        },
        |guest| {
            let exec = guest.order(Work::Exec {
                path: WITNESS.into(),
                argv: vec!["wit".into(), "--exit=9".into()],
                envp: Vec::new(),
            });
            (exec.unwrap(), guest.order(Work::Fork { count: 5 }).unwrap())
        },
    );
    let of = |what, pid: u32| {
        records
            .iter()
            .filter(move |r| r.what == what && r.current.pid == pid as i32)
    };
    let execs: Vec<_> = of(Lifecycle::Exec, exec.pid).collect();
    assert_eq!(execs.len(), 1, "{records:?}");
    assert_eq!(execs[0].subject.as_deref(), Some(WITNESS));
    assert_eq!(execs[0].arguments.as_deref().unwrap(), ["wit", "--exit=9"]);
    let codes: Vec<_> = of(Lifecycle::Exit, exec.pid).map(|r| r.code).collect();
    assert_eq!(codes, [Some(9 << 8)]);
    let started: Vec<u32> = of(Lifecycle::Start, fork.pid)
        .filter_map(|r| Some(r.child.as_ref()?.pid as u32))
        .collect();
    assert_eq!(started, fork.children);
    for (child, code) in fork.children.iter().zip(&fork.values) {
        let codes: Vec<_> = of(Lifecycle::Exit, *child).map(|r| r.code).collect();
        assert_eq!(codes, [Some((*code as u32) << 8)], "child {child}");
    }
}

/// One process and those it makes, and nobody else.
fn children(watched: &Watched) {
    let monitor = watched.monitor();
    let orders = watched.guest.orders().unwrap();
    let family = orders.prepare(Work::Fork { count: 3 }).unwrap();
    let parent = family.pid() as i32;
    let mut trace = SyscallTrace::new(&watched.kernel, &["exit_group".into(), "exit".into()])
        .unwrap()
        .of([parent], true);
    trace.arm(&monitor, HELD).unwrap();
    let mut seen = Vec::new();
    let account = watched.during(
        &monitor,
        |occurrence| {
            if let Some(record) = trace.take(occurrence).unwrap() {
                assert!(matches!(record.arguments[0].value, Value::Signed(_)), "{record}");
                seen.push(record.current.pid as u32);
            }
            Verdict::Continue
        },
        |guest| {
            let account = family.go().unwrap();
            guest.order(Work::Exit { code: 3 }).unwrap();
            account
        },
    );
    seen.sort_unstable();
    let mut family = account.children.clone();
    family.push(account.pid);
    family.sort_unstable();
    assert_eq!(seen, family);
}

/// The instructions that write control registers: those of the functions that are known to.
fn sites(watched: &Watched) {
    let sites = control_sites(&watched.kernel).unwrap();
    for (function, register) in [
        ("native_write_cr0", ControlRegister::Cr0),
        ("native_write_cr4", ControlRegister::Cr4),
    ] {
        let start = watched.symbol(function);
        assert!(
            sites
                .iter()
                .any(|s| s.register == register && s.at.0.wrapping_sub(start.0) < 64),
            "{function} at {start} is not among {sites:x?}"
        );
    }
    assert!(
        sites
            .iter()
            .filter(|s| s.register == ControlRegister::Cr3)
            .count()
            >= 4
    );
}

macro_rules! kernels {
    ($($name:ident: $kernel:expr, $calls:expr;)*) => {$(
        #[test]
        fn $name() {
            check($kernel, $calls);
        }
    )*};
}

kernels! {
    kernel_5_10: Kernel::V5_10, 200;
    kernel_6_1: Kernel::V6_1, 5000;
    kernel_6_1_cloud: Kernel::V6_1Cloud, 200;
    kernel_6_1_rt: Kernel::V6_1Rt, 200;
    kernel_6_12: Kernel::V6_12, 200;
    kernel_sid: Kernel::Sid, 200;
}
