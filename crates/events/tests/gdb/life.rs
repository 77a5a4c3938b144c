//! Beginnings and ends: the owner's pauses, deadlines, others at the stub, monitors and machines that are killed.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use vmsight_arch::Gva;
use vmsight_events::EventError;
use vmsight_events::gdb::{self, GdbOptions};
use vmsight_hooks::{Delivery, Expiry, Hook, Overflow, Verdict};
use vmsight_lab::connections;
use vmsight_target::{AttachOptions, TargetSpec, attach};

use crate::execute::{held, next, patient};
use crate::guest::{CALLS, IDLE, STORED, upper};
use crate::machine::{Machine, PATIENCE};

fn is_open(vm: &Machine) -> bool {
    vm.hmp("info chardev").contains("gdb: filename=")
}

#[test]
fn nothing_is_left_when_it_ends() {
    let vm = Machine::start(2);
    assert!(!is_open(&vm));
    let monitor = vm.monitor();
    assert!(is_open(&vm));
    let hook = monitor
        .hook(&Hook::execute(Gva(vm.guest.function)).delivered(patient()))
        .unwrap();
    let watch = monitor.hook(&Hook::write(Gva(upper(0, CALLS)), 8)).unwrap();
    vm.work(0, 1000);
    vm.work(1, 1000);
    // Held, and nobody answers: dropped with it.
    let occurrence = next(&monitor);
    drop((occurrence, hook, watch, monitor));
    vm.wait_for(|m| m.is_done(0, 1) && m.is_done(1, 1));
    assert_eq!((vm.status(), is_open(&vm)), ("running".to_owned(), false));
    assert_eq!(vm.word(0, CALLS) + vm.word(1, CALLS), 2000);
}

#[test]
fn a_panic_lets_the_guest_go_on() {
    let vm = Machine::start(1);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let monitor = vm.monitor();
        let at = Hook::execute(Gva(vm.guest.function)).delivered(patient());
        let _hook = monitor.on(&at, |_| panic!("on purpose")).unwrap();
        vm.work(0, 100);
        let _ = monitor.next(PATIENCE);
    }));
    assert!(result.is_err());
    vm.wait_for(|m| m.is_done(0, 1));
    assert_eq!((vm.word(0, CALLS), is_open(&vm)), (100, false));
}

/// What is run again as the monitor that is killed.
fn killed(pid: u32, stage: &str, function: u64) {
    let monitor = Machine::monitor_of(pid);
    let delivery = match stage {
        "held" => patient(),
        "closed" | "closed-busy" => held(PATIENCE, Expiry::Closed),
        _ => Delivery::Told {
            overflow: Overflow::Drop,
        },
    };
    let _hook = monitor
        .hook(&Hook::execute(Gva(function)).delivered(delivery))
        .unwrap();
    let _watch = monitor
        .hook(&Hook::write(Gva(upper(1, STORED)), 8).delivered(delivery))
        .unwrap();
    println!("\nhooked");
    let occurrence = next(&monitor);
    println!("\ntold");
    if matches!(stage, "held" | "closed") {
        std::thread::sleep(PATIENCE);
    }
    drop(occurrence);
    loop {
        let _ = monitor.next(Duration::from_secs(1)).unwrap();
    }
}

#[test]
fn a_monitor_that_is_killed_leaves_the_guest_as_it_was() {
    if let Ok(text) = std::env::var("VMSIGHT_TEST_KILLED") {
        let words: Vec<&str> = text.split(' ').collect();
        return killed(words[0].parse().unwrap(), words[1], words[2].parse().unwrap());
    }
    let vm = Machine::start(2);
    let kill_one = |stage: &str, rounds: u64| {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "life::a_monitor_that_is_killed_leaves_the_guest_as_it_was",
                "--nocapture",
            ])
            .env(
                "VMSIGHT_TEST_KILLED",
                format!("{} {stage} {}", vm.pid(), vm.guest.function),
            )
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|l| l.unwrap() == "hooked"));
        vm.work(0, rounds);
        vm.work(1, rounds);
        assert!(lines.any(|l| l.unwrap() == "told"));
        child.kill().unwrap();
        child.wait().unwrap();
    };
    let image = |vm: &Machine| {
        let path = vm.dir().join("memory");
        vm.command(&format!(
            r#"{{"execute":"pmemsave","arguments":{{"val":983040,"size":65536,"filename":"{}"}}}}"#,
            path.display()
        ));
        std::fs::read(path).unwrap()
    };
    let before = image(&vm);
    const ROUNDS: u64 = 200_000;
    for (turn, stage) in ["held", "busy", "held", "busy"].into_iter().enumerate() {
        kill_one(stage, ROUNDS);
        vm.wait_for(|m| m.is_done(0, turn as u64 + 1) && m.is_done(1, turn as u64 + 1));
        assert_eq!(vm.status(), "running");
        let calls = ROUNDS * (turn as u64 + 1);
        assert_eq!((vm.word(0, CALLS), vm.word(1, CALLS)), (calls, calls));
        assert!(
            image(&vm) == before && before.len() == 0x1_0000,
            "the guest's code is what it was"
        );
    }
    // Told to fail closed, the guest stands still: held at a hook, or wherever it was. Its owner lets it go on.
    for (turn, stage) in ["closed", "closed-busy"].into_iter().enumerate() {
        kill_one(stage, ROUNDS);
        vm.wait_for(|m| m.status() != "running");
        assert!(image(&vm) == before, "the guest's code is what it was");
        let stands = (vm.word(0, CALLS), vm.word(1, CALLS));
        let calls = ROUNDS * (turn as u64 + 5);
        assert!(
            stands.0 + stands.1 < 2 * calls,
            "it stopped in the midst of its work: {stands:?}"
        );
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!((vm.word(0, CALLS), vm.word(1, CALLS)), stands);
        assert_ne!(vm.status(), "running");
        // A vCPU that was in the midst of a step may stop once more.
        let mut conts = 0;
        vm.wait_for(|m| {
            if m.status() != "running" {
                conts += 1;
                m.command(r#"{"execute":"cont"}"#);
            }
            m.is_done(0, turn as u64 + 5) && m.is_done(1, turn as u64 + 5)
        });
        assert!(conts <= 2, "{conts}");
        assert_eq!((vm.word(0, CALLS), vm.word(1, CALLS)), (calls, calls));
    }
    // What the killed ones left open does not stand in anybody's way.
    let monitor = vm.monitor();
    let hook = monitor
        .hook(&Hook::execute(Gva(vm.guest.function)).delivered(Delivery::Counted))
        .unwrap();
    vm.work(0, 10);
    vm.wait_for(|m| m.is_done(0, 7));
    assert_eq!(hook.counts().unwrap().occurred, 10);
    drop((hook, monitor));
    assert!(!is_open(&vm));
}

/// Shuts the connection of this process to the machine's stub.
fn cut(vm: &Machine) {
    let stub = format!("/vmsight-gdb-{}-", std::process::id());
    let is_stub = |path: &Path| path.to_string_lossy().contains(&stub);
    assert_eq!(connections::cut(vm.pid(), is_stub).unwrap(), 1);
}

#[test]
fn a_connection_that_is_cut_leaves_the_guest_as_it_was() {
    let vm = Machine::start(2);
    let at = Hook::execute(Gva(vm.guest.function));
    const ROUNDS: u64 = 1000;
    let work = || [0, 1].map(|vcpu| vm.work(vcpu, ROUNDS));
    let calls = || vm.word(0, CALLS) + vm.word(1, CALLS);
    let done = |times| vm.wait_for(|m| m.is_done(0, times) && m.is_done(1, times));

    // While a vCPU is held, with a watchpoint beside.
    let monitor = vm.monitor();
    let hook = monitor.hook(&at.clone().delivered(patient())).unwrap();
    let watch = Hook::write(Gva(upper(1, STORED)), 8).delivered(patient());
    let watch = monitor.hook(&watch).unwrap();
    work();
    let occurrence = next(&monitor);
    cut(&vm);
    done(1);
    assert_eq!((calls(), vm.status()), (2 * ROUNDS, "running".to_owned()));
    assert!(occurrence.answer(Verdict::Skip).is_err());
    assert!(monitor.next(PATIENCE).is_err());
    drop((hook, watch, monitor));

    // While it runs, with nothing held.
    let monitor = vm.monitor();
    let hook = monitor.hook(&at.clone().delivered(patient())).unwrap();
    cut(&vm);
    assert!(monitor.next(PATIENCE).is_err());
    drop((hook, monitor));
    work();
    done(2);
    assert_eq!((calls(), vm.status()), (4 * ROUNDS, "running".to_owned()));

    // A hook that fails closed: it stays where it was, without breakpoints, until its owner lets it go on.
    let monitor = vm.monitor();
    let closed = at.clone().delivered(held(PATIENCE, Expiry::Closed));
    let hook = monitor.hook(&closed).unwrap();
    work();
    let occurrence = next(&monitor);
    cut(&vm);
    assert!(monitor.next(PATIENCE).is_err());
    drop((occurrence, hook, monitor));
    std::thread::sleep(Duration::from_millis(300));
    assert_ne!(vm.status(), "running");
    assert_eq!(calls(), 4 * ROUNDS);
    vm.command(r#"{"execute":"cont"}"#);
    done(3);
    assert_eq!((calls(), vm.status()), (6 * ROUNDS, "running".to_owned()));

    // The next one is welcome, and leaves nothing open.
    let monitor = vm.monitor();
    let hook = monitor.hook(&at.delivered(Delivery::Counted)).unwrap();
    work();
    done(4);
    assert_eq!(hook.counts().unwrap().occurred, 2 * ROUNDS);
    drop((hook, monitor));
    assert!(!is_open(&vm));
}

#[test]
fn a_deadline_lets_the_guest_go_on_or_keeps_it_paused() {
    let vm = Machine::start(1);
    let monitor = vm.monitor();
    let soon = Duration::from_millis(50);
    let at = Hook::execute(Gva(vm.guest.function));
    let open = monitor
        .hook(&at.clone().delivered(held(soon, Expiry::Open)))
        .unwrap();
    vm.work(0, 100);
    // Fetched and not answered.
    let occurrence = next(&monitor);
    vm.wait_for(|m| m.is_done(0, 1));
    let counts = open.counts().unwrap();
    assert_eq!((counts.occurred, counts.expired), (1, 1), "the hook is out");
    assert!(occurrence.registers().is_err(), "its vCPU went on");
    occurrence.answer(Verdict::Skip).unwrap();
    assert_eq!(vm.word(0, CALLS), 100, "a late verdict does nothing");
    drop(open);

    let closed = monitor.hook(&at.delivered(held(soon, Expiry::Closed))).unwrap();
    vm.work(0, 1);
    vm.wait_for(|_| closed.counts().unwrap().expired == 1);
    assert!(
        monitor.next(Duration::ZERO).unwrap().is_none(),
        "nobody fetched it in time"
    );
    let idle = vm.word(0, IDLE);
    assert_eq!((vm.word(0, CALLS), vm.status().as_str()), (100, "debug"));
    // Until its owner lets it go on: then the call happens, and is not told once more.
    vm.command(r#"{"execute":"cont"}"#);
    vm.wait_for(|m| m.is_done(0, 2));
    assert_eq!((vm.word(0, CALLS), closed.counts().unwrap().occurred), (101, 1));
    vm.wait_for(|m| m.word(0, IDLE) > idle);
    vm.work(0, 1);
    vm.wait_for(|_| closed.counts().unwrap().expired == 2);
    // Paused it stays when the monitor ends.
    drop((closed, monitor));
    assert_eq!(
        (vm.word(0, CALLS), vm.status().as_str(), is_open(&vm)),
        (101, "debug", false)
    );
    vm.command(r#"{"execute":"cont"}"#);
    vm.wait_for(|m| m.is_done(0, 3));
    assert_eq!(vm.word(0, CALLS), 102);
}

#[test]
fn the_verdict_pause_lasts_until_the_owner_ends_it() {
    let vm = Machine::start(2);
    let monitor = vm.monitor();
    let hook = monitor
        .hook(&Hook::execute(Gva(vm.guest.function)).delivered(patient()))
        .unwrap();
    vm.work(0, 2);
    next(&monitor).answer(Verdict::Pause).unwrap();
    vm.wait_for(|m| m.status() == "debug");
    assert_eq!(vm.word(0, CALLS), 0);
    // Hooks come and go meanwhile, and it stays paused.
    drop(monitor.hook(&Hook::execute(Gva(vm.guest.second))).unwrap());
    assert_eq!((vm.word(0, CALLS), vm.status().as_str()), (0, "debug"));
    vm.command(r#"{"execute":"cont"}"#);
    next(&monitor).answer(Verdict::Continue).unwrap();
    vm.wait_for(|m| m.is_done(0, 1));
    assert_eq!((vm.word(0, CALLS), hook.counts().unwrap().occurred), (2, 2));
    vm.lives(2);
}

#[test]
fn what_its_owner_paused_stays_paused() {
    let vm = Machine::start(1);
    vm.command(r#"{"execute":"stop"}"#);
    let monitor = vm.monitor();
    let hook = monitor
        .hook(&Hook::execute(Gva(vm.guest.function)).delivered(Delivery::Counted))
        .unwrap();
    vm.work(0, 5);
    let idle = vm.word(0, IDLE);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!((vm.status().as_str(), vm.word(0, IDLE)), ("paused", idle));
    vm.command(r#"{"execute":"cont"}"#);
    vm.wait_for(|m| m.is_done(0, 1));
    assert_eq!(hook.counts().unwrap().occurred, 5);
    // While hooks are there.
    vm.command(r#"{"execute":"stop"}"#);
    vm.wait_for(|m| m.status() == "paused");
    drop(hook);
    let hook = monitor
        .hook(&Hook::execute(Gva(vm.guest.second)).delivered(Delivery::Counted))
        .unwrap();
    assert_eq!(vm.status(), "paused");
    vm.command(r#"{"execute":"cont"}"#);
    vm.work(0, 5);
    vm.wait_for(|m| m.is_done(0, 2));
    assert_eq!(hook.counts().unwrap().occurred, 5);
    vm.command(r#"{"execute":"stop"}"#);
    vm.wait_for(|m| m.status() == "paused");
    drop((hook, monitor));
    assert_eq!((vm.status().as_str(), is_open(&vm)), ("paused", false));
    vm.command(r#"{"execute":"cont"}"#);
    vm.lives(1);
}

#[test]
fn a_stub_that_somebody_uses_is_left_alone() {
    let vm = Machine::start_with(1, &["-gdb", "unix:DIR/gdb,server=on,wait=off"]);
    let options = GdbOptions {
        timeout: Duration::from_millis(500),
    };
    // Nobody uses it: it serves us, and is there afterwards.
    let monitor = vm.monitor();
    let hook = monitor
        .hook(&Hook::execute(Gva(vm.guest.function)).delivered(Delivery::Counted))
        .unwrap();
    vm.work(0, 3);
    vm.wait_for(|m| m.is_done(0, 1));
    assert_eq!(hook.counts().unwrap().occurred, 3);
    let error = gdb::open(&vm.target, options).unwrap_err();
    assert!(matches!(error, EventError::Busy { .. }), "{error}");
    drop((hook, monitor));
    assert!(is_open(&vm));
    let debugger = UnixStream::connect(vm.dir().join("gdb")).unwrap();
    vm.wait_for(|m| m.status() == "paused");
    let error = gdb::open(&vm.target, options).unwrap_err();
    assert!(matches!(error, EventError::Busy { .. }), "{error}");
    assert_eq!(vm.status(), "paused");
    drop(debugger);
    vm.command(r#"{"execute":"cont"}"#);
    vm.lives(1);
    // By its name, while somebody else has the monitor.
    let _owner = UnixStream::connect(vm.dir().join("qmp")).unwrap();
    let spec: TargetSpec = format!("gdb:{}", vm.dir().join("gdb").display()).parse().unwrap();
    let attach_options = AttachOptions {
        timeout: options.timeout,
        ..AttachOptions::default()
    };
    let target = attach(&spec, &attach_options).unwrap();
    let monitor = gdb::open(&target, options).unwrap();
    let hook = monitor
        .hook(&Hook::execute(Gva(vm.guest.function)).delivered(Delivery::Counted))
        .unwrap();
    vm.work(0, 3);
    vm.wait_for(|m| m.is_done(0, 2));
    assert_eq!(hook.counts().unwrap().occurred, 3);
}

#[test]
fn a_machine_that_ends_is_gone() {
    let mut vm = Machine::start(1);
    let monitor = vm.monitor();
    let hook = monitor
        .hook(&Hook::execute(Gva(vm.guest.function)).delivered(patient()))
        .unwrap();
    vm.work(0, 1);
    let occurrence = next(&monitor);
    vm.kill();
    let error = occurrence.answer(Verdict::Continue).unwrap_err();
    assert!(matches!(error, EventError::Gone), "{error}");
    let error = monitor.next(PATIENCE).unwrap_err();
    assert!(matches!(error, EventError::Gone), "{error}");
    let error = monitor.hook(&Hook::execute(Gva(1))).unwrap_err();
    assert!(matches!(error, EventError::Gone), "{error}");
    drop((hook, monitor));
    // And one that ends while nothing happens.
    let mut vm = Machine::start(1);
    let monitor = vm.monitor();
    let waits = {
        let monitor = monitor.clone();
        std::thread::spawn(move || monitor.next(PATIENCE))
    };
    vm.kill();
    assert!(matches!(waits.join().unwrap(), Err(EventError::Gone)));
}

#[test]
fn who_waits_can_be_woken_and_others_can_arm_meanwhile() {
    let vm = Machine::start(1);
    let monitor = vm.monitor();
    let waits = {
        let monitor = monitor.clone();
        std::thread::spawn(move || monitor.next(PATIENCE))
    };
    let begun = Instant::now();
    while !waits.is_finished() {
        assert!(begun.elapsed() < PATIENCE / 2);
        drop(monitor.hook(&Hook::execute(Gva(vm.guest.second))).unwrap());
        monitor.wake();
    }
    assert!(waits.join().unwrap().unwrap().is_none());
}

#[test]
fn events_are_gone_through_until_somebody_wakes_or_the_machine_ends() {
    let mut vm = Machine::start(1);
    let monitor = vm.monitor();
    let hook = monitor
        .hook(&Hook::execute(Gva(vm.guest.function)).delivered(patient()))
        .unwrap();
    vm.work(0, 5);
    let mut seen = 0;
    for occurrence in monitor.events() {
        let occurrence = occurrence.unwrap();
        seen += 1;
        occurrence.answer(Verdict::Continue).unwrap();
        if seen == 5 {
            break;
        }
    }
    vm.wait_for(|m| m.is_done(0, 1));
    assert_eq!(
        (seen, vm.word(0, CALLS), hook.counts().unwrap().occurred),
        (5, 5, 5)
    );
    let waits = {
        let monitor = monitor.clone();
        std::thread::spawn(move || monitor.events().count())
    };
    while !waits.is_finished() {
        monitor.wake();
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(waits.join().unwrap(), 0, "woken");
    vm.kill();
    assert_eq!(monitor.events().count(), 0, "gone");
}

#[test]
fn what_its_owner_does_while_a_vcpu_is_held_changes_nothing() {
    let vm = Machine::start(2);
    let monitor = vm.monitor();
    let hook = monitor
        .hook(&Hook::execute(Gva(vm.guest.function)).delivered(patient()))
        .unwrap();
    vm.work(0, 1);
    let occurrence = next(&monitor);
    // It meets the breakpoint once more, which nobody is told of.
    let idle = vm.word(1, IDLE);
    vm.command(r#"{"execute":"cont"}"#);
    vm.wait_for(|m| m.status() == "debug" && m.word(1, IDLE) >= idle);
    occurrence.answer(Verdict::Continue).unwrap();
    vm.wait_for(|m| m.is_done(0, 1));
    assert_eq!((vm.word(0, CALLS), hook.counts().unwrap().occurred), (1, 1));
    // A reset keeps the hooks.
    vm.command(r#"{"execute":"system_reset"}"#);
    vm.wait_for(|m| m.status() == "running");
    vm.lives(2);
    vm.work(0, 1);
    next(&monitor).answer(Verdict::Continue).unwrap();
    vm.wait_for(|m| m.is_done(0, 2));
}

#[test]
fn a_stub_that_does_not_answer_is_given_up_and_the_guest_goes_on() {
    let vm = Machine::start(1);
    let signal = |name: &str| {
        let pid = vm.pid().to_string();
        assert!(
            Command::new("kill")
                .args([name, &pid])
                .status()
                .unwrap()
                .success()
        );
    };
    let options = GdbOptions {
        timeout: Duration::from_millis(500),
    };
    let monitor = gdb::open(&vm.target, options).unwrap();
    let hook = monitor
        .hook(&Hook::execute(Gva(vm.guest.function)).delivered(patient()))
        .unwrap();
    vm.work(0, 100);
    let occurrence = next(&monitor);
    signal("-STOP");
    let error = monitor.hook(&Hook::execute(Gva(vm.guest.second))).unwrap_err();
    assert!(matches!(error, EventError::Target(_)), "{error}");
    assert!(occurrence.answer(Verdict::Continue).is_err());
    assert!(monitor.next(PATIENCE).is_err());
    drop((hook, monitor));
    signal("-CONT");
    vm.wait_for(|m| m.is_done(0, 1));
    assert_eq!(vm.word(0, CALLS), 100);
    vm.lives(1);
    // What was given up is taken over.
    drop(vm.monitor());
    assert_eq!((vm.status(), is_open(&vm)), ("running".to_owned(), false));
}
