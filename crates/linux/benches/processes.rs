//! How long a listing of processes takes: per process, in a guest that has 10,000 of them.
//!
//! The guest is built byte by byte (see tests/synthetic), with structures of the sizes and spread of a real one and page tables, arguments
//! and environment of its own for each process, so that what is measured includes the cache misses that a real guest costs.
//! Next to it, in the same run, what the same memory costs when one reads it plainly, knowing beforehand that nothing lies.

#![allow(clippy::unwrap_used)]

#[path = "../tests/synthetic/mod.rs"]
mod synthetic;

use std::hint::black_box;
use std::time::Instant;

use synthetic::{Guest, offset};
use vmsight_linux::ProcessFields;

const PROCESSES: i32 = 10_000;
/// Milliseconds that a listing may take.
const GOAL: f64 = 10.0;

/// Follows the list and reads of each process its name and ids, and its arguments through its page tables.
fn plainly(guest: &Guest, head: u64) -> u64 {
    let member = |task: u64, name: &str| guest.get(task + offset("task_struct", name));
    let mut sum = 0u64;
    let mut node = guest.get(head);
    while node != head {
        let task = node - offset("task_struct", "tasks");
        for name in ["pid", "comm", "__state", "real_parent", "real_cred"] {
            sum = sum.wrapping_add(member(task, name));
        }
        let signal = member(task, "signal");
        sum = sum.wrapping_add(guest.get(signal + offset("signal_struct", "nr_threads")));
        let mm = member(task, "mm");
        let start = guest.get(mm + offset("mm_struct", "arg_start"));
        let mut table = guest.get(mm + offset("mm_struct", "pgd"));
        for level in (0..4).rev() {
            table = guest.get((table & !0xfff) + (start >> (12 + 9 * level) & 511) * 8);
        }
        for word in 0..5 {
            sum = sum.wrapping_add(guest.get((table & !0xfff) + word * 8));
        }
        node = guest.get(node);
    }
    sum
}

fn main() {
    let mut guest = Guest::new(512);
    let init = guest.init;
    for pid in 1..=PROCESSES {
        let task = guest.process(pid, "bench-worker", init);
        guest.user_memory(
            task,
            b"/usr/sbin/bench-worker\0--number\x0017\0",
            b"PATH=/bin\0HOME=/\0",
        );
    }
    let kernel = guest.kernel();
    // The clock and cgroups of a real kernel are not there: the rest of the default columns, and the rest of all.
    let columns = [
        (
            "default columns",
            ProcessFields::default() - ProcessFields::START,
            Some(GOAL),
        ),
        (
            "without user memory",
            ProcessFields::default() - ProcessFields::START - ProcessFields::CMDLINE,
            None,
        ),
        (
            "all columns",
            ProcessFields::all() - ProcessFields::START - ProcessFields::CGROUP,
            None,
        ),
    ];
    // As a test, nothing is measured to be believed.
    let rounds = if std::env::args().any(|a| a == "--bench") {
        25
    } else {
        1
    };
    let mut times = vec![Vec::new(); columns.len() + 1];
    let list = init + offset("task_struct", "tasks");
    for _ in 0..rounds {
        let start = Instant::now();
        black_box(plainly(&guest, list));
        times[0].push(start.elapsed().as_secs_f64() * 1e3);
        for ((_, fields, _), times) in columns.iter().zip(&mut times[1..]) {
            let start = Instant::now();
            let listing = kernel.processes(*fields).unwrap();
            times.push(start.elapsed().as_secs_f64() * 1e3);
            assert_eq!(listing.rows.len(), PROCESSES as usize);
            assert!(
                listing.rows.iter().all(|r| r.problems.is_empty()),
                "{:?}",
                listing.rows.first()
            );
        }
    }
    times.iter_mut().for_each(|times| times.sort_by(f64::total_cmp));
    let floor = times[0][rounds / 2];
    println!(
        "{:<44} {:>8} {:>8} {:>9} {:>6}",
        "ms for 10,000 processes", "best", "median", "× plain", "goal"
    );
    let names = [("read plainly, on one processor", None)]
        .into_iter()
        .chain(columns.iter().map(|(name, _, goal)| (*name, *goal)));
    for ((name, goal), times) in names.zip(&times) {
        let median = times[rounds / 2];
        let goal = goal.map_or(String::new(), |goal| {
            let verdict = if median <= goal { "ok" } else { "MISSED" };
            format!("{goal:>6.0}  {verdict}")
        });
        let line = format!(
            "{name:<44} {:>8.2} {median:>8.2} {:>9.1} {goal}",
            times[0],
            median / floor
        );
        println!("{}", line.trim_end());
    }
}
