//! An unmodified Debian kernel under the hypervisor, on two processors.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::time::Duration;

use vmsight_lab::Kernel;
use vmsight_lab::cache::Lock;
use vmsight_lab::cpio::Archive;
use vmsight_sim_image::bochs::WITH_VMX;
use vmsight_sim_image::{Image, Machine, user};

/// For a machine that has others to run too; alone it takes two minutes.
const LIMIT: Duration = Duration::from_secs(900);
/// `Call::Report`.
const REPORT: u32 = 0x7369_6d02;
/// What the hypervisor says when it starts the kernel.
const STARTS: &str = "vmsight-hypervisor: kernel at";
/// It sleeps last, for the kernel says in the midst of what it wrote that it restarts.
const INIT: &str = "\
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /tmp
/bin/busybox mount -t proc proc /proc
/bin/busybox mkdir -p /sys && /bin/busybox mount -t sysfs sys /sys
echo \"guest: $(/bin/busybox cat /proc/sys/kernel/osrelease)\"
echo \"guest: meltdown $(/bin/busybox cat /sys/devices/system/cpu/vulnerabilities/meltdown)\"
/bin/busybox insmod /dummy.ko && echo \"guest: module $(/bin/busybox grep -c '^dummy ' /proc/modules)\"
for n in 1 2 3; do /bin/busybox sh -c \"echo $n > /tmp/$n\"; done
echo \"guest: files $(/bin/busybox cat /tmp/1 /tmp/2 /tmp/3 | /bin/busybox tr -d '\\n')\"
echo \"guest: processors $(/bin/busybox nproc)\"
echo \"guest: vmx $(/bin/busybox grep -c -w vmx /proc/cpuinfo)\"
/report; echo \"guest: report $?\"
/bin/busybox sleep 1
/bin/busybox reboot -f
";

fn initrd(kernel: &vmsight_lab::kernel::Fetched) -> Vec<u8> {
    let mut archive = Archive::new();
    archive.folder("dev");
    archive.file("bin/busybox", 0o755, &fs::read("/bin/busybox").unwrap());
    archive.file("init", 0o755, INIT.as_bytes());
    archive.file("report", 0o755, &user::vmcall(REPORT));
    for module in kernel.modules(&[("dummy", "")]).unwrap() {
        archive.file(&format!("{}.ko", module.name), 0o644, &module.read().unwrap());
    }
    archive.finish()
}

#[test]
fn an_unmodified_debian_boots_works_and_restarts() {
    let kernel = Kernel::V6_1Cloud.fetch().unwrap_or_else(|e| panic!("{e:?}"));
    let image =
        Image::new(fs::read(kernel.vmlinuz()).unwrap(), "console=ttyS0 quiet").initrd(initrd(&kernel));
    let _lock = Lock::wait("bochs").unwrap();
    let machine = Machine::with_processors(&image, WITH_VMX, 2).unwrap_or_else(|e| panic!("{e:?}"));
    // When the kernel is started a second time, on both processors, there is nothing more to see.
    let mut console = Vec::new();
    let run = machine
        .watch(LIMIT, |news| {
            console.extend_from_slice(&news.console);
            String::from_utf8_lossy(&console).matches(STARTS).count() < 2
        })
        .unwrap();
    let serial = run.serial.replace('\r', "");
    let release = format!("guest: {}", kernel.release);
    for line in [
        &release,
        "guest: module 1",
        "guest: files 123",
        "guest: processors 2",
        "guest: vmx 0",
        // What a guest is that hooks are put into by default.
        "guest: meltdown Mitigation: PTI",
        "guest: report 0",
    ] {
        assert!(serial.contains(line), "not found: {line}\n{serial}");
    }
    let table = vmsight_sim_image::exits::parse(&serial);
    let exits = |name: &str| table.iter().find(|e| e.name == name).map(|e| e.count);
    assert!(exits("CPUID").is_some_and(|n| n > 0), "{serial}");
    // Nothing happens at every interrupt, system call or page fault: the rest is a handful, whatever the guest does.
    for name in [
        "external interrupt",
        "triple fault",
        "EPT misconfiguration",
        "VMFUNC",
    ] {
        assert_eq!(exits(name), None, "{name}\n{serial}");
    }
    for (name, most) in [
        ("RDMSR", 100),
        ("WRMSR", 100),
        ("control register", 10),
        ("XSETBV", 10),
        // One for each time that a processor stops the other.
        ("exception or NMI", 4),
        ("SIPI", 2),
        // Until the other processor starts, each store to the APIC, of which an interrupt takes one.
        ("EPT violation", 2000),
    ] {
        assert!(exits(name).unwrap_or(0) <= most, "{name}\n{serial}");
    }
    let starts: Vec<_> = serial.lines().filter(|l| l.contains(STARTS)).collect();
    assert!(!run.off && starts.len() == 2, "it did not restart\n{serial}");
    println!("{serial}");
}
