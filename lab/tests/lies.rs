//! A real guest's memory in which words are lies: every listing ends soon, none panics, and few lies hide little.
//!
//! What lies is decided by the word's address and a seed, so that a word lies in the same way each time it is read, and a failure can
//! be made again.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::collections::{BTreeMap, BTreeSet};
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

/// Rounds, and how many of each word one lies: none; one in 50, which leaves little to go by; and so on to few.
const ROUNDS: u64 = 30;
const RATES: [u64; 6] = [0, 50, 200, 1000, 5000, 20_000];

/// What came of one listing with one rate of lies: how often it was tried, how often it was made, and the rows that were in it.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    tried: usize,
    made: usize,
    rows: usize,
}

/// What came of all listings.
#[derive(Debug, Default)]
struct Tallies {
    rate: u64,
    seed: u64,
    of: BTreeMap<(&'static str, u64), Tally>,
}

impl Tallies {
    /// Makes a listing; it may fail, but must do so soon, and what it gives must serialise.
    fn list<T: serde::Serialize>(
        &mut self,
        what: &'static str,
        make: impl FnOnce() -> Result<Listing<T>, LinuxError>,
    ) {
        let start = Instant::now();
        let made = make();
        if let Ok(listing) = &made {
            serde_json::to_string(&listing.rows).unwrap();
        }
        let (seed, rate) = (self.seed, self.rate);
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "{what} took {:?} with seed {seed}",
            start.elapsed()
        );
        if rate == 0 {
            let warnings = made.as_ref().map(|listing| &listing.warnings);
            assert!(
                warnings.is_ok_and(Vec::is_empty),
                "{what} without a lie: {warnings:?}"
            );
        }
        let tally = self.of.entry((what, rate)).or_default();
        tally.tried += 1;
        tally.made += usize::from(made.is_ok());
        tally.rows += made.map_or(0, |listing| listing.rows.len());
    }

    /// Lies cost what they are told about, not the listing, and not the others. How much is bounded with room to spare: which words
    /// lie depends on where this guest happened to put them. The way to one process's mappings is the longest.
    fn check(&self) {
        let listings: BTreeSet<&str> = self.of.keys().map(|(what, _)| *what).collect();
        let tally = |what, rate| self.of.get(&(what, rate)).copied().unwrap_or_default();
        let seen = |what, rate| tally(what, rate).rows as f64 / tally(what, 0).rows as f64;
        for rate in [5000, 20_000] {
            for &what in &listings {
                let Tally { tried, made, .. } = tally(what, rate);
                assert!(
                    made * 5 >= tried * 3,
                    "{what}, one in {rate}: {made} of {tried} made"
                );
                let seen = seen(what, rate);
                assert!(seen > 0.4, "{what}, one in {rate}: {seen} of the rows");
            }
        }
        // With more lies the mappings of a process are often lost: with any task before it in the list, with its memory, or with the
        // root of their tree. The other listings have a few words only without which there is nothing.
        let others: Vec<&str> = listings
            .into_iter()
            .filter(|what| !what.starts_with("maps"))
            .collect();
        for rate in RATES {
            let made: usize = others.iter().map(|what| tally(what, rate).made).sum();
            let tried: usize = others.iter().map(|what| tally(what, rate).tried).sum();
            assert!(made * 4 >= tried * 3, "one in {rate}: {made} of {tried} made");
            let seen = others.iter().map(|what| seen(what, rate)).sum::<f64>() / others.len() as f64;
            let least = match rate {
                50 => 0.1,
                200 => 0.3,
                1000 => 0.6,
                _ => 0.8,
            };
            assert!(seen > least, "one in {rate}: on average {seen} of the rows");
        }
    }
}

fn check(kernel: Kernel) {
    let guest = Guest::boot(&Spec::new(kernel)).unwrap_or_else(|e| panic!("{e:?}"));
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
    let mapper = guest.truth().named("mapper").unwrap().pid as i32;
    let mut tallies = Tallies::default();
    for seed in 0..ROUNDS {
        let rate = RATES[(seed % 6) as usize];
        liar.seed.store(seed, Ordering::Relaxed);
        liar.rate.store(rate, Ordering::Relaxed);
        (tallies.seed, tallies.rate) = (seed, rate);
        // A kernel of its own each time: nothing read before is remembered.
        let kernel =
            vmsight_linux::Kernel::new(memory.clone(), known.image().clone(), known.profile().clone());
        tallies.list("processes", || kernel.processes(ProcessFields::all()));
        tallies.list("threads", || kernel.threads(None));
        tallies.list("cgroups", || kernel.cgroups());
        tallies.list("maps", || kernel.maps(mapper));
        for process in guest.truth().processes.iter().step_by(7) {
            tallies.list("maps of others", || kernel.maps(process.pid as i32));
        }
        let files = FileFilter {
            mapped: true,
            ..FileFilter::default()
        };
        tallies.list("open files", || kernel.open_files(files));
        tallies.list("mounts", || kernel.mounts());
        tallies.list("modules", || kernel.modules(ModuleFields::ALL));
        tallies.list("symbols of modules", || kernel.module_symbols());
        tallies.list("kernel log", || kernel.kmsg());
        tallies.list("sockets", || kernel.sockets(SocketFilter::ALL));
        tallies.list("UNIX sockets", || kernel.unix_sockets());
        tallies.list("interfaces", || kernel.interfaces());
        tallies.list("neighbours", || kernel.neighbours());
        tallies.list("routes", || kernel.routes());
    }
    tallies.check();
}

#[test]
fn listings_of_lying_memory_of_6_1_end_and_do_not_panic() {
    check(Kernel::V6_1);
}

#[test]
fn listings_of_lying_memory_of_6_12_end_and_do_not_panic() {
    check(Kernel::V6_12);
}
