//! A paused machine goes on, whatever becomes of us.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use vmsight_target::{AttachOptions, Target, TargetSpec, attach};

use crate::machine::Machine;

fn target(vm: &Machine) -> Target {
    attach(&TargetSpec::Pid(vm.pid()), &AttachOptions::default()).unwrap()
}

/// Asked through the human monitor, which is a socket of its own: QMP's is ours during a pause.
fn is_running(vm: &Machine) -> bool {
    let text = vm.human("info status");
    assert!(text.contains("VM status:"), "{text}");
    text.contains("VM status: running")
}

fn waits_for_running(vm: &Machine) {
    let until = Instant::now() + Duration::from_secs(5);
    while !is_running(vm) {
        assert!(Instant::now() < until, "the machine was left paused");
        std::thread::sleep(Duration::from_millis(20));
    }
}

const MACHINE: [&str; 6] = [
    "-m",
    "64",
    "-chardev",
    "socket,id=h,path=DIR/hmp,server=on,wait=off",
    "-mon",
    "chardev=h,mode=readline",
];

#[test]
fn it_goes_on_when_the_guard_is_dropped() {
    let vm = Machine::start_running(&MACHINE);
    let target = target(&vm);
    assert!(is_running(&vm));
    let pause = target.pause().unwrap();
    assert!(pause.will_resume());
    assert!(!is_running(&vm));
    let first = target.registers(None).unwrap();
    assert_eq!(
        first,
        target.registers(None).unwrap(),
        "nothing moves, and the registers can be asked for"
    );
    let second = target.pause().unwrap();
    drop(pause);
    assert!(!is_running(&vm), "somebody else still wants it paused");
    drop(second);
    assert!(is_running(&vm));
    // And once more, to see that nothing of the first time is left.
    drop(target.pause().unwrap());
    assert!(is_running(&vm));
}

#[test]
fn it_goes_on_when_the_program_panics() {
    let vm = Machine::start_running(&MACHINE);
    let target = target(&vm);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _pause = target.pause().unwrap();
        assert!(!is_running(&vm));
        panic!("on purpose");
    }));
    assert!(result.is_err());
    assert!(is_running(&vm));
}

#[test]
fn a_machine_that_its_owner_paused_stays_paused() {
    let vm = Machine::start_running(&MACHINE);
    let target = target(&vm);
    vm.command("{\"execute\":\"stop\"}");
    let pause = target.pause().unwrap();
    assert!(!pause.will_resume());
    drop(pause);
    assert!(!is_running(&vm));
}

#[test]
fn it_goes_on_when_we_are_killed() {
    if let Ok(pid) = std::env::var("VMSIGHT_TEST_PAUSE") {
        // The program that is killed.
        let target = attach(&TargetSpec::Pid(pid.parse().unwrap()), &AttachOptions::default()).unwrap();
        let _pause = target.pause().unwrap();
        println!("paused");
        std::thread::sleep(Duration::from_secs(60));
        return;
    }
    let vm = Machine::start_running(&MACHINE);
    for signal in [Signal::KILL, Signal::TERM, Signal::INT, Signal::HUP] {
        // Whoever runs the tests may have them ignore signals (nohup does), which programs that they start would, too.
        let mut child = Command::new("env")
            .arg("--default-signal")
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "pause::it_goes_on_when_we_are_killed", "--nocapture"])
            .env("VMSIGHT_TEST_PAUSE", vm.pid().to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        // The test harness may print on the same line before.
        assert!(
            lines.map_while(Result::ok).any(|l| l.ends_with("paused")),
            "the child never paused"
        );
        assert!(!is_running(&vm));
        let pid = Pid::from_child(&child);
        kill_process(pid, signal).unwrap();
        child.wait().unwrap();
        waits_for_running(&vm);
        // The watch is gone and the socket free.
        let until = Instant::now() + Duration::from_secs(5);
        while let Err(error) = target(&vm).registers(None) {
            assert!(Instant::now() < until, "{error}");
        }
    }
}
