//! Hooks come and go, and the VMM goes on with its own.

use super::*;

#[test]
fn a_reset_takes_out_what_means_nothing_any_more() {
    let Some(mut scene) = Scene::start(GuestKind::Calls, 1) else {
        return;
    };
    let arm = |at: u64| scene.hook(&execute(at));
    let elsewhere: Vec<_> = (0..4).map(|n| arm(0xdead_0000 + n)).collect();
    let inc = arm(scene.machine.labels()["inc"]);
    assert!(!scene.machine.code_is_clean(), "an INT3 is there");
    assert_eq!(scene.machine.command("reset"), "ok");
    assert!(scene.machine.code_is_clean());
    scene.go();
    assert_eq!(scene.answer_all(|_| Verdict::Continue).len(), 0);
    assert_eq!(scene.results(), [1000, 1000, 0]);
    drop((elsewhere, inc));
    scene.finish();
}

/// How often hooks are armed and taken out under load.
const ROUNDS: u64 = 60;

#[test]
fn hooks_come_and_go_under_load() {
    let Some(mut scene) = Scene::start(GuestKind::Many, 2) else {
        return;
    };
    scene.go();
    let (mut rounds, mut seen) = (0, 0);
    while !scene.machine.is_done() {
        // Hardware, INT3, pages, MSRs, in turn and together.
        let breakpoints = if support::has_int3() { rounds % 5 } else { 0 };
        let fill: Vec<_> = (0..breakpoints)
            .map(|n| scene.hook(&execute(0xdead_0000 + n)))
            .collect();
        let label = ["inc", "nop", "push", "pushf", "function"][rounds as usize % 5];
        let execute = scene.hook(&execute(scene.at(label)));
        let write = Hook::new(HookKind::Memory {
            range: Range::Physical {
                start: Gpa(support::RESULTS & !0xfff),
                len: 8,
            },
            access: Access::WRITE,
        });
        let write = scene.hook(&write);
        for _ in 0..20 {
            if let Some(occurrence) = scene.monitor.next(Duration::from_millis(1)).unwrap() {
                drop(occurrence);
                seen += 1;
            }
        }
        drop((execute, write, fill));
        rounds += 1;
        if rounds == ROUNDS {
            scene.machine.let_end();
        }
    }
    assert!(rounds >= ROUNDS && seen > 100, "{rounds} rounds, {seen} events");
    let [first, second, flags] = scene.results();
    assert_eq!(first, second, "each call did both halves, once");
    assert_eq!(first, scene.machine.calls(), "and no call was lost or done twice");
    assert_eq!(flags, 0, "no flags of ours were seen");
    assert!(scene.machine.code_is_clean());
    scene.finish();
}

#[test]
fn what_the_vmm_does_itself_still_works() {
    let Some(mut scene) = Scene::start(GuestKind::Writes, 1) else {
        return;
    };
    let hook = Hook::new(HookKind::Memory {
        range: Range::Physical {
            start: Gpa(support::WATCHED),
            len: 8,
        },
        access: Access::WRITE,
    });
    let _guard = scene.hook(&hook);
    let breakpoint = scene.hook(&execute(0xdead_0000));
    // A slot that comes with a number that ours may have, one that goes, and the one that is cut, logged and not.
    assert_eq!(scene.machine.command("add-slot"), "ok");
    assert_eq!(scene.machine.command("log"), "ok");
    assert_eq!(
        scene.machine.command("dirty"),
        "ok",
        "the log is that of the whole slot"
    );
    assert_eq!(scene.machine.command("unlog"), "ok");
    assert_eq!(scene.machine.command("remove-slot"), "ok");
    // A debugger of the VMM's own is refused while we are there, and we while it is.
    assert_eq!(scene.machine.command("debug"), "busy");
    drop(breakpoint);
    assert_eq!(scene.machine.command("debug"), "ok");
    assert!(matches!(
        scene.monitor.hook(&execute(0xdead_0000)),
        Err(EventError::Busy { .. })
    ));
    assert_eq!(scene.machine.command("undebug"), "ok");
    scene.go();
    let events = scene.answer_all(|_| Verdict::Continue);
    assert_eq!(events.len(), 1000, "slot {SLOT} is watched again");
    scene.finish();
}
