//! How long it takes from a guest's memory to its kernel's symbols and types, on the dump that VMSIGHT_BENCH_DUMP names.

#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;
use std::path::{Path, PathBuf};

use divan::Bencher;
use vmsight_memory::{GuestMemory, dump};
use vmsight_symbols::cache::Cache;
use vmsight_symbols::kernel::{Found, Hints, find};
use vmsight_symbols::{Profile, Types, kallsyms, locate};

fn main() {
    if std::env::var_os("VMSIGHT_BENCH_DUMP").is_none() {
        eprintln!("nothing measured: VMSIGHT_BENCH_DUMP names no memory dump");
        return;
    }
    divan::main();
}

fn memory() -> GuestMemory {
    let path = PathBuf::from(std::env::var_os("VMSIGHT_BENCH_DUMP").unwrap());
    dump::open(&path, None).unwrap().memory
}

fn found(memory: &GuestMemory) -> Found {
    find(memory, &Hints::default()).unwrap()
}

/// The kernel's image by the cheapest way that gives one, banner and build-id included.
#[divan::bench]
fn find_kernel(bencher: Bencher<'_, '_>) {
    let memory = memory();
    bencher.bench(|| find(black_box(&memory), &Hints::default()).unwrap());
}

/// All of memory searched, as when low memory is missing and there are no registers.
#[divan::bench(sample_count = 10)]
fn find_kernel_by_scan(bencher: Bencher<'_, '_>) {
    let memory = memory();
    bencher.bench(|| {
        find(
            black_box(&memory),
            &Hints {
                thorough: true,
                ..Hints::default()
            },
        )
        .unwrap()
    });
}

/// Symbols alone: found in the read-only data and decoded.
#[divan::bench]
fn kallsyms_decode(bencher: Bencher<'_, '_>) {
    let memory = memory();
    let found = found(&memory);
    let image = found.image();
    let part = image
        .parts
        .iter()
        .filter(|p| !p.write && !p.execute)
        .max_by_key(|p| p.len)
        .unwrap();
    let mut bytes = vec![0; part.len as usize];
    memory
        .read(image.phys.wrapping_add(part.start), &mut bytes)
        .unwrap();
    let section = kallsyms::Section {
        bytes: &bytes,
        address: image.text.0 + part.start,
    };
    let bounds = kallsyms::Image {
        span: image.text.0..image.text.0 + image.len,
        slide: image.slide,
    };
    bencher.bench(|| kallsyms::decode(black_box(section), &bounds).unwrap());
}

/// Types alone, with the index by name that every use needs.
#[divan::bench]
fn btf_parse(bencher: Bencher<'_, '_>) {
    let memory = memory();
    let found = found(&memory);
    let profile = Profile::from_memory(&memory, found.image()).unwrap();
    let btf = profile.types.btf().clone();
    bencher.bench(|| {
        let types = Types::from_btf(black_box(btf.clone())).unwrap();
        types.find_struct("task_struct").map(|id| id.0)
    });
}

/// Symbols and types, from a kernel that was found.
#[divan::bench]
fn profile_from_memory(bencher: Bencher<'_, '_>) {
    let memory = memory();
    let found = found(&memory);
    bencher.bench(|| Profile::from_memory(black_box(&memory), found.image()).unwrap());
}

/// Everything, nothing cached.
#[divan::bench]
fn locate_cold(bencher: Bencher<'_, '_>) {
    let memory = memory();
    bencher.bench(|| locate(black_box(&memory), &Hints::default(), &Cache::disabled()).unwrap());
}

/// Everything, with the profile in the cache: opened, found, compared with the guest's own bytes.
#[divan::bench]
fn locate_cached(bencher: Bencher<'_, '_>) {
    let memory = memory();
    let directory = tempfile::tempdir().unwrap();
    let open = || Cache::open(Path::new(&directory.path().join("profiles"))).unwrap();
    drop(locate(&memory, &Hints::default(), &open()).unwrap());
    bencher.bench(|| locate(black_box(&memory), &Hints::default(), &open()).unwrap());
}

/// A symbol by name, and a name by address.
#[divan::bench(args = ["init_task", "no_such_symbol"])]
fn lookup(bencher: Bencher<'_, '_>, name: &str) {
    let memory = memory();
    let found = found(&memory);
    let profile = Profile::from_memory(&memory, found.image()).unwrap();
    bencher.bench(|| profile.symbols.address(black_box(name)));
}
