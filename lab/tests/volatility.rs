//! The released volatility3 accepts a symbol table that vmsight has made out of a dump, and sees with it what the guest
//! says of itself; and it reads the dumps that vmsight writes. Built only where it is asked for: it installs volatility3, and
//! waits minutes for it (`script/volatility`).

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;

use tempfile::TempDir;
use vmsight_lab::{Format, Guest, Kernel, Spec};
use vmsight_memory::dump;
use vmsight_memory::dump::write::{self, OutFormat};
use vmsight_symbols::kernel::{Hints, find};
use vmsight_symbols::{Profile, export};

/// A raw dump, the symbol table made for it, and the guest's truth: their files are in the folder.
fn dumped(kernel: Kernel) -> TempDir {
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

    folder
}

/// Every plugin agrees.
fn check(kernel: Kernel) -> TempDir {
    let folder = dumped(kernel);
    let file = |name: &str| folder.path().join(name);
    let status = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("volatility/run"))
        .args([file("memory.raw"), file("kernel.json.xz"), file("truth.json")])
        .status()
        .unwrap();
    assert!(status.success(), "{kernel}: {status}");
    folder
}

/// It reads what vmsight has written, too, and lists the same processes.
fn check_written(folder: &Path) {
    let file = |name: &str| folder.join(name);
    let memory = dump::open(&file("memory.raw"), None).unwrap().memory;
    let go_on = AtomicBool::new(false);
    let vmcoreinfo = write::find_vmcoreinfo(&memory, &go_on);
    let contents = write::Contents {
        memory: &memory,
        registers: &[],
        vmcoreinfo: vmcoreinfo.as_ref().map(|found| found.text.as_str()),
    };
    let written = [OutFormat::Lime, OutFormat::Avml, OutFormat::Elf].map(|format| {
        let path = file(&format!("memory.{format}"));
        let out = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        write::write(&contents, format, &out, &go_on, &|_| {}).unwrap_or_else(|e| panic!("{format}: {e}"));
        path
    });
    check_processes(folder, &written);
}

/// It lists the guest's processes in each of these dumps.
fn check_processes(folder: &Path, dumps: &[PathBuf]) {
    let file = |name: &str| folder.join(name);
    let status = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("volatility/processes"))
        .args([file("kernel.json.xz"), file("truth.json")])
        .args(dumps)
        .status()
        .unwrap();
    assert!(status.success(), "{status}");
}

#[test]
fn kernel_5_10() {
    check(Kernel::V5_10);
}

#[test]
fn kernel_6_1_and_dumps_that_vmsight_writes() {
    let folder = check(Kernel::V6_1);
    check_written(folder.path());
}

#[test]
fn kernel_6_12() {
    check(Kernel::V6_12);
}
