//! The released volatility3 accepts a symbol table that vmsight has made out of a dump, and sees with it what the guest
//! says of itself. Built only where it is asked for: it installs volatility3, and waits minutes for it (`script/volatility`).

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::fs::File;
use std::path::Path;
use std::process::Command;

use vmsight_lab::{Format, Guest, Kernel, Spec};
use vmsight_memory::dump;
use vmsight_symbols::kernel::{Hints, find};
use vmsight_symbols::{Profile, export};

fn check(kernel: Kernel) {
    let guest = Guest::boot(&Spec::new(kernel)).unwrap_or_else(|e| panic!("{e:?}"));
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    guest
        .dump(Format::Raw, &file("memory.raw"))
        .unwrap_or_else(|e| panic!("{e:?}"));
    serde_json::to_writer(File::create(file("truth.json")).unwrap(), guest.truth()).unwrap();
    drop(guest);

    let memory = dump::open(&file("memory.raw"), None).unwrap().memory;
    let found = find(&memory, &Hints::default()).unwrap_or_else(|e| panic!("{e}"));
    let profile = Profile::from_memory(&memory, found.image()).unwrap_or_else(|e| panic!("{e}"));
    let table = File::create(file("kernel.json.xz")).unwrap();
    let written = export::isf(&profile, table, Some(export::XZ_LEVEL)).unwrap();
    eprintln!("{kernel}: {written:?}");

    let status = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("volatility/run"))
        .args([file("memory.raw"), file("kernel.json.xz"), file("truth.json")])
        .status()
        .unwrap();
    assert!(status.success(), "{kernel}: {status}");
}

#[test]
fn kernel_5_10() {
    check(Kernel::V5_10);
}

#[test]
fn kernel_6_1() {
    check(Kernel::V6_1);
}

#[test]
fn kernel_6_12() {
    check(Kernel::V6_12);
}
