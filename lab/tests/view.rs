//! What vmsight sees in every kernel of the lab, running and dumped, is what the guest says of itself.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use vmsight_lab::{Format, Guest, Kernel, Machine, Paging, Spec, compare};
use vmsight_linux::AttachOptions;
use vmsight_memory::{GuestMemory, dump};
use vmsight_target::TargetSpec;

fn agree(what: &str, memory: GuestMemory, guest: &Guest) {
    let kernel = vmsight_linux::Kernel::attach(memory, AttachOptions::default())
        .unwrap_or_else(|e| panic!("{what}: {e}"));
    let differences = compare::all(&kernel, guest.truth());
    assert!(
        differences.is_empty(),
        "{what} of {}: {} differences\n{}",
        guest.spec(),
        differences.len(),
        differences.join("\n")
    );
}

fn live(guest: &Guest) {
    let spec = TargetSpec::Qmp(guest.qmp_path().unwrap());
    let target = vmsight_target::attach(&spec, &Default::default()).unwrap_or_else(|e| panic!("{e}"));
    agree("the running guest", target.memory, guest);
}

/// The small guest of a kernel: running, and dumped in both formats at one moment.
fn check(kernel: Kernel) {
    let guest = Guest::boot(&Spec::new(kernel)).unwrap_or_else(|e| panic!("{e:?}"));
    live(&guest);
    for (format, name) in [(Format::Elf, "memory.elf"), (Format::Raw, "memory.raw")] {
        let file = guest.folder().join(name);
        guest.dump(format, &file).unwrap_or_else(|e| panic!("{e:?}"));
        agree(name, dump::open(&file, None).unwrap().memory, &guest);
    }
}

/// A guest with memory above 4 GiB, private to QEMU, and page tables as deep as they get.
fn check_large(kernel: Kernel, paging: Paging) {
    let spec = Spec {
        paging,
        machine: Machine::Q35,
        vcpus: 2,
        memory: vmsight_lab::Memory::Private,
        ..Spec::new(kernel)
    };
    live(&Guest::boot(&spec.memory_mib(5120)).unwrap_or_else(|e| panic!("{e:?}")));
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
fn kernel_6_1_cloud() {
    check(Kernel::V6_1Cloud);
}

#[test]
fn kernel_6_1_rt() {
    check(Kernel::V6_1Rt);
}

#[test]
fn kernel_6_12() {
    check(Kernel::V6_12);
}

/// A comparison that cannot fail is none: one wrong value in each part of the guest's account is noticed, by its own comparison.
#[test]
fn each_comparison_notices_one_wrong_value() {
    let guest = Guest::boot(&Spec::new(Kernel::V6_1)).unwrap_or_else(|e| panic!("{e:?}"));
    let file = guest.folder().join("memory.elf");
    guest.dump(Format::Elf, &file).unwrap_or_else(|e| panic!("{e:?}"));
    let memory = dump::open(&file, None).unwrap().memory;
    let kernel = vmsight_linux::Kernel::attach(memory, AttachOptions::default()).unwrap();
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

#[test]
fn kernel_sid() {
    check(Kernel::Sid);
}

#[test]
fn large_kernel_5_10() {
    check_large(Kernel::V5_10, Paging::Four);
}

#[test]
fn large_kernel_6_1() {
    check_large(Kernel::V6_1, Paging::Five);
}

#[test]
fn large_kernel_sid() {
    check_large(Kernel::Sid, Paging::Five);
}
