//! Execution: breakpoints of both kinds, steps, and what verdicts make of them.

use super::*;

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
    let Some(mut scene) = Scene::start(GuestKind::Calls, 2) else {
        return;
    };
    let arm = |at: u64| scene.hook(&execute(at));
    let elsewhere: Vec<_> = elsewhere.iter().map(|at| arm(*at)).collect();
    let guards: Vec<_> = labels.iter().map(|label| arm(scene.at(label))).collect();
    scene.go();
    let events = scene.answer_all(|_| Verdict::Continue);
    for (label, guard) in labels.iter().zip(&guards) {
        for vcpu in 0..2 {
            let told = events
                .iter()
                .filter(|(v, d)| {
                    *v == vcpu
                        && *d
                            == Detail::Execute {
                                rip: Gva(scene.at(label)),
                            }
                })
                .count();
            assert_eq!(told, 1000, "{label}, vCPU {vcpu}");
        }
        assert_eq!(guard.counts().unwrap().occurred, 2000, "{label}");
    }
    // What the guest counted itself: two counters for each call, and no TF in any flags that it pushed.
    assert_eq!(scene.results(), [2000, 2000, 0]);
    drop((guards, elsewhere));
    assert!(scene.machine.code_is_clean());
    scene.finish();
}

#[test]
fn verdicts_change_what_the_guest_does() {
    let Some(mut scene) = Scene::start(GuestKind::Calls, 1) else {
        return;
    };
    let function = scene.arm("function");
    let inc = scene.arm("inc");
    let mut calls = 0;
    let mut incs = 0;
    scene.go();
    loop {
        let Some(occurrence) = scene.monitor.next(Duration::from_secs(20)).unwrap() else {
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
    scene.wait_until_done();
    // 100 calls returned at once, 50 skipped the first INC, and after the 151st the loop ended.
    assert_eq!(calls, 151);
    assert_eq!(scene.results(), [1, 51, 0]);
    scene.finish();
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
fn a_guest_that_is_stepped_does_not_see_it() {
    let Some(mut scene) = Scene::start(GuestKind::Calls, 1) else {
        return;
    };
    let function = scene.arm("function");
    scene.go();
    // Each call to its end, PUSHF among its instructions, for the first hundred.
    let mut steps = 0;
    while steps < 100 {
        let occurrence = scene.next();
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
    scene.wait_until_done();
    assert_eq!(scene.results(), [1000, 1000, 0]);
    scene.finish();
}

#[test]
fn a_guest_that_is_stepped_through_does_not_see_it() {
    let Some(mut scene) = Scene::start(GuestKind::Calls, 1) else {
        return;
    };
    let steps = HookKind::Step { vcpu: 0, count: 2000 };
    let guard = scene.hook(&Hook::new(steps));
    scene.go();
    let events = scene.answer_all(|detail| match detail {
        Detail::Step { .. } => Verdict::Step(2000),
        other => panic!("{other:?}"),
    });
    assert!(events.len() >= 6, "a call has 13 instructions: {}", events.len());
    assert_eq!(scene.results(), [1000, 1000, 0]);
    drop(guard);
    scene.finish();
}

#[test]
fn steps_are_counted() {
    let Some(mut scene) = Scene::start(GuestKind::Calls, 1) else {
        return;
    };
    let function = scene.arm("function");
    scene.go();
    let first = scene.next();
    first.answer(Verdict::Step(3)).unwrap();
    let step = scene.next();
    // Two NOPs and a PUSH are behind it.
    assert_eq!(
        step.event().detail,
        Detail::Step {
            rip: Gva(scene.at("inc")),
            made: 3,
            end: StepEnd::Count,
        }
    );
    drop(step);
    drop(function);
    scene.wait_until_done();
    assert_eq!(scene.results(), [1000, 1000, 0]);
    scene.finish();
}

#[test]
fn steps_end_where_a_condition_holds_or_the_count_is_reached() {
    let Some(mut scene) = Scene::start(GuestKind::Calls, 1) else {
        return;
    };
    let function = scene.arm("function");
    let until = |condition: &Condition, most| scene.hook(&Hook::step_until(0, condition, most).unwrap());
    let step = |rip, made, end| Detail::Step {
        rip: Gva(rip),
        made,
        end,
    };
    scene.go();
    let first = scene.next();
    // A call has eleven instructions, and three more are between two calls. The last six are in 17 bytes.
    let begin = scene.at("function");
    let inside = Condition::rip_within(Gva(begin), scene.at("inc_again") + 17 - begin);
    let left = until(&!inside, 1000);
    first.answer(Verdict::Remove).unwrap();
    let occurrence = scene.next();
    assert_eq!(occurrence.event().hook, left.id());
    let returned = match occurrence.event().detail {
        Detail::Step {
            rip,
            made: 11,
            end: StepEnd::Condition,
        } => rip.0,
        other => panic!("{other:?}"),
    };
    // Behind the CALL are a DEC and a JNZ to it.
    let counts = left.counts().unwrap();
    assert_eq!((counts.occurred, counts.filtered), (11, 10));
    // RSI is where the fourth instruction of a call counts.
    let calls = Value::register(Register::RSI).load(8);
    let many = until(&calls.is(500), 1 << 40);
    occurrence.answer(Verdict::Continue).unwrap();
    let occurrence = scene.next();
    assert_eq!(occurrence.event().hook, many.id());
    assert_eq!(
        occurrence.event().detail,
        step(scene.at("pushf"), 3 + 498 * 14 + 4, StepEnd::Condition)
    );
    assert_eq!(many.counts().unwrap().occurred, 3 + 498 * 14 + 4);
    // Never, and as many as one whole round has; then two rounds more for the same hook.
    let never = until(&Value::register(Register::RSP).is(1), 14);
    occurrence.answer(Verdict::Continue).unwrap();
    let occurrence = scene.next();
    assert_eq!(
        occurrence.event().detail,
        step(scene.at("pushf"), 14, StepEnd::Count)
    );
    occurrence.answer(Verdict::Step(28)).unwrap();
    let occurrence = scene.next();
    assert_eq!(
        occurrence.event().detail,
        step(scene.at("pushf"), 28, StepEnd::Count)
    );
    assert_eq!(never.counts().unwrap().occurred, 42);
    drop(occurrence);
    scene.wait_until_done();
    let told = [&left, &many, &never].map(|guard| guard.counts().unwrap().told);
    assert_eq!(told, [1, 1, 2]);
    drop((function, left, many, never));
    // No flags that it pushed had TF.
    assert_eq!(scene.results(), [1000, 1000, 0]);
    assert!(returned < begin);
    scene.finish();
}

#[test]
fn an_exception_can_be_raised_instead() {
    let Some(mut scene) = Scene::start(GuestKind::Calls, 1) else {
        return;
    };
    // The guest's handler counts, and passes over two bytes: those of the instruction.
    let _guard = scene.hook(&execute(scene.machine.labels()["nop"]));
    scene.go();
    let calls = std::cell::Cell::new(0);
    let events = scene.answer_all(|_| {
        calls.set(calls.get() + 1);
        match calls.get() % 10 {
            0 => Verdict::Inject(Exception::GENERAL_PROTECTION),
            _ => Verdict::Continue,
        }
    });
    assert_eq!(events.len(), 1000);
    assert_eq!(scene.results(), [1000, 1000, 0]);
    assert_eq!(scene.machine.results_n(5)[4], 100, "faults");
    scene.finish();
}
