//! How long a listing of processes takes: per process, in a guest that has 10,000 of them.
//!
//! The guest is built byte by byte (see tests/synthetic), with structures of the sizes and spread of a real one and page tables, arguments
//! and environment of its own for each process, so that what is measured includes the cache misses that a real guest costs.

#![allow(clippy::unwrap_used)]

#[path = "../tests/synthetic/mod.rs"]
mod synthetic;

use std::time::{Duration, Instant};

use synthetic::Guest;
use vmsight_linux::ProcessFields;

const PROCESSES: i32 = 10_000;

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
    drop(guest);
    // The clock and cgroups of a real kernel are not there: the rest of the default columns, and the rest of all.
    let columns = [
        ("default columns", ProcessFields::default() - ProcessFields::START),
        (
            "without user memory",
            ProcessFields::default() - ProcessFields::START - ProcessFields::CMDLINE,
        ),
        (
            "all columns",
            ProcessFields::all() - ProcessFields::START - ProcessFields::CGROUP,
        ),
    ];
    for (name, fields) in columns {
        let mut best = Duration::MAX;
        for _ in 0..15 {
            let start = Instant::now();
            let listing = kernel.processes(fields).unwrap();
            best = best.min(start.elapsed());
            assert_eq!(listing.rows.len(), PROCESSES as usize);
            assert!(
                listing.rows.iter().all(|r| r.problems.is_empty()),
                "{:?}",
                listing.rows.first()
            );
        }
        println!(
            "ps, {name}: {:.2} ms per 10,000 processes",
            best.as_secs_f64() * 1e3
        );
    }
}
