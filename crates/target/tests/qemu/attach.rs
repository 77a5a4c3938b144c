//! Memory of real machines, held against what QEMU itself says of the same addresses.

use std::sync::{Mutex, MutexGuard, PoisonError};

use vmsight_arch::Gpa;
use vmsight_target::{AttachOptions, Target, TargetKind, TargetSpec, Vmm, attach};

use crate::machine::Machine;

const GIB: u64 = 1 << 30;
const WRITE: AttachOptions<'static> = AttachOptions {
    write: true,
    timeout: std::time::Duration::from_secs(10),
    prove: None,
    ahead: None,
};

fn attach_pid(vm: &Machine, options: &AttachOptions<'_>) -> Target {
    attach(&TargetSpec::Pid(vm.pid()), options).unwrap_or_else(|e| panic!("{e}"))
}

/// Writes a number of its own at each address from outside, and lets QEMU read it by its monitor.
fn agrees_with_qemu(vm: &Machine, target: &Target, addresses: &[u64]) {
    for (i, gpa) in addresses.iter().enumerate() {
        let value = 0xfeed_0000_0000_0001 + ((i as u64) << 20);
        target
            .memory
            .write(Gpa(*gpa), &value.to_le_bytes())
            .unwrap_or_else(|e| panic!("{gpa:#x}: {e}"));
    }
    for (i, gpa) in addresses.iter().enumerate() {
        let value = 0xfeed_0000_0000_0001_u64 + ((i as u64) << 20);
        let text = vm.hmp(&format!("xp /1gx {gpa:#x}"));
        assert!(
            text.contains(&format!("{value:#018x}")),
            "QEMU has at {gpa:#x}: {text}"
        );
        assert_eq!(target.memory.read_u64(Gpa(*gpa)).unwrap(), value);
    }
}

fn regions(target: &Target) -> Vec<(u64, u64)> {
    target
        .memory
        .regions()
        .iter()
        .map(|r| (r.start.0, r.end().0))
        .collect()
}

#[test]
fn plain_memory_of_a_pc() {
    let vm = Machine::start(&["-machine", "pc", "-m", "512", "-name", "plain"]);
    let target = attach_pid(&vm, &WRITE);
    assert_eq!(
        (target.name.as_str(), target.kind),
        ("plain", TargetKind::Vm(Vmm::Qemu))
    );
    assert!(target.memory.is_live() && target.memory.is_writable());
    assert_eq!(regions(&target), [(0, 0xc0000), (0x10_0000, 512 << 20)]);
    agrees_with_qemu(&vm, &target, &[0, 0xbfff8, 0x10_0000, (512 << 20) - 8]);
}

#[test]
fn what_is_looked_at_ahead_is_a_part_of_the_memory() {
    let vm = Machine::start(&["-machine", "pc", "-m", "512"]);
    for (spec, monitor) in [
        (TargetSpec::Pid(vm.pid()), "pid"),
        (TargetSpec::Qmp(vm.qmp()), "qmp"),
    ] {
        vm.hmp("stop");
        let shown = std::cell::RefCell::new(Vec::new());
        let ahead = |memory: &vmsight_memory::GuestMemory| {
            let word = memory.read_u64(Gpa(0x20_0000)).unwrap();
            shown.borrow_mut().push((memory.regions().to_vec(), word));
        };
        let options = AttachOptions {
            ahead: Some(&ahead),
            ..WRITE
        };
        let target = attach(&spec, &options).unwrap_or_else(|e| panic!("{e}"));
        assert!(target.ahead, "{monitor}");
        let shown = shown.into_inner();
        let [(regions, word)] = &shown[..] else {
            panic!("{monitor}: shown {} times", shown.len());
        };
        // Nothing that may be no memory: touching it would make it be.
        let spans: Vec<(u64, u64)> = regions.iter().map(|r| (r.start.0, r.end().0)).collect();
        assert_eq!(spans, [(0, 0xa_0000), (0x10_0000, 512 << 20)]);
        assert_eq!(target.memory.read_u64(Gpa(0x20_0000)).unwrap(), *word);
        assert_eq!(target.memory.regions()[0].end(), Gpa(0xc_0000));
    }
    // Where nobody looks ahead, nothing is said of it.
    assert!(!attach_pid(&vm, &WRITE).ahead);
}

#[test]
fn memory_above_4_gib() {
    for (machine, low, plain) in [
        ("pc", 3 * GIB, true),
        ("q35", 2 * GIB, true),
        ("q35", 2 * GIB, false),
    ] {
        let memory = format!("{machine}{}", if plain { "" } else { ",memory-backend=m" });
        let backend = "memory-backend-memfd,id=m,size=5G,share=on";
        let mut args = vec!["-m", "5G", "-machine", &memory];
        if !plain {
            args.extend(["-object", backend]);
        }
        let vm = Machine::start(&args);
        let target = attach_pid(&vm, &WRITE);
        let end = 4 * GIB + 5 * GIB - low;
        assert_eq!(regions(&target), [(0, 0xc0000), (0x10_0000, low), (4 * GIB, end)]);
        agrees_with_qemu(&vm, &target, &[0x1000, low - 8, 4 * GIB, end - 8]);
        assert!(target.memory.read_u64(Gpa(low)).is_err(), "the hole is no memory");
    }
}

#[test]
fn several_backends_and_dimms() {
    let vm = Machine::start(&[
        "-machine",
        "q35",
        "-m",
        "3G,slots=4,maxmem=16G",
        "-object",
        "memory-backend-memfd,id=n0,size=1G,share=on",
        "-object",
        "memory-backend-file,id=n1,size=1536M,share=on,mem-path=DIR/n1",
        "-object",
        "memory-backend-ram,id=n2,size=512M",
        "-numa",
        "node,memdev=n0",
        "-numa",
        "node,memdev=n1",
        "-numa",
        "node,memdev=n2",
        "-object",
        "memory-backend-ram,id=d0,size=128M",
        "-device",
        "pc-dimm,memdev=d0",
        "-object",
        "memory-backend-memfd,id=v0,size=1G",
        "-device",
        "virtio-mem-pci,memdev=v0,requested-size=128M",
        // Memory of a device, which is not the machine's.
        "-device",
        "VGA",
    ]);
    let target = attach_pid(&vm, &WRITE);
    assert_eq!(regions(&target)[..2], [(0, 0xa0000), (0x10_0000, 2 * GIB)]);
    // 1 GiB of the 3 above the hole, the DIMM and virtio-mem's gibibyte right after.
    let above = regions(&target)[2..].to_vec();
    assert_eq!(above.first().map(|r| r.0), Some(4 * GIB));
    let bytes: u64 = above.iter().map(|(start, end)| end - start).sum();
    assert_eq!(bytes, GIB + (128 << 20) + GIB);
    // One address in each: n0, n1 on both sides of the hole, n2, d0.
    agrees_with_qemu(
        &vm,
        &target,
        &[
            0x1000,
            GIB,
            2 * GIB - 8,
            4 * GIB,
            4 * GIB + (512 << 20),
            5 * GIB,
            5 * GIB + 0x1000,
        ],
    );
    let all = [0, 1, 2, 3, 4].map(|i| 0x20_0000 * i + 0x10_0000);
    agrees_with_qemu(&vm, &target, &all);
}

#[test]
fn private_and_shared_backends_of_every_kind() {
    for backend in [
        "memory-backend-ram,id=m,size=64M",
        "memory-backend-ram,id=m,size=64M,share=on",
        "memory-backend-memfd,id=m,size=64M,share=on",
        "memory-backend-memfd,id=m,size=64M,share=off",
        "memory-backend-file,id=m,size=64M,share=on,mem-path=DIR",
        "memory-backend-file,id=m,size=64M,share=on,mem-path=DIR/file",
        "memory-backend-file,id=m,size=64M,share=off,mem-path=DIR/file",
    ] {
        let vm = Machine::start(&["-machine", "pc,memory-backend=m", "-m", "64M", "-object", backend]);
        let target = attach_pid(&vm, &WRITE);
        agrees_with_qemu(&vm, &target, &[0x2000, 0x10_0000, (64 << 20) - 8]);
    }
    let vm = Machine::start(&["-m", "64M", "-mem-path", "DIR", "-mem-prealloc"]);
    agrees_with_qemu(&vm, &attach_pid(&vm, &WRITE), &[0x2000, (64 << 20) - 8]);
}

#[test]
fn hugepages_where_the_host_has_them() {
    let Some(_reserved) = HugePages::reserve(40) else {
        eprintln!("this host gives no hugepages (not root, or memory too fragmented): nothing to test");
        return;
    };
    for share in ["on", "off"] {
        // A size that is no multiple of what QEMU maps beside it.
        let backend = format!("memory-backend-memfd,id=m,size=66M,share={share},hugetlb=on,hugetlbsize=2M");
        let vm = Machine::start(&[
            "-machine",
            "pc,memory-backend=m",
            "-m",
            "66M",
            "-object",
            &backend,
        ]);
        let target = attach_pid(&vm, &WRITE);
        agrees_with_qemu(&vm, &target, &[0x2000, 0x20_0000, (66 << 20) - 8]);
    }
}

#[test]
fn hugetlbfs_files_where_the_host_has_them() {
    let Some(_reserved) = HugePages::reserve(40) else {
        eprintln!("this host gives no hugepages (not root, or memory too fragmented): nothing to test");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let mount = |args: &[&str]| {
        let done = std::process::Command::new("mount")
            .args(args)
            .arg(dir.path())
            .status();
        done.is_ok_and(|status| status.success())
    };
    if !mount(&["-t", "hugetlbfs", "-o", "pagesize=2M", "none"]) {
        eprintln!("this host mounts no hugetlbfs (not root, or in a container): nothing to test");
        return;
    }
    let _unmount = Unmount(dir.path().to_owned());
    let folder = dir.path().display();
    for (share, reserve, file) in [
        ("on", "on", ""),
        ("on", "off", ""),
        ("off", "on", ""),
        ("on", "on", "/ram"),
    ] {
        let backend = format!(
            "memory-backend-file,id=m,size=66M,share={share},reserve={reserve},mem-path={folder}{file}"
        );
        let vm = Machine::start(&[
            "-machine",
            "pc,memory-backend=m",
            "-m",
            "66M",
            "-object",
            &backend,
        ]);
        let target = attach_pid(&vm, &WRITE);
        agrees_with_qemu(&vm, &target, &[0x2000, 0x20_0000, (66 << 20) - 8]);
    }
}

/// Unmounts when dropped.
struct Unmount(std::path::PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn memory_of_a_device_is_none_of_the_machines() {
    let vm = Machine::start_running(&[
        "-m",
        "64",
        "-object",
        "memory-backend-memfd,id=shm,size=4M,share=on",
        "-device",
        "ivshmem-plain,memdev=shm",
        "-device",
        "VGA",
        "-device",
        "secondary-vga",
        "-qmp",
        "unix:DIR/second,server=on,wait=off",
    ]);
    // Firmware gives them their places, and says on the screen who it is.
    let until = std::time::Instant::now() + std::time::Duration::from_secs(60);
    let screen = || vm.hmp("xp /160xb 0xb8000");
    while !vm.hmp("info mtree -f").contains("ram): shm") || !screen().contains("0x53 0x07 0x65 0x07 0x61") {
        assert!(std::time::Instant::now() < until, "{}", vm.hmp("info mtree -f"));
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    let target = attach_pid(&vm, &AttachOptions::default());
    assert_eq!(target.memory.end(), Gpa(64 << 20), "{:?}", regions(&target));

    let devices = target.device_memory().unwrap_or_else(|e| panic!("{e}"));
    assert!(devices.is_live() && !devices.is_writable());
    assert_eq!(devices.size(), (4 + 16 + 16) << 20, "{:?}", devices.regions());
    // One of the cards has the screen, and a cell of it every four bytes.
    let title = |at: u64| {
        let cell = |n: u64| devices.read_u8(Gpa(at + 4 * n)).unwrap();
        (0..7).map(cell).collect::<Vec<u8>>()
    };
    let cards = devices
        .regions()
        .iter()
        .flat_map(|r| (r.start.0..r.end().0).step_by(4 << 20));
    assert_eq!(cards.filter(|at| title(*at) == b"SeaBIOS").count(), 1);
}

#[test]
fn by_name_by_uuid_and_by_socket() {
    let vm = Machine::start(&[
        "-m",
        "64",
        "-name",
        "one-of-a-kind",
        "-uuid",
        "b2a4c6c8-0d3b-4c5a-8f5f-5a0e4e2b9c01",
    ]);
    let named = |name: &str| attach(&name.parse().unwrap(), &AttachOptions::default()).unwrap();
    for target in [
        "one-of-a-kind",
        "B2A4C6C8-0D3B-4C5A-8F5F-5A0E4E2B9C01",
        &format!("qmp:{}", vm.qmp().display()),
    ] {
        let target = named(target);
        assert_eq!(target.info.as_ref().unwrap().pid, vm.pid());
        assert!(!target.memory.is_writable(), "read-only unless asked otherwise");
        assert!(target.memory.write(Gpa(0x1000), &[1]).is_err());
    }
    let twin = Machine::start(&["-m", "64", "-name", "one-of-a-kind"]);
    let error = attach(
        &TargetSpec::Name("one-of-a-kind".into()),
        &AttachOptions::default(),
    )
    .unwrap_err()
    .to_string();
    assert!(
        error.contains(&format!("pid:{}", vm.pid())) && error.contains(&format!("pid:{}", twin.pid())),
        "{error}"
    );
    let error = attach(&TargetSpec::Name("no-such".into()), &AttachOptions::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains("one-of-a-kind"), "what there is is named: {error}");
    let error = attach(&TargetSpec::Pid(std::process::id()), &AttachOptions::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains("no virtual machine"), "{error}");
}

#[test]
fn the_map_is_the_one_qemu_has() {
    // Every page of a window, on both sides: QEMU's own translation of guest-physical addresses.
    let vm = Machine::start(&["-machine", "q35", "-m", "3G"]);
    let target = attach_pid(&vm, &WRITE);
    let pages: Vec<u64> = (0..64).map(|i| 0x10_0000 + i * 0x17_3000).collect();
    agrees_with_qemu(&vm, &target, &pages);
}

#[test]
fn registers_of_a_machine_at_reset() {
    let vm = Machine::start(&["-m", "64", "-smp", "2"]);
    let target = attach_pid(&vm, &AttachOptions::default());
    let all = target.registers(None).unwrap();
    assert_eq!(all.len(), 2);
    // The reset vector.
    assert_eq!(
        (all[0].cs.selector, all[0].cs.base, all[0].rip),
        (0xf000, 0xffff_0000, 0xfff0)
    );
    assert_eq!(all[0].dtb(), None, "paging is off");
    assert_eq!(target.registers(Some(1)).unwrap()[0].vcpu, 1);
    let error = target.registers(Some(2)).unwrap_err().to_string();
    assert!(error.contains("no vCPU 2: it has 2"), "{error}");
}

/// Hugepages of 2 MiB reserved for a test and given back after it; one test at a time has some.
struct HugePages {
    before: String,
    _turn: MutexGuard<'static, ()>,
}

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

impl HugePages {
    fn reserve(pages: u64) -> Option<Self> {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let read = |file: &str| std::fs::read_to_string(file).ok()?.trim().parse::<u64>().ok();
        let before = read(POOL)?;
        let free = || read("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").unwrap_or(0);
        let this = Self {
            before: before.to_string(),
            _turn: turn,
        };
        if free() < pages {
            std::fs::write(POOL, (before + pages).to_string()).ok()?;
        }
        (free() >= pages).then_some(this)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = std::fs::write(POOL, &self.before);
    }
}
