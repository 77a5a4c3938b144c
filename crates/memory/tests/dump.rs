//! Dump files of every format, whole, cut, contradictory and hostile.

mod files;

use files::{Core, Load, block, lime, lime_range, note, pattern, qemu_state, virtualbox_notes};
use std::io::Write;
use std::path::{Path, PathBuf};
use vmsight_arch::{Gpa, Gva};
use vmsight_memory::dump::{self, DumpError, DumpFormat, RawLayout, raw_layouts};
use vmsight_memory::{MemoryError, Region};

/// A file in a folder of its own that is not in memory (of files in memory one cannot know whether they live).
struct Scratch {
    _folder: tempfile::TempDir,
    path: PathBuf,
}

fn scratch(bytes: &[u8]) -> Scratch {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder in the target folder");
    let path = folder.path().join("dump");
    std::fs::write(&path, bytes).expect("written");
    Scratch {
        _folder: folder,
        path,
    }
}

fn open(bytes: &[u8]) -> Result<dump::Dump, DumpError> {
    let file = scratch(bytes);
    // The mapping outlives the name.
    dump::open(&file.path, None)
}

fn region(start: u64, len: u64) -> Region {
    Region {
        start: Gpa(start),
        len,
    }
}

/// Every part reads as it was written, in place too.
fn assert_holds(dump: &dump::Dump, parts: &[(u64, Vec<u8>)]) {
    for (gpa, bytes) in parts {
        let mut buf = vec![0; bytes.len()];
        dump.memory
            .read(Gpa(*gpa), &mut buf)
            .expect("memory that is there");
        assert!(&buf == bytes, "bytes at {gpa:#x} differ");
        assert_eq!(dump.memory.frozen(Gpa(*gpa), bytes.len()), Some(&bytes[..]));
    }
}

fn three_parts() -> Vec<(u64, Vec<u8>)> {
    vec![
        (0x1000, pattern(1, 0x9e000)),
        (0x10_0000, pattern(2, 0x5000)),
        (0x1_0000_0000, pattern(3, 0x3000)),
    ]
}

#[test]
fn lime_ranges_are_where_they_say() {
    let parts = three_parts();
    let dump = open(&lime(&parts)).unwrap();
    assert_eq!(dump.format, DumpFormat::Lime);
    assert!(dump.notes.is_empty() && !dump.is_live(), "{:?}", dump.notes);
    assert_eq!(
        dump.memory.regions(),
        [
            region(0x1000, 0x9e000),
            region(0x10_0000, 0x5000),
            region(0x1_0000_0000, 0x3000)
        ]
    );
    assert_holds(&dump, &parts);
    assert!(matches!(
        dump.memory.read_u8(Gpa(0)),
        Err(MemoryError::Unbacked { .. })
    ));
    assert!(dump.with_layout(RawLayout::Flat).is_err());
    assert!(dump.layouts().is_empty());
}

#[test]
fn a_lime_file_that_is_cut_gives_what_is_there_and_names_what_is_not() {
    let parts = three_parts();
    let whole = lime(&parts);
    let cut = whole.len() - 0x1800;
    let dump = open(&whole[..cut]).unwrap();
    assert_holds(&dump, &parts[..2]);
    assert_eq!(dump.memory.missing(), [region(0x1_0000_1800, 0x1800)]);
    assert_eq!(dump.notes, ["the file lacks 0x100001800-0x100003000"]);
    assert!(dump.memory.read_u64(Gpa(0x1_0000_17f8)).is_ok());
    let error = dump.memory.read_u64(Gpa(0x1_0000_17fc)).unwrap_err();
    assert_eq!(
        error,
        MemoryError::Missing {
            gpa: Gpa(0x1_0000_1800),
            missing: region(0x1_0000_1800, 0x1800)
        }
    );
    // Cut inside a header.
    let dump = open(&whole[..whole.len() - 0x3000 - 20]).unwrap();
    assert_holds(&dump, &parts[..2]);
    assert!(
        dump.notes[0].contains("ends inside a LiME header"),
        "{:?}",
        dump.notes
    );
}

#[test]
fn a_broken_lime_header_ends_the_reading_but_not_the_rest() {
    let parts = three_parts();
    for (bad, say) in [
        (lime_range(5, 4, &[0; 4096]), "impossible range"),
        (lime_range(9, 3, &[0; 4096]), "impossible range"),
        (lime_range(0, u64::MAX, &[0; 4096]), "impossible range"),
        (
            lime_range(u64::MAX - 5, u64::MAX, &[0; 6]),
            "impossible addresses",
        ),
        (
            b"something else that is long enough for a header".to_vec(),
            "no LiME header",
        ),
    ] {
        let mut file = lime(&parts);
        file.extend(&bad);
        file.extend(&[0; 64]);
        let dump = open(&file).unwrap();
        assert_holds(&dump, &parts);
        let notes = dump.notes.join("\n");
        assert!(notes.contains(say), "{notes}");
    }
}

#[test]
fn elf_segments_are_read_by_physical_address_in_both_classes() {
    for wide in [true, false] {
        let mut parts = three_parts();
        if !wide {
            parts.pop();
        }
        // In no order, at odd offsets, with virtual addresses that mean nothing.
        let mut loads: Vec<Load> = parts
            .iter()
            .map(|(gpa, bytes)| Load {
                vaddr: gpa ^ 0xffff,
                ..Load::new(*gpa, bytes.clone())
            })
            .collect();
        loads.reverse();
        for extended in [false, true] {
            let core = Core {
                wide,
                extended,
                loads: loads.clone(),
                notes: vec![0; 20],
                ..Core::default()
            };
            let dump = open(&core.build()).unwrap();
            assert_eq!(dump.format, DumpFormat::Elf);
            assert!(dump.notes.is_empty(), "{:?}", dump.notes);
            assert_eq!(dump.memory.regions().len(), parts.len());
            assert_holds(&dump, &parts);
        }
    }
}

#[test]
fn more_segments_than_sixteen_bits_count_are_read() {
    let count = 70_000u64;
    let loads = (0..count)
        .map(|i| Load::new(i * 0x1000, (i as u16).to_le_bytes().to_vec()))
        .collect();
    let dump = open(
        &Core {
            extended: true,
            loads,
            ..Core::default()
        }
        .build(),
    )
    .unwrap();
    assert_eq!(dump.memory.regions().len() as u64, count);
    for i in [0, 1, 65_534, 65_535, 69_999] {
        assert_eq!(dump.memory.read_u16(Gpa(i * 0x1000)), Ok(i as u16));
    }
}

#[test]
fn where_segments_overlap_the_first_one_counts() {
    let (a, b) = (vec![1u8; 0x3000], vec![2u8; 0x5000]);
    let loads = vec![
        Load::new(0x2000, a),
        Load::new(0x1000, b),
        Load::new(u64::MAX - 0x100, vec![3; 0x1000]),
    ];
    let dump = open(
        &Core {
            loads,
            ..Core::default()
        }
        .build(),
    )
    .unwrap();
    assert_eq!(dump.memory.regions(), [region(0x1000, 0x5000)]);
    for (gpa, value) in [(0x1fff, 2), (0x2000, 1), (0x4fff, 1), (0x5000, 2), (0x5fff, 2)] {
        assert_eq!(dump.memory.read_u8(Gpa(gpa)), Ok(value), "{gpa:#x}");
    }
    let notes = dump.notes.join("\n");
    assert!(notes.contains("1 segments describe memory"), "{notes}");
    // A physical address of 2^64 − 257: beyond any machine.
    assert!(notes.contains("impossible addresses"), "{notes}");
}

#[test]
fn an_elf_core_that_is_cut_gives_what_is_there() {
    let parts = [(0, pattern(1, 0x4000)), (0x10_0000, pattern(2, 0x4000))];
    let loads: Vec<Load> = parts
        .iter()
        .map(|(gpa, bytes)| Load::new(*gpa, bytes.clone()))
        .collect();
    let whole = Core {
        loads,
        ..Core::default()
    }
    .build();
    let dump = open(&whole[..whole.len() - 0x1000]).unwrap();
    assert_holds(&dump, &parts[..1]);
    assert_eq!(dump.memory.missing(), [region(0x10_3000, 0x1000)]);
    assert_eq!(dump.notes, ["the file lacks 0x103000-0x104000"]);
    // So short that a whole segment is gone.
    let dump = open(&whole[..whole.len() - 0x4800]).unwrap();
    assert_eq!(
        dump.memory.missing(),
        [region(0x3800, 0x800), region(0x10_0000, 0x4000)]
    );
    // More memory than bytes (a page that was left out).
    let loads = vec![Load {
        memsz: 0x5000,
        ..Load::new(0x1000, vec![7; 0x1000])
    }];
    let dump = open(
        &Core {
            loads,
            ..Core::default()
        }
        .build(),
    )
    .unwrap();
    assert_eq!(dump.memory.missing(), [region(0x2000, 0x4000)]);
}

#[test]
fn the_program_headers_themselves_may_be_cut() {
    let loads = (0..200)
        .map(|i| Load::new(i * 0x1000, vec![i as u8; 16]))
        .collect();
    let mut file = Core {
        loads,
        ..Core::default()
    }
    .build();
    // Segment data of the first ones before the table: move the table behind the data, then cut it.
    let table = 64 + 64;
    let len = 201 * 56;
    let moved: Vec<u8> = file[table..table + len].to_vec();
    let at = file.len() as u64;
    file.extend(&moved[..100 * 56 + 20]);
    file[32..40].copy_from_slice(&at.to_le_bytes());
    let dump = open(&file).unwrap();
    assert_eq!(dump.memory.regions().len(), 99);
    assert_eq!(dump.memory.read_u8(Gpa(98 * 0x1000)), Ok(98));
    assert!(dump.notes[0].contains("100 of 201"), "{:?}", dump.notes);
}

#[test]
fn qemu_s_notes_become_registers() {
    let mut notes = note("CORE", 1, &block(336, &[(112 + 16 * 8, 0xbad)]), true);
    notes.extend(note("QEMU", 0, &qemu_state(0x1000, 440), true));
    notes.extend(note("QEMU", 0, &qemu_state(0x2000, 432), true));
    notes.extend(note(
        "VMCOREINFO",
        0,
        b"OSRELEASE=6.1.0\nPAGESIZE=4096\n\0\0",
        true,
    ));
    let loads = vec![Load::new(0, vec![0; 0x1000])];
    let dump = open(
        &Core {
            notes: notes.clone(),
            loads: loads.clone(),
            ..Core::default()
        }
        .build(),
    )
    .unwrap();
    assert_eq!(
        dump.vmcoreinfo.as_deref(),
        Some("OSRELEASE=6.1.0\nPAGESIZE=4096\n")
    );
    assert_eq!(dump.registers.len(), 2);
    for (r, (vcpu, tag)) in dump.registers.iter().zip([(0, 0x1000), (1, 0x2000)]) {
        assert_eq!(r.vcpu, vcpu);
        // In the file: rax rbx rcx rdx rsi rdi rsp rbp r8…; in Registers: rax rcx rdx rbx rsp rbp rsi rdi r8….
        let order = [0, 2, 3, 1, 6, 7, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15];
        assert_eq!(r.gprs, order.map(|i| tag + i));
        assert_eq!((r.rip, r.rflags), (tag + 16, tag + 17));
        let segments = [r.cs, r.ds, r.es, r.fs, r.gs, r.ss, r.ldt, r.tr];
        for (i, segment) in segments.iter().enumerate() {
            assert_eq!(u64::from(segment.selector), 0x10 + i as u64);
            assert_eq!(u64::from(segment.limit), 0xffff_0000 + i as u64);
            assert_eq!(segment.attributes, 0xa09b);
            assert_eq!(segment.base, tag + 0x100 + i as u64);
        }
        assert_eq!((r.gdt.base, r.gdt.limit), (Gva(tag + 0x108), 8));
        assert_eq!((r.idt.base, r.idt.limit), (Gva(tag + 0x109), 9));
        assert_eq!(
            (r.cr0, r.cr2, r.cr3, r.cr4),
            (0x8005_0033, tag + 0x202, tag + 0x203, 0x6f0)
        );
        assert_eq!(
            r.efer & 0x500,
            0x500,
            "long mode follows from CR0, CR4 and the machine"
        );
    }
    assert_eq!(dump.registers[0].kernel_gs_base, Some(0x1300));
    assert_eq!(dump.registers[1].kernel_gs_base, None);
    // A 32-bit guest's vCPUs are not in long mode.
    let dump = open(
        &Core {
            wide: false,
            machine: 3,
            notes,
            loads,
            ..Core::default()
        }
        .build(),
    )
    .unwrap();
    assert_eq!(dump.registers[0].efer, 0);
}

#[test]
fn the_kernel_s_own_notes_give_what_they_have() {
    // elf_prstatus: r15 first … gs last, from byte 112.
    let words: Vec<(usize, u64)> = (0..27).map(|i| (112 + i * 8, 0x50 + i as u64)).collect();
    let notes = note("CORE", 1, &block(336, &words), true);
    let loads = vec![Load::new(0, vec![0; 0x1000])];
    let dump = open(
        &Core {
            notes,
            loads: loads.clone(),
            ..Core::default()
        }
        .build(),
    )
    .unwrap();
    let r = dump.registers[0];
    let name = |n: &str| r.by_name(n).unwrap() - 0x50;
    let names = [
        "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi",
    ];
    for (i, n) in names.iter().enumerate() {
        assert_eq!(name(n), i as u64, "{n}");
    }
    for (n, i) in [
        ("rip", 16),
        ("cs", 17),
        ("rflags", 18),
        ("rsp", 19),
        ("ss", 20),
        ("fs_base", 21),
        ("gs_base", 22),
    ] {
        assert_eq!(name(n), i, "{n}");
    }
    assert!(dump.notes[0].contains("no control registers"), "{:?}", dump.notes);

    let mut body = vec![0; 144];
    for i in 0..17u32 {
        body[72 + i as usize * 4..][..4].copy_from_slice(&(0x50 + i).to_le_bytes());
    }
    let core = Core {
        wide: false,
        machine: 3,
        notes: note("CORE", 1, &body, true),
        loads,
        ..Core::default()
    };
    let r = open(&core.build()).unwrap().registers[0];
    for (n, i) in [
        ("rbx", 0),
        ("rcx", 1),
        ("rdx", 2),
        ("rsi", 3),
        ("rdi", 4),
        ("rbp", 5),
        ("rax", 6),
        ("rip", 12),
    ] {
        assert_eq!(r.by_name(n), Some(0x50 + i), "{n}");
    }
    assert_eq!(
        (r.cs.selector, r.rflags, r.rsp(), r.ss.selector),
        (0x5d, 0x5e, 0x5f, 0x60)
    );
}

#[test]
fn virtualbox_s_notes_become_registers_and_its_devices_no_memory() {
    let mut words: Vec<(usize, u64)> = (0..17).map(|i| (i * 8, 0x1000 + i as u64)).collect();
    words.extend([
        (136, 0x246),
        (288, 0x8005_0033),
        (296, 0xc2),
        (304, 0xc3),
        (312, 0x6f0),
    ]);
    words.extend([
        (144, 0xc5ba5e),
        (152, 0x0001_a09b_ffff_ffff),
        (160, 0x10),
        (384, 0x6d7),
        (392, 0x7f),
        (400, 0x1d7),
        (408, 0xfff),
    ]);
    words.extend([
        (464, 0x10),
        (472, 0xe1),
        (480, 0xe5),
        (488, 0xd01),
        (496, 0x57a2),
        (512, 0x157a2),
        (520, 0xc57a2),
        (528, 0xf3),
        (536, 0x65),
    ]);
    let cpu = block(8768, &words);
    let loads = vec![
        Load::new(0, pattern(1, 0x2000)),
        Load {
            memsz: 0x100_0000,
            ..Load::new(0xe000_0000, Vec::new())
        },
        Load::new(1 << 32, pattern(2, 0x1000)),
    ];
    for version in [0x1_0004, 0x1_0005, 0x1_0006] {
        let core = Core {
            notes: virtualbox_notes(version, &cpu),
            loads: loads.clone(),
            ..Core::default()
        };
        let dump = open(&core.build()).unwrap();
        assert!(dump.notes.is_empty(), "{:?}", dump.notes);
        assert_eq!(
            dump.memory.regions(),
            [region(0, 0x2000), region(1 << 32, 0x1000)]
        );
        let r = dump.registers[0];
        let expect = [
            ("rax", 0x1000),
            ("rbx", 0x1001),
            ("rcx", 0x1002),
            ("rdx", 0x1003),
            ("rsi", 0x1004),
            ("rdi", 0x1005),
            ("r8", 0x1006),
            ("r15", 0x100d),
            ("rip", 0x100e),
            ("rsp", 0x100f),
            ("rbp", 0x1010),
            ("rflags", 0x246),
            ("cs", 0x10),
            ("cr2", 0xc2),
            ("cr3", 0xc3),
            ("cr4", 0x6f0),
            ("gdt_base", 0x6d7),
            ("gdt_limit", 0x7f),
            ("idt_base", 0x1d7),
            ("idt_limit", 0xfff),
            ("sysenter_eip", 0xe1),
            ("sysenter_esp", 0xe5),
            ("efer", 0xd01),
            ("star", 0x57a2),
            ("lstar", 0x157a2),
            ("cstar", 0xc57a2),
            ("sfmask", 0xf3),
            ("kernel_gs_base", 0x65),
        ];
        for (name, value) in expect {
            assert_eq!(r.by_name(name), Some(value), "{name}");
        }
        assert_eq!(
            (r.cs.base, r.cs.limit, r.cs.attributes),
            (0xc5ba5e, 0xffff_ffff, 0xa09b)
        );
    }
    // Of another layout nothing is believed.
    for (version, cpu) in [
        (0x1_0000, cpu.clone()),
        (0x1_0007, pattern(5, 8768)),
        (0x2_0000, cpu.clone()),
        (0x1_0005, vec![0; 100]),
    ] {
        let core = Core {
            notes: virtualbox_notes(version, &cpu),
            loads: loads.clone(),
            ..Core::default()
        };
        let dump = open(&core.build()).unwrap();
        assert!(dump.registers.is_empty());
        assert!(dump.notes[0].contains("VirtualBox"), "{:?}", dump.notes);
    }
}

#[test]
fn raw_images_are_flat_or_split_at_the_hole() {
    let bytes = pattern(9, 0x8000);
    let dump = open(&bytes).unwrap();
    assert_eq!(dump.format, DumpFormat::Raw(RawLayout::Flat));
    assert_holds(&dump, &[(0, bytes.clone())]);
    let split = dump.with_layout(RawLayout::Split { below: 0x3000 }).unwrap();
    assert_eq!(
        split.memory.regions(),
        [region(0, 0x3000), region(1 << 32, 0x5000)]
    );
    assert_holds(
        &split,
        &[(0, bytes[..0x3000].to_vec()), (1 << 32, bytes[0x3000..].to_vec())],
    );
    assert!(open(&bytes[..0x7ffb]).unwrap().notes[0].contains("does not end at a page"));

    assert_eq!(raw_layouts(0x8000_0000), [RawLayout::Flat]);
    let three = raw_layouts(0xc000_0001);
    assert_eq!(three[0], RawLayout::Flat);
    assert!(three.contains(&RawLayout::Split { below: 0xc000_0000 }));
    assert!(three.contains(&RawLayout::Split { below: 0x8000_0000 }));
    assert!(!three.contains(&RawLayout::Split { below: 0xe000_0000 }));
}

#[test]
fn a_format_may_be_forced() {
    let file = scratch(
        &Core {
            loads: vec![Load::new(0, vec![0; 0x2000])],
            ..Core::default()
        }
        .build(),
    );
    let raw = dump::open(&file.path, Some(DumpFormat::Raw(RawLayout::Flat))).unwrap();
    assert_eq!(raw.memory.read_u32(Gpa(0)), Ok(u32::from_le_bytes(*b"\x7fELF")));
    assert!(
        raw.notes
            .iter()
            .any(|note| note.contains("begins like a file of another format")),
        "{:?}",
        raw.notes
    );
    assert!(matches!(
        dump::open(&file.path, Some(DumpFormat::Lime)),
        Err(DumpError::Broken(_))
    ));
    let file = scratch(&lime(&three_parts()));
    assert!(matches!(
        dump::open(&file.path, Some(DumpFormat::Elf)),
        Err(DumpError::Broken(_))
    ));
}

#[test]
fn what_is_no_dump_is_refused_with_the_reason() {
    let refused = |bytes: &[u8]| open(bytes).unwrap_err().to_string();
    let mut kdump = b"KDUMP   ".to_vec();
    kdump.resize(8192, 0);
    assert!(refused(&kdump).contains("kdump file with pages of 0 bytes"));
    let load = || vec![Load::new(0, vec![0; 0x2000])];
    assert!(
        refused(
            &Core {
                kind: 3,
                loads: load(),
                ..Core::default()
            }
            .build()
        )
        .contains("not a core file")
    );
    let process = (1..4)
        .map(|i| Load {
            vaddr: i << 40,
            ..Load::new(0, vec![0; 0x1000])
        })
        .collect();
    assert!(
        refused(
            &Core {
                loads: process,
                ..Core::default()
            }
            .build()
        )
        .contains("core file of a process")
    );
    assert!(
        refused(
            &Core {
                notes: vec![0; 8192],
                ..Core::default()
            }
            .build()
        )
        .contains("no guest memory")
    );
    let mut big_endian = Core {
        loads: load(),
        ..Core::default()
    }
    .build();
    big_endian[5] = 2;
    assert!(refused(&big_endian).contains("big-endian"));
    assert!(refused(&[0; 100]).contains("too small"));
    assert!(refused(&[]).contains("too small"));
    for path in ["/", "/dev/null", "/nonexistent/x"] {
        assert!(dump::open(Path::new(path), None).is_err(), "{path}");
    }
}

#[test]
fn a_raw_file_that_somebody_writes_to_is_live_memory() {
    let file = scratch(&pattern(1, 0x4000));
    assert!(!dump::open(&file.path, None).unwrap().is_live());
    let mut writer = std::fs::OpenOptions::new().write(true).open(&file.path).unwrap();
    let dump = dump::open(&file.path, None).unwrap();
    assert!(dump.is_live() && dump.memory.is_live());
    assert!(dump.memory.frozen(Gpa(0), 16).is_none());
    assert!(dump.notes[0].contains("open for writing"), "{:?}", dump.notes);
    writer.write_all(b"changed!").unwrap();
    assert_eq!(dump.memory.read_u64(Gpa(0)), Ok(u64::from_le_bytes(*b"changed!")));
    assert!(!dump.memory.is_writable());
    assert!(
        dump.with_layout(RawLayout::Split { below: 0x1000 })
            .unwrap()
            .memory
            .is_live()
    );
}

#[test]
fn a_raw_file_of_which_nobody_tells_who_writes_to_it_is_live_memory() {
    // Another user's file, looked at without the right to take a lease on it.
    // SAFETY: a plain system call.
    let root = unsafe { libc::geteuid() } == 0;
    if !root {
        let theirs = Path::new("/bin/sh");
        let raw = Some(DumpFormat::Raw(RawLayout::Flat));
        assert!(dump::open(theirs, raw).unwrap().is_live());
        return;
    }
    let file = scratch(&pattern(1, 0x4000));
    assert!(!dump::open(&file.path, None).unwrap().is_live());
    std::os::unix::fs::chown(&file.path, Some(65534), None).unwrap();
    let path = file.path.clone();
    // Capabilities are a thread's own: this one loses CAP_LEASE (28), by capset(2) with the version of 64 bits.
    let live = std::thread::spawn(move || {
        let header = [0x2008_0522_u32, 0];
        let mut data = [0_u32; 6];
        // SAFETY: header and data have the form that version 3 asks for.
        unsafe {
            assert_eq!(
                libc::syscall(libc::SYS_capget, header.as_ptr(), data.as_mut_ptr()),
                0
            );
            data[0] &= !(1 << 28);
            assert_eq!(libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()), 0);
        }
        let dump = dump::open(&path, None).unwrap();
        (dump.is_live(), dump.memory.frozen(Gpa(0), 16).is_some())
    });
    assert_eq!(live.join().unwrap(), (true, false));
}

#[test]
fn formats_of_other_programs_are_refused_by_name() {
    for (magic, name, instead) in [
        (&b"LibvirtQemudPart"[..], "libvirt", "virsh dump --memory-only"),
        (b"LibvirtQemudSave", "libvirt", "virsh dump --memory-only"),
        (b"\x7fVirtualBox SavedState V2.0\n", "VirtualBox", "dumpvmcore"),
        (b"DISKDUMP", "diskdump", "ELF core"),
    ] {
        let mut bytes = magic.to_vec();
        bytes.resize(0x2000, 0);
        match open(&bytes) {
            Err(DumpError::Foreign { what, instead: how }) => {
                assert!(what.contains(name) && how.contains(instead), "{what}: {how}");
            }
            other => panic!("{name}: {other:?}"),
        }
    }
}
