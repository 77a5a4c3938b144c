//! On the KVM host: monitors of the stock guest, one after the other.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use vmsight_arch::{Gpa, Gva};
use vmsight_events::agent::AgentBackend;
use vmsight_events::{Monitor, Occurrence};
use vmsight_hooks::{Access, Delivery, Detail, Expiry, Hook, HookKind, Range, Verdict};
use vmsight_lab::chance::patiently;
use vmsight_lab::orders::{DEADLINE, checksum};
use vmsight_lab::qmp::Qmp;
use vmsight_lab::truth::frame;
use vmsight_lab::{Account, Orders, Work};

/// The pid of the guest's QEMU.
const QEMU: &str = "VMSIGHT_TEST_QEMU";
/// Calls of which each one is told.
const CALLS: u64 = 1000;
/// Calls that nobody hooks: with a hook left behind there would be an exit for each.
const MANY: u64 = 20_000;
/// Events that a monitor is to tell before it is killed.
const FEW: u64 = 100;
/// Of [`CALLS`] so many are denied.
const DENIED: u64 = 100;
/// Writes to a page.
const WRITES: u64 = 200;
/// The instruction.
const INT3: u8 = 0xcc;
/// EPERM, as a system call in the kernel returns it.
const EPERM: u64 = 1u64.wrapping_neg();
/// Nothing is executed there: four hooks take all hardware breakpoints.
const ELSEWHERE: [Gva; 4] = [
    Gva(0xdead_0000),
    Gva(0xdead_1000),
    Gva(0xdead_2000),
    Gva(0xdead_3000),
];
const HELD: Delivery = Delivery::Held {
    deadline: Duration::from_secs(60),
    expiry: Expiry::Open,
};

/// All of it. Elsewhere than on that host this is nothing.
#[test]
fn monitors() {
    if std::env::var_os(QEMU).is_none() {
        return;
    }
    say("waiting for the guest");
    patiently(is_up);
    let orders = Orders::connect(Path::new("/run/orders")).unwrap();
    unhooked(&orders);
    say("the guest is up");
    let function = traced_and_killed(&orders);
    say("traced, and the monitor was killed");
    judged(&orders, function, &[]);
    say("judged by a hardware breakpoint");
    judged(&orders, function, &ELSEWHERE);
    say("judged by an INT3");
    written(&orders);
    say("a page was watched");
    asked_inside(&orders, function);
    say("a filter was asked inside the guest");
    let account = orders.order(Work::Compute { rounds: 1000 }).unwrap();
    assert_eq!(account.checksum, Some(checksum(1000)), "the guest is well");
}

/// When what happens; the host's clock counts instructions.
fn say(what: &str) {
    let uptime = fs::read_to_string("/proc/uptime").unwrap();
    println!("vtx: {} s: {what}", uptime.split(' ').next().unwrap());
}

fn is_up() -> Option<()> {
    let qemu = std::env::var(QEMU).unwrap();
    assert!(
        Path::new(&format!("/proc/{qemu}/fd/0")).exists(),
        "QEMU has ended"
    );
    let said = ["/out/stock.truth", "/out/stock.console"].map(|path| {
        let said = fs::read(path).unwrap_or_default();
        String::from_utf8_lossy(&said).into_owned()
    });
    assert!(!said.concat().contains(frame::FAILED), "{said:?}");
    said.concat().contains(frame::READY).then_some(())
}

/// What the guest says of so many calls: each was made, and those that were not denied gave what they must.
fn called(account: &Account, made: u64, failed: u64) {
    assert_eq!((account.made, account.failed), (made, failed), "{account:?}");
    assert_eq!(account.returned, Some(account.pid.into()), "{account:?}");
}

/// All exits of all guests of this KVM, of which there is one.
fn exits() -> u64 {
    let text = fs::read_to_string("/sys/kernel/debug/kvm/exits").unwrap();
    text.trim().parse().unwrap()
}

/// Calls leave the guest no more: nothing is hooked.
fn unhooked(orders: &Orders) {
    let before = exits();
    called(&orders.order(Work::GetPid { count: MANY }).unwrap(), MANY, 0);
    let exits = exits() - before;
    assert!(exits < MANY, "{exits} exits");
}

/// `vmsight trace`, at work.
struct Trace {
    child: Child,
    said: BufReader<ChildStderr>,
}

impl Trace {
    const ROWS: &str = "/out/trace.jsonl";

    fn start(what: &[&str]) -> Self {
        let mut child = Command::new("vmsight")
            .args([
                "trace",
                "qmp:/run/qmp",
                "--timeout",
                "60",
                "--backend",
                "agent-kvm",
            ])
            .args(what)
            .args(["--hook", "__x64_sys_getpid", "-o", "jsonl"])
            .stdin(Stdio::null())
            .stdout(File::create(Self::ROWS).unwrap())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        said.read_line(&mut line).unwrap();
        assert!(line.contains("Ctrl-C ends it"), "{line}");
        Self { child, said }
    }

    /// Waits until it has told so many events.
    fn wait_for(&mut self, rows: u64) {
        patiently(|| {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "{ended:?}");
            let text = fs::read(Self::ROWS).unwrap();
            (text.iter().filter(|byte| **byte == b'\n').count() as u64 >= rows).then_some(())
        });
    }

    /// Kills it, and gives what it has told.
    fn kill(mut self) -> Vec<Value> {
        kill_process(Pid::from_child(&self.child), Signal::KILL).unwrap();
        assert!(!self.child.wait().unwrap().success());
        let mut said = String::new();
        self.said.read_to_string(&mut said).unwrap();
        assert_eq!(said, "", "nothing to complain about");
        let text = fs::read_to_string(Self::ROWS).unwrap();
        let rows = text.lines().map(|line| serde_json::from_str(line).unwrap());
        rows.collect()
    }
}

/// Each call is told at its begin, in the function that carries it out, and with its result. Of many more calls the monitor sees the
/// first: killed then, it leaves a guest that goes on without hooks. The function's address.
fn traced_and_killed(orders: &Orders) -> Gva {
    let mut trace = Trace::start(&["--syscalls", "getpid"]);
    say("vmsight trace has its hooks in");
    let before = exits();
    let account = orders.order(Work::GetPid { count: CALLS }).unwrap();
    called(&account, CALLS, 0);
    let exits = exits() - before;
    assert!(exits >= 3 * CALLS, "three hooks, and {exits} exits");
    trace.wait_for(2 * CALLS);
    say("traced");

    let interrupted = orders.prepare(Work::GetPid { count: MANY }).unwrap();
    let second = interrupted.pid();
    let sent = interrupted.send_go().unwrap();
    trace.wait_for(2 * CALLS + FEW);
    let rows = trace.kill();
    let accounts = sent.wait_all(DEADLINE).unwrap();
    assert_eq!(accounts.len(), 1);
    called(&accounts[0], MANY, 0);
    unhooked(orders);

    let own = |pid: u32, event: &str| -> Vec<&Value> {
        let own = rows
            .iter()
            .filter(|row| row["pid"] == pid && row["event"] == event);
        own.collect()
    };
    let calls = own(account.pid, "syscall");
    assert_eq!(calls.len() as u64, CALLS);
    let whole = |row: &&Value| row["subject"] == "getpid" && row["result"] == account.pid;
    assert!(calls.iter().all(whole), "{:?}", calls[0]);
    let executions = own(account.pid, "execute");
    assert_eq!(executions.len() as u64, CALLS);
    let rip = executions[0]["args"]["rip"].as_str().unwrap();
    assert!(
        executions.iter().all(|row| row["args"]["rip"] == rip),
        "{executions:?}"
    );
    let seen = own(second, "syscall").len() as u64;
    assert!((1..MANY).contains(&seen), "{seen} of {MANY} were seen");
    Gva(u64::from_str_radix(rip.strip_prefix("0x").unwrap(), 16).unwrap())
}

/// Has the guest do what is prepared, and gives each event to `judge`.
fn during(
    monitor: &Monitor,
    work: impl FnOnce() -> Account + Send,
    mut judge: impl FnMut(&Occurrence) -> Verdict,
) -> Account {
    std::thread::scope(|scope| {
        let worker = scope.spawn(work);
        loop {
            match monitor.next(Duration::from_millis(50)).unwrap() {
                Some(occurrence) => {
                    let verdict = judge(&occurrence);
                    occurrence.answer(verdict).unwrap();
                }
                None if worker.is_finished() => return worker.join().unwrap(),
                None => {}
            }
        }
    })
}

fn monitor() -> Monitor {
    let backend = AgentBackend::open(Path::new("/run/agent/vm.sock")).unwrap_or_else(|e| panic!("{e}"));
    Monitor::new(Box::new(backend))
}

/// A byte of the kernel's code, as it is in the guest's memory. The guest is idle: the kernel's page tables are in use.
fn code(at: Gva) -> u8 {
    patiently(|| {
        let mut qmp = Qmp::connect(Path::new("/run/qmp")).unwrap();
        let said = qmp.human(&format!("x /1xb {:#x}", at.0)).unwrap();
        let (_, byte) = said.trim().rsplit_once(": 0x")?;
        u8::from_str_radix(byte, 16).ok()
    })
}

/// The first calls fail as the monitor says, the others are what they would be without it; and when the hook is out, with the
/// monitor still there, nothing is told any more. With hooks `elsewhere` that take the hardware breakpoints it is by INT3.
fn judged(orders: &Orders, function: Gva, elsewhere: &[Gva]) {
    let untouched = code(function);
    assert_ne!(untouched, INT3);
    let monitor = monitor();
    let arm = |at: Gva| monitor.hook(&Hook::execute(at).delivered(HELD)).unwrap();
    let elsewhere: Vec<_> = elsewhere.iter().map(|at| arm(*at)).collect();
    let prepared = orders.prepare(Work::GetPid { count: CALLS }).unwrap();
    let hook = arm(function);
    let armed = if elsewhere.is_empty() { untouched } else { INT3 };
    assert_eq!(code(function), armed);
    let mut calls = 0;
    let account = during(
        &monitor,
        || prepared.go().unwrap(),
        |occurrence| {
            assert_eq!(occurrence.event().hook, hook.id());
            assert_eq!(occurrence.event().detail, Detail::Execute { rip: function });
            calls += 1;
            match calls <= DENIED {
                true => Verdict::Return(EPERM),
                false => Verdict::Continue,
            }
        },
    );
    called(&account, CALLS, DENIED);
    assert_eq!((calls, hook.counts().unwrap().occurred), (CALLS, CALLS));
    drop(hook);
    unhooked(orders);
    assert!(monitor.next(Duration::ZERO).unwrap().is_none());
    assert_eq!(code(function), untouched);
    drop(elsewhere);
}

/// Calls of another process than the one that is asked for do not leave the guest; its own do, each once. With the monitor killed the
/// kernel's code is what it was.
fn asked_inside(orders: &Orders, function: Gva) {
    let untouched = code(function);
    let prepared = orders.prepare(Work::GetPid { count: CALLS }).unwrap();
    let pid = prepared.pid();
    let mut trace = Trace::start(&["--inside", "--pid", &pid.to_string()]);
    // Nobody's call is told, and there is no exit for it.
    unhooked(orders);
    assert_eq!(fs::read(Trace::ROWS).unwrap(), b"");
    let before = exits();
    called(&prepared.go().unwrap(), CALLS, 0);
    let exits = exits() - before;
    assert!(exits >= CALLS, "{exits} exits");
    trace.wait_for(CALLS);
    let rows = trace.kill();
    unhooked(orders);
    let own = |row: &&Value| row["pid"] == pid && row["event"] == "execute";
    assert_eq!(rows.iter().filter(own).count() as u64, CALLS);
    assert_eq!(rows.len() as u64, CALLS);
    let rip = rows[0]["args"]["rip"].as_str().unwrap();
    let rip = u64::from_str_radix(rip.strip_prefix("0x").unwrap(), 16).unwrap();
    assert!([0, 4].contains(&rip.wrapping_sub(function.0)), "{rip:#x}");
    assert_eq!(code(function), untouched);
}

/// Each write to a page of a process is told before it happens, with what was there and what will be.
fn written(orders: &Orders) {
    const OFFSET: u64 = 64;
    let monitor = monitor();
    let prepared = orders
        .prepare(Work::Write {
            first: 7,
            step: 3,
            count: WRITES,
            offset: OFFSET,
            shared: false,
        })
        .unwrap();
    let range = Range::Physical {
        start: Gpa((prepared.frame() << 12) + OFFSET),
        len: 8,
    };
    let access = Access::WRITE;
    let hook = Hook::new(HookKind::Memory { range, access }).delivered(HELD);
    let hook = monitor.hook(&hook).unwrap();
    let mut values = Vec::new();
    let account = during(
        &monitor,
        || prepared.go().unwrap(),
        |occurrence| {
            let Detail::Memory { old, new, len: 8, .. } = occurrence.event().detail else {
                panic!("{:?}", occurrence.event());
            };
            values.push((old.unwrap(), new.unwrap()));
            Verdict::Continue
        },
    );
    assert_eq!(account.made, WRITES, "{account:?}");
    let written: Vec<u64> = values.iter().map(|(_, new)| *new).collect();
    let expected: Vec<u64> = (0..WRITES).map(|n| 7 + 3 * n).collect();
    assert_eq!(written, expected);
    assert!(
        values.windows(2).all(|pair| pair[1].0 == pair[0].1),
        "{values:x?}"
    );
    drop(hook);
}
