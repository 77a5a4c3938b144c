//! Hooks on memory: what was there, what is there, and how a write is undone.

use vmsight_arch::Gva;
use vmsight_hooks::{Access, Delivery, Detail, Hook, HookKind, Overflow, Range, Verdict};

use crate::execute::{next, patient};
use crate::guest::{CALLS, DONE, ROUNDS as ROUNDS_LEFT, STORED, SUM, upper};
use crate::machine::Machine;

const TOLD: Delivery = Delivery::Told {
    overflow: Overflow::Block,
};

fn hook(start: u64, len: u64, access: Access) -> Hook {
    Hook::new(HookKind::Memory {
        range: Range::Virtual {
            start: Gva(start),
            len,
        },
        access,
    })
}

#[test]
fn writes_by_two_vcpus_at_once_have_their_values() {
    let vm = Machine::start(2);
    let monitor = vm.monitor();
    let hooks = [0, 1].map(|vcpu| {
        monitor
            .hook(&Hook::write(Gva(upper(vcpu, STORED)), 8).delivered(TOLD))
            .unwrap()
    });
    const ROUNDS: u64 = 1000;
    vm.work(0, ROUNDS);
    vm.work(1, ROUNDS);
    let mut before = [0, 0];
    let mut seen = [0, 0];
    while seen != [ROUNDS, ROUNDS] {
        let occurrence = next(&monitor);
        let event = occurrence.event();
        let vcpu = event.vcpu as usize;
        assert_eq!(event.hook, hooks[vcpu].id());
        seen[vcpu] += 1;
        let new = ROUNDS - seen[vcpu];
        let expected = Detail::Memory {
            gva: Some(Gva(upper(event.vcpu, STORED))),
            gpa: None,
            len: 8,
            access: Access::WRITE,
            old: Some(before[vcpu]),
            new: Some(new),
            done: true,
        };
        assert_eq!(event.detail, expected, "write {} of vCPU {vcpu}", seen[vcpu]);
        before[vcpu] = new;
    }
    vm.wait_for(|m| m.is_done(0, 1) && m.is_done(1, 1));
    assert_eq!((vm.word(0, CALLS), vm.word(1, CALLS)), (ROUNDS, ROUNDS));
}

#[test]
fn a_hook_on_pages_tells_which_bytes() {
    let vm = Machine::start(2);
    let monitor = vm.monitor();
    // From what the first counts, over its stack, to what the second sums up.
    let members = CALLS..DONE;
    let len = upper(1, members.end) - upper(0, members.start);
    let _hook = monitor
        .hook(&Hook::write(Gva(upper(0, members.start)), len).delivered(TOLD))
        .unwrap();
    const ROUNDS: u64 = 100;
    vm.work(0, ROUNDS);
    vm.work(1, ROUNDS);
    let mut seen = [[0, 0]; 2];
    let mut values = [[0, 0]; 2];
    let (mut stack, mut filled) = (0, 0);
    while seen != [[ROUNDS; 2]; 2] || stack < ROUNDS || filled < 8 * ROUNDS {
        let occurrence = next(&monitor);
        let event = occurrence.event();
        let Detail::Memory {
            gva: Some(Gva(gva)),
            len,
            old,
            new,
            ..
        } = event.detail
        else {
            panic!("{event:?}")
        };
        let vcpu = event.vcpu as usize;
        match (gva - upper(event.vcpu, 0), len) {
            (member @ (CALLS | SUM), 8) => {
                let which = usize::from(member == SUM);
                assert_eq!(old, Some(values[vcpu][which]), "{event:?}");
                seen[vcpu][which] += 1;
                let more = if which == 0 { 1 } else { ROUNDS + 1 - seen[vcpu][1] };
                values[vcpu][which] += more;
                assert_eq!(new, Some(values[vcpu][which]), "{event:?}");
            }
            (0xff8, 8) => stack += 1,
            (0x100..0x108, 1) => filled += 1,
            (STORED | DONE | ROUNDS_LEFT, 8) => {}
            _ => panic!("{event:?}"),
        }
    }
    assert_eq!((stack, filled), (ROUNDS, 8 * ROUNDS), "of the first alone");
}

#[test]
fn reads_and_writes_are_told_apart() {
    let vm = Machine::start(1);
    let monitor = vm.monitor();
    let reads = monitor
        .hook(&hook(upper(0, CALLS), 8, Access::READ).delivered(Delivery::Counted))
        .unwrap();
    let writes = monitor
        .hook(&hook(upper(0, CALLS), 8, Access::WRITE).delivered(Delivery::Counted))
        .unwrap();
    let stored = monitor
        .hook(&hook(upper(0, STORED), 8, Access::READ).delivered(Delivery::Counted))
        .unwrap();
    let both = monitor
        .hook(&hook(upper(0, STORED), 8, Access::READ | Access::WRITE).delivered(TOLD))
        .unwrap();
    vm.work(0, 50);
    for round in (0..50).rev() {
        let occurrence = next(&monitor);
        assert_eq!(occurrence.event().hook, both.id());
        let Detail::Memory { access, new, .. } = occurrence.event().detail else {
            panic!()
        };
        assert_eq!((access, new), (Access::WRITE, Some(round)));
    }
    vm.wait_for(|m| m.is_done(0, 1));
    // An increment is both.
    assert_eq!(
        (
            reads.counts().unwrap().occurred,
            writes.counts().unwrap().occurred
        ),
        (50, 50)
    );
    assert_eq!(stored.counts().unwrap().occurred, 0, "nobody reads it");
}

#[test]
fn a_write_is_undone_or_changed() {
    let vm = Machine::start(1);
    let monitor = vm.monitor();
    let _hook = monitor
        .hook(&Hook::write(Gva(upper(0, CALLS)), 8).delivered(patient()))
        .unwrap();
    vm.work(0, 4);
    next(&monitor).answer(Verdict::Continue).unwrap();
    next(&monitor).answer(Verdict::Deny).unwrap();
    let occurrence = next(&monitor);
    let Detail::Memory { old, new, .. } = occurrence.event().detail else {
        panic!()
    };
    assert_eq!((old, new), (Some(1), Some(2)), "what was denied is forgotten");
    occurrence.answer(Verdict::SetData(100)).unwrap();
    let occurrence = next(&monitor);
    let Detail::Memory { old, new, .. } = occurrence.event().detail else {
        panic!()
    };
    assert_eq!((old, new), (Some(100), Some(101)));
    assert!(occurrence.answer(Verdict::Skip).is_err(), "it is done");
    vm.wait_for(|m| m.is_done(0, 1));
    assert_eq!((vm.word(0, CALLS), vm.word(0, SUM)), (101, 10));
}
