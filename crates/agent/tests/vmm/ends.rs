//! The guest survives its monitors.

use super::*;

#[test]
fn a_monitor_that_is_killed_leaves_the_guest_as_it_was() {
    for kill in 0..3 {
        let Some(mut machine) = Machine::start(GuestKind::Calls, 2) else {
            return;
        };
        let mut monitor = machine.monitor_process();
        machine.go();
        // It has hooked, was told at least once, and holds a vCPU for ever.
        monitor.wait_until_it_holds();
        let killed = Instant::now();
        monitor.kill();
        machine.wait_until_done();
        let took = killed.elapsed();
        assert!(
            took < Duration::from_secs(30),
            "the guest went on only after {took:?}"
        );
        assert_eq!(machine.results(), [2000, 2000, 0], "round {kill}");
        assert!(machine.code_is_clean(), "an INT3 stayed behind");
        // And the next monitor is welcome.
        let next = machine.monitor();
        drop(next.hook(&execute(machine.labels()["inc"])).unwrap());
        drop(next);
        machine.finish();
    }
}

#[test]
fn a_monitor_that_hangs_does_not_stop_the_guest() {
    let Some(mut scene) = Scene::start(GuestKind::Calls, 1) else {
        return;
    };
    let hook = execute(scene.at("function")).delivered(Delivery::Held {
        deadline: Duration::from_millis(20),
        expiry: Expiry::Open,
    });
    let guard = scene.hook(&hook);
    scene.go();
    scene.wait_until_done();
    assert_eq!(scene.results(), [1000, 1000, 0]);
    let counts = guard.counts().unwrap();
    assert_eq!(
        (counts.told, counts.expired),
        (1, 1),
        "told once, and taken out: {counts:?}"
    );
    let late = scene.next();
    assert!(matches!(
        late.answer(Verdict::Skip),
        Err(EventError::Verdict { .. })
    ));
    drop(guard);
    scene.finish();
}

#[test]
fn a_hook_that_fails_closed_pauses_the_vm() {
    let Some(mut scene) = Scene::start(GuestKind::Calls, 2) else {
        return;
    };
    let hook = execute(scene.at("function")).delivered(Delivery::Held {
        deadline: Duration::from_millis(20),
        expiry: Expiry::Closed,
    });
    let guard = scene.hook(&hook);
    scene.go();
    let _event = scene.next();
    std::thread::sleep(Duration::from_millis(500));
    assert!(!scene.machine.is_done());
    let before = scene.results();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(scene.results(), before, "nothing runs");
    drop(guard);
    drop(_event);
    let Scene { mut machine, monitor } = scene;
    drop(monitor);
    assert!(!machine.is_done(), "an orderly end does not resume it");
    machine.backend().resume().unwrap();
    machine.wait_until_done();
    assert_eq!(machine.results(), [2000, 2000, 0]);
    machine.finish();
}

#[test]
fn what_is_only_told_holds_nobody() {
    let Some(mut scene) = Scene::start(GuestKind::Calls, 2) else {
        return;
    };
    let told = |overflow| execute(scene.at("function")).delivered(Delivery::Told { overflow });
    let dropping = scene.hook(&told(Overflow::Drop));
    let counted = scene.hook(&execute(scene.at("inc")).delivered(Delivery::Counted));
    scene.go();
    scene.wait_until_done();
    // Nobody read: each ring holds so many, and the rest was counted.
    let counts = dropping.counts().unwrap();
    assert_eq!((counts.occurred, counts.told, counts.dropped), (2000, 1024, 976));
    assert_eq!(counted.counts().unwrap().occurred, 2000);
    let mut last = None;
    let mut read = 0;
    while let Some(occurrence) = scene.monitor.next(Duration::ZERO).unwrap() {
        assert!(last < Some(occurrence.event().sequence), "in order");
        last = Some(occurrence.event().sequence);
        read += 1;
    }
    assert_eq!(read, 1024);
    drop((dropping, counted));
    scene.finish();
}
