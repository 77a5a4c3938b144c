//! Exceptions, where their handlers begin. Interrupts are no other to the hooks: what differs is what makes the
//! processor begin a handler.

use vmsight_hooks::{Condition, Field, Filter, HookKind, Value, Vectors};

use super::*;

fn on(first: u8, last: u8) -> Hook {
    Hook::new(HookKind::Interrupt {
        vectors: Vectors { first, last },
    })
}

/// What each round of the guest meets, in this order.
fn expected(scene: &Scene) -> Vec<Detail> {
    let detail = |vector, error_code, cr2, label: &str| Detail::Interrupt {
        vector,
        error_code,
        cr2,
        rip: Gva(scene.at(label)),
    };
    vec![
        detail(6, None, None, "ud"),
        // A register that there is not.
        detail(13, Some(0), None, "wrmsr"),
        // A read by the kernel of what is not mapped.
        detail(14, Some(0), Some(0x4000_0000), "load"),
        detail(0, None, None, "div"),
    ]
}

/// What the handlers counted: #GP, #UD, #DE, #PF.
fn handled(scene: &Scene) -> Vec<u64> {
    scene.machine.results_n(8).split_off(4)
}

#[test]
fn every_exception_is_told_once() {
    for taken in [0, 4] {
        // By hardware breakpoints, or by INT3s where others have taken those.
        if taken > 0 && !support::has_int3() {
            continue;
        }
        let Some(mut scene) = Scene::start(GuestKind::Faults, 1) else {
            return;
        };
        let elsewhere: Vec<_> = (0..taken)
            .map(|n| scene.hook(&execute(0xdead_0000 + n)))
            .collect();
        let guards: Vec<_> = [on(6, 6), on(13, 14), on(0, 0)]
            .iter()
            .map(|h| scene.hook(h))
            .collect();
        scene.go();
        let events = scene.answer_all(|_| Verdict::Continue);
        let round = expected(&scene);
        assert_eq!(events.len(), 400);
        for (n, (_, detail)) in events.iter().enumerate() {
            assert_eq!(*detail, round[n % 4], "event {n}");
        }
        assert_eq!(handled(&scene), [100; 4]);
        assert_eq!(
            guards
                .iter()
                .map(|g| g.counts().unwrap().told)
                .collect::<Vec<_>>(),
            [100, 200, 100]
        );
        drop((guards, elsewhere));
        assert!(scene.machine.code_is_clean());
        scene.finish();
    }
}

#[test]
fn a_filter_tells_exceptions_apart() {
    let Some(mut scene) = Scene::start(GuestKind::Faults, 1) else {
        return;
    };
    let faults = |field: Field, n: u64| Value::from(field).is(n);
    let page_faults: Condition = faults(Field::Index, 14).and(faults(Field::ErrorCode, 0));
    let filter = Filter::only(&page_faults.and(faults(Field::Cr2, 0x4000_0000))).unwrap();
    let guard = scene.hook(&on(13, 14).filtered(filter));
    scene.go();
    let events = scene.answer_all(|_| Verdict::Continue);
    assert_eq!(events.len(), 100);
    assert!(
        events
            .iter()
            .all(|(_, d)| matches!(d, Detail::Interrupt { vector: 14, .. }))
    );
    assert_eq!(guard.counts().unwrap().filtered, 100);
    assert_eq!(handled(&scene), [100; 4]);
    drop(guard);
    scene.finish();
}

#[test]
fn a_vector_without_a_handler_cannot_be_hooked() {
    let Some(scene) = Scene::start(GuestKind::Many, 1) else {
        return;
    };
    for vectors in [on(1, 1), on(6, 13), on(0, 255)] {
        let error = scene.monitor.hook(&vectors).unwrap_err();
        assert!(matches!(error, EventError::Limit { .. }), "{error}");
    }
    // What cannot be hooked at all is said with its reason.
    let cpuid = scene.monitor.hook(&Hook::new(HookKind::Cpuid));
    assert!(matches!(cpuid, Err(EventError::Unsupported { .. })));
    let lacks = scene.monitor.lacks();
    for feature in vmsight_hooks::Feature::ALL {
        let can = scene.monitor.capabilities().iter().any(|c| c.feature == *feature);
        let lack = lacks.iter().find(|l| l.feature == *feature);
        assert_ne!(can, lack.is_some_and(|l| !l.why.is_empty()), "{feature}");
    }
    scene.machine.let_end();
    scene.go();
    scene.finish();
}
