//! The stub knows no filters; they are evaluated here, with the same results as in a VMM that has the agent in it.

use vmsight_arch::Gva;
use vmsight_hooks::{Bucket, Buckets, Counts, Delivery, Field, Filter, Hook, Register, Value, Verdict};

use crate::execute::{next, patient};
use crate::guest::{CALLS, upper};
use crate::machine::Machine;

/// As in the agent's own test: of a thousand calls every eighth of the first half, by a register and a word in
/// memory.
#[test]
fn only_what_a_filter_lets_through_is_told() {
    let vm = Machine::start(1);
    let monitor = vm.monitor();
    let left = || Value::from(Register::RDI);
    let done = Value::from(upper(0, CALLS)).load(8);
    let condition = left().masked(7).is(0).and(done.is_below(500));
    let filter = Filter::only(&condition)
        .unwrap()
        .counting(&left().masked(0x3ff), Buckets::Log2)
        .unwrap();
    let hook = Hook::execute(Gva(vm.guest.function)).delivered(patient());
    let guard = monitor.hook(&hook.clone().filtered(filter)).unwrap();
    let by_vcpu = Filter::none()
        .counting(&Field::Vcpu.into(), Buckets::Each)
        .unwrap();
    let told = hook.delivered(Delivery::Counted).filtered(by_vcpu);
    let counted = monitor.hook(&told).unwrap();
    vm.work(0, 1000);
    for expected in (501..=1000).rev().filter(|n| n % 8 == 0) {
        let occurrence = next(&monitor);
        assert_eq!(occurrence.registers().unwrap().rdi(), expected);
        occurrence.answer(Verdict::Continue).unwrap();
    }
    vm.wait_for(|m| m.is_done(0, 1));
    let counts = guard.counts().unwrap();
    let all = Counts {
        occurred: 1000,
        filtered: 1000 - 63,
        told: 63,
        ..Counts::default()
    };
    assert_eq!(counts, all);
    // 504 and 512 to 1000.
    let bucket = |key: u64, count: u64| Bucket { key, count };
    assert_eq!(guard.tally().unwrap().buckets, [bucket(256, 1), bucket(512, 62)]);
    assert_eq!(counted.tally().unwrap().buckets, [bucket(0, 1000)]);
    assert_eq!(counted.counts().unwrap().told, 0);
    drop((guard, counted));
    assert_eq!(vm.word(0, CALLS), 1000);
}
