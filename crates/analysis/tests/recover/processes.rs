//! Processes that have ended, and one that somebody took out of the lists.

use std::collections::BTreeSet;

use vmsight_analysis::recover::processes::{Certainty, removed_tasks};
use vmsight_arch::{Gpa, Gva};

use crate::support::{Forgery, subject};

/// The process that wrote down the truth, with its threads: it ends right before the guest is ready.
const LAST: &str = "collector";

#[test]
fn the_process_that_ended_last_is_found_and_nobody_who_lives() {
    let subject = subject();
    let truth = subject.guest.truth();
    let alive: BTreeSet<i32> = truth
        .processes
        .iter()
        .map(|p| i32::try_from(p.pid).unwrap())
        .collect();
    for (how, kernel) in subject.both() {
        let listing = removed_tasks(&kernel).unwrap();
        assert_eq!(listing.warnings, [""; 0], "{how}");
        let last = listing.rows.iter().find(|row| row.name == LAST);
        // In a guest that runs, others may have got its place by now.
        assert!(last.is_some() || how == "running", "{how}: {listing:?}");
        if let Some(last) = last {
            let facts = (last.certainty, last.state, last.found_in);
            assert_eq!(facts, (Certainty::Certain, "ended", "slab"), "{how}");
            assert_eq!(
                (last.exit_code, last.signal, last.ppid),
                (Some(0), None, Some(1)),
                "{how}"
            );
            // The guest tells whole seconds.
            let [boot, now] = [truth.system.boot_time, truth.system.now + 1].map(|seconds| {
                vmsight_linux::clock::rfc3339(i64::try_from(seconds).unwrap() * 1_000_000_000).unwrap()
            });
            let start = last.start_time.as_ref().unwrap();
            assert!((&boot..=&now).contains(&start), "{how}: {last:?}");
        }
        for row in &listing.rows {
            assert_eq!(row.state, "ended", "{how}: {row:?}");
            // It wrote itself down, too.
            assert!(row.name == LAST || !alive.contains(&row.pid), "{how}: {row:?}");
        }
    }
}

#[test]
fn remains_in_free_memory_and_a_process_in_no_list() {
    let subject = subject();
    let forged = Forgery::of(&subject);
    let rows = removed_tasks(&forged.kernel).unwrap().rows;
    let last = rows.iter().find(|row| row.name == LAST).unwrap();
    // The remains of the last one in memory that nobody uses, under another name.
    let types = forged.kernel.types();
    let size = types.size_of(types.find_struct("task_struct").unwrap()).unwrap();
    let mut bytes = vec![0; size as usize];
    forged.kernel.space().read(last.task, &mut bytes).unwrap();
    let comm = forged.kernel.offset("task_struct", "comm").unwrap() as usize;
    bytes[comm..comm + 8].copy_from_slice(b"long\x1bgo\0");
    let free = unused(&forged, bytes.len() as u64);
    forged.put_at(free, &bytes);
    // Names are text: nothing is found until it is one.
    assert!(
        removed_tasks(&forged.forged())
            .unwrap()
            .rows
            .iter()
            .all(|row| row.found_in == "slab")
    );
    bytes[comm..comm + 9].copy_from_slice(b"long ago\0");
    forged.put_at(free, &bytes);
    // A process that somebody took out of the list, as rootkits do.
    let hidden = subject.guest.truth().named("low-priority").unwrap().pid;
    let hidden = i32::try_from(hidden).unwrap();
    let threads = forged.kernel.threads(Some(hidden)).unwrap();
    let links = forged.member("task_struct", "tasks", threads.rows[0].task);
    let (next, prev) = (forged.pointer(links), forged.pointer(links.wrapping_add(8)));
    forged.put(prev, &next.0.to_le_bytes());
    forged.put(next.wrapping_add(8), &prev.0.to_le_bytes());

    let rows = removed_tasks(&forged.forged()).unwrap().rows;
    let ago = rows.iter().find(|row| row.name == "long ago").unwrap();
    assert_eq!(
        (ago.found_in, ago.certainty, ago.pid),
        ("memory", Certainty::Likely, last.pid)
    );
    let row = rows.iter().find(|row| row.pid == hidden).unwrap();
    assert_eq!((row.state, row.certainty), ("unlisted", Certainty::Certain));
    assert_eq!(row.task, threads.rows[0].task);
    assert_ne!(row.task, Gva(0));
}

/// Some memory full of zeros, in one piece.
fn unused(forged: &Forgery, length: u64) -> u64 {
    let memory = forged.kernel.memory();
    let mut bytes = vec![0; length as usize];
    let places = (0x100_0000..memory.size()).step_by(0x1_0000);
    let mut free = places.filter(|&at| {
        memory.read(Gpa(at), &mut bytes).unwrap();
        bytes.iter().all(|&b| b == 0)
    });
    free.next().unwrap()
}
