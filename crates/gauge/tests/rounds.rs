//! The guest, in the least VMM and in stock QEMU: it does its rounds, and its clock is the host's.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vmsight_gauge::image::{Image, MEMORY};
use vmsight_gauge::vmm::{self, Privilege};
use vmsight_gauge::{Operation, Samples, Timer};

const PATIENCE: Duration = Duration::from_secs(60);
const ROUNDS: u64 = 500;

fn memory(folder: &Path) -> File {
    let file = File::options()
        .create(true)
        .truncate(true)
        .read(true)
        .write(true)
        .open(folder.join("memory"))
        .unwrap();
    file.set_len(MEMORY).unwrap();
    file
}

/// All operations that it may do; and what the guest says of its time is not more than the host's own clock says.
fn works(timer: &Timer, privilege: Privilege) {
    let operations = [
        Operation::Nothing,
        Operation::Call,
        Operation::Write,
        Operation::Msr,
        Operation::Port,
    ];
    let may = |o: &Operation| privilege == Privilege::Kernel || *o != Operation::Msr;
    for operation in operations.into_iter().filter(may) {
        let begin = Instant::now();
        let Samples { nanoseconds } = timer.run(operation, ROUNDS, PATIENCE).unwrap();
        let outside = begin.elapsed().as_nanos() as f64;
        assert_eq!(nanoseconds.len() as u64, ROUNDS);
        assert!(nanoseconds.iter().all(|sample| *sample > 0.0), "{operation:?}");
        let inside: f64 = nanoseconds.iter().sum();
        // The rate of the counter is known to a part in a hundred at least.
        assert!(inside < 1.05 * outside, "{operation:?}: {inside} of {outside}");
    }
    assert!(timer.is_through().unwrap());
}

#[test]
fn the_least_vmm_runs_it() {
    in_the_least_vmm(Privilege::Kernel);
}

#[test]
fn the_least_vmm_runs_it_as_a_program() {
    in_the_least_vmm(Privilege::Program);
}

fn in_the_least_vmm(privilege: Privilege) {
    if !Path::new("/dev/kvm").exists() {
        println!("skipped: there is no /dev/kvm here");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = memory(folder.path());
    let own = file.try_clone().unwrap();
    // It runs until this process ends.
    let vmm = std::thread::spawn(move || vmm::run(&own, privilege).unwrap_err());
    let alive = || !vmm.is_finished();
    match Timer::start(file, Image::assemble().unwrap(), PATIENCE, alive) {
        Ok(timer) => works(&timer, privilege),
        Err(error) if vmm.is_finished() => panic!("{error}: {}", vmm.join().unwrap()),
        Err(error) => panic!("{error}"),
    }
}

struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn stock_qemu_runs_it() {
    let folder = tempfile::tempdir().unwrap();
    let file = memory(folder.path());
    let image = Image::assemble().unwrap();
    let firmware = folder.path().join("firmware");
    std::fs::write(&firmware, &image.bytes).unwrap();
    let path = folder.path().join("memory");
    let backend = format!(
        "memory-backend-file,id=memory,size={MEMORY},share=on,mem-path={}",
        path.display()
    );
    let child = Command::new("qemu-system-x86_64")
        .args(["-nodefaults", "-display", "none", "-accel", "tcg", "-cpu", "max"])
        .args([
            "-machine",
            "pc,memory-backend=memory",
            "-m",
            &format!("{}M", MEMORY >> 20),
        ])
        .args(["-object", &backend, "-bios"])
        .arg(&firmware)
        .stdin(Stdio::null())
        .spawn();
    let _qemu = Qemu(child.expect("qemu-system-x86_64: install the Debian package qemu-system-x86"));
    let timer = Timer::start(file, image, PATIENCE, || true).unwrap();
    works(&timer, Privilege::Kernel);
}
