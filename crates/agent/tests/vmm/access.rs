//! Accesses: MSRs, memory, ports.

use super::*;

const LSTAR: u32 = 0xc000_0082;

#[test]
fn msr_writes_are_seen_denied_and_changed() {
    let Some(mut scene) = Scene::start(GuestKind::Msr, 1) else {
        return;
    };
    let msr = |access| HookKind::Msr { index: LSTAR, access };
    let _write = scene.hook(&Hook::new(msr(Access::WRITE)));
    let _read = scene.hook(&Hook::new(msr(Access::READ)));
    scene.go();
    // The guest writes 1 to 4 and reads back after each; #GP is counted by its handler.
    let events = scene.answer_all(|detail| match detail {
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
        scene.machine.results_n(5),
        [1, 1, 0x33, 0x44, 1],
        "what it read, and its #GPs"
    );
    scene.finish();
}

#[test]
fn memory_writes_are_seen_denied_and_changed() {
    for vcpus in [1, 2] {
        let Some(mut scene) = Scene::start(GuestKind::Writes, vcpus) else {
            return;
        };
        // One counter per vCPU in a watched page; a third word in the page is written too and not watched.
        let range = Range::Physical {
            start: Gpa(support::WATCHED),
            len: 16,
        };
        let hook = Hook::new(HookKind::Memory {
            range,
            access: Access::WRITE,
        });
        let guard = scene.hook(&hook);
        scene.go();
        let events = scene.answer_all(|detail| match detail {
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
        let mut memory = scene.machine.watched_words(3);
        memory.truncate(vcpus as usize);
        assert_eq!(memory, vec![1000; vcpus as usize]);
        scene.finish();
    }
}

#[test]
fn memory_reads_are_seen_and_changed() {
    let Some(mut scene) = Scene::start(GuestKind::Reads, 1) else {
        return;
    };
    let hook = Hook::new(HookKind::Memory {
        range: Range::Virtual {
            start: Gva(support::WATCHED),
            len: 8,
        },
        access: Access::READ,
    });
    let _guard = scene.hook(&hook);
    scene.go();
    let events = scene.answer_all(|detail| match detail {
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
    assert_eq!(scene.machine.results_n(1), [99 * 100 / 2 - 5 + 0x100]);
    scene.finish();
}

#[test]
fn ports_are_seen_denied_and_changed() {
    let Some(mut scene) = Scene::start(GuestKind::Ports, 1) else {
        return;
    };
    let hook = Hook::new(HookKind::Port {
        first: 0x500,
        last: 0x500,
        access: Access::READ | Access::WRITE,
    });
    let _guard = scene.hook(&hook);
    scene.go();
    let events = scene.answer_all(|detail| match detail {
        Detail::Port { value: Some(3), .. } => Verdict::Deny,
        Detail::Port { value: Some(4), .. } => Verdict::SetData(100),
        Detail::Port {
            access: Access::READ, ..
        } => Verdict::SetData(7),
        _ => Verdict::Continue,
    });
    assert_eq!(events.len(), 20);
    assert_eq!(
        scene.machine.word(support::PORT),
        55 - 3 - 4 + 100,
        "what the VMM got"
    );
    assert_eq!(
        scene.machine.results_n(1),
        [70],
        "what the guest read, and not the VMM's 5"
    );
    scene.finish();
}
