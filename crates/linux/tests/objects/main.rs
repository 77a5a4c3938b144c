//! Files, mounts, sockets, interfaces, modules and the log of guests that lie: every listing ends soon, with what it found and a mark
//! where something is wrong, and never with a panic. One honest guest of each kind shows that the tests look at the right places.

#![allow(clippy::unwrap_used)]

mod bpf;
mod cgroups;
mod files;
#[path = "../flicker/mod.rs"]
mod flicker;
mod guest;
mod layout;
mod log;
mod modules;
mod mounts;
mod net;

use std::time::{Duration, Instant};

/// Addresses that are not one, or nobody's.
const BAD: [u64; 6] = [
    0,
    1,
    0xdead_0000_0000_0100,
    u64::MAX - 7,
    1 << 63,
    0xffff_8880_2000_0000,
];

/// Runs a listing and holds it to a time that no honest one needs.
fn timed<T>(list: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let out = list();
    assert!(
        start.elapsed() < Duration::from_secs(20),
        "took {:?}",
        start.elapsed()
    );
    out
}
