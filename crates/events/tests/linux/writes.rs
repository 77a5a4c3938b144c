//! Memory of processes that is written to: each write once, with what was there and what is there then.

use vmsight_hooks::{Detail, Hook, Scope, Verdict};
use vmsight_lab::{Kernel, Work};

use crate::support::{HELD, Watched};

const COUNT: u64 = 1000;
const STEP: u64 = 0x0101_0101;

/// What was there, what is there now, and which vCPU wrote it.
type Seen = (Option<u64>, Option<u64>, u32);

#[test]
fn each_write_of_two_processes_at_once_is_told_with_its_values() {
    let watched = Watched::boot(Kernel::V6_1Cloud, false);
    let orders = watched.guest.orders().unwrap();
    let prepared = [0, 1].map(|cpu| {
        let work = Work::Write {
            first: 0x1000 << (16 * cpu),
            step: STEP,
            count: COUNT,
            offset: 64 * u64::from(cpu),
            shared: false,
        };
        orders.prepare(work.on(cpu)).unwrap()
    });
    let monitor = watched.monitor();
    // Both may have their page at the same address: it is the address space that tells them apart.
    let hooks = [0, 1].map(|i: usize| {
        let pid = i32::try_from(prepared[i].pid()).unwrap();
        let space = watched.kernel.process_space(pid).unwrap().unwrap();
        let hook = Hook::write(prepared[i].address().into(), 8)
            .within(Scope::Dtb(space.dtb()))
            .delivered(HELD);
        monitor.hook(&hook).unwrap()
    });
    let mut seen: [Vec<Seen>; 2] = Default::default();
    let accounts = watched.during(
        &monitor,
        |occurrence| {
            let event = occurrence.event();
            let index = hooks.iter().position(|h| h.id() == event.hook).unwrap();
            let Detail::Memory { old, new, .. } = event.detail else {
                panic!("{event:?}");
            };
            seen[index].push((old, new, event.vcpu));
            Verdict::Continue
        },
        |_| orders.go(prepared).unwrap(),
    );
    for (cpu, (seen, account)) in seen.iter().zip(&accounts).enumerate() {
        assert_eq!(account.made, COUNT);
        assert_eq!(seen.len() as u64, COUNT, "CPU {cpu}");
        let mut old = 0;
        for (n, event) in (0..COUNT).zip(seen) {
            let new = (0x1000u64 << (16 * cpu)).wrapping_add(n * STEP);
            assert_eq!(*event, (Some(old), Some(new), cpu as u32), "CPU {cpu}, write {n}");
            old = new;
        }
    }
}
