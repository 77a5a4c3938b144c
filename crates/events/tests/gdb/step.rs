//! Single steps.

use vmsight_arch::Gva;
use vmsight_hooks::{Delivery, Detail, Hook, HookKind, Verdict};

use crate::execute::{next, patient};
use crate::guest::{CALLS, IDLE};
use crate::machine::Machine;

#[test]
fn a_vcpu_makes_so_many_steps_and_the_others_stand() {
    let vm = Machine::start(2);
    let monitor = vm.monitor();
    let kind = HookKind::Step { vcpu: 1, count: 250 };
    let _hook = monitor.hook(&Hook::new(kind).delivered(patient())).unwrap();
    let occurrence = next(&monitor);
    assert_eq!(occurrence.event().vcpu, 1);
    assert!(matches!(occurrence.event().detail, Detail::Step { .. }));
    // The loop in which it waits has five instructions.
    let (idle, other) = (vm.word(1, IDLE), vm.word(0, IDLE));
    occurrence.answer(Verdict::Step(100)).unwrap();
    let occurrence = next(&monitor);
    assert_eq!((vm.word(1, IDLE) - idle, vm.word(0, IDLE) - other), (20, 0));
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
            rip: Gva(vm.guest.returns)
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
