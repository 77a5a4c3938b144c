//! Events that nobody takes: the guest waits for room, or events are lost; and a monitor that takes none does not stop it.

use std::time::Duration;

use vmsight_arch::Gva;
use vmsight_hooks::{Delivery, Hook, Overflow};

use crate::execute::next;
use crate::guest::CALLS;
use crate::machine::Machine;

const BLOCK: Delivery = Delivery::Told {
    overflow: Overflow::Block,
};

#[test]
fn a_full_queue_holds_the_guest_or_loses_events_and_says_so() {
    let vm = Machine::start(1);
    let monitor = vm.monitor();
    let at = Hook::execute(Gva(vm.guest.function));
    let hook = monitor.hook(&at.clone().delivered(BLOCK)).unwrap();
    vm.work(0, 10_000);
    vm.wait_for(|m| hook.counts().unwrap().told == 4096 && m.word(0, CALLS) == 4096);
    for _ in 0..10 {
        assert_eq!(next(&monitor).event().hook, hook.id());
    }
    vm.wait_for(|_| hook.counts().unwrap().told == 4106);
    drop(hook);
    vm.wait_for(|m| m.is_done(0, 1));
    assert!(
        monitor.next(Duration::ZERO).unwrap().is_none(),
        "with the hook went its events"
    );
    let lost = Delivery::Told {
        overflow: Overflow::Drop,
    };
    let hook = monitor.hook(&at.delivered(lost)).unwrap();
    vm.work(0, 5000);
    vm.wait_for(|m| m.is_done(0, 2));
    let counts = hook.counts().unwrap();
    assert_eq!((counts.occurred, counts.told, counts.dropped), (5000, 4096, 904));
}

#[test]
fn a_full_queue_of_which_nobody_takes_lets_the_guest_go_on() {
    const ROUNDS: u64 = 5000;
    let vm = Machine::start(1);
    let monitor = vm.monitor();
    // A round meets both.
    let hooks = [vm.guest.function, vm.guest.second]
        .map(|at| monitor.hook(&Hook::execute(Gva(at)).delivered(BLOCK)).unwrap());
    vm.work(0, ROUNDS);
    vm.wait_for(|m| m.is_done(0, 1));
    assert_eq!((vm.word(0, CALLS), vm.status()), (ROUNDS, "running".to_owned()));
    for hook in &hooks {
        let counts = hook.counts().unwrap();
        assert_eq!(
            (counts.occurred, counts.told, counts.dropped, counts.expired),
            (2049, 2048, 1, 1),
            "it is out"
        );
    }
    // What was told before is there to be taken, and no more.
    for sequence in 1..=4096 {
        assert_eq!(next(&monitor).event().sequence, sequence);
    }
    assert!(monitor.next(Duration::ZERO).unwrap().is_none());
    drop(hooks);
    // Then there is room for others.
    let at = Hook::execute(Gva(vm.guest.function));
    let hook = monitor.hook(&at.delivered(BLOCK)).unwrap();
    vm.work(0, 10);
    vm.wait_for(|m| m.is_done(0, 2));
    assert_eq!(hook.counts().unwrap().told, 10);
}
