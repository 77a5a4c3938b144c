//! Hooks on instructions, and what verdicts do there.

use std::time::Duration;

use vmsight_arch::{Dtb, Gva};
use vmsight_events::{EventError, Monitor, Occurrence};
use vmsight_hooks::{
    Access, Delivery, Detail, Exception, Expiry, Feature, Hook, HookKind, Overflow, Range, Register, Scope,
    Verdict,
};

use crate::guest::{CALLS, STORED, SUM, root, upper};
use crate::machine::{Machine, PATIENCE};

pub(crate) fn held(deadline: Duration, expiry: Expiry) -> Delivery {
    Delivery::Held { deadline, expiry }
}

pub(crate) fn patient() -> Delivery {
    held(PATIENCE, Expiry::Open)
}

pub(crate) fn next(monitor: &Monitor) -> Occurrence {
    monitor.next(PATIENCE).unwrap().expect("an event in time")
}

/// What a round leaves in RAX, summed up over so many of them.
fn sum(rounds: u64) -> u64 {
    rounds * (rounds + 1) / 2
}

#[test]
fn every_call_is_an_event_and_the_guest_does_all_its_work() {
    let vm = Machine::start(1);
    let monitor = vm.monitor();
    let hook = monitor
        .hook(&Hook::execute(Gva(vm.guest.function)).delivered(patient()))
        .unwrap();
    vm.work(0, 10_000);
    for round in (1..=10_000_u64).rev() {
        let occurrence = next(&monitor);
        let event = occurrence.event();
        assert_eq!((event.vcpu, event.cr3, event.held), (0, root(0), true));
        assert_eq!(
            event.detail,
            Detail::Execute {
                rip: Gva(vm.guest.function)
            }
        );
        if round % 1000 == 0 {
            let registers = occurrence.registers().unwrap();
            assert_eq!((registers.rip, registers.rdi()), (vm.guest.function, round));
            assert_eq!(vm.word(0, CALLS), 10_000 - round, "it has not begun");
        }
        occurrence.answer(Verdict::Continue).unwrap();
    }
    vm.wait_for(|m| m.is_done(0, 1));
    assert_eq!((vm.word(0, CALLS), vm.word(0, SUM)), (10_000, sum(10_000)));
    let counts = hook.counts().unwrap();
    assert_eq!(
        (counts.occurred, counts.told, counts.dropped, counts.expired),
        (10_000, 10_000, 0, 0)
    );
    drop(hook);
    vm.work(0, 50_000);
    vm.wait_for(|m| m.is_done(0, 2));
    assert_eq!(
        monitor
            .next(Duration::ZERO)
            .unwrap()
            .map(|o| o.event().clone().sequence),
        None
    );
}

#[test]
fn two_vcpus_at_once_lose_no_call() {
    let vm = Machine::start(2);
    let monitor = vm.monitor();
    let told = Delivery::Told {
        overflow: Overflow::Block,
    };
    let both = monitor
        .hook(&Hook::execute(Gva(vm.guest.function)).delivered(Delivery::Counted))
        .unwrap();
    let hook = monitor
        .hook(&Hook::execute(Gva(vm.guest.function)).delivered(told))
        .unwrap();
    let second = Hook::execute(Gva(vm.guest.function))
        .within(Scope::Dtb(Dtb(root(1))))
        .delivered(Delivery::Counted);
    let second = monitor.hook(&second).unwrap();
    vm.work(0, 2000);
    vm.work(1, 2000);
    let mut seen = [0, 0];
    while seen != [2000, 2000] {
        let occurrence = next(&monitor);
        assert_eq!(
            (occurrence.event().hook, occurrence.event().held),
            (hook.id(), false)
        );
        seen[occurrence.event().vcpu as usize] += 1;
    }
    vm.wait_for(|m| m.is_done(0, 1) && m.is_done(1, 1));
    for vcpu in [0, 1] {
        assert_eq!((vm.word(vcpu, CALLS), vm.word(vcpu, SUM)), (2000, sum(2000)));
    }
    assert_eq!(both.counts().unwrap().occurred, 4000);
    // The two have page tables of their own: 0xf4000 and 0xf6000 are no pair that page-table isolation would make.
    assert_eq!(second.counts().unwrap().occurred, 2000);
}

#[test]
fn verdicts_change_what_happens() {
    let vm = Machine::start(1);
    let monitor = vm.monitor();
    let _hook = monitor
        .hook(&Hook::execute(Gva(vm.guest.function)).delivered(patient()))
        .unwrap();
    let mut done = 0;
    let mut round = |verdict: Verdict| {
        let (calls, before) = (vm.word(0, CALLS), vm.word(0, SUM));
        vm.work(0, 1);
        let given = next(&monitor).answer(verdict);
        done += 1;
        vm.wait_for(|m| m.is_done(0, done));
        (vm.word(0, CALLS) - calls, vm.word(0, SUM) - before, given)
    };
    let (calls, sum, given) = round(Verdict::Continue);
    assert_eq!((calls, sum, given.is_ok()), (1, 1, true));
    // The first instruction counts the call: passed over, the rest of the function is executed.
    let (calls, sum, given) = round(Verdict::Skip);
    assert_eq!((calls, sum, given.is_ok()), (0, 1, true));
    let (calls, sum, given) = round(Verdict::Return(1234));
    assert_eq!((calls, sum, given.is_ok()), (0, 1234, true));
    let (calls, sum, given) = round(Verdict::SetRegisters(vec![(Register::RDI, 77)]));
    assert_eq!((calls, sum, given.is_ok()), (1, 77, true));
    let elsewhere = vec![(Register::Rip, vm.guest.second), (Register::RDI, 5)];
    let (calls, sum, given) = round(Verdict::SetRegisters(elsewhere));
    assert_eq!((calls, sum, given.is_ok()), (0, 5, true));
    // What does not fit is an error, and the call goes on.
    for verdict in [
        Verdict::Deny,
        Verdict::SetData(1),
        Verdict::Inject(Exception::GENERAL_PROTECTION),
        Verdict::Step(0),
        Verdict::SetRegisters(vec![(Register::RDI, 9), (Register::Gpr(16), 1)]),
    ] {
        let (calls, sum, given) = round(verdict.clone());
        assert_eq!((calls, sum), (1, 1), "{verdict:?}");
        let error = given.unwrap_err();
        assert!(
            matches!(&error, EventError::Verdict { verdict: kind, .. } if *kind == verdict.kind()),
            "{error}"
        );
    }
    let (calls, sum, given) = round(Verdict::Remove);
    assert_eq!((calls, sum, given.is_ok()), (1, 1, true));
    vm.work(0, 100);
    done += 1;
    vm.wait_for(|m| m.is_done(0, done));
    assert!(monitor.next(Duration::ZERO).unwrap().is_none(), "the hook is out");
}

#[test]
fn hooks_at_one_place_take_turns() {
    let vm = Machine::start(1);
    let monitor = vm.monitor();
    let at = Hook::execute(Gva(vm.guest.function));
    let first = monitor.hook(&at.clone().delivered(patient())).unwrap();
    let second = monitor.hook(&at.clone().delivered(patient())).unwrap();
    let told = Delivery::Told {
        overflow: Overflow::Drop,
    };
    let told = monitor.hook(&at.delivered(told)).unwrap();
    vm.work(0, 1);
    // Who holds nobody is told first.
    let occurrence = next(&monitor);
    assert_eq!(occurrence.event().hook, told.id());
    let occurrence = next(&monitor);
    assert_eq!(occurrence.event().hook, first.id());
    occurrence
        .answer(Verdict::SetRegisters(vec![(Register::RDI, 50)]))
        .unwrap();
    let occurrence = next(&monitor);
    assert_eq!(occurrence.event().hook, second.id());
    assert_eq!(
        occurrence.registers().unwrap().rdi(),
        50,
        "what the first one changed"
    );
    occurrence.answer(Verdict::Continue).unwrap();
    vm.wait_for(|m| m.is_done(0, 1));
    assert_eq!((vm.word(0, CALLS), vm.word(0, SUM)), (1, 50));
    // By the first one's verdict the call does not happen: the second one is not asked.
    vm.work(0, 1);
    let _ = next(&monitor);
    next(&monitor).answer(Verdict::Return(0)).unwrap();
    vm.wait_for(|m| m.is_done(0, 2));
    assert_eq!(second.counts().unwrap().occurred, 1);
    // Without the first the other two go on.
    drop(first);
    vm.work(0, 1);
    assert_eq!(next(&monitor).event().hook, told.id());
    assert_eq!(next(&monitor).event().hook, second.id());
    vm.wait_for(|m| m.is_done(0, 3));
    assert_eq!(vm.word(0, CALLS), 2);
}

#[test]
fn neighbouring_instructions_and_repeated_ones() {
    let vm = Machine::start(1);
    let monitor = vm.monitor();
    let counted = |at: u64| {
        monitor
            .hook(&Hook::execute(Gva(at)).delivered(Delivery::Counted))
            .unwrap()
    };
    let hooks = [
        vm.guest.function,
        vm.guest.second,
        vm.guest.returns,
        vm.guest.fill,
    ]
    .map(counted);
    vm.work(0, 500);
    vm.wait_for(|m| m.is_done(0, 1));
    for hook in &hooks {
        assert_eq!(hook.counts().unwrap().occurred, 500);
    }
    assert_eq!(
        vm.word(0, 0x100),
        0x0101_0101_0101_0101,
        "the sum's low byte: that of 500"
    );
}

#[test]
fn hooks_come_and_go_while_two_vcpus_work() {
    let vm = Machine::start(2);
    let monitor = vm.monitor();
    const ROUNDS: u64 = 300_000;
    vm.work(0, ROUNDS);
    vm.work(1, ROUNDS);
    let mut told = 0;
    for turn in 0..60 {
        let at = [vm.guest.function, vm.guest.second, vm.guest.fill][turn % 3];
        let hook = monitor
            .hook(&Hook::execute(Gva(at)).delivered(patient()))
            .unwrap();
        let watch = (turn % 4 == 0).then(|| {
            let hook = Hook::write(Gva(upper(0, STORED)), 8).delivered(Delivery::Counted);
            monitor.hook(&hook).unwrap()
        });
        for _ in 0..turn % 5 {
            if let Some(occurrence) = monitor.next(Duration::from_millis(20)).unwrap() {
                told += 1;
                occurrence.answer(Verdict::Continue).unwrap();
            }
        }
        // Also while one of its events is held, and with others in the queue.
        drop(watch);
        drop(hook);
    }
    assert!(told > 0);
    vm.wait_for(|m| m.is_done(0, 1) && m.is_done(1, 1));
    for vcpu in [0, 1] {
        assert_eq!((vm.word(vcpu, CALLS), vm.word(vcpu, SUM)), (ROUNDS, sum(ROUNDS)));
    }
}

#[test]
fn what_a_stub_cannot_do_names_who_can() {
    let vm = Machine::start(1);
    let monitor = vm.monitor();
    let features: Vec<Feature> = monitor.capabilities().iter().map(|c| c.feature).collect();
    assert_eq!(
        features,
        [
            Feature::Execute,
            Feature::VirtualRead,
            Feature::VirtualWrite,
            Feature::Step,
            Feature::StepUntil
        ]
    );
    for kind in [
        HookKind::Msr {
            index: 0xc000_0082,
            access: Access::WRITE,
        },
        HookKind::Memory {
            range: Range::Physical {
                start: vmsight_arch::Gpa(0x1000),
                len: 8,
            },
            access: Access::WRITE,
        },
        HookKind::Cpuid,
    ] {
        let error = monitor.hook(&Hook::new(kind)).unwrap_err();
        let EventError::Unsupported { can, .. } = &error else {
            panic!("{error}")
        };
        assert!(error.to_string().contains(can[0].name()), "{error}");
    }
    let code = HookKind::Memory {
        range: Range::Physical {
            start: vmsight_arch::Gpa(0x1000),
            len: 8,
        },
        access: Access::EXECUTE,
    };
    let error = monitor.hook(&Hook::new(code)).unwrap_err();
    assert!(
        error.to_string().contains("physical execute; no backend"),
        "who can, if anybody: {error}"
    );
    let error = monitor
        .hook(&Hook::new(HookKind::Step { vcpu: 7, count: 1 }))
        .unwrap_err();
    assert!(matches!(error, EventError::Limit { .. }), "{error}");
    vm.lives(1);
}
