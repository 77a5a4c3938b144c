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
                "0x0-0x40000000 at 0x7f0000000000",
                "0x40000000-0x80000000 at 0x7f0050000000"
            ],
            [
                "0x0-0x40000000 at 0x7f0050000000",
                "0x40000000-0x80000000 at 0x7f0000000000"
            ],
        ]
    );
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
