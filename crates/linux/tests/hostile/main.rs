//! Guests that lie: every listing ends in bounded time, with a marked row or a warning, and never with a panic.

#![allow(clippy::unwrap_used)]

mod budgets;
mod lists;
mod stacks;
#[path = "../synthetic/mod.rs"]
mod synthetic;
mod trees;

use std::time::{Duration, Instant};

use synthetic::{Guest, offset};
use vmsight_linux::{Kernel, Listing, Process, ProcessFields};

/// What is asked for where not everything is: cgroups and the clock need structures that the synthetic guest does not have.
fn fields() -> ProcessFields {
    ProcessFields::all() - ProcessFields::CGROUP - ProcessFields::START
}

fn list(kernel: &Kernel) -> Listing<Process> {
    let start = Instant::now();
    let listing = kernel.processes(fields()).unwrap();
    assert!(
        start.elapsed() < Duration::from_secs(20),
        "took {:?}",
        start.elapsed()
    );
    listing
}

fn tasks(task: u64) -> u64 {
    task + offset("task_struct", "tasks")
}

fn three() -> (Guest, [u64; 3]) {
    let mut guest = Guest::new(4);
    let init = guest.init;
    let a = guest.process(1, "init", init);
    let b = guest.process(20, "b", a);
    let c = guest.process(30, "c", b);
    (guest, [a, b, c])
}
