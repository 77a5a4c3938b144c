//! What vmsight sees in every guest of the matrix, running and dumped, is what the guest says of itself.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::path::Path;

use vmsight_lab::{Format, Guest, Kernel, Spec, compare, matrix_of};
use vmsight_linux::AttachOptions;
use vmsight_memory::{GuestMemory, dump};
use vmsight_target::TargetSpec;

fn attach(what: &str, memory: &GuestMemory) -> vmsight_linux::Kernel {
    vmsight_linux::Kernel::attach(memory.clone(), AttachOptions::default())
        .unwrap_or_else(|e| panic!("{what}: {e}"))
}

fn agree(what: &str, memory: &GuestMemory, guest: &Guest) {
    let differences = compare::all(&attach(what, memory), guest.truth());
    assert!(
        differences.is_empty(),
        "{what} of {}: {} differences\n{}",
        guest.spec(),
        differences.len(),
        differences.join("\n")
    );
}

/// The running guest: through its monitor where it has one, else through nothing but its process.
fn live(guest: &Guest) {
    let spec = match guest.qmp_path() {
        Some(path) => TargetSpec::Qmp(path),
        None => TargetSpec::Pid(guest.pid()),
    };
    let prove = |memory: &GuestMemory| {
        attach("the deduced layout", memory)
            .confirm_memory_end()
            .map_err(|e| e.to_string())
    };
    let options = vmsight_target::AttachOptions {
        prove: Some(&prove),
        ..Default::default()
    };
    let target = vmsight_target::attach(&spec, &options).unwrap_or_else(|e| panic!("{}: {e}", guest.spec()));
    agree("the running guest", &target.memory, guest);
}

fn dumped(guest: &Guest, format: Format, folder: &Path) {
    let file = folder.join("memory");
    guest.dump(format, &file).unwrap_or_else(|e| panic!("{e:?}"));
    agree(
        &format!("a dump ({format:?})"),
        &dump::open(&file, None).unwrap().memory,
        guest,
    );
    std::fs::remove_file(file).unwrap();
}

/// The guest of this number in the kernel's part of the matrix: running; and where it has a monitor that can dump it, dumped
/// as ELF core and, below 4 GiB, as a raw file.
fn check(kernel: Kernel, number: usize) {
    let spec = &matrix_of(kernel)[number];
    let guest = Guest::boot(spec).unwrap_or_else(|e| panic!("{e:?}"));
    live(&guest);
    if guest.qmp_path().is_some() {
        // Not in the guest's folder, which is in memory: large dumps take room.
        let folder = tempfile::tempdir().unwrap();
        dumped(&guest, Format::Elf, folder.path());
        if spec.memory_mib < 4096 {
            dumped(&guest, Format::Raw, folder.path());
        }
    }
}

/// A test for each guest of a kernel's matrix: tests run side by side, and one that fails hides no other.
macro_rules! matrix {
    ($($module:ident: $kernel:ident),+ $(,)?) => {
        $(mod $module {
            use super::{Kernel, check};
            matrix!(@guests $kernel guest_0 0, guest_1 1, guest_2 2, guest_3 3, guest_4 4, guest_5 5);
        })+
    };
    (@guests $kernel:ident $($name:ident $number:literal),+) => {
        $(#[test]
        fn $name() {
            check(Kernel::$kernel, $number);
        })+
    };
}

matrix! {
    kernel_5_10: V5_10,
    kernel_6_1: V6_1,
    kernel_6_1_cloud: V6_1Cloud,
    kernel_6_1_rt: V6_1Rt,
    kernel_6_12: V6_12,
    kernel_sid: Sid,
}

#[test]
fn the_matrix_is_all_checked() {
    for kernel in Kernel::ALL {
        assert_eq!(matrix_of(kernel).len(), 6, "{kernel}");
    }
    assert_eq!(Kernel::ALL.len(), 6);
}

/// A comparison that cannot fail is none: one wrong value in each part of the guest's account is noticed, by its own comparison.
#[test]
fn each_comparison_notices_one_wrong_value() {
    let guest = Guest::boot(&Spec::new(Kernel::V6_1)).unwrap_or_else(|e| panic!("{e:?}"));
    let file = guest.folder().join("memory.elf");
    guest.dump(Format::Elf, &file).unwrap_or_else(|e| panic!("{e:?}"));
    let kernel = attach("a dump", &dump::open(&file, None).unwrap().memory);
    let mut truth = guest.truth().clone();
    assert_eq!(compare::all(&kernel, &truth), Vec::<String>::new());
    let holder = truth
        .processes
        .iter_mut()
        .find(|p| p.comm == "file-holder")
        .unwrap();
    holder.fds.last_mut().unwrap().pos += 1;
    truth.mounts[0].mounts[0].options.push('x');
    truth.modules[0].size += 1;
    truth.kmsg[0].level ^= 1;
    truth.net[0].inet[0].uid += 1;
    truth.net[0].unix[0].refs += 1;
    truth.net[0].interfaces[0].mtu += 1;
    let differences = compare::all(&kernel, &truth);
    for what in [
        "open files",
        "mounts",
        "modules",
        "kernel log",
        "sockets",
        "UNIX sockets",
        "interfaces",
    ] {
        let own = differences
            .iter()
            .filter(|d| d.split(':').next() == Some(what))
            .count();
        assert_eq!(own, 1, "{what}: {differences:#?}");
    }
}
