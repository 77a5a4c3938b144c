//! A stock guest under a stock QEMU on a real KVM, started by `vmsight launch`: hooked from its first instruction on.
//!
//! The KVM host's processor is emulated, and that emulation has neither hardware breakpoints nor an intercept of INT3 in a
//! guest: execution is hooked in `tests/vtx`, on another. Here it is what QEMU and a kernel make of the rest.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use vmsight_arch::Gva;
use vmsight_events::Monitor;
use vmsight_events::agent::AgentBackend;
use vmsight_hooks::{Access, Delivery, Detail, Hook, HookKind, Overflow, Verdict};
use vmsight_lab::chance::patiently;
use vmsight_lab::{Kernel, nested};

use crate::support::{number, objects};

const SCRIPT: &str = r#"
set -e
export XDG_CACHE_HOME=/tmp VMSIGHT_TEST_INSIDE=1 RUST_BACKTRACE=0
LAUNCH="vmsight launch --socket /run/agent/vm.sock --"
guest hooked vmsight.idle -S -qmp unix:/run/qmp,server=on,wait=off &
export HOOKED=$!
guests --exact agent::inside --nocapture
# It is the process that was started, and it runs on without us.
kill -0 $HOOKED
kill $HOOKED
LAUNCH=
guest restored vmsight.idle -incoming "exec:cat /tmp/state" &
export HOOKED=$!
guests --exact agent::restored --nocapture
"#;

const LSTAR: u32 = 0xc000_0082;
const SYSENTER_EIP: u32 = 0x176;

#[test]
fn a_stock_guest_with_the_agent() {
    let folder = tempfile::tempdir().unwrap();
    let own = std::env::current_exe().unwrap();
    let inside = folder.path().join("guests");
    std::fs::copy(&own, &inside).unwrap();
    let library = own.with_file_name("libvmsight_agent.so");
    let program = Path::new(env!("CARGO_BIN_EXE_vmsight"));
    let programs = [program, inside.as_path(), library.as_path()];
    let (code, said) =
        nested::run_alone(Some(Kernel::V6_12), &programs, SCRIPT).unwrap_or_else(|e| panic!("{e:?}"));
    assert_eq!(code, 0, "{said}");
    assert_eq!(said.matches("1 passed").count(), 2, "{said}");
}

/// Sends QEMU a command and waits for its answer.
struct Qmp(BufReader<UnixStream>);

impl Qmp {
    fn connect() -> Self {
        let stream = patiently(|| UnixStream::connect("/run/qmp").ok());
        let mut qmp = Self(BufReader::new(stream));
        qmp.ask("qmp_capabilities");
        qmp
    }

    fn ask(&mut self, command: &str) -> String {
        self.send(&format!("{{\"execute\": \"{command}\"}}"))
    }

    fn send(&mut self, line: &str) -> String {
        writeln!(self.0.get_mut(), "{line}").unwrap();
        loop {
            let mut line = String::new();
            assert_ne!(self.0.read_line(&mut line).unwrap(), 0, "QEMU is gone");
            if line.contains("\"return\"") {
                return line;
            }
        }
    }
}

fn is_up() -> bool {
    let said = std::fs::read("/out/hooked.truth").unwrap_or_default();
    String::from_utf8_lossy(&said).contains("@@VMSIGHT-READY")
}

/// What the program says from outside, with the guest running.
fn jiffies() -> (u64, u64) {
    // QEMU's monitor has one client at a time, and that are we.
    let target = format!("pid:{}", std::env::var("HOOKED").unwrap());
    let output = Command::new("vmsight")
        .args(["read", &target, "jiffies_64", "8", "--as", "u64", "-o", "json"])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let rows = objects(&output.stdout).unwrap();
    (number(&rows[0]["address"]), number(&rows[0]["value"]))
}

/// The monitor, on the KVM host.
#[test]
fn inside() {
    if std::env::var_os("VMSIGHT_TEST_INSIDE").is_none() {
        return;
    }
    let socket = Path::new("/run/agent/vm.sock");
    let backend = patiently(|| AgentBackend::open(socket).ok());
    // A second monitor comes and goes beside the first.
    drop(AgentBackend::open(socket).unwrap());
    let monitor = Monitor::new(Box::new(backend));
    let write = |index| {
        Hook::new(HookKind::Msr {
            index,
            access: Access::WRITE,
        })
    };
    let lstar = monitor.hook(&write(LSTAR)).unwrap();
    let sysenter = monitor.hook(&write(SYSENTER_EIP)).unwrap();
    let mut qmp = Qmp::connect();
    qmp.ask("cont");

    // The kernel sets both once per vCPU; the second it tries and gets #GP, which it has a handler for.
    let (mut seen, mut denied) = (Vec::new(), 0);
    let end = Instant::now() + Duration::from_secs(300);
    while !is_up() {
        assert!(Instant::now() < end, "the guest did not come up; {seen:x?}");
        let Some(occurrence) = monitor.next(Duration::from_millis(200)).unwrap() else {
            continue;
        };
        let registers = occurrence.registers().unwrap();
        assert!(
            registers.rip >> 47 == 0x1ffff && registers.cpl() == 0,
            "{registers}"
        );
        match occurrence.event().detail {
            Detail::Msr {
                index: LSTAR,
                new: Some(new),
                ..
            } => {
                seen.push(new);
                occurrence.answer(Verdict::Continue).unwrap();
            }
            Detail::Msr {
                index: SYSENTER_EIP, ..
            } => {
                denied += 1;
                occurrence.answer(Verdict::Deny).unwrap();
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(seen.len() == 1 && seen[0] >> 47 == 0x1ffff, "{seen:x?}");
    assert_eq!(denied, 1);
    drop((lstar, sysenter));

    // The clock of the kernel stands still while its writes are denied, and goes on after.
    let (address, _) = jiffies();
    let clock = monitor.hook(&Hook::write(Gva(address), 8)).unwrap();
    let (mut frozen, mut writes) = (None, 0);
    while writes < 10 {
        let occurrence = monitor.next(Duration::from_secs(60)).unwrap().expect("a tick");
        let Detail::Memory {
            gva: Some(gva),
            old: Some(old),
            new: Some(new),
            len: 8,
            ..
        } = occurrence.event().detail
        else {
            panic!("{:?}", occurrence.event());
        };
        assert_eq!(gva, Gva(address));
        assert!(new > old, "{new:#x} after {old:#x}");
        assert_eq!(*frozen.get_or_insert(old), old, "nothing was written");
        occurrence.answer(Verdict::Deny).unwrap();
        writes += 1;
    }
    drop(clock);
    assert!(patiently(|| Some(jiffies().1).filter(|now| Some(*now) > frozen)) > 0);

    // A few instructions, each at its own place.
    let steps = HookKind::Step { vcpu: 0, count: 20 };
    let guard = monitor.hook(&Hook::new(steps)).unwrap();
    let step = monitor.next(Duration::from_secs(60)).unwrap().expect("20 steps");
    assert!(matches!(step.event().detail, Detail::Step { .. }));
    drop((step, guard));

    // Paused by a verdict, the VM is paused for its owner, who resumes it.
    let clock = monitor.hook(&Hook::write(Gva(address), 8)).unwrap();
    let tick = monitor.next(Duration::from_secs(60)).unwrap().expect("a tick");
    tick.answer(Verdict::Pause).unwrap();
    patiently(|| qmp.ask("query-status").contains("\"paused\"").then_some(()));
    drop(clock);
    let stopped = jiffies().1;
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(jiffies().1, stopped);
    qmp.ask("cont");
    patiently(|| (jiffies().1 > stopped).then_some(()));

    // Moved elsewhere while it is hooked: what is sent is the guest without hooks, and it runs on there.
    let told = Delivery::Told {
        overflow: Overflow::Drop,
    };
    let clock = monitor
        .hook(&Hook::write(Gva(address), 8).delivered(told))
        .unwrap();
    let lstar = monitor.hook(&write(LSTAR)).unwrap();
    patiently(|| (clock.counts().unwrap().occurred > 0).then_some(()));
    qmp.send(r#"{"execute": "migrate", "arguments": {"uri": "exec:cat >/tmp/state"}}"#);
    patiently(|| {
        let said = qmp.ask("query-migrate");
        assert!(!said.contains("\"failed\""), "{said}");
        said.contains("\"completed\"").then_some(())
    });
    drop((clock, lstar, monitor));
    assert!(qmp.ask("query-status").contains("\"postmigrate\""));
}

/// The guest that was moved, in a QEMU without the agent.
#[test]
fn restored() {
    if std::env::var_os("VMSIGHT_TEST_INSIDE").is_none() {
        return;
    }
    let target = format!("pid:{}", std::env::var("HOOKED").unwrap());
    let lists = || {
        let output = Command::new("vmsight")
            .args(["ps", &target, "-o", "json"])
            .output()
            .unwrap();
        objects(&output.stdout).ok().filter(|rows| rows.len() > 10)
    };
    patiently(lists);
    let before = jiffies().1;
    patiently(|| (jiffies().1 > before).then_some(()));
}
