//! Several monitors of one VM.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use super::*;

/// A thread that gives one verdict on every event of a monitor.
struct Answering {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Answering {
    fn always(monitor: &Monitor, verdict: &Verdict) -> Self {
        let (monitor, verdict) = (monitor.clone(), verdict.clone());
        let stop = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut events = 0;
            loop {
                match monitor.next(Duration::from_millis(50)).unwrap() {
                    Some(occurrence) => {
                        occurrence.answer(verdict.clone()).unwrap();
                        events += 1;
                    }
                    None if over.load(Ordering::SeqCst) => return events,
                    None => {}
                }
            }
        });
        Self { stop, thread }
    }

    /// How many events there were until now.
    fn end(self) -> u64 {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().unwrap()
    }
}

#[test]
fn each_has_its_own_hooks_events_and_counts() {
    let Some(mut scene) = Scene::start(GuestKind::Calls, 2) else {
        return;
    };
    let second = scene.machine.monitor();
    let hooks = [
        scene.arm("function"),
        second.hook(&scene.execute("function")).unwrap(),
    ];
    // One more that only the second has, and that holds nobody.
    let told = Delivery::Told {
        overflow: Overflow::Block,
    };
    let inc = second.hook(&scene.execute("inc").delivered(told)).unwrap();
    assert_ne!(hooks[0].id(), hooks[1].id());
    let threads = [
        Answering::always(&scene.monitor, &Verdict::Continue),
        Answering::always(&second, &Verdict::Continue),
    ];
    scene.go();
    scene.wait_until_done();
    let events = threads.map(Answering::end);
    assert_eq!(events, [2000, 4000]);
    assert_eq!(hooks.each_ref().map(|h| h.counts().unwrap().told), [2000, 2000]);
    assert_eq!(inc.counts().unwrap().told, 2000);
    assert_eq!(scene.results(), [2000, 2000, 0]);
    drop((hooks, inc, second));
    scene.finish();
}

#[test]
fn the_strictest_verdict_is_applied() {
    // Whichever of them is asked first, and whether it is armed first or last.
    for strict_first in [true, false] {
        let Some(mut scene) = Scene::start(GuestKind::Writes, 1) else {
            return;
        };
        let second = scene.machine.monitor();
        let hook = Hook::new(HookKind::Memory {
            range: Range::Physical {
                start: Gpa(support::WATCHED),
                len: 8,
            },
            access: Access::WRITE,
        });
        let guards = [scene.hook(&hook), second.hook(&hook).unwrap()];
        let mut verdicts = [Verdict::Deny, Verdict::SetData(7)];
        if !strict_first {
            verdicts.reverse();
        }
        let threads = [
            Answering::always(&scene.monitor, &verdicts[0]),
            Answering::always(&second, &verdicts[1]),
        ];
        scene.go();
        scene.wait_until_done();
        assert_eq!(threads.map(Answering::end), [1000, 1000], "both were asked");
        assert_eq!(scene.machine.watched_words(1), [0], "every write was denied");
        drop((guards, second));
        scene.finish();
    }
}

#[test]
fn a_pause_does_not_let_pass_what_another_monitor_denies() {
    let Some(scene) = Scene::start(GuestKind::Writes, 1) else {
        return;
    };
    let second = scene.machine.monitor();
    let hook = Hook::new(HookKind::Memory {
        range: Range::Physical {
            start: Gpa(support::WATCHED),
            len: 8,
        },
        access: Access::WRITE,
    });
    let (pauses, denies) = (scene.hook(&hook), second.hook(&hook).unwrap());
    let (pausing, denying) = (pauses.id(), denies.id());
    scene.go();
    let first = scene.next();
    let other = second
        .next(Duration::from_secs(20))
        .unwrap()
        .expect("the same write");
    assert_eq!((first.event().hook, other.event().hook), (pausing, denying));
    first.answer(Verdict::Pause).unwrap();
    other.answer(Verdict::Deny).unwrap();
    // Out before it goes on: what follows is nobody's.
    drop((pauses, denies));
    let Scene { mut machine, monitor } = scene;
    drop((monitor, second));
    assert!(!machine.is_done());
    assert_eq!(machine.watched_words(1), [0]);
    machine.backend().resume().unwrap();
    machine.wait_until_done();
    // The first write was 1; the guest writes what it counted.
    assert_eq!(machine.watched_words(1), [1000]);
    machine.finish();
}

#[test]
fn a_monitor_that_is_killed_takes_only_its_own_hooks_with_it() {
    let Some(mut scene) = Scene::start(GuestKind::Calls, 2) else {
        return;
    };
    let counted = scene.hook(&scene.execute("function").delivered(Delivery::Counted));
    let held = scene.arm("inc");
    let mut victim = scene.machine.monitor_process();
    let thread = Answering::always(&scene.monitor, &Verdict::Continue);
    scene.go();
    victim.wait_until_it_holds();
    victim.kill();
    scene.wait_until_done();
    assert_eq!(thread.end(), 2000, "every INC was told to who is still there");
    assert_eq!(counted.counts().unwrap().occurred, 2000);
    assert_eq!(
        (held.counts().unwrap().told, held.counts().unwrap().expired),
        (2000, 0)
    );
    assert_eq!(scene.results(), [2000, 2000, 0]);
    drop((counted, held));
    assert!(scene.machine.code_is_clean());
    scene.finish();
}

#[test]
fn monitors_are_limited_in_number() {
    let Some(machine) = Machine::start(GuestKind::Many, 1) else {
        return;
    };
    let mut monitors: Vec<Monitor> = (0..16).map(|_| machine.monitor()).collect();
    assert!(matches!(machine.try_backend(), Err(EventError::Busy { .. })));
    // Another one's hook is nobody's business.
    let guard = monitors[3]
        .hook(&execute(0xdead_0000).delivered(Delivery::Counted))
        .unwrap();
    monitors.truncate(4);
    drop(machine.monitor());
    assert_eq!(monitors[3].capabilities(), monitors[0].capabilities());
    drop(guard);
    machine.let_end();
    machine.go();
    machine.finish();
}

#[test]
fn nobody_can_touch_another_ones_hook() {
    use vmsight_events::Backend;
    let Some(mut scene) = Scene::start(GuestKind::Calls, 1) else {
        return;
    };
    let guard = scene.hook(&scene.execute("function").delivered(Delivery::Counted));
    let other = scene.machine.backend();
    other.disarm(guard.id()).unwrap();
    scene.go();
    scene.wait_until_done();
    assert_eq!(other.counts(guard.id()).unwrap().occurred, 0);
    assert_eq!(guard.counts().unwrap().occurred, 1000);
    drop((guard, other));
    scene.finish();
}
