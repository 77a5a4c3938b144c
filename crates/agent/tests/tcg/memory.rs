//! Memory that is read and written: each access once, with what the QEMU tells of it.

use vmsight_arch::Gpa;
use vmsight_hooks::{Access, Detail, Hook, HookKind, Range, Scope};
use vmsight_lab::Work;

use crate::guest::{HELD, TOLD, Watched};

const COUNT: u64 = 1000;
const STEP: u64 = 0x0101_0101;

/// What was there, what is there now, and which vCPU wrote it.
type Seen = (Option<u64>, Option<u64>, u32);

fn write(cpu: u64) -> Work {
    Work::Write {
        first: 0x1000 << (16 * cpu),
        step: STEP,
        count: COUNT,
        offset: 64 * cpu,
        shared: false,
    }
}

fn physical(frame: u64, offset: u64, access: Access) -> HookKind {
    HookKind::Memory {
        range: Range::Physical {
            start: Gpa(frame * 4096 + offset),
            len: 8,
        },
        access,
    }
}

/// Of two processes at once, by virtual and by physical address.
pub(crate) fn each_write_is_told_without_values(watched: &Watched) {
    let orders = watched.guest.orders().unwrap();
    let prepared = [0, 1].map(|cpu| orders.prepare(write(cpu).on(cpu as u32)).unwrap());
    let frames = [0, 1].map(|i: usize| prepared[i].frame());
    let monitor = watched.monitor();
    let virtually = Hook::write(prepared[0].address().into(), 8).delivered(TOLD);
    let physically = Hook::new(physical(prepared[1].frame(), 64, Access::WRITE)).delivered(TOLD);
    let hooks = [virtually, physically].map(|hook| monitor.hook(&hook).unwrap());
    let mut seen = [0; 2];
    let accounts = watched.during(
        &monitor,
        |occurrence| {
            let event = occurrence.event();
            let index = hooks.iter().position(|h| h.id() == event.hook).unwrap();
            let Detail::Memory {
                gpa,
                len: 8,
                old: None,
                new: None,
                done: true,
                ..
            } = event.detail
            else {
                panic!("{event:?}");
            };
            assert_eq!(event.vcpu as usize, index);
            assert_eq!(gpa, [None, Some(Gpa(frames[1] * 4096 + 64))][index]);
            seen[index] += 1;
        },
        |_| orders.go(prepared).unwrap(),
    );
    assert!(accounts.iter().all(|a| a.made == COUNT));
    assert_eq!(seen, [COUNT; 2]);
}

/// Of two processes at once, whose pages lie at one address: it is the address space that tells them apart.
pub(crate) fn each_write_is_told_with_its_values(watched: &Watched) {
    let orders = watched.guest.orders().unwrap();
    let prepared = [0, 1].map(|cpu| orders.prepare(write(cpu).on(cpu as u32)).unwrap());
    let monitor = watched.monitor();
    let frames = [0, 1].map(|i: usize| prepared[i].frame());
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
            let Detail::Memory { gpa, old, new, .. } = event.detail else {
                panic!("{event:?}");
            };
            assert_eq!(gpa, Some(Gpa(frames[index] * 4096 + 64 * index as u64)));
            seen[index].push((old, new, event.vcpu));
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

/// Reads, and writes by whatever mapping.
pub(crate) fn reads_and_physical_addresses(watched: &Watched) {
    const VALUE: u64 = 0x1122_3344_5566_7788;
    let orders = watched.guest.orders().unwrap();
    let read = Work::Read {
        value: VALUE,
        count: COUNT,
        offset: 8,
    };
    let prepared = [
        orders.prepare(read.on(0)).unwrap(),
        orders.prepare(write(1).on(1)).unwrap(),
    ];
    let monitor = watched.monitor();
    let reads = physical(prepared[0].frame(), 8, Access::READ);
    let writes = physical(prepared[1].frame(), 64, Access::WRITE);
    let hooks = [reads, writes].map(|kind| monitor.hook(&Hook::new(kind).delivered(HELD)).unwrap());
    let (mut read, mut written) = (Vec::new(), Vec::new());
    let accounts = watched.during(
        &monitor,
        |occurrence| {
            let event = occurrence.event();
            match event.detail {
                Detail::Memory {
                    access: Access::READ,
                    new,
                    ..
                } => {
                    assert_eq!(event.hook, hooks[0].id());
                    read.push(new);
                }
                Detail::Memory {
                    access: Access::WRITE,
                    new,
                    ..
                } => written.push(new),
                other => panic!("{other:?}"),
            }
        },
        |_| orders.go(prepared).unwrap(),
    );
    assert_eq!(accounts[0].checksum, Some(VALUE.wrapping_mul(COUNT)));
    assert_eq!(read, vec![Some(VALUE); COUNT as usize]);
    let expected = (0..COUNT).map(|n| Some((0x1000u64 << 16).wrapping_add(n * STEP)));
    assert_eq!(written, expected.collect::<Vec<_>>());
}
