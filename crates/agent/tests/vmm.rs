//! A tiny VMM of our own: real KVM, with the agent preloaded. It is this test binary once more, told by a variable which
//! guest to run; the test proper is the monitor.
//!
//! Each guest is a few instructions of real-mode or flat 64-bit code with counts that are known beforehand, so that what
//! was told can be compared with what happened.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use support::{GuestKind, Machine, SLOT};
use vmsight_arch::{Gpa, Gva};
use vmsight_events::{EventError, Monitor};
use vmsight_hooks::{
    Access, Delivery, Detail, Exception, Expiry, Hook, HookKind, Overflow, Range, Register, Verdict,
};

/// The VMM, when this binary is started as one. First by its name: the harness runs tests in that order, and this one only
/// where the variable is set.
#[test]
fn a_vmm() {
    support::vmm_if_asked();
}

/// The same for the monitor that is to be killed.
#[test]
fn a_monitor() {
    support::monitor_if_asked();
}

const LSTAR: u32 = 0xc000_0082;

fn execute(at: u64) -> Hook {
    Hook::execute(Gva(at))
}

/// All events until the guest says that it is done.
fn answer_all(
    machine: &mut Machine,
    monitor: &Monitor,
    verdict: impl Fn(&Detail) -> Verdict,
) -> Vec<(u32, Detail)> {
    let mut events = Vec::new();
    let end = Instant::now() + Duration::from_secs(60);
    while Instant::now() < end {
        match monitor.next(Duration::from_millis(50)) {
            Ok(Some(occurrence)) => {
                let (vcpu, detail) = (occurrence.event().vcpu, occurrence.event().detail);
                occurrence.answer(verdict(&detail)).unwrap();
                events.push((vcpu, detail));
            }
            Ok(None) if machine.is_done() => return events,
            Ok(None) => {}
            Err(EventError::Gone) => return events,
            Err(error) => panic!("{error}"),
        }
    }
    panic!("the guest did not come to its end: {} events", events.len());
}

#[test]
fn every_execution_is_told_once() {
    every_execution(&[], &["function", "inc", "push", "pushf"]);
}

#[test]
fn every_execution_of_an_int3_is_told_once() {
    if !support::has_int3() {
        return;
    }
    // All hardware breakpoints are taken. NOP and PUSH are done by the agent, the others are stepped over.
    let elsewhere = [0xdead_0000, 0xdead_1000, 0xdead_2000, 0xdead_3000];
    every_execution(&elsewhere, &["inc", "nop", "push", "inc_again", "pushf"]);
}

/// The function is called 1000 times on each of two vCPUs.
fn every_execution(elsewhere: &[u64], labels: &[&str]) {
    let Some(mut machine) = Machine::start(GuestKind::Calls, 2) else {
        return;
    };
    let monitor = machine.monitor();
    let at = machine.labels();
    let arm = |at: u64| monitor.hook(&execute(at)).unwrap();
    let elsewhere: Vec<_> = elsewhere.iter().map(|at| arm(*at)).collect();
    let guards: Vec<_> = labels.iter().map(|label| arm(at[label])).collect();
    machine.go();
    let events = answer_all(&mut machine, &monitor, |_| Verdict::Continue);
    for (label, guard) in labels.iter().zip(&guards) {
        for vcpu in 0..2 {
            let told = events
                .iter()
                .filter(|(v, d)| *v == vcpu && *d == Detail::Execute { rip: Gva(at[label]) })
                .count();
            assert_eq!(told, 1000, "{label}, vCPU {vcpu}");
        }
        assert_eq!(guard.counts().unwrap().occurred, 2000, "{label}");
    }
    // What the guest counted itself: two counters for each call, and no TF in any flags that it pushed.
    assert_eq!(machine.results(), [2000, 2000, 0]);
    drop((guards, elsewhere));
    assert!(machine.code_is_clean());
    machine.finish();
}

#[test]
fn verdicts_change_what_the_guest_does() {
    let Some(mut machine) = Machine::start(GuestKind::Calls, 1) else {
        return;
    };
    let monitor = machine.monitor();
    let at = machine.labels();
    let function = monitor.hook(&execute(at["function"])).unwrap();
    let inc = monitor.hook(&execute(at["inc"])).unwrap();
    let mut calls = 0;
    let mut incs = 0;
    machine.go();
    loop {
        let Some(occurrence) = monitor.next(Duration::from_secs(20)).unwrap() else {
            panic!("no event after {calls} calls");
        };
        let registers = occurrence.registers().unwrap();
        assert_eq!(registers.rip, occurrence.event().detail_rip());
        let verdict = if occurrence.event().hook == function.id() {
            calls += 1;
            // RBX counts the calls down from 1000.
            assert_eq!(registers.rbx(), 1001 - calls);
            match calls {
                1..=100 => Verdict::Return(7),
                _ => Verdict::Continue,
            }
        } else {
            incs += 1;
            match incs {
                1..=50 => Verdict::Skip,
                51 => Verdict::SetRegisters(vec![(Register::Gpr(3), 1)]),
                _ => Verdict::Continue,
            }
        };
        let last = incs == 51;
        occurrence.answer(verdict).unwrap();
        if last {
            break;
        }
    }
    // Deny does not fit an execution; nothing waits any more.
    drop((function, inc));
    machine.wait_until_done();
    // 100 calls returned at once, 50 skipped the first INC, and after the 151st the loop ended.
    assert_eq!(calls, 151);
    assert_eq!(machine.results(), [1, 51, 0]);
    machine.finish();
}

trait Rip {
    fn detail_rip(&self) -> u64;
}

impl Rip for vmsight_hooks::Event {
    fn detail_rip(&self) -> u64 {
        match self.detail {
            Detail::Execute { rip } => rip.0,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn msr_writes_are_seen_denied_and_changed() {
    let Some(mut machine) = Machine::start(GuestKind::Msr, 1) else {
        return;
    };
    let monitor = machine.monitor();
    let msr = |access| HookKind::Msr { index: LSTAR, access };
    let _write = monitor.hook(&Hook::new(msr(Access::WRITE))).unwrap();
    let _read = monitor.hook(&Hook::new(msr(Access::READ))).unwrap();
    machine.go();
    // The guest writes 1 to 4 and reads back after each; #GP is counted by its handler.
    let events = answer_all(&mut machine, &monitor, |detail| match detail {
        Detail::Msr {
            access: Access::WRITE,
            new: Some(2),
            ..
        } => Verdict::Deny,
        Detail::Msr {
            access: Access::WRITE,
            new: Some(3),
            ..
        } => Verdict::SetData(0x33),
        Detail::Msr {
            access: Access::READ,
            new: Some(4),
            ..
        } => Verdict::SetData(0x44),
        _ => Verdict::Continue,
    });
    let values: Vec<_> = events
        .iter()
        .map(|(_, d)| match d {
            Detail::Msr { access, old, new, .. } => (access.bits(), *old, *new),
            other => panic!("{other:?}"),
        })
        .collect();
    let (r, w) = (Access::READ.bits(), Access::WRITE.bits());
    assert_eq!(
        values,
        [
            (w, Some(0), Some(1)),
            (r, Some(1), Some(1)),
            (w, Some(1), Some(2)),
            (r, Some(1), Some(1)),
            (w, Some(1), Some(3)),
            (r, Some(0x33), Some(0x33)),
            (w, Some(0x33), Some(4)),
            (r, Some(4), Some(4)),
        ]
    );
    assert_eq!(
        machine.results_n(5),
        [1, 1, 0x33, 0x44, 1],
        "what it read, and its #GPs"
    );
    machine.finish();
}

#[test]
fn memory_writes_are_seen_denied_and_changed() {
    for vcpus in [1, 2] {
        let Some(mut machine) = Machine::start(GuestKind::Writes, vcpus) else {
            return;
        };
        let monitor = machine.monitor();
        // One counter per vCPU in a watched page; a third word in the page is written too and not watched.
        let range = Range::Physical {
            start: Gpa(support::WATCHED),
            len: 16,
        };
        let hook = Hook::new(HookKind::Memory {
            range,
            access: Access::WRITE,
        });
        let guard = monitor.hook(&hook).unwrap();
        machine.go();
        let events = answer_all(&mut machine, &monitor, |detail| match detail {
            Detail::Memory { new: Some(10), .. } => Verdict::Deny,
            Detail::Memory { new: Some(20), .. } => Verdict::SetData(0x2000),
            _ => Verdict::Continue,
        });
        for vcpu in 0..vcpus {
            let gpa = Gpa(support::WATCHED + 8 * u64::from(vcpu));
            let mine: Vec<_> = events
                .iter()
                .filter(|(v, _)| *v == vcpu)
                .map(|(_, d)| *d)
                .collect();
            assert_eq!(mine.len(), 1000);
            for (n, detail) in (1..).zip(mine) {
                let old = match n {
                    11 => 9,
                    21 => 0x2000,
                    _ => n - 1,
                };
                let expected = Detail::Memory {
                    gva: None,
                    gpa: Some(gpa),
                    len: 8,
                    access: Access::WRITE,
                    old: Some(old),
                    new: Some(n),
                    done: false,
                };
                assert_eq!(detail, expected);
            }
        }
        drop(guard);
        let mut memory = machine.watched_words(3);
        memory.truncate(vcpus as usize);
        assert_eq!(memory, vec![1000; vcpus as usize]);
        machine.finish();
    }
}

#[test]
fn memory_reads_are_seen_and_changed() {
    let Some(mut machine) = Machine::start(GuestKind::Reads, 1) else {
        return;
    };
    let monitor = machine.monitor();
    let hook = Hook::new(HookKind::Memory {
        range: Range::Virtual {
            start: Gva(support::WATCHED),
            len: 8,
        },
        access: Access::READ,
    });
    let _guard = monitor.hook(&hook).unwrap();
    machine.go();
    let events = answer_all(&mut machine, &monitor, |detail| match detail {
        Detail::Memory { old: Some(5), .. } => Verdict::SetData(0x100),
        _ => Verdict::Continue,
    });
    assert_eq!(
        events.len(),
        100,
        "the reads, and not the writes of the same word"
    );
    assert!(matches!(
        events[0].1,
        Detail::Memory {
            gva: Some(Gva(support::WATCHED)),
            ..
        }
    ));
    // The guest adds up what it reads: 0 to 99, with one changed.
    assert_eq!(machine.results_n(1), [99 * 100 / 2 - 5 + 0x100]);
    machine.finish();
}

#[test]
fn a_guest_that_is_stepped_does_not_see_it() {
    let Some(mut machine) = Machine::start(GuestKind::Calls, 1) else {
        return;
    };
    let monitor = machine.monitor();
    let at = machine.labels();
    let function = monitor.hook(&execute(at["function"])).unwrap();
    machine.go();
    // Each call to its end, PUSHF among its instructions, for the first hundred.
    let mut steps = 0;
    while steps < 100 {
        let occurrence = monitor.next(Duration::from_secs(20)).unwrap().expect("an event");
        let verdict = match occurrence.event().detail {
            Detail::Execute { .. } => Verdict::Step(10),
            _ => {
                steps += 1;
                Verdict::Continue
            }
        };
        occurrence.answer(verdict).unwrap();
    }
    drop(function);
    machine.wait_until_done();
    assert_eq!(machine.results(), [1000, 1000, 0]);
    machine.finish();
}

#[test]
fn a_guest_that_is_stepped_through_does_not_see_it() {
    let Some(mut machine) = Machine::start(GuestKind::Calls, 1) else {
        return;
    };
    let monitor = machine.monitor();
    let steps = HookKind::Step { vcpu: 0, count: 2000 };
    let guard = monitor.hook(&Hook::new(steps)).unwrap();
    machine.go();
    let events = answer_all(&mut machine, &monitor, |detail| match detail {
        Detail::Step { .. } => Verdict::Step(2000),
        other => panic!("{other:?}"),
    });
    assert!(events.len() >= 6, "a call has 13 instructions: {}", events.len());
    assert_eq!(machine.results(), [1000, 1000, 0]);
    drop(guard);
    machine.finish();
}

#[test]
fn ports_are_seen_denied_and_changed() {
    let Some(mut machine) = Machine::start(GuestKind::Ports, 1) else {
        return;
    };
    let monitor = machine.monitor();
    let hook = Hook::new(HookKind::Port {
        first: 0x500,
        last: 0x500,
        access: Access::READ | Access::WRITE,
    });
    let _guard = monitor.hook(&hook).unwrap();
    machine.go();
    let events = answer_all(&mut machine, &monitor, |detail| match detail {
        Detail::Port { value: Some(3), .. } => Verdict::Deny,
        Detail::Port { value: Some(4), .. } => Verdict::SetData(100),
        Detail::Port {
            access: Access::READ, ..
        } => Verdict::SetData(7),
        _ => Verdict::Continue,
    });
    assert_eq!(events.len(), 20);
    assert_eq!(machine.word(support::PORT), 55 - 3 - 4 + 100, "what the VMM got");
    assert_eq!(
        machine.results_n(1),
        [70],
        "what the guest read, and not the VMM's 5"
    );
    machine.finish();
}

#[test]
fn an_exception_can_be_raised_instead() {
    let Some(mut machine) = Machine::start(GuestKind::Calls, 1) else {
        return;
    };
    let monitor = machine.monitor();
    // The guest's handler counts, and passes over two bytes: those of the instruction.
    let _guard = monitor.hook(&execute(machine.labels()["nop"])).unwrap();
    machine.go();
    let calls = std::cell::Cell::new(0);
    let events = answer_all(&mut machine, &monitor, |_| {
        calls.set(calls.get() + 1);
        match calls.get() % 10 {
            0 => Verdict::Inject(Exception::GENERAL_PROTECTION),
            _ => Verdict::Continue,
        }
    });
    assert_eq!(events.len(), 1000);
    assert_eq!(machine.results(), [1000, 1000, 0]);
    assert_eq!(machine.results_n(5)[4], 100, "faults");
    machine.finish();
}

#[test]
fn a_reset_takes_out_what_means_nothing_any_more() {
    let Some(mut machine) = Machine::start(GuestKind::Calls, 1) else {
        return;
    };
    let monitor = machine.monitor();
    let arm = |at: u64| monitor.hook(&execute(at)).unwrap();
    let elsewhere: Vec<_> = (0..4).map(|n| arm(0xdead_0000 + n)).collect();
    let inc = arm(machine.labels()["inc"]);
    assert!(!machine.code_is_clean(), "an INT3 is there");
    assert_eq!(machine.command("reset"), "ok");
    assert!(machine.code_is_clean());
    machine.go();
    assert_eq!(answer_all(&mut machine, &monitor, |_| Verdict::Continue).len(), 0);
    assert_eq!(machine.results(), [1000, 1000, 0]);
    drop((elsewhere, inc));
    machine.finish();
}

#[test]
fn steps_are_counted() {
    let Some(mut machine) = Machine::start(GuestKind::Calls, 1) else {
        return;
    };
    let monitor = machine.monitor();
    let at = machine.labels();
    let function = monitor.hook(&execute(at["function"])).unwrap();
    machine.go();
    let first = monitor
        .next(Duration::from_secs(20))
        .unwrap()
        .expect("the first call");
    first.answer(Verdict::Step(3)).unwrap();
    let step = monitor
        .next(Duration::from_secs(20))
        .unwrap()
        .expect("three steps later");
    // Two NOPs and a PUSH are behind it.
    assert_eq!(step.event().detail, Detail::Step { rip: Gva(at["inc"]) });
    drop(step);
    drop(function);
    machine.wait_until_done();
    assert_eq!(machine.results(), [1000, 1000, 0]);
    machine.finish();
}

#[test]
fn a_monitor_that_is_killed_leaves_the_guest_as_it_was() {
    for kill in 0..3 {
        let Some(mut machine) = Machine::start(GuestKind::Calls, 2) else {
            return;
        };
        let mut monitor = machine.monitor_process();
        machine.go();
        // It has hooked, was told at least once, and holds a vCPU for ever.
        monitor.wait_until_it_holds();
        let killed = Instant::now();
        monitor.kill();
        machine.wait_until_done();
        let took = killed.elapsed();
        assert!(
            took < Duration::from_secs(30),
            "the guest went on only after {took:?}"
        );
        assert_eq!(machine.results(), [2000, 2000, 0], "round {kill}");
        assert!(machine.code_is_clean(), "an INT3 stayed behind");
        // And the next monitor is welcome.
        let next = machine.monitor();
        drop(next.hook(&execute(machine.labels()["inc"])).unwrap());
        drop(next);
        machine.finish();
    }
}

#[test]
fn a_monitor_that_hangs_does_not_stop_the_guest() {
    let Some(mut machine) = Machine::start(GuestKind::Calls, 1) else {
        return;
    };
    let monitor = machine.monitor();
    let at = machine.labels();
    let hook = execute(at["function"]).delivered(Delivery::Held {
        deadline: Duration::from_millis(20),
        expiry: Expiry::Open,
    });
    let guard = monitor.hook(&hook).unwrap();
    machine.go();
    machine.wait_until_done();
    assert_eq!(machine.results(), [1000, 1000, 0]);
    let counts = guard.counts().unwrap();
    assert_eq!(
        (counts.told, counts.expired),
        (1, 1),
        "told once, and taken out: {counts:?}"
    );
    let late = monitor
        .next(Duration::from_secs(1))
        .unwrap()
        .expect("the event was told");
    assert!(matches!(
        late.answer(Verdict::Skip),
        Err(EventError::Verdict { .. })
    ));
    drop(guard);
    machine.finish();
}

#[test]
fn a_hook_that_fails_closed_pauses_the_vm() {
    let Some(mut machine) = Machine::start(GuestKind::Calls, 2) else {
        return;
    };
    let monitor = machine.monitor();
    let at = machine.labels();
    let hook = execute(at["function"]).delivered(Delivery::Held {
        deadline: Duration::from_millis(20),
        expiry: Expiry::Closed,
    });
    let guard = monitor.hook(&hook).unwrap();
    machine.go();
    let _event = monitor
        .next(Duration::from_secs(20))
        .unwrap()
        .expect("the first call");
    std::thread::sleep(Duration::from_millis(500));
    assert!(!machine.is_done());
    let before = machine.results();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(machine.results(), before, "nothing runs");
    drop(guard);
    drop(_event);
    drop(monitor);
    assert!(!machine.is_done(), "an orderly end does not resume it");
    machine.backend().resume().unwrap();
    machine.wait_until_done();
    assert_eq!(machine.results(), [2000, 2000, 0]);
    machine.finish();
}

#[test]
fn what_is_only_told_holds_nobody() {
    let Some(mut machine) = Machine::start(GuestKind::Calls, 2) else {
        return;
    };
    let monitor = machine.monitor();
    let at = machine.labels();
    let told = |overflow| execute(at["function"]).delivered(Delivery::Told { overflow });
    let dropping = monitor.hook(&told(Overflow::Drop)).unwrap();
    let counted = monitor
        .hook(&execute(at["inc"]).delivered(Delivery::Counted))
        .unwrap();
    machine.go();
    machine.wait_until_done();
    // Nobody read: each ring holds so many, and the rest was counted.
    let counts = dropping.counts().unwrap();
    assert_eq!((counts.occurred, counts.told, counts.dropped), (2000, 1024, 976));
    assert_eq!(counted.counts().unwrap().occurred, 2000);
    let mut last = None;
    let mut read = 0;
    while let Some(occurrence) = monitor.next(Duration::ZERO).unwrap() {
        assert!(last < Some(occurrence.event().sequence), "in order");
        last = Some(occurrence.event().sequence);
        read += 1;
    }
    assert_eq!(read, 1024);
    drop((dropping, counted));
    machine.finish();
}

/// How often hooks are armed and taken out under load.
const ROUNDS: u64 = 60;

#[test]
fn hooks_come_and_go_under_load() {
    let Some(mut machine) = Machine::start(GuestKind::Many, 2) else {
        return;
    };
    let monitor = machine.monitor();
    let at = machine.labels();
    machine.go();
    let (mut rounds, mut seen) = (0, 0);
    while !machine.is_done() {
        // Hardware, INT3, pages, MSRs, in turn and together.
        let breakpoints = if support::has_int3() { rounds % 5 } else { 0 };
        let fill: Vec<_> = (0..breakpoints)
            .map(|n| monitor.hook(&execute(0xdead_0000 + n)).unwrap())
            .collect();
        let label = ["inc", "nop", "push", "pushf", "function"][rounds as usize % 5];
        let execute = monitor.hook(&execute(at[label])).unwrap();
        let write = Hook::new(HookKind::Memory {
            range: Range::Physical {
                start: Gpa(support::RESULTS & !0xfff),
                len: 8,
            },
            access: Access::WRITE,
        });
        let write = monitor.hook(&write).unwrap();
        for _ in 0..20 {
            if let Some(occurrence) = monitor.next(Duration::from_millis(1)).unwrap() {
                drop(occurrence);
                seen += 1;
            }
        }
        drop((execute, write, fill));
        rounds += 1;
        if rounds == ROUNDS {
            machine.let_end();
        }
    }
    assert!(rounds >= ROUNDS && seen > 100, "{rounds} rounds, {seen} events");
    let [first, second, flags] = machine.results();
    assert_eq!(first, second, "each call did both halves, once");
    assert_eq!(first, machine.calls(), "and no call was lost or done twice");
    assert_eq!(flags, 0, "no flags of ours were seen");
    assert!(machine.code_is_clean());
    machine.finish();
}

#[test]
fn a_second_monitor_is_refused_until_the_first_goes() {
    let Some(machine) = Machine::start(GuestKind::Many, 1) else {
        return;
    };
    let first = machine.monitor();
    for _ in 0..50 {
        assert!(matches!(machine.try_backend(), Err(EventError::Busy { .. })));
    }
    drop(first);
    drop(machine.monitor());
    machine.let_end();
    machine.go();
    machine.finish();
}

#[test]
fn what_the_vmm_does_itself_still_works() {
    let Some(mut machine) = Machine::start(GuestKind::Writes, 1) else {
        return;
    };
    let monitor = machine.monitor();
    let hook = Hook::new(HookKind::Memory {
        range: Range::Physical {
            start: Gpa(support::WATCHED),
            len: 8,
        },
        access: Access::WRITE,
    });
    let _guard = monitor.hook(&hook).unwrap();
    let breakpoint = monitor.hook(&execute(0xdead_0000)).unwrap();
    // A slot that comes with a number that ours may have, one that goes, and the one that is cut, logged and not.
    assert_eq!(machine.command("add-slot"), "ok");
    assert_eq!(machine.command("log"), "ok");
    assert_eq!(
        machine.command("dirty"),
        "ok",
        "the log is that of the whole slot"
    );
    assert_eq!(machine.command("unlog"), "ok");
    assert_eq!(machine.command("remove-slot"), "ok");
    // A debugger of the VMM's own is refused while we are there, and we while it is.
    assert_eq!(machine.command("debug"), "busy");
    drop(breakpoint);
    assert_eq!(machine.command("debug"), "ok");
    assert!(matches!(
        monitor.hook(&execute(0xdead_0000)),
        Err(EventError::Busy { .. })
    ));
    assert_eq!(machine.command("undebug"), "ok");
    machine.go();
    let events = answer_all(&mut machine, &monitor, |_| Verdict::Continue);
    assert_eq!(events.len(), 1000, "slot {SLOT} is watched again");
    machine.finish();
}
