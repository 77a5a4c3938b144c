//! The trial's findings: the gate's cost, and every attack.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use vmsight_lab::cache::Lock;
use vmsight_sim_image::bochs::{HALTED, Run, WITH_VMX, WITHOUT_VMX};
use vmsight_sim_image::{Image, Machine, Program};

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

/// Each attack, and what must be found: that it was stopped by the exit that is said to stop it.
const FINDINGS: &[&str] = &[
    "exits through the gate: ok 0 in 1000 calls",
    "exits by VMCALL: ok 1000 in 1000 calls",
    "the monitor reads and writes guest memory: ok 0x123456789abcdef; 0 exits",
    "addresses that lead astray: ok handler called 25 times",
    "write to a protected hook: ok exit 48",
    "write to the stub: ok exit 48",
    "read, write, execute each page of the monitor, also by an alias: ok",
    "VMFUNC into the gate from elsewhere: ok exit 2",
    "A4: VMFUNC into the unarmed monitor: ok exit 59",
    "VMFUNC with an empty entry of the list: ok exit 59",
    "VMFUNC with index 512: ok exit 59",
    "VMFUNC with the greatest index: ok exit 59",
    "VMFUNC of a function that there is not: ok exit 59",
    "A1: VMFUNC at the end of a page, the monitor's own page next: ok exit 2",
    "A1 into the unarmed monitor: ok exit 59",
    "A1 onto the gate's page tables: ok exit 48",
    "A1 onto the list: ok exit 48",
    "A3: the attacker's page at the monitor's address: ok exit 2",
    "A3 into the unarmed monitor: ok exit 59",
    "A1 with the monitor's whole address space forged: ok exit 2",
    "landing on each byte of the gate, registers zero: ok 1 of 4096",
    "landing on each byte of the gate, registers at the list: ok 1 of 4096",
    "landing on each byte of the gate, registers at guest memory: ok 1 of 4096",
    "landing on each byte of the gate, registers all ones: ok 1 of 4096",
    "A5: page tables of the attacker's, read-write in the monitor's view: ok exit 48: 1; end 14; handler called 1 times",
    "a hook with a PCID: ok",
    "single step into the gate: ok exit 0",
    "breakpoint on the gate: ok exit 0",
    "breakpoint after the arming: ok exit 0",
    "breakpoint on the monitor's entry: ok exit 0",
    "stack pointer in the monitor's stack: ok",
    "IDT in guest memory as the monitor sees it: ok",
    "a call from what is no registered hook: ok",
    "GDT in guest memory as the monitor sees it: ok",
    "VMFUNC from code of 32 bits: ok exit 2",
    "VMFUNC from user mode: ok exit 2",
    "VMCALL from user mode: ok exit 18",
    "CR0.WP: ok exit 28",
    "CR4.PAE: ok exit 28",
    "CR4.LA57: ok exit 28",
    "CR4.SMEP: ok exit 28",
    "LSTAR: ok exit 32",
    "DS_AREA: ok exit 32",
    "APIC over the monitor: ok exit 32",
    "calls after the lockdown: ok 4 of 4 refused",
    "hooks while the timer interrupts: ok 20000 of 20000 handled",
    "a hook after all this: ok",
];

#[test]
fn every_attack_is_stopped_and_the_gate_costs_no_exit() {
    let run = run(&trial(), WITH_VMX, 1);
    let serial = run.serial.replace('\r', "");
    for finding in FINDINGS {
        let found = serial
            .lines()
            .any(|l| l.strip_prefix("trial: ").is_some_and(|l| l.starts_with(finding)));
        assert!(found, "not found: {finding}\n{serial}");
    }
    let round_trip = |way: &str| -> u64 {
        let begin = format!("trial: round trip {way}: ok ");
        let line = serial
            .lines()
            .find_map(|l| l.strip_prefix(&begin))
            .unwrap_or_else(|| panic!("{serial}"));
        line.strip_suffix(" instructions").unwrap().parse().unwrap()
    };
    let (gate, call) = (round_trip("through the gate"), round_trip("by VMCALL"));
    assert!(
        gate <= 60 && call > 2 * gate,
        "{gate} and {call} instructions\n{serial}"
    );
    assert!(
        !serial.contains("FAILED") && serial.contains(" passed, 0 failed"),
        "{serial}"
    );
    assert!(run.off, "it did not switch the machine off\n{serial}");
    // The table shows with --nocapture.
    println!("{serial}");
}

/// Without the view of the gate, A1 and A3 succeed: the same code that finds them stopped above finds that.
#[test]
fn controls_reach_the_monitor() {
    for (hypervisor, attack) in [(Program::TwoViews, "A1"), (Program::TwoViewsApt, "A3")] {
        let image = trial().hypervisor(hypervisor).command_line(attack);
        let run = run(&image, WITH_VMX, 1);
        let finding = format!("trial: {attack}: reached the monitor 1 times");
        assert!(
            run.off && run.serial.contains(&finding),
            "{hypervisor:?}\n{}",
            run.serial
        );
    }
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
        (WITH_VMX, 2, "this machine has 2 processors"),
    ] {
        let run = run(&trial(), processor, count);
        assert!(
            run.serial.contains(why) && run.serial.contains(HALTED),
            "{}",
            run.serial
        );
    }
}
