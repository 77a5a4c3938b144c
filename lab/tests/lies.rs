//! A real guest's memory in which words are lies: every listing ends soon, and none panics.
//!
//! What lies is decided by the word's address and a seed, so that a word lies in the same way each time it is read, and a failure can
//! be made again.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vmsight_arch::Gpa;
use vmsight_lab::{Format, Guest, Kernel, Spec};
use vmsight_linux::file::FileFilter;
use vmsight_linux::module::ModuleFields;
use vmsight_linux::socket::SocketFilter;
use vmsight_linux::{AttachOptions, LinuxError, Listing, ProcessFields};
use vmsight_memory::{GuestMemory, Source, dump};

/// A guest's memory with one word in `rate` replaced.
#[derive(Debug)]
struct Liar {
    honest: GuestMemory,
    seed: AtomicU64,
    rate: AtomicU64,
}

impl Liar {
    fn lie(&self, at: u64) -> Option<u64> {
        let rate = self.rate.load(Ordering::Relaxed);
        let hash = mix(at ^ mix(self.seed.load(Ordering::Relaxed)));
        if rate == 0 || !hash.is_multiple_of(rate) {
            return None;
        }
        let truth = self.honest.read_u64(Gpa(at)).unwrap_or(0);
        Some(match mix(hash) % 12 {
            0 => 0,
            1 => u64::MAX,
            2 => 1 << 63,
            3 => 0x8000_0000_8000_0000,
            4 => 0x7fff_ffff_7fff_ffff,
            5 => truth ^ 0x40,
            6 => truth.wrapping_add(8),
            7 => truth & !0xfff,
            8 => 0xffff_ffff_ffff,
            9 => truth.wrapping_sub(0x100),
            10 => mix(hash ^ 1),
            _ => 0xffff_ffff,
        })
    }
}

/// A hash of 64 bits (the finalizer of MurmurHash3).
fn mix(mut x: u64) -> u64 {
    x = (x ^ x >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    x = (x ^ x >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ x >> 33
}

impl Source for Liar {
    fn len(&self) -> u64 {
        self.honest.end().0
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), String> {
        self.honest.read(Gpa(offset), buf).map_err(|e| e.to_string())?;
        let end = offset + buf.len() as u64;
        for word in (offset & !7..end).step_by(8) {
            let Some(lie) = self.lie(word) else { continue };
            for (at, byte) in (word..).zip(lie.to_le_bytes()) {
                if (offset..end).contains(&at) {
                    buf[(at - offset) as usize] = byte;
                }
            }
        }
        Ok(())
    }
}

/// Makes a listing; it may fail, but must do so soon, and what it gives must serialise.
fn list<T: serde::Serialize>(
    what: &str,
    seed: u64,
    make: impl FnOnce() -> Result<Listing<T>, LinuxError>,
) -> usize {
    let start = Instant::now();
    let rows = make().map_or(0, |listing| {
        serde_json::to_string(&listing.rows).unwrap();
        listing.rows.len()
    });
    assert!(
        start.elapsed() < Duration::from_secs(60),
        "{what} took {:?} with seed {seed}",
        start.elapsed()
    );
    rows
}

#[test]
fn listings_of_lying_memory_end_and_do_not_panic() {
    let guest = Guest::boot(&Spec::new(Kernel::V6_12)).unwrap_or_else(|e| panic!("{e:?}"));
    let file = guest.folder().join("memory.raw");
    guest.dump(Format::Raw, &file).unwrap_or_else(|e| panic!("{e:?}"));
    let honest = dump::open(&file, None).unwrap().memory;
    let known = vmsight_linux::Kernel::attach(honest.clone(), AttachOptions::default()).unwrap();
    let liar = Arc::new(Liar {
        honest: honest.clone(),
        seed: AtomicU64::new(0),
        rate: AtomicU64::new(0),
    });
    let memory = GuestMemory::builder()
        .custom(Gpa(0), honest.end().0, liar.clone(), 0)
        .build()
        .unwrap();
    let pids: Vec<i32> = known
        .processes(ProcessFields::default())
        .unwrap()
        .rows
        .iter()
        .map(|p| p.pid)
        .collect();
    let (mut honest_rows, mut lying_rows) = (0, 0);
    for seed in 0..60 {
        // Every sixth round is honest: the listings see what there is through the same source.
        let rate = [0, 50, 200, 1000, 5000, 20_000][(seed % 6) as usize];
        liar.seed.store(seed, Ordering::Relaxed);
        liar.rate.store(rate, Ordering::Relaxed);
        // A kernel of its own each time: nothing read before is remembered.
        let kernel =
            vmsight_linux::Kernel::new(memory.clone(), known.image().clone(), known.profile().clone());
        let mut rows = 0;
        rows += list("processes", seed, || kernel.processes(ProcessFields::all()));
        rows += list("threads", seed, || kernel.threads(None));
        rows += list("cgroups", seed, || kernel.cgroups());
        for &pid in pids.iter().step_by(7) {
            rows += list("maps", seed, || kernel.maps(pid));
        }
        let files = FileFilter {
            mapped: true,
            ..FileFilter::default()
        };
        rows += list("open files", seed, || kernel.open_files(files));
        rows += list("mounts", seed, || kernel.mounts());
        rows += list("modules", seed, || kernel.modules(ModuleFields::ALL));
        rows += list("symbols of modules", seed, || kernel.module_symbols());
        rows += list("kernel log", seed, || kernel.kmsg());
        rows += list("sockets", seed, || kernel.sockets(SocketFilter::ALL));
        rows += list("UNIX sockets", seed, || kernel.unix_sockets());
        rows += list("interfaces", seed, || kernel.interfaces());
        if rate == 0 {
            honest_rows = rows;
        } else if rate == 20_000 {
            lying_rows += rows;
        }
    }
    assert!(honest_rows > 5000, "{honest_rows}");
    // A few lies do not hide the rest: of ten rounds with the fewest at least half is seen.
    assert!(lying_rows / 10 > honest_rows / 2, "{lying_rows} of {honest_rows}");
}
