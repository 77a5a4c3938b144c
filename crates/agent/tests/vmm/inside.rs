//! Filters that are judged in the guest: the same events as by one in the VMM, and a guest that does not notice.

use vmsight_hooks::{Counts, Feature, Field, Filter, Scope};

use super::*;

/// Where the guest's page tables have nothing.
const ROOM: Gva = Gva(0x1000_0000);

/// RBX, which counts the calls down from 1000 to 1.
fn left() -> Value {
    Register::Gpr(3).into()
}

/// Every eighth call of the first half, by a filter that looks at what it can.
fn every_eighth_of_the_first_half(scene: &Scene) -> Hook {
    let first = left().is_at_most(500);
    let wanted = left().masked(7).is(0).and(!first);
    let wanted = wanted.and(Value::register(Register::Rip).is(scene.at("function")));
    let hook = scene.execute("function");
    hook.filtered(Filter::only(&wanted).unwrap()).inside(ROOM)
}

/// Whether that can be had here. Then the guest is in its own code, with its page tables.
fn judged_inside(scene: &Scene) -> bool {
    let has = |feature| scene.monitor.capabilities().iter().any(|c| c.feature == feature);
    if !support::has_int3() || !has(Feature::Inside) {
        return false;
    }
    let step = scene.hook(&Hook::new(HookKind::Step { vcpu: 0, count: 1 }));
    scene.next().answer(Verdict::Continue).unwrap();
    drop(step);
    true
}

#[test]
fn only_what_is_wanted_comes_out() {
    let Some(mut scene) = Scene::start(GuestKind::Calls, 2) else {
        return;
    };
    if !judged_inside(&scene) {
        return;
    }
    let guard = scene.hook(&every_eighth_of_the_first_half(&scene));
    assert!(!scene.machine.code_is_clean());
    scene.go();
    let mut seen = [Vec::new(), Vec::new()];
    for _ in 0..2 * 63 {
        let occurrence = scene.next();
        let registers = occurrence.registers().unwrap();
        assert_eq!(registers.rip, scene.at("function"));
        seen[registers.vcpu as usize].push(registers.rbx());
        occurrence.answer(Verdict::Continue).unwrap();
    }
    assert!(scene.answer_all(|_| Verdict::Continue).is_empty());
    let expected: Vec<u64> = (501..=1000).rev().filter(|n| n % 8 == 0).collect();
    assert_eq!(seen, [expected.clone(), expected]);
    let all = Counts {
        occurred: 2000,
        filtered: 2000 - 126,
        told: 126,
        ..Counts::default()
    };
    assert_eq!(guard.counts().unwrap(), all);
    assert_eq!(scene.results(), [2000, 2000, 0]);
    drop(guard);
    assert!(scene.machine.code_is_clean());
    scene.finish();
}

#[test]
fn verdicts_are_given_at_the_instruction_itself() {
    let Some(mut scene) = Scene::start(GuestKind::Calls, 1) else {
        return;
    };
    if !judged_inside(&scene) {
        return;
    }
    let wanted = left().is_at_most(30);
    let hook = scene.execute("function").filtered(Filter::only(&wanted).unwrap());
    let guard = scene.hook(&hook.inside(ROOM));
    scene.go();
    let steps = std::cell::Cell::new(0);
    let events = scene.answer_all(|detail| match detail {
        Detail::Step { rip, .. } => {
            // NOP, then XCHG AX, AX and PUSH RBP: what is ours in between is no step of the guest's.
            assert_eq!(rip.0, labels_at("inc"));
            Verdict::Continue
        }
        _ => {
            steps.set(steps.get() + 1);
            match steps.get() {
                1..=5 => Verdict::Return(7),
                6..=10 => Verdict::Skip,
                11..=15 => Verdict::Step(3),
                16 => Verdict::SetRegisters(vec![(Register::Gpr(3), 2)]),
                _ => Verdict::Continue,
            }
        }
    });
    // 1000 calls until RBX is 30, 15 more, then one that makes it 2, which is the one before the last.
    assert_eq!(steps.get(), 17);
    assert_eq!(events.len(), 17 + 5);
    let calls = 970 + 17;
    // The steps are events of the hook, too.
    assert_eq!(guard.counts().unwrap().occurred, calls + 5);
    // Five returned at once.
    assert_eq!(scene.results(), [calls - 5, calls - 5, 0]);
    drop(guard);
    assert!(scene.machine.code_is_clean());
    scene.finish();
}

fn labels_at(label: &str) -> u64 {
    support::labels()[label]
}

#[test]
fn what_cannot_be_judged_inside_is_refused_with_the_reason() {
    let Some(scene) = Scene::start(GuestKind::Many, 1) else {
        return;
    };
    if !judged_inside(&scene) {
        return;
    }
    let refused = |hook: Hook, why: &str| {
        let error = scene.monitor.hook(&hook).unwrap_err().to_string();
        assert!(error.contains(why), "{why}: {error}");
    };
    let filter = |condition: &Condition| Filter::only(condition).unwrap();
    let few = filter(&left().is_at_most(3));
    let at = |label: &str| scene.execute(label).filtered(few.clone());
    let unfiltered = scene.monitor.hook(&scene.execute("function").inside(ROOM));
    assert!(matches!(unfiltered, Err(EventError::Hook(_))));
    refused(at("push").inside(ROOM), "NOP, a call or a jump");
    refused(
        at("function").inside(Gva(ROOM.0 + 0x1000)),
        "no multiple of 2 MiB",
    );
    refused(at("function").inside(Gva(0)), "the guest has something");
    refused(at("function").inside(Gva(ROOM.0 << 16)), "do not lead to");
    let text = filter(&left().begins_with("x"));
    refused(
        at("function").filtered(text).inside(ROOM),
        "memory that may not be there",
    );
    let cr4 = filter(&Value::from(Field::Cr4).is(0));
    refused(
        at("function").filtered(cr4).inside(ROOM),
        "only general-purpose registers",
    );
    let scope = Scope::Dtb(vmsight_arch::Dtb(0x1000));
    refused(at("function").within(scope).inside(ROOM), "cannot read CR3");
    // One hook at a time on an instruction, in either order.
    let plain = scene.arm("function");
    refused(at("function").inside(ROOM), "another hook is on this instruction");
    drop(plain);
    let inside = scene.hook(&at("function").inside(ROOM));
    refused(scene.execute("function"), "needs the instruction alone");
    refused(at("function").inside(ROOM), "another hook is on this instruction");
    drop(inside);
    assert!(scene.machine.code_is_clean());
    drop(scene.arm("function"));
    scene.machine.let_end();
    scene.go();
    scene.finish();
}

/// An INT3 on the next instruction, in the same few bytes of memory as the jump.
#[test]
fn an_int3_behind_it_goes_out_whichever_goes_first() {
    let Some(scene) = Scene::start(GuestKind::Calls, 1) else {
        return;
    };
    if !judged_inside(&scene) {
        return;
    }
    // Where there are hardware breakpoints they are taken.
    let taken = ["push", "inc", "pushf", "inc_again"].map(|label| scene.arm(label));
    let before = scene.machine.code_now();
    let next = (scene.at("nop") - support::CODE) as usize;
    for inside_comes_first in [true, false] {
        for inside_goes_first in [true, false] {
            let inside = || scene.hook(&every_eighth_of_the_first_half(&scene));
            let (jump, int3) = match inside_comes_first {
                true => {
                    let jump = inside();
                    (jump, scene.arm("nop"))
                }
                false => {
                    let int3 = scene.arm("nop");
                    (inside(), int3)
                }
            };
            assert_eq!(scene.machine.code_now()[next], 0xcc);
            match inside_goes_first {
                true => {
                    drop(jump);
                    drop(int3);
                }
                false => {
                    drop(int3);
                    drop(jump);
                }
            }
            assert_eq!(
                scene.machine.code_now(),
                before,
                "{inside_comes_first} {inside_goes_first}"
            );
        }
    }
    drop(taken);
    assert!(scene.machine.code_is_clean());
    scene.go();
    scene.finish();
}

/// It comes and goes while two vCPUs call the function as fast as they can: no call is lost, and none counted twice.
#[test]
fn it_comes_and_goes_while_the_guest_runs() {
    let Some(mut scene) = Scene::start(GuestKind::Many, 2) else {
        return;
    };
    if !judged_inside(&scene) {
        return;
    }
    scene.go();
    // Odd calls and even ones, by what the guest counts itself before each.
    let [none, some] = [u64::MAX, 5].map(|n| {
        let hook = scene.execute("function").delivered(Delivery::Told {
            overflow: Overflow::Drop,
        });
        hook.filtered(Filter::only(&Value::register(Register::RDI).is(n).or(left().is(n))).unwrap())
            .inside(ROOM)
    });
    let mut occurred = 0;
    for round in 0..60 {
        let guard = scene.hook(if round % 2 == 0 { &none } else { &some });
        std::thread::sleep(Duration::from_millis(5));
        occurred += guard.counts().unwrap().occurred;
        drop(guard);
        if round % 10 == 0 {
            assert!(scene.machine.code_is_clean());
        }
    }
    assert!(occurred > 0);
    scene.machine.let_end();
    scene.wait_until_done();
    let calls = scene.machine.calls();
    assert_eq!(scene.results(), [calls, calls, 0], "each call was made whole");
    assert!(occurred <= calls);
    scene.finish();
}
