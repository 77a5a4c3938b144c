//! Hooks that come and go at random, and monitors that are killed, while two vCPUs do work whose results are known.
//!
//! `VMSIGHT_TORTURE_SECONDS` says for how long, `VMSIGHT_TORTURE_SEED` with which dice: a run that failed prints its own.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use vmsight_arch::Gva;
use vmsight_events::{EventError, HookGuard, Monitor, OpenOptions, open};
use vmsight_hooks::{Delivery, Hook, Overflow, Verdict};
use vmsight_lab::chance::Dice;
use vmsight_lab::orders::checksum;
use vmsight_lab::{Kernel, Work};
use vmsight_target::{AttachOptions, Target, TargetSpec};

use crate::support::{HELD, Watched};

const SECONDS: u64 = 120;
/// What the work below goes through; and the timer's tick.
const FUNCTIONS: &[&str] = &[
    "__x64_sys_getpid",
    "vfs_read",
    "vfs_write",
    "__x64_sys_lseek",
    "wake_up_new_task",
    "do_exit",
    "handle_mm_fault",
    "tick_sched_timer",
];
const DATA: &str = "jiffies_64";
/// A guest that stood still for so long would have been forgotten. It is to be 100 ms; how long it took is printed.
const LONGEST: Duration = Duration::from_secs(10);

#[test]
fn hooks_at_random_and_monitors_that_are_killed() {
    if let Ok(text) = std::env::var("VMSIGHT_TEST_TORTURER") {
        let words: Vec<&str> = text.split(' ').collect();
        let addresses: Vec<u64> = words[2..].iter().map(|word| word.parse().unwrap()).collect();
        return torturer(words[0], words[1].parse().unwrap(), &addresses);
    }
    let number = |name: &str, otherwise: u64| {
        std::env::var(name).map_or(otherwise, |text| text.parse().expect("a number"))
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed = number("VMSIGHT_TORTURE_SEED", now);
    println!("VMSIGHT_TORTURE_SEED={seed}");
    let end = Instant::now() + Duration::from_secs(number("VMSIGHT_TORTURE_SECONDS", SECONDS));
    let watched = Watched::boot(Kernel::V6_1Cloud, false);
    let before = watched.text();
    let stop = AtomicBool::new(false);
    let done = [const { AtomicU64::new(0) }; 2];
    let killed = std::thread::scope(|scope| {
        let _stop = SetOnDrop(&stop);
        let workers: Vec<_> = (0..)
            .zip(&done)
            .map(|(cpu, done)| {
                let (watched, stop) = (&watched, &stop);
                scope.spawn(move || {
                    let mut dice = Dice::new(seed.wrapping_mul(3 + u64::from(cpu)));
                    while !stop.load(Ordering::Relaxed) {
                        work(watched, cpu, dice.roll(6));
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        let mut dice = Dice::new(seed);
        let mut killed = 0;
        while Instant::now() < end && !workers.iter().any(|worker| worker.is_finished()) {
            kill_one(&watched, &mut dice);
            killed += 1;
            assert_eq!(watched.text(), before, "the kernel's code is what it was");
        }
        killed
    });
    let done = done.map(AtomicU64::into_inner);
    println!("{killed} monitors were killed while {done:?} pieces of work were done");
    assert!(killed > 2 && done.iter().all(|done| *done > 10));
    // And it can still be hooked.
    let monitor = watched.monitor();
    let at = watched.symbol("__x64_sys_getpid");
    let hook = monitor.hook(&Hook::execute(at).delivered(HELD)).unwrap();
    let account = watched.during(
        &monitor,
        |_| Verdict::Continue,
        |guest| guest.order(Work::GetPid { count: 50 }).unwrap(),
    );
    assert_eq!((account.made, account.failed), (50, 0));
    assert!(hook.counts().unwrap().occurred >= 50);
}

/// Whoever leaves the scope, in a panic too, lets the workers end.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A piece of work, and that its result is what it must be.
fn work(watched: &Watched, cpu: u32, which: u64) {
    match which {
        0 => {
            let account = watched.order(Work::GetPid { count: 100 }.on(cpu));
            assert_eq!((account.made, account.failed), (100, 0));
            assert_eq!(account.returned, Some(i64::from(account.pid)));
        }
        1 => {
            let account = watched.order(Work::Call { count: 50_000 }.on(cpu));
            assert_eq!(account.checksum, Some(50_000 * 50_001 / 2));
        }
        2 => {
            let (value, count) = (0x1234_5678_9abc, 50_000);
            let read = Work::Read {
                value,
                count,
                offset: 16,
            };
            let account = watched.order(read.on(cpu));
            assert_eq!(account.checksum, Some(value.wrapping_mul(count)));
        }
        3 => {
            let account = watched.order(Work::Fork { count: 3 }.on(cpu));
            assert_eq!((account.children.len(), account.values), (3, vec![0, 1, 2]));
        }
        4 => {
            let account = watched.order(Work::Compute { rounds: 1_000_000 }.on(cpu));
            assert_eq!(account.checksum, Some(checksum(1_000_000)));
        }
        _ => {
            let account = watched.order(Work::Syscalls { rounds: 20 }.on(cpu));
            assert_eq!(account.failed, 0);
        }
    }
}

/// A monitor that hooks at random, for some seconds, and then is killed.
fn kill_one(watched: &Watched, dice: &mut Dice) {
    let mut places: Vec<String> = Vec::new();
    for name in FUNCTIONS.iter().chain([&DATA]) {
        places.push(watched.symbol(name).0.to_string());
    }
    let qmp = watched.guest.qmp_path().unwrap();
    let asked = format!("{} {} {}", qmp.display(), dice.roll(u64::MAX), places.join(" "));
    let mut child = Torturer(
        Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "torture::hooks_at_random_and_monitors_that_are_killed",
                "--nocapture",
            ])
            .env("VMSIGHT_TEST_TORTURER", asked)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let mut lines = BufReader::new(child.0.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "@@at work"), "it did not begin");
    std::thread::sleep(Duration::from_millis(500 + dice.roll(4500)));
    assert_eq!(child.0.try_wait().unwrap(), None, "it ended by itself");
    child.0.kill().unwrap();
    child.0.wait().unwrap();
    let begin = Instant::now();
    let ticks = ticks(watched);
    while self::ticks(watched) == ticks {
        assert!(begin.elapsed() < LONGEST, "the guest stands still");
        std::thread::sleep(Duration::from_millis(1));
    }
    let ticked = begin.elapsed();
    // Both vCPUs run on.
    for cpu in 0..2 {
        watched.order(Work::Ping.on(cpu));
    }
    println!(
        "killed; the guest's clock ticked after {ticked:?}, both vCPUs had answered after {:?}",
        begin.elapsed()
    );
}

fn ticks(watched: &Watched) -> u64 {
    let mut bytes = [0; 8];
    let at = watched.symbol(DATA);
    watched.kernel.space().read(at, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

/// Ends with the test.
struct Torturer(Child);

impl Drop for Torturer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The monitor that is to be killed.
fn torturer(qmp: &str, seed: u64, places: &[u64]) {
    let mut dice = Dice::new(seed);
    let spec = TargetSpec::Qmp(qmp.into());
    // The one before may have been killed a moment ago, and its stub be on its way out.
    let target = patiently(|| vmsight_target::attach(&spec, &AttachOptions::default()));
    let (data, functions) = places.split_last().unwrap();
    let mut told = false;
    loop {
        let monitor = again(&target);
        let mut hooks: Vec<HookGuard> = Vec::new();
        for _ in 0..40 {
            match dice.roll(3) {
                0 if hooks.len() < 6 => {
                    let delivery = match dice.roll(3) {
                        0 => HELD,
                        1 => Delivery::Told {
                            overflow: Overflow::Drop,
                        },
                        _ => Delivery::Counted,
                    };
                    let hook = match dice.roll(5) {
                        0 => Hook::write(Gva(*data), 8),
                        _ => Hook::execute(Gva(functions[dice.roll(functions.len() as u64) as usize])),
                    };
                    // Hardware watchpoints are few.
                    match monitor.hook(&hook.delivered(delivery)) {
                        Ok(guard) => hooks.push(guard),
                        Err(EventError::Limit { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
                1 if !hooks.is_empty() => {
                    let which = dice.roll(hooks.len() as u64) as usize;
                    drop(hooks.swap_remove(which));
                }
                _ => {
                    let until = Instant::now() + Duration::from_millis(dice.roll(50));
                    while let Some(left) = until.checked_duration_since(Instant::now()) {
                        if let Some(occurrence) = monitor.next(left).unwrap() {
                            match dice.roll(20) {
                                0 => drop(occurrence),
                                _ => occurrence.answer(Verdict::Continue).unwrap(),
                            }
                        }
                    }
                }
            }
            if !told && !hooks.is_empty() {
                println!("\n@@at work");
                told = true;
            }
        }
    }
}

fn again(target: &Target) -> Monitor {
    let options = OpenOptions {
        timeout: Duration::from_secs(30),
        ..OpenOptions::default()
    };
    patiently(|| open(target, options))
}

fn patiently<T, E: std::fmt::Display>(mut attempt: impl FnMut() -> Result<T, E>) -> T {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        match attempt() {
            Ok(done) => return done,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
