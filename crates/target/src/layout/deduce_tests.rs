//! Mappings as real processes have them, and the layouts they allow.

use super::*;

fn machine(vmm: Vmm, args: &str, memory: Option<u64>) -> VmInfo {
    let mut info = VmInfo::new(vmm, 1, "qemu-system-x86_64");
    info.memory_bytes = memory;
    if vmm == Vmm::Qemu {
        let args: Vec<String> = args.split_whitespace().map(str::to_owned).collect();
        let config = QemuConfig::parse(&args, &|_| None);
        info.machine = config.machine.clone();
        info.memory_bytes = config.memory;
        info.qemu = Some(config);
    } else {
        info.exe = vmm.to_string();
    }
    info
}

fn shown(info: &VmInfo, text: &str) -> Vec<Vec<String>> {
    let all = candidates(info, &maps::parse(text)).unwrap();
    all.iter()
        .map(|c| c.ranges.iter().map(ToString::to_string).collect())
        .collect()
}

#[test]
fn plain_memory_ends_at_its_guard_page() {
    // 512 MiB that the kernel merged with 64 KiB below it.
    let text = "\
7fef4bdf0000-7fef6be00000 rw-p 00000000 00:00 0
7fef6be00000-7fef6be01000 ---p 00000000 00:00 0
7fef74000000-7fefb3fff000 rwxp 00000000 00:00 0
7fefb3fff000-7fefb4000000 ---p 00000000 00:00 0
";
    let info = machine(Vmm::Qemu, "q -m 512", None);
    assert_eq!(
        shown(&info, text),
        [["0x0-0x20000000 at 0x7fef4be00000"]],
        "not the code buffer, which is executable"
    );
    // With 1 GiB asked for nothing fits.
    let info = machine(Vmm::Qemu, "q -m 1G", None);
    let error = candidates(&info, &maps::parse(text)).unwrap_err();
    assert!(error.contains("no mapping of 0x40000000 bytes"), "{error}");
}

#[test]
fn memory_above_the_hole() {
    let text = "7f0000000000-7f0140000000 rw-s 00000000 00:01 99 /memfd:memory-backend-memfd (deleted)\n";
    let args = "q -machine q35,memory-backend=m -m 5G -object memory-backend-memfd,id=m,size=5G,share=on";
    let all = shown(&machine(Vmm::Qemu, args, None), text);
    assert_eq!(
        all[0],
        [
            "0x0-0x80000000 at 0x7f0000000000",
            "0x100000000-0x1c0000000 at 0x7f0080000000"
        ]
    );
    assert!(
        all.len() > 2,
        "other layouts are tried when this one is disproved"
    );
    assert!(all.contains(&vec![
        "0x0-0xc0000000 at 0x7f0000000000".into(),
        "0x100000000-0x180000000 at 0x7f00c0000000".into()
    ]));
}

#[test]
fn backends_of_one_size_are_tried_in_every_order() {
    let text = "\
7f0000000000-7f0040000000 rw-s 00000000 00:01 98 /memfd:memory-backend-memfd (deleted)
7f0050000000-7f0090000000 rw-s 00000000 00:01 99 /memfd:memory-backend-memfd (deleted)
";
    let args = "q -m 2G -numa node,memdev=a -numa node,memdev=b \
                -object memory-backend-memfd,id=a,size=1G -object memory-backend-memfd,id=b,size=1G";
    let all = shown(&machine(Vmm::Qemu, args, None), text);
    assert_eq!(
        all,
        [
            [
                "0x0-0x40000000 at 0x7f0050000000",
                "0x40000000-0x80000000 at 0x7f0000000000"
            ],
            [
                "0x0-0x40000000 at 0x7f0000000000",
                "0x40000000-0x80000000 at 0x7f0050000000"
            ],
        ],
        "from the top down first, as the kernel gives them"
    );
}

/// `count` memfd backends of 1 GiB, a gibibyte apart.
fn equal(count: u64) -> String {
    (0..count)
        .map(|i| {
            let start = 0x7f00_0000_0000 + i * 0x8000_0000;
            format!(
                "{start:x}-{:x} rw-s 00000000 00:01 {} /memfd:memory-backend-memfd (deleted)\n",
                start + 0x4000_0000,
                90 + i
            )
        })
        .collect()
}

#[test]
fn many_backends_of_one_size_begin_with_qemus_own_order() {
    // Nodes in another order than their backends were made in; one of the backends is a DIMM's.
    let ids = ["d", "a", "dimm", "c", "b", "e"];
    let mut args = "q -machine q35 -m 5G,slots=1,maxmem=8G -device pc-dimm,memdev=dimm".to_owned();
    for id in ids {
        args += &format!(" -object memory-backend-memfd,id={id},size=1G");
    }
    for id in ["a", "b", "c", "d", "e"] {
        args += &format!(" -numa node,memdev={id}");
    }
    let info = machine(Vmm::Qemu, &args, None);
    let all = candidates(&info, &maps::parse(&equal(6))).unwrap();
    let order: Vec<u64> = all[0]
        .ranges
        .iter()
        .map(|r| (r.hva - 0x7f00_0000_0000) / 0x8000_0000)
        .collect();
    assert_eq!(order, [4, 1, 2, 5, 0]);
    assert!(all.len() <= MAX_CANDIDATES);
    // The first layout in every arrangement before the second layout in any.
    let first_low = |c: &Candidate| {
        c.ranges
            .iter()
            .filter(|r| r.gpa < 1 << 32)
            .map(|r| r.len)
            .sum::<u64>()
    };
    assert!(all.iter().take(MAX_ARRANGEMENTS).all(|c| first_low(c) == 2 << 30));
    assert!(all.iter().any(|c| first_low(c) == 3 << 30));
    assert!(all.iter().skip(1).all(|c| c.ranges != all[0].ranges));
    let rivals = all.iter().filter(|c| c.is_rival_of(&all[0])).count();
    assert_eq!(rivals, MAX_ARRANGEMENTS - 1);
}

#[test]
fn a_file_that_names_its_backend_is_its() {
    let text = "\
7f0000000000-7f0040000000 rw-s 00000000 00:2a 11 /dev/hugepages/libvirt/qemu/1-vm/qemu_back_mem._objects_ram-node1.AbCdEf (deleted)
7f1000000000-7f1040000000 rw-s 00000000 00:2a 12 /dev/hugepages/libvirt/qemu/1-vm/qemu_back_mem._objects_ram-node0.GhIjKl (deleted)
7f2000000000-7f2040000000 rw-s 00000000 00:2a 13 /dev/hugepages/libvirt/qemu/1-vm2/qemu_back_mem._objects_ram-node0.GhIjKl (deleted)
";
    let mut args = "q -m 2G".to_owned();
    for id in ["ram-node0", "ram-node1"] {
        args += &format!(
            " -object memory-backend-file,id={id},size=1G,mem-path=/dev/hugepages/libvirt/qemu/1-vm,share=on \
             -numa node,memdev={id}"
        );
    }
    let only = [[
        "0x0-0x40000000 at 0x7f1000000000",
        "0x40000000-0x80000000 at 0x7f0000000000",
    ]];
    assert_eq!(shown(&machine(Vmm::Qemu, &args, None), text), only);
    // Files of their own, one's name a part of the other's.
    let text = "\
7f0000000000-7f0040000000 rw-s 00000000 00:2a 11 /mnt/n10
7f1000000000-7f1040000000 rw-s 00000000 00:2a 12 /mnt/n1
";
    let args = "q -m 2G -numa node,memdev=a -numa node,memdev=b \
                -object memory-backend-file,id=a,size=1G,mem-path=/mnt/n1 \
                -object memory-backend-file,id=b,size=1G,mem-path=/mnt/n10";
    assert_eq!(shown(&machine(Vmm::Qemu, args, None), text), only);
}

#[test]
fn a_piece_across_the_hole_is_cut() {
    let text = "\
7f0000000000-7f0060000000 rw-s 00000000 00:01 98 /mnt/huge/n0
7f1000000000-7f1080000000 rw-s 00000000 00:01 99 /mnt/huge/n1
";
    let args = "q -machine q35 -m 3584 -numa node,memdev=a -numa node,memdev=b \
                -object memory-backend-file,id=a,size=1536M,mem-path=/mnt/huge/n0,share=on \
                -object memory-backend-file,id=b,size=2G,mem-path=/mnt/huge/n1,share=on";
    let all = shown(&machine(Vmm::Qemu, args, None), text);
    assert_eq!(
        all[0],
        [
            "0x0-0x60000000 at 0x7f0000000000",
            "0x60000000-0x80000000 at 0x7f1000000000",
            "0x100000000-0x160000000 at 0x7f1020000000",
        ]
    );
}

#[test]
fn firecracker_maps_below_and_above_apart() {
    let text = "\
7f0000000000-7f00d0000000 rw-p 00000000 00:00 0
7f1000000000-7f1030000000 rw-p 00000000 00:00 0
7f2000000000-7f2000800000 rw-p 00000000 00:00 0
";
    let all = shown(&machine(Vmm::Firecracker, "", Some(4 << 30)), text);
    assert_eq!(
        all[0],
        [
            "0x0-0xd0000000 at 0x7f0000000000",
            "0x100000000-0x130000000 at 0x7f1000000000"
        ]
    );
    // The size came through the API and is not known: the biggest mapping, then the two biggest.
    let all = shown(&machine(Vmm::Firecracker, "", None), text);
    assert_eq!(all[0], ["0x0-0xd0000000 at 0x7f0000000000"]);
    assert!(all.iter().any(|c| c.len() == 2));
    assert!(candidates(&machine(Vmm::Firecracker, "", None), &[]).is_err());
}

#[test]
fn what_is_not_known_is_refused() {
    let error = |args: &str| candidates(&machine(Vmm::Qemu, args, None), &[]).unwrap_err();
    assert!(error("q -machine memory-backend=x -m 1G").contains("does not describe it"));
    assert!(error("q -m 1G").contains("no mapping"));
    let mut info = machine(Vmm::Qemu, "q -m 1G", None);
    info.exe = "/usr/bin/qemu-system-riscv64".into();
    let text = "7f0000000000-7f0040000000 rw-p 00000000 00:00 0\n";
    assert!(
        candidates(&info, &maps::parse(text))
            .unwrap_err()
            .contains("riscv64")
    );
}
