//! How fast memory is searched for keys, next to how fast the same memory is copied.
//!
//! `cargo bench -p vmsight-analysis --bench keys [FILE]`: over a dump if one is given (or named by `VMSIGHT_BENCH_DUMP`), and
//! over 512 MiB made here, of which a quarter each is zeros, random numbers, text, and small integers. All run in turns on all
//! processors, five rounds; the best of each is shown. Copying goes chunk by chunk into a buffer that the cache holds, as
//! the search's own pass does.

#![allow(clippy::unwrap_used, reason = "a bench stops at the first surprise")]

use std::hint::black_box;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use vmsight_analysis::keys::search;
use vmsight_arch::Gpa;
use vmsight_memory::{GuestMemory, ScanOptions, dump};

/// GiB a second that a search has to do, on two processors.
const GOAL: f64 = 1.0;

fn mixed(mib: usize) -> GuestMemory {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let words = [
        "the key of ",
        "0x02000100, ",
        "struct crypto_tfm *",
        "SSH version 2 of a CLIENT ",
        "----------\n",
    ];
    let mut bytes = Vec::with_capacity(mib << 20);
    while bytes.len() < mib << 20 {
        match bytes.len() >> 20 & 3 {
            0 => bytes.extend([0; 4096]),
            1 => (0..512).for_each(|_| bytes.extend(random().to_le_bytes())),
            2 => (0..1024).for_each(|_| bytes.extend((random() as u32 & 0xff).to_le_bytes())),
            _ => bytes.extend(words[(random() % 5) as usize].bytes()),
        }
    }
    bytes.truncate(mib << 20);
    GuestMemory::from_bytes(vec![(Gpa(0), bytes)]).unwrap()
}

fn best(rounds: usize, mut run: impl FnMut()) -> Duration {
    let times = (0..rounds).map(|_| {
        let start = Instant::now();
        run();
        start.elapsed()
    });
    times.min().unwrap()
}

fn measure(name: &str, memory: &GuestMemory, rounds: usize) {
    let stop = AtomicBool::new(false);
    let whole = ScanOptions {
        skip_untouched: false,
        ..ScanOptions::default()
    };
    let copied = best(rounds, || {
        let scan = memory.scan(&whole, &stop, |_, bytes| {
            thread_local!(static TO: std::cell::RefCell<Vec<u8>> = const { std::cell::RefCell::new(Vec::new()) });
            TO.with_borrow_mut(|to| {
                to.clear();
                to.extend_from_slice(bytes);
                black_box(to.as_ptr());
            });
            Vec::<()>::new()
        });
        black_box(scan.stopped);
    });
    let mut keys = 0;
    let mut looked_at = 0;
    let searched = best(rounds, || {
        let found = search(memory, &stop, &|_| {});
        (keys, looked_at) = (found.hits.len(), found.looked_at);
    });
    let gib = memory.size() as f64 / f64::from(1 << 30);
    let rate = gib / searched.as_secs_f64();
    println!(
        "{name:24} {:8.0} MiB  copied {:6.2} GiB/s  searched {rate:6.2} GiB/s  {keys} keys, {} MiB looked at  goal {GOAL:.1} {}",
        gib * 1024.0,
        gib / copied.as_secs_f64(),
        looked_at >> 20,
        if rate >= GOAL { "met" } else { "MISSED" },
    );
}

fn main() {
    // Run as a test, nothing is measured to be believed.
    let measured = std::env::args().any(|argument| argument == "--bench");
    let (mib, rounds) = if measured { (512, 5) } else { (8, 1) };
    measure("made of all sorts", &mixed(mib), rounds);
    let file = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with('-'));
    let file = file
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("VMSIGHT_BENCH_DUMP").map(PathBuf::from));
    if let Some(path) = file.filter(|_| measured) {
        let dump = dump::open(&path, None).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        measure("a guest's dump", &dump.memory, rounds);
    }
}
