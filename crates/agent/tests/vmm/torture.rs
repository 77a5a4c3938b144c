//! Hooks that come and go at random, and monitors that are killed, while two vCPUs do work that they count.
//!
//! `VMSIGHT_TORTURE_SECONDS` says for how long, `VMSIGHT_TORTURE_SEED` with which dice: a run that failed prints its
//! own.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use super::*;
use vmsight_events::HookGuard;
use vmsight_events::agent::AgentBackend;
use vmsight_hooks::{Filter, Value};
use vmsight_lab::chance::Dice;

const SECONDS: u64 = 60;
/// A guest that stood still for so long would have been forgotten. It is to be 100 ms; how long it took is printed.
const LONGEST: Duration = Duration::from_secs(10);
/// Where the guest's page tables have nothing.
const ROOM: Gva = Gva(0x1000_0000);
const LABELS: [&str; 6] = ["function", "push", "inc", "pushf", "nop", "inc_again"];

#[test]
fn hooks_at_random_and_monitors_that_are_killed() {
    if let Ok(text) = std::env::var("VMSIGHT_TEST_TORTURER") {
        let (seed, socket) = text.split_once(' ').unwrap();
        return torturer(socket, seed.parse().unwrap());
    }
    let number = |name: &str, otherwise: u64| {
        std::env::var(name).map_or(otherwise, |text| text.parse().expect("a number"))
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed = number("VMSIGHT_TORTURE_SEED", now);
    println!("VMSIGHT_TORTURE_SEED={seed}");
    let Some(mut machine) = Machine::start(GuestKind::Many, 2) else {
        return;
    };
    machine.go();
    let end = Instant::now() + Duration::from_secs(number("VMSIGHT_TORTURE_SECONDS", SECONDS));
    let mut dice = Dice::new(seed);
    // Two at a time, each with hooks of its own on the same places.
    let mut both = [(); 2].map(|()| Torturer::start(&machine, &mut dice));
    let mut killed = 0;
    while Instant::now() < end {
        std::thread::sleep(Duration::from_millis(200 + dice.roll(1300)));
        let which = &mut both[dice.roll(2) as usize];
        assert_eq!(which.0.try_wait().unwrap(), None, "it ended by itself");
        drop(std::mem::replace(which, Torturer::start(&machine, &mut dice)));
        killed += 1;
        runs_on(&mut machine);
    }
    drop(both);
    let took = runs_on(&mut machine);
    println!("{killed} monitors were killed; after the last two both vCPUs ran on within {took:?}");
    machine.let_end();
    machine.wait_until_done();
    // Each call counted itself twice in the function, and never saw the trap flag.
    let calls = machine.calls();
    println!("{calls} calls");
    assert!(killed > 2 && calls > 1000);
    assert_eq!(machine.results(), [calls, calls, 0]);
    assert!(machine.code_is_clean(), "an INT3 or a jump stayed behind");
    machine.finish();
}

/// How long it takes until both vCPUs have made calls.
fn runs_on(machine: &mut Machine) -> Duration {
    let begin = Instant::now();
    let before = [0, 1].map(|vcpu| machine.calls_of(vcpu));
    while (0..2).any(|vcpu| machine.calls_of(vcpu) == before[vcpu as usize]) {
        assert!(!machine.is_done());
        assert!(begin.elapsed() < LONGEST, "a vCPU stands still");
        std::thread::sleep(Duration::from_millis(1));
    }
    begin.elapsed()
}

/// A monitor that hooks at random; dropped, it is killed.
struct Torturer(Child);

impl Torturer {
    fn start(machine: &Machine, dice: &mut Dice) -> Self {
        let asked = format!("{} {}", dice.roll(u64::MAX), machine.socket().display());
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "torture::hooks_at_random_and_monitors_that_are_killed",
                "--nocapture",
            ])
            .env("VMSIGHT_TEST_TORTURER", asked)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let begun = lines.any(|line| line.unwrap() == "@@at work");
        let torturer = Self(child);
        assert!(begun, "it did not begin");
        torturer
    }
}

impl Drop for Torturer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The monitor that is to be killed.
fn torturer(socket: &str, seed: u64) {
    let mut dice = Dice::new(seed);
    let labels = support::labels();
    let mut told = false;
    loop {
        let monitor = Monitor::new(Box::new(AgentBackend::open(socket.as_ref()).unwrap()));
        let mut hooks: Vec<HookGuard> = Vec::new();
        for _ in 0..60 {
            match dice.roll(3) {
                0 if hooks.len() < 6 => {
                    let label = LABELS[dice.roll(LABELS.len() as u64) as usize];
                    match monitor.hook(&random(&mut dice, labels[label])) {
                        Ok(guard) => hooks.push(guard),
                        // Breakpoints are few, and so is what can be stepped.
                        Err(EventError::Limit { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
                1 if !hooks.is_empty() => {
                    let which = dice.roll(hooks.len() as u64) as usize;
                    drop(hooks.swap_remove(which));
                }
                _ => serve(&monitor, &mut dice),
            }
            if !told && !hooks.is_empty() {
                println!("\n@@at work");
                told = true;
            }
        }
    }
}

fn random(dice: &mut Dice, place: u64) -> Hook {
    let delivery = match dice.roll(3) {
        0 => Delivery::Held {
            deadline: Duration::from_secs(10),
            expiry: Expiry::Open,
        },
        1 => Delivery::Told {
            overflow: Overflow::Drop,
        },
        _ => Delivery::Counted,
    };
    let hook = match dice.roll(7) {
        0 => Hook::new(HookKind::Memory {
            range: Range::Physical {
                start: Gpa(support::RESULTS),
                len: 64,
            },
            access: Access::WRITE,
        }),
        1 => Hook::new(HookKind::Step {
            vcpu: dice.roll(2) as u32,
            count: 1 + dice.roll(20),
        }),
        2 => {
            // Wanted always, or never: the guest leaves RBX as it is.
            let some = Value::register(Register::Gpr(3)).masked(dice.roll(8)).is(0);
            execute(place).filtered(Filter::only(&some).unwrap())
        }
        // The function only, and where no other hook is on it.
        3 if support::has_int3() => {
            let some = Value::register(Register::RDI).is(dice.roll(3));
            let filter = Filter::only(&some).unwrap();
            execute(support::labels()["function"])
                .filtered(filter)
                .inside(ROOM)
        }
        _ => execute(place),
    };
    hook.delivered(delivery)
}

/// Answers what comes in the next moments.
fn serve(monitor: &Monitor, dice: &mut Dice) {
    let until = Instant::now() + Duration::from_millis(dice.roll(30));
    while let Some(left) = until.checked_duration_since(Instant::now()) {
        let Some(occurrence) = monitor.next(left).unwrap() else {
            return;
        };
        match dice.roll(20) {
            0 => drop(occurrence),
            // Its hook may be out by now.
            _ => drop(occurrence.answer(Verdict::Continue)),
        }
    }
}
