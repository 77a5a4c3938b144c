//! Filters: what nobody wants does not leave the VMM, and the guest does not notice.

use std::time::Duration;

use vmsight_events::agent::AgentBackend;
use vmsight_events::{Backend, EventError};
use vmsight_hooks::{Bucket, Buckets, Condition, Counts, Field, Filter, Value};

use super::*;

/// RBX, which counts the calls down from 1000 to 1.
fn left() -> Value {
    Register::Gpr(3).into()
}

/// Calls of the first half, and of those every eighth. How many were made before lies in the guest's memory, where
/// RSI points.
fn every_eighth_of_the_first_half() -> Condition {
    let done = Value::from(Register::RSI).load(8);
    left().masked(7).is(0).and(done.is_below(500))
}

#[test]
fn only_what_a_filter_lets_through_is_told() {
    let Some(mut scene) = Scene::start(GuestKind::Calls, 2) else {
        return;
    };
    let filter = Filter::only(&every_eighth_of_the_first_half()).unwrap();
    let guard = scene.hook(&scene.execute("function").filtered(filter));
    scene.go();
    let mut seen = [Vec::new(), Vec::new()];
    for _ in 0..2 * 63 {
        let occurrence = scene.next();
        let registers = occurrence.registers().unwrap();
        seen[registers.vcpu as usize].push(registers.rbx());
        occurrence.answer(Verdict::Continue).unwrap();
    }
    assert!(scene.answer_all(|_| Verdict::Continue).is_empty());
    let expected: Vec<u64> = (501..=1000).rev().filter(|n| n % 8 == 0).collect();
    assert_eq!(seen, [expected.clone(), expected]);
    let counts = guard.counts().unwrap();
    let all = Counts {
        occurred: 2000,
        filtered: 2000 - 126,
        told: 126,
        ..Counts::default()
    };
    assert_eq!((counts, counts.matched()), (all, 126));
    assert_eq!(scene.results(), [2000, 2000, 0]);
    drop(guard);
    scene.finish();
}

#[test]
fn counting_by_key_costs_no_event() {
    let Some(mut scene) = Scene::start(GuestKind::Calls, 2) else {
        return;
    };
    let histogram = Filter::none().counting(&left(), Buckets::Log2).unwrap();
    let by_vcpu = Filter::only(&left().is_at_most(10))
        .unwrap()
        .counting(&Field::Vcpu.into(), Buckets::Each)
        .unwrap();
    let hook = scene.execute("function").delivered(Delivery::Counted);
    let guards = [histogram, by_vcpu].map(|filter| scene.hook(&hook.clone().filtered(filter)));
    scene.go();
    scene.wait_until_done();
    let [histogram, by_vcpu] = guards.each_ref().map(|guard| guard.tally().unwrap());
    let counts = guards.each_ref().map(|guard| guard.counts().unwrap());
    let bucket = |key: u64, count: u64| Bucket { key, count };
    // 1, 2 to 3, … 256 to 511, 512 to 1000, on each vCPU.
    let mut expected: Vec<Bucket> = (0..9).map(|n| bucket(1 << n, 2 << n)).collect();
    expected.push(bucket(512, 2 * 489));
    assert_eq!(histogram.buckets, expected);
    assert_eq!(by_vcpu.buckets, [bucket(0, 10), bucket(1, 10)]);
    assert_eq!(
        counts.map(|c| (c.occurred, c.filtered, c.told)),
        [(2000, 0, 0), (2000, 1980, 0)]
    );
    assert!(scene.monitor.next(Duration::ZERO).unwrap().is_none());
    drop(guards);
    scene.finish();
}

#[test]
fn a_rate_limits_what_is_told() {
    let Some(mut scene) = Scene::start(GuestKind::Calls, 2) else {
        return;
    };
    let filter = Filter::none().at_most(5, Duration::from_secs(3600));
    let hook = scene.execute("function").filtered(filter);
    assert!(
        matches!(scene.monitor.hook(&hook), Err(EventError::Hook(_))),
        "events that are held"
    );
    let told = Delivery::Told {
        overflow: Overflow::Drop,
    };
    let guard = scene.hook(&hook.delivered(told));
    scene.go();
    scene.wait_until_done();
    let counts = guard.counts().unwrap();
    assert_eq!((counts.occurred, counts.limited, counts.told), (2000, 1995, 5));
    drop(guard);
    scene.finish();
}

#[test]
fn filters_read_texts_and_tell_what_they_cannot_decide() {
    let Some(mut scene) = Scene::start(GuestKind::Calls, 1) else {
        return;
    };
    // The guest's own code, at the pointer in RIP: a long NOP.
    let rip = || Value::from(Register::Rip);
    let filters = [
        rip().begins_with([0x0f, 0x1f]),
        rip().begins_with([0x0f, 0x05]),
        // Nothing is mapped there.
        Value::from(1 << 40).load(8).is(0),
    ];
    let counted = scene.execute("function").delivered(Delivery::Counted);
    let guards = filters.map(|c| scene.hook(&counted.clone().filtered(Filter::only(&c).unwrap())));
    scene.go();
    scene.wait_until_done();
    let counts = guards.each_ref().map(|guard| guard.counts().unwrap());
    assert_eq!(
        counts.map(|c| (c.matched(), c.undecided)),
        [(1000, 0), (0, 0), (1000, 1000)]
    );
    drop(guards);
    scene.finish();
}

#[test]
fn memory_writes_that_are_filtered_out_are_done() {
    let Some(mut scene) = Scene::start(GuestKind::Writes, 2) else {
        return;
    };
    let hundreds = Value::from(Field::New).is_one_of((1..=10).map(|n| 100 * n));
    let hook = Hook::new(HookKind::Memory {
        range: Range::Physical {
            start: Gpa(support::WATCHED),
            len: 16,
        },
        access: Access::WRITE,
    });
    let guard = scene.hook(&hook.filtered(Filter::only(&hundreds).unwrap()));
    scene.go();
    let events = scene.answer_all(|detail| match detail {
        Detail::Memory { new: Some(1000), .. } => Verdict::SetData(7),
        _ => Verdict::Continue,
    });
    assert_eq!(events.len(), 20);
    let counts = guard.counts().unwrap();
    assert_eq!((counts.occurred, counts.filtered, counts.told), (2000, 1980, 20));
    assert_eq!(scene.machine.watched_words(2), [7, 7]);
    drop(guard);
    scene.finish();
}

#[test]
fn the_agent_verifies_what_it_is_given() {
    let Some(scene) = Scene::start(GuestKind::Many, 1) else {
        return;
    };
    // A number for a condition: it passes as JSON, and the backend passes it on.
    let filter: Filter = serde_json::from_str(r#"{"condition":[2,0]}"#).unwrap();
    let hook = scene.execute("function").filtered(filter);
    let Scene { machine, monitor } = scene;
    drop(monitor);
    let backend: AgentBackend = machine.backend();
    assert!(matches!(backend.arm(&hook), Err(EventError::Limit { .. })));
    drop(backend);
    machine.let_end();
    machine.go();
    machine.finish();
}
