//! What the monitors cost in a fixed workload of an unmodified Debian: with the gate nothing leaves the guest, and the same
//! hooks by exits leave once each.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::time::Duration;

use vmsight_lab::Kernel;
use vmsight_lab::cache::Lock;
use vmsight_sim_image::Machine;
use vmsight_sim_image::bochs::WITH_VMX;
use vmsight_sim_image::trial::Way;
use vmsight_sim_image::workload::{self, Boot, Monitor};
use vmsight_sim_policy::{KernelImage, Wanted, policy};
use vmsight_sim_witness::ROUNDS;

/// For a machine that has others to run too; alone it takes a minute.
const LIMIT: Duration = Duration::from_secs(900);

#[test]
fn hooks_through_the_gate_cost_no_exit_and_less_than_those_by_exits() {
    // The smallest that boots: what is measured is the same in all.
    let kernel = Kernel::V6_1Cloud.fetch().unwrap_or_else(|e| panic!("{e:?}"));
    let vmlinuz = fs::read(kernel.vmlinuz()).unwrap();
    let policy = policy(&KernelImage::read(&vmlinuz).unwrap(), &Wanted::default()).unwrap();
    let [gate, exit] = [Way::Gate, Way::Call].map(|way| {
        let image = workload::image(vmlinuz.clone(), &policy, &Monitor::ALL, way).unwrap();
        let _lock = Lock::wait("bochs").unwrap();
        let machine = Machine::start(&image, WITH_VMX).unwrap_or_else(|e| panic!("{e:?}"));
        let run = machine.wait(LIMIT).unwrap();
        let said = workload::said(&Monitor::ALL, way, &run);
        let boots = Boot::parse(&said).unwrap_or_else(|e| panic!("{e}\n{said}"));
        let [boot] = boots.try_into().unwrap();
        assert!(run.off && boot.held(), "{boot:#?}\n{said}");
        boot
    });
    for boot in [&gate, &exit] {
        assert_eq!(boot.rounds.len(), 4 * ROUNDS);
        for round in &boot.rounds {
            // Each part is the same each time.
            let files = round.part == Monitor::Calls;
            let made = (round.calls, round.processes, round.programs);
            assert_eq!(made, if files { (2401, 0, 0) } else { (CALLS, 16, 8) });
            // All hooks are the workload's, but for threads that the kernel makes.
            let hooks = round.calls + round.processes + round.programs + round.kernel_threads;
            assert_eq!(round.handled, if round.hooked { hooks } else { 0 });
            let left = round.hooked && boot.way == Way::Call;
            assert_eq!(round.calls_out, if left { hooks } else { 0 });
        }
        for part in Monitor::ALL {
            for hooked in [false, true] {
                println!("{:?} {:?}", boot.way, boot.least(part, hooked).unwrap());
            }
        }
    }
    // For most rounds nothing leaves at all; the kernel may patch itself in one.
    let quiet = gate.rounds.iter().filter(|round| round.exits == 0).count();
    assert!(quiet > gate.rounds.len() / 2, "{gate:#?}");
    let least = |boot: &Boot, hooked| boot.least(Monitor::Calls, hooked).unwrap().instructions;
    let bare = least(&gate, false).max(least(&exit, false));
    assert!(
        bare < least(&gate, true) && least(&gate, true) < least(&exit, true),
        "{gate:#?}\n{exit:#?}"
    );
}

/// System calls of the processes' part: a fork, a wait and an end for each of 16, and for 8 the execution and four calls by
/// which the program gets at what it counts in.
const CALLS: u64 = 16 * 3 + 8 * 5;
