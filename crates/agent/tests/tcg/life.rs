//! Monitors that come, go and die, verdicts, and hooks that change while the guest works.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::json;
use vmsight_arch::Gva;
use vmsight_events::agent::{AgentBackend, MOST_WAITING};
use vmsight_events::{EventError, Monitor, OpenOptions, open};
use vmsight_hooks::{BackendKind, Delivery, Expiry, Hook, Verdict};
use vmsight_lab::{Order, Work, connections};

use crate::guest::{HELD, TOLD, Watched};

const SOCKET: &str = "VMSIGHT_TEST_SOCKET";
const PLACE: &str = "VMSIGHT_TEST_PLACE";
const PATIENCE: Duration = Duration::from_secs(60);

/// Run by [`a_killed_monitor_leaves_no_trace`] in a process of its own: holds a vCPU and gives no verdict.
pub(crate) fn victim() {
    let (Some(socket), Ok(place)) = (std::env::var_os(SOCKET), std::env::var(PLACE)) else {
        return;
    };
    let monitor = Monitor::new(Box::new(AgentBackend::open(&PathBuf::from(socket)).unwrap()));
    let _guard = monitor
        .hook(&Hook::execute(Gva(place.parse().unwrap())).delivered(HELD))
        .unwrap();
    println!("armed");
    let occurrence = monitor.next(PATIENCE).unwrap().unwrap();
    println!("holding");
    std::thread::sleep(PATIENCE);
    drop(occurrence);
}

pub(crate) fn a_killed_monitor_leaves_no_trace(watched: &Watched) {
    let place = watched.symbol("__x64_sys_getpid");
    for _ in 0..3 {
        let mut victim = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "victim", "--nocapture"])
            .env(SOCKET, watched.guest.agent_path().unwrap())
            .env(PLACE, place.0.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(victim.stdout.take().unwrap()).lines();
        let mut said = |what: &str| {
            let line = lines.find(|line| line.as_ref().unwrap().contains(what));
            assert!(line.is_some(), "the monitor did not get that far: {what}");
        };
        said("armed");
        let orders = watched.guest.orders().unwrap();
        let sent = orders.send(Order::from(Work::GetPid { count: 1000 })).unwrap();
        said("holding");
        victim.kill().unwrap();
        victim.wait().unwrap();
        let account = sent.wait(PATIENCE).unwrap();
        assert_eq!((account.made, account.failed), (1000, 0));
    }
    // Nothing is hooked any more, and the next monitor starts from nothing.
    let monitor = watched.monitor();
    watched.order(Work::GetPid { count: 10 });
    assert!(monitor.next(Duration::from_millis(200)).unwrap().is_none());
}

/// Its connection is cut while it lives and holds a vCPU.
pub(crate) fn a_monitor_that_is_cut_off_holds_nobody(watched: &Watched) {
    let monitor = watched.monitor();
    let place = watched.symbol("__x64_sys_getpid");
    let guard = monitor.hook(&Hook::execute(place).delivered(HELD)).unwrap();
    let orders = watched.guest.orders().unwrap();
    let sent = orders.send(Order::from(Work::GetPid { count: 1000 })).unwrap();
    let held = monitor.next(PATIENCE).unwrap().unwrap();
    let path = watched.guest.agent_path().unwrap();
    // The backend has one, by two descriptors, of which the second may be closed for the first.
    assert!(connections::cut(watched.guest.pid(), |at| *at == *path).unwrap() > 0);
    let account = sent.wait(PATIENCE).unwrap();
    assert_eq!((account.made, account.failed), (1000, 0));
    // It learns of that.
    assert!(matches!(held.answer(Verdict::Pause), Err(EventError::Gone)));
    assert!(matches!(monitor.next(PATIENCE), Err(EventError::Gone)));
    drop((guard, monitor));
    // Nothing is hooked any more, and another one can hook at once.
    let next = watched.monitor();
    let guard = next
        .hook(&Hook::execute(place).delivered(Delivery::Counted))
        .unwrap();
    watched.order(Work::GetPid { count: 10 });
    assert_eq!(guard.counts().unwrap().occurred, 10);
}

/// It does not take what it wants all of: the guest waits once, not again and again, and the hook is out.
pub(crate) fn a_full_ring_takes_the_hook_out(watched: &Watched) {
    const MORE: u64 = 1000;
    let monitor = watched.monitor();
    let place = watched.symbol("__x64_sys_getpid");
    let guard = monitor.hook(&Hook::execute(place).delivered(TOLD)).unwrap();
    let room = MOST_WAITING as u64;
    let orders = watched.guest.orders().unwrap();
    let work = Work::GetPid { count: room + MORE }.on(0);
    let account = orders.send(work).unwrap().wait(PATIENCE).unwrap();
    assert_eq!((account.made, account.failed), (room + MORE, 0));
    let counts = guard.counts().unwrap();
    assert_eq!(
        (counts.occurred, counts.told, counts.dropped, counts.expired),
        (room + 1, room, 1, 1)
    );
    // What was told before is there to be read.
    let mut read = 0;
    while monitor.next(Duration::ZERO).unwrap().is_some() {
        read += 1;
    }
    assert_eq!(read, room);
}

/// What verdicts do here, what they cannot, and what a vCPU that waits for one keeps others from.
pub(crate) fn a_held_vcpu_and_its_verdicts(watched: &Watched) {
    let monitor = watched.monitor();
    let place = watched.symbol("__x64_sys_getpid");
    let orders = watched.guest.orders().unwrap();
    let getpid = |count| orders.send(Order::from(Work::GetPid { count })).unwrap();

    // What a plugin cannot do is an error that names who can; the guest goes on.
    let guard = monitor.hook(&Hook::execute(place).delivered(HELD)).unwrap();
    let sent = getpid(2);
    let held = monitor.next(PATIENCE).unwrap().unwrap();
    let Err(EventError::Verdict { why, .. }) = held.answer(Verdict::Return(0)) else {
        panic!("it cannot");
    };
    assert!(why.contains("gdb-stub"), "{why}");
    // While one is held, no hook can be armed: the translated code cannot change.
    let held = monitor.next(PATIENCE).unwrap().unwrap();
    let second = Hook::execute(watched.symbol("__x64_sys_getppid")).delivered(TOLD);
    assert!(matches!(monitor.hook(&second), Err(EventError::Busy { .. })));
    held.answer(Verdict::Remove).unwrap();
    assert_eq!(sent.wait(PATIENCE).unwrap().failed, 0);
    assert_eq!(guard.counts().unwrap().occurred, 0, "it is out, and forgotten");
    drop(guard);
    drop(monitor.hook(&second).unwrap());

    // No verdict in time: the guest goes on, and the hook is out.
    let soon = Delivery::Held {
        deadline: Duration::from_millis(50),
        expiry: Expiry::Open,
    };
    let guard = monitor.hook(&Hook::execute(place).delivered(soon)).unwrap();
    let sent = getpid(100);
    let held = monitor.next(PATIENCE).unwrap().unwrap();
    assert_eq!(sent.wait(PATIENCE).unwrap().made, 100);
    let counts = guard.counts().unwrap();
    assert_eq!((counts.occurred, counts.expired), (1, 1));
    assert!(held.answer(Verdict::Pause).is_err(), "too late");
    drop(guard);

    // Paused by a verdict, and let go by the VM's owner.
    let mut qmp = watched.guest.qmp().unwrap();
    let guard = monitor.hook(&Hook::execute(place).delivered(HELD)).unwrap();
    let sent = getpid(1);
    monitor
        .next(PATIENCE)
        .unwrap()
        .unwrap()
        .answer(Verdict::Pause)
        .unwrap();
    let mut is = |status: &str| {
        let end = std::time::Instant::now() + PATIENCE;
        while qmp.execute("query-status", json!({})).unwrap()["status"] != status {
            assert!(std::time::Instant::now() < end, "never {status}");
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    is("paused");
    drop(guard);
    qmp.execute("cont", json!({})).unwrap();
    assert_eq!(sent.wait(PATIENCE).unwrap().failed, 0);

    // The owner's own pause gets through to a vCPU that is held.
    let guard = monitor.hook(&Hook::execute(place).delivered(HELD)).unwrap();
    let sent = getpid(1);
    let held = monitor.next(PATIENCE).unwrap().unwrap();
    qmp.execute("stop", json!({})).unwrap();
    drop((held, guard));
    qmp.execute("cont", json!({})).unwrap();
    assert_eq!(sent.wait(PATIENCE).unwrap().failed, 0);
}

/// Which backend is taken where none is named, and where one is.
pub(crate) fn backends(watched: &Watched, best: BackendKind) {
    let open = |backend| {
        let timeout = PATIENCE;
        open(&watched.target, OpenOptions { backend, timeout })
    };
    assert_eq!(open(None).unwrap().backend(), best);
    let named = open(Some(BackendKind::AgentTcg)).unwrap();
    assert_eq!(named.backend(), BackendKind::AgentTcg);
    drop(named);
    let Err(EventError::NoBackend { why, .. }) = open(Some(BackendKind::AgentKvm)) else {
        panic!("it is no KVM");
    };
    assert!(why.contains("agent-tcg"), "{why}");
}

/// Hooks are armed and taken out while both vCPUs run into them: none is told of that is not armed, and what is
/// armed all the while misses nothing.
pub(crate) fn hooks_come_and_go_under_load(watched: &Watched) {
    const CALLS: u64 = 4000;
    let monitor = watched.monitor();
    let always = monitor
        .hook(&Hook::execute(watched.symbol("__x64_sys_getpid")).delivered(Delivery::Counted))
        .unwrap();
    let done = AtomicBool::new(false);
    let accounts = std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let orders = watched.guest.orders().unwrap();
            let both = [0, 1].map(|cpu| orders.prepare(Work::GetPid { count: CALLS }.on(cpu)).unwrap());
            let accounts = orders.go(both).unwrap();
            done.store(true, Ordering::SeqCst);
            accounts
        });
        let functions = ["do_syscall_64", "__x64_sys_getpid", "__task_pid_nr_ns"];
        let mut rounds = 0;
        while !done.load(Ordering::SeqCst) || rounds < functions.len() {
            let place = watched.symbol(functions[rounds % functions.len()]);
            let guard = monitor.hook(&Hook::execute(place).delivered(HELD)).unwrap();
            if let Some(occurrence) = monitor.next(Duration::from_millis(20)).unwrap() {
                assert_eq!(occurrence.event().hook, guard.id());
            }
            drop(guard);
            rounds += 1;
        }
        worker.join().unwrap()
    });
    assert!(accounts.iter().all(|a| (a.made, a.failed) == (CALLS, 0)));
    assert_eq!(always.counts().unwrap().occurred, 2 * CALLS);
}

/// Each monitor is told of its own hooks' events and of no others, and one's end is not the other's.
pub(crate) fn two_monitors_have_each_their_own(watched: &Watched) {
    let (first, second) = (watched.monitor(), watched.monitor());
    let getpid = watched.symbol("__x64_sys_getpid");
    let one = first.hook(&Hook::execute(getpid).delivered(HELD)).unwrap();
    let both = second.hook(&Hook::execute(getpid).delivered(TOLD)).unwrap();
    let (mut seen, mut told) = (0, 0);
    watched.during(
        &first,
        |_| seen += 1,
        |guest| guest.order(Work::GetPid { count: 500 }).unwrap(),
    );
    while second.next(Duration::from_millis(200)).unwrap().is_some() {
        told += 1;
    }
    assert_eq!((seen, told), (500, 500));
    assert_eq!(one.counts().unwrap().told, 500);
    drop((one, first));
    watched.order(Work::GetPid { count: 100 });
    assert_eq!(both.counts().unwrap().occurred, 600);
}
