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

/// Longer than any of it may take. What it does take is printed: it should be below 100 ms, on a machine that has
/// time for it.
const SLACK: Duration = Duration::from_secs(5);

/// How long it takes until `done`.
fn until(what: &str, done: impl Fn() -> bool) -> Duration {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_micros(200));
    }
    begin.elapsed()
}

/// How long it takes until both vCPUs call again, and no INT3 is in the code.
fn until_free(machine: &Machine) -> Duration {
    let before = [0, 1].map(|vcpu| machine.calls_of(vcpu));
    let runs = || {
        [0, 1]
            .iter()
            .zip(before)
            .all(|(v, calls)| machine.calls_of(*v) > calls + 1)
    };
    until("the vCPUs do not run", || runs() && machine.code_is_clean())
}

fn took(what: &str, time: Duration) {
    println!(
        "{what}: hooks out and vCPUs running after {:.1} ms",
        time.as_secs_f64() * 1e3
    );
    assert!(time < SLACK, "{what}: {time:?}");
}

fn held(at: &str, deadline: Duration, expiry: Expiry) -> Hook {
    execute(support::labels()[at]).delivered(Delivery::Held { deadline, expiry })
}

const HOUR: Duration = Duration::from_secs(3600);

#[test]
fn a_monitor_that_ends_badly_lets_the_guest_go_at_once() {
    let Some(mut machine) = Machine::start(GuestKind::Many, 2) else {
        return;
    };
    machine.go();

    // Killed, with breakpoints of both kinds and a watched page, and both vCPUs held.
    let mut process = machine.monitor_process();
    process.wait_until_it_holds();
    let begin = Instant::now();
    process.kill();
    until_free(&machine);
    took("monitor killed", begin.elapsed());

    // Its connection is cut while both vCPUs wait for it.
    let bare = Bare::connect(&machine);
    bare.arm(&held("function", HOUR, Expiry::Open));
    until("both are held", || bare.is_held(0) && bare.is_held(1));
    let begin = Instant::now();
    drop(bare);
    until_free(&machine);
    took("connection cut", begin.elapsed());

    // It takes no notice of its events: counted from the deadline.
    let deadline = Duration::from_millis(50);
    let bare = Bare::connect(&machine);
    let hook = bare.arm(&held("function", deadline, Expiry::Open));
    let begin = Instant::now();
    until("it expires", || bare.counts(hook).expired > 0);
    until_free(&machine);
    took("callback hung", begin.elapsed().saturating_sub(deadline));
    drop(bare);

    // It does not read what it wants all of: counted from when a vCPU has waited for room for long enough.
    let bare = Bare::connect(&machine);
    let told = Delivery::Told {
        overflow: Overflow::Block,
    };
    let hook = bare.arm(&execute(machine.labels()["function"]).delivered(told));
    until("the rings are full", || bare.counts(hook).told == 2 * 512);
    until("it expires", || bare.counts(hook).expired > 0);
    took("ring full", until_free(&machine));
    let counts = bare.counts(hook);
    assert!(
        counts.dropped >= 1 && counts.told == 1024,
        "dropped and said so: {counts:?}"
    );
    drop(bare);

    machine.let_end();
    machine.wait_until_done();
    let [first, second, flags] = machine.results();
    assert_eq!((first, second, flags), (machine.calls(), machine.calls(), 0));
    machine.finish();
}

#[test]
fn a_monitor_that_asked_for_it_leaves_the_vm_paused_when_it_is_cut_off() {
    let Some(mut machine) = Machine::start(GuestKind::Many, 2) else {
        return;
    };
    machine.go();
    let bare = Bare::connect(&machine);
    bare.arm(&held("function", HOUR, Expiry::Closed));
    until("both are held", || bare.is_held(0) && bare.is_held(1));
    drop(bare);
    // Its hooks are out at some time, and whether they are or not: nobody calls.
    let stopped = [0, 1].map(|vcpu| machine.calls_of(vcpu));
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!([0, 1].map(|vcpu| machine.calls_of(vcpu)), stopped);
    let backend = machine.backend();
    backend.resume().unwrap();
    took("resumed", until_free(&machine));
    drop(backend);
    machine.let_end();
    machine.wait_until_done();
    assert_eq!(machine.results()[0], machine.calls());
    machine.finish();
}
