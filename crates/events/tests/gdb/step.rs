//! Single steps.

use vmsight_arch::Gva;
use vmsight_events::EventError;
use vmsight_hooks::{Condition, Delivery, Detail, Hook, HookKind, Register, StepEnd, Value, Verdict};

use crate::execute::{next, patient};
use crate::guest::{CALLS, IDLE, SLEEP, STORED, upper};
use crate::machine::Machine;

#[test]
fn a_vcpu_makes_so_many_steps_and_the_others_stand() {
    let vm = Machine::start(2);
    let monitor = vm.monitor();
    let kind = HookKind::Step { vcpu: 1, count: 140 };
    let _hook = monitor.hook(&Hook::new(kind).delivered(patient())).unwrap();
    let occurrence = next(&monitor);
    assert_eq!(occurrence.event().vcpu, 1);
    assert!(matches!(occurrence.event().detail, Detail::Step { .. }));
    // The loop in which it waits has seven instructions.
    let (idle, other) = (vm.word(1, IDLE), vm.word(0, IDLE));
    occurrence.answer(Verdict::Step(70)).unwrap();
    let occurrence = next(&monitor);
    assert_eq!((vm.word(1, IDLE) - idle, vm.word(0, IDLE) - other), (10, 0));
    occurrence.answer(Verdict::Continue).unwrap();
    vm.lives(2);
}

#[test]
fn steps_from_a_hook_pass_through_others() {
    let vm = Machine::start(1);
    let monitor = vm.monitor();
    let first = monitor
        .hook(&Hook::execute(Gva(vm.guest.function)).delivered(patient()))
        .unwrap();
    let second = monitor
        .hook(&Hook::execute(Gva(vm.guest.second)).delivered(Delivery::Counted))
        .unwrap();
    vm.work(0, 2);
    next(&monitor).answer(Verdict::Step(3)).unwrap();
    let occurrence = next(&monitor);
    assert_eq!(occurrence.event().hook, first.id());
    assert_eq!(
        occurrence.event().detail,
        Detail::Step {
            rip: Gva(vm.guest.returns),
            made: 3,
            end: StepEnd::Count,
        }
    );
    assert_eq!(second.counts().unwrap().occurred, 1);
    assert_eq!(vm.word(0, CALLS), 1);
    occurrence.answer(Verdict::Step(1)).unwrap();
    drop(next(&monitor));
    next(&monitor).answer(Verdict::Continue).unwrap();
    vm.wait_for(|m| m.is_done(0, 1));
    assert_eq!((second.counts().unwrap().occurred, vm.word(0, CALLS)), (2, 2));
}

#[test]
fn steps_end_where_a_condition_holds_or_the_count_is_reached() {
    let vm = Machine::start(1);
    let monitor = vm.monitor();
    let first = Hook::execute(Gva(vm.guest.function)).delivered(patient());
    let first = monitor.hook(&first).unwrap();
    vm.work(0, 9);
    let occurrence = next(&monitor);
    let until = |condition: &Condition, most| {
        let hook = Hook::step_until(0, condition, most).unwrap().delivered(patient());
        monitor.hook(&hook).unwrap()
    };
    // The function has three instructions, the last two of four bytes.
    let inside = Condition::rip_within(Gva(vm.guest.function), vm.guest.second + 4 - vm.guest.function);
    let left = until(&!inside, 1000);
    occurrence.answer(Verdict::Remove).unwrap();
    let step = |rip, made, end| Detail::Step {
        rip: Gva(rip),
        made,
        end,
    };
    let occurrence = next(&monitor);
    assert_eq!(occurrence.event().hook, left.id());
    assert_eq!(
        occurrence.event().detail,
        step(vm.guest.returns, 3, StepEnd::Condition)
    );
    let counts = left.counts().unwrap();
    assert_eq!((counts.occurred, counts.filtered, counts.told), (3, 2, 1));
    // R13 is the vCPU's page. A round has 13 instructions, and eleven of them are between here and the next count.
    let calls = Value::register(Register::Gpr(13)).plus(CALLS).load(8);
    let third = until(&calls.is(3), 1000);
    occurrence.answer(Verdict::Remove).unwrap();
    let occurrence = next(&monitor);
    assert_eq!(occurrence.event().hook, third.id());
    assert_eq!(
        occurrence.event().detail,
        step(vm.guest.second, 24, StepEnd::Condition)
    );
    assert_eq!(vm.word(0, CALLS), 3);
    let never = until(&Value::register(Register::RSP).is(1), 13);
    occurrence.answer(Verdict::Remove).unwrap();
    let occurrence = next(&monitor);
    assert_eq!(occurrence.event().hook, never.id());
    assert_eq!(
        occurrence.event().detail,
        step(vm.guest.second, 13, StepEnd::Count)
    );
    occurrence.answer(Verdict::Step(26)).unwrap();
    let occurrence = next(&monitor);
    assert_eq!(
        occurrence.event().detail,
        step(vm.guest.second, 26, StepEnd::Count)
    );
    assert_eq!(never.counts().unwrap().occurred, 39);
    drop((first, left, third, never, occurrence));
    vm.wait_for(|m| m.is_done(0, 1));
    assert_eq!(vm.word(0, CALLS), 9);
}

#[test]
fn a_vcpu_that_sleeps_makes_no_steps() {
    let vm = Machine::start(2);
    let monitor = vm.monitor();
    let steps = |count| Hook::new(HookKind::Step { vcpu: 1, count }).delivered(patient());
    let hook = monitor.hook(&steps(1)).unwrap();
    let occurrence = next(&monitor);
    vm.set(1, SLEEP, 1);
    occurrence.answer(Verdict::Step(1_000_000)).unwrap();
    // It falls asleep on the way.
    let occurrence = next(&monitor);
    assert!(
        matches!(
            occurrence.event().detail,
            Detail::Step {
                made: ..100,
                end: StepEnd::Sleep,
                ..
            }
        ),
        "{:?}",
        occurrence.event()
    );
    assert_eq!(occurrence.event().vcpu, 1);
    occurrence.answer(Verdict::Continue).unwrap();
    drop(hook);
    let error = monitor.hook(&steps(1)).unwrap_err();
    assert!(matches!(error, EventError::Limit { .. }), "{error}");
    vm.lives(1);
    // And does not stand in the way of watchpoints.
    let hook = Hook::write(Gva(upper(0, STORED)), 8).delivered(Delivery::Counted);
    let hook = monitor.hook(&hook).unwrap();
    vm.work(0, 100);
    vm.wait_for(|m| m.is_done(0, 1));
    assert_eq!(hook.counts().unwrap().occurred, 100);
}
