//! Machines on which the trial does not come to attack: how the hypervisor refuses them, and how it survives a reset. The
//! attacks are tested through `vmsight sim attack`.

#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use vmsight_lab::cache::Lock;
use vmsight_sim_image::bochs::{HALTED, Run, WITH_VMX, WITHOUT_VMFUNC, WITHOUT_VMX};
use vmsight_sim_image::{Image, Machine};

/// For a machine that has others to run too.
const LIMIT: Duration = Duration::from_secs(420);

fn trial() -> Image {
    Image::trial().unwrap_or_else(|e| panic!("{e}"))
}

/// One Bochs at a time.
fn run(image: &Image, processor: &str, count: u32) -> Run {
    let _lock = Lock::wait("bochs").unwrap();
    let machine = Machine::with_processors(image, processor, count).unwrap_or_else(|e| panic!("{e}"));
    machine.wait(LIMIT).unwrap()
}

#[test]
fn a_guest_that_resets_the_machine_comes_back() {
    let run = run(&trial().command_line("RB"), WITH_VMX, 1);
    for times in 0..3 {
        assert!(
            run.serial.contains(&format!("trial: reset {times} times")),
            "{}",
            run.serial
        );
    }
    assert!(
        run.off && run.serial.contains("triple fault of the guest"),
        "{}",
        run.serial
    );
}

#[test]
fn a_machine_that_cannot_be_watched_is_refused() {
    for (processor, count, why) in [
        (WITHOUT_VMX, 1, "this processor lacks VT-x"),
        (WITHOUT_VMFUNC, 1, "this processor lacks VM functions"),
        (WITH_VMX, 5, "this machine has 5 processors: 4 are supported"),
    ] {
        let _lock = Lock::wait("bochs").unwrap();
        let mut machine =
            Machine::with_processors(&trial(), processor, count).unwrap_or_else(|e| panic!("{e}"));
        let deadline = Instant::now() + LIMIT;
        let mut serial = Vec::new();
        // The machine goes on; the screen is drawn some time after it was written to.
        while !(machine.is_halted() && is_drawn(&machine.screen(), why)) {
            serial.extend(machine.look().unwrap().console);
            let late = Instant::now() > deadline;
            assert!(
                !late,
                "{}\n{:?}",
                String::from_utf8_lossy(&serial),
                machine.screen()
            );
            std::thread::sleep(Duration::from_millis(200));
        }
        let serial = String::from_utf8_lossy(&serial);
        assert!(serial.contains(why) && serial.contains(HALTED), "{serial}");
    }
}

/// Whether a text's words are on the screen, one after the other.
fn is_drawn(screen: &str, text: &str) -> bool {
    let mut rest = Some(screen);
    for word in text.split(' ') {
        rest = rest.and_then(|rest| rest.split_once(word)).map(|(_, rest)| rest);
    }
    rest.is_some()
}
