//! Memory that is written as a dump of every format is read back byte for byte; digests are those of what is there.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use sha2::{Digest, Sha256};
use vmsight_arch::{Gpa, Gva, Registers, Segment, TableRegister};
use vmsight_memory::dump::write::{Contents, OutFormat, WriteError, Written, find_vmcoreinfo, write};
use vmsight_memory::dump::{self, Coding, Dump};
use vmsight_memory::{GuestMemory, Region, Source};

const PAGE: usize = 4096;

struct Scratch {
    _folder: tempfile::TempDir,
    path: PathBuf,
}

fn scratch() -> Scratch {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    Scratch {
        path: folder.path().join("dump"),
        _folder: folder,
    }
}

/// Text, noise, zeros and repeated words, page by page.
fn memory_like(seed: u64, pages: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut bytes = Vec::with_capacity(pages * PAGE);
    for _ in 0..pages {
        let kind = next() % 4;
        let word = next();
        for _ in 0..PAGE / 8 {
            let word = match kind {
                0 => 0,
                1 => word,
                2 => next() & 0x0f0f_0f0f,
                _ => next(),
            };
            bytes.extend(word.to_le_bytes());
        }
    }
    bytes
}

fn parts() -> Vec<(Gpa, Vec<u8>)> {
    vec![
        // More than a block of AVML, and no multiple of one.
        (Gpa(0), memory_like(1, 4500)),
        (Gpa(0x200_0000), memory_like(2, 3)),
        (Gpa(0x1000_0000), memory_like(3, 700)),
    ]
}

fn registers() -> Registers {
    let segment = |n: u64| Segment {
        selector: n as u16 * 8,
        base: n * 0x1000,
        limit: 0xffff_f000 | n as u32,
        attributes: 0xa09b,
    };
    let table = |n: u64| TableRegister {
        base: Gva(0xffff_8000_0000_0000 + n),
        limit: n as u16,
    };
    Registers {
        gprs: std::array::from_fn(|i| 0x1111 * i as u64),
        rip: 0xffff_ffff_8100_0000,
        rflags: 0x246,
        cs: segment(2),
        ss: segment(3),
        ds: segment(4),
        es: segment(5),
        fs: segment(6),
        gs: segment(7),
        ldt: segment(8),
        tr: segment(9),
        gdt: table(127),
        idt: table(4095),
        cr0: 0x8005_0033,
        cr2: 0x7fff_1234,
        cr3: 0x1_2345_6000,
        cr4: 0x7706f0,
        efer: 0x500,
        kernel_gs_base: Some(0xffff_8880_3fc0_0000),
        ..Registers::default()
    }
}

const INFO: &str = "OSRELEASE=6.1.0-test\nBUILD-ID=00ff\nSYMBOL(swapper_pg_dir)=ffffffff82610000\n";

fn write_to(scratch: &Scratch, memory: &GuestMemory, format: OutFormat) -> Result<Written, WriteError> {
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&scratch.path)
        .unwrap();
    let contents = Contents {
        memory,
        registers: &[
            registers(),
            Registers {
                vcpu: 1,
                kernel_gs_base: None,
                ..registers()
            },
        ],
        vmcoreinfo: Some(INFO),
    };
    write(&contents, format, &file, &AtomicBool::new(false), &|_| {})
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

fn sha256_of_file(path: &std::path::Path) -> [u8; 32] {
    let mut hash = Sha256::new();
    let mut file = File::open(path).unwrap();
    let mut buf = vec![0; 1 << 20];
    loop {
        match file.read(&mut buf).unwrap() {
            0 => return hash.finalize().into(),
            n => hash.update(&buf[..n]),
        }
    }
}

fn assert_same(dump: &Dump, parts: &[(Gpa, Vec<u8>)], what: &str) {
    let mut buf = Vec::new();
    for (gpa, bytes) in parts {
        // Not along pages, and forwards and backwards.
        buf.resize(bytes.len(), 0xaa);
        dump.memory
            .read(*gpa, &mut buf)
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        assert!(buf == *bytes, "{what}: memory at {gpa:#x} differs");
        for at in (0..bytes.len() - 8).rev().step_by(PAGE / 2 + 13) {
            let want = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
            assert_eq!(
                dump.memory.read_u64(gpa.wrapping_add(at as u64)),
                Ok(want),
                "{what}"
            );
        }
    }
}

#[test]
fn every_format_gives_back_what_went_in() {
    let parts = parts();
    let memory = GuestMemory::live_from_bytes(parts.clone()).unwrap();
    for format in OutFormat::ALL {
        let what = format.to_string();
        assert_eq!(what.parse(), Ok(format));
        let out = scratch();
        let written = write_to(&out, &memory, format).unwrap_or_else(|e| panic!("{what}: {e}"));
        let len = std::fs::metadata(&out.path).unwrap().len();
        assert_eq!(written.len, len, "{what}");
        assert!(
            written.unreadable.is_empty() && written.left_out.is_empty(),
            "{what}"
        );
        assert_eq!(written.sha256, sha256_of_file(&out.path), "{what}");
        let digests: Vec<_> = written.regions.iter().map(|r| (r.region, r.sha256)).collect();
        let want = parts.iter().map(|(gpa, bytes)| {
            let len = bytes.len() as u64;
            (Region { start: *gpa, len }, sha256(bytes))
        });
        assert_eq!(digests, want.collect::<Vec<_>>(), "{what}");

        let dump = dump::open(&out.path, None).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert!(dump.notes.is_empty(), "{what}: {:?}", dump.notes);
        match format {
            // The holes of a raw image are memory, as far as anybody can tell.
            OutFormat::Raw => assert_eq!(dump.memory.end(), memory.end()),
            _ => assert_eq!(dump.memory.regions(), memory.regions(), "{what}"),
        }
        assert!(dump.memory.missing().is_empty() && !dump.is_live(), "{what}");
        assert_same(&dump, &parts, &what);
        if format.has_notes() {
            assert_eq!(dump.vmcoreinfo.as_deref(), Some(INFO), "{what}");
            let (first, second) = (dump.registers[0], dump.registers[1]);
            assert_eq!(first, registers(), "{what}");
            assert_eq!((second.vcpu, second.kernel_gs_base), (1, None), "{what}");
            assert_eq!(dump.registers.len(), 2);
        }
        // What is zero takes no room, but where a format packs all the same.
        let zeros = parts
            .iter()
            .flat_map(|(_, b)| b.chunks(PAGE))
            .filter(|p| p.iter().all(|b| *b == 0));
        let zeros = zeros.count() as u64 * PAGE as u64;
        let room = memory.size() - zeros + 0x1_0000;
        assert!(
            zeros > 1 << 20 && written.stored <= room,
            "{what}: {} > {room}",
            written.stored
        );
    }
}

#[test]
fn a_dump_is_converted_into_every_other_format_and_digests_stay() {
    let parts = parts();
    let memory = GuestMemory::from_bytes(parts.clone()).unwrap();
    let mut from = memory;
    let mut digests = None;
    let lzo = OutFormat::Kdump(Coding::Lzo);
    for format in OutFormat::ALL
        .into_iter()
        .chain([lzo])
        .filter(|f| *f != OutFormat::Raw)
    {
        let out = scratch();
        let written = write_to(&out, &from, format).unwrap();
        let now: Vec<_> = written.regions.iter().map(|r| r.sha256).collect();
        assert_eq!(*digests.get_or_insert_with(|| now.clone()), now, "{format}");
        let dump = dump::open(&out.path, None).unwrap();
        assert_same(&dump, &parts, &format.to_string());
        // The next is made of this one.
        from = dump.memory;
    }
}

#[test]
fn many_threads_read_pages_that_must_be_unpacked() {
    let parts = parts();
    let memory = GuestMemory::from_bytes(parts.clone()).unwrap();
    for format in [OutFormat::Kdump(Coding::Zstd), OutFormat::Avml] {
        let out = scratch();
        write_to(&out, &memory, format).unwrap();
        let dump = Arc::new(dump::open(&out.path, None).unwrap());
        std::thread::scope(|scope| {
            for seed in 0..4usize {
                let (dump, parts) = (Arc::clone(&dump), &parts);
                scope.spawn(move || {
                    let (gpa, bytes) = &parts[0];
                    let mut at = seed * 7919;
                    for _ in 0..3000 {
                        at = (at * 31 + 4097) % (bytes.len() - 100);
                        let mut buf = [0; 100];
                        dump.memory.read(gpa.wrapping_add(at as u64), &mut buf).unwrap();
                        assert_eq!(buf, bytes[at..at + 100]);
                    }
                });
            }
        });
    }
}

/// A guest of 4 GiB and more of addresses in which only a little was ever touched.
#[test]
fn memory_that_nobody_touched_is_neither_read_nor_stored() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(folder.path().join("ram"))
        .unwrap();
    let len = 64 << 20;
    file.set_len(len).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[7; 5000], 40 << 20).unwrap();
    let mapping = vmsight_memory::Mapping::live(&file, 0, len, false).unwrap();
    let memory = GuestMemory::builder()
        .mapped(Gpa(0x1000_0000), len, &mapping, 0)
        .build()
        .unwrap();
    let mut whole = vec![0; len as usize];
    whole[40 << 20..][..5000].fill(7);
    for format in OutFormat::ALL {
        let out = scratch();
        let written = write_to(&out, &memory, format).unwrap();
        assert_eq!(written.regions[0].sha256, sha256(&whole), "{format}");
        assert_eq!(written.sha256, sha256_of_file(&out.path), "{format}");
        let dump = dump::open(&out.path, None).unwrap();
        assert_same(&dump, &[(Gpa(0x1000_0000), whole.clone())], &format.to_string());
        assert!(written.stored < 4 << 20, "{format}: {}", written.stored);
    }
}

/// A source of which some pages cannot be read.
#[derive(Debug)]
struct Patchy(Vec<u8>);

impl Source for Patchy {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), String> {
        let (first, last) = (offset as usize / PAGE, (offset as usize + buf.len() - 1) / PAGE);
        if (first..=last).any(|page| page % 100 == 42) {
            return Err("a bad page".to_owned());
        }
        buf.copy_from_slice(&self.0[offset as usize..][..buf.len()]);
        Ok(())
    }
}

#[test]
fn pages_that_cannot_be_read_are_named_and_not_made_up() {
    let bytes = vec![5u8; 600 * PAGE];
    let source = Arc::new(Patchy(bytes.clone()));
    let memory = GuestMemory::builder()
        .custom(Gpa(0), bytes.len() as u64, source, 0)
        .build()
        .unwrap();
    for format in OutFormat::ALL {
        let out = scratch();
        let written = write_to(&out, &memory, format).unwrap();
        assert_eq!(written.unreadable_bytes, 6 * PAGE as u64, "{format}");
        let starts: Vec<u64> = written
            .unreadable
            .iter()
            .map(|(region, _)| region.start.0 / PAGE as u64)
            .collect();
        assert_eq!(starts, [42, 142, 242, 342, 442, 542], "{format}");
        let dump = dump::open(&out.path, None).unwrap();
        let mut page = [0; PAGE];
        dump.memory.read(Gpa(41 * PAGE as u64), &mut page).unwrap();
        assert_eq!(page, [5; PAGE]);
        let read = dump.memory.read(Gpa(142 * PAGE as u64), &mut page);
        match format {
            OutFormat::Kdump(_) => {
                assert!(read.is_err(), "{format}");
                assert_eq!(dump.memory.missing().len(), 6, "{format}");
            }
            _ => assert_eq!((read, page), (Ok(()), [0; PAGE]), "{format}"),
        }
    }
}

#[test]
fn it_stops_when_it_is_told_to_and_says_when_there_is_no_room() {
    let memory = GuestMemory::from_bytes(vec![(Gpa(0), memory_like(9, 2000))]).unwrap();
    let contents = Contents {
        memory: &memory,
        registers: &[],
        vmcoreinfo: None,
    };
    for format in OutFormat::ALL {
        let stop = AtomicBool::new(false);
        let seen = AtomicU64::new(0);
        let advance = |bytes| {
            if seen.fetch_add(bytes, Ordering::Relaxed) > 2 << 20 {
                stop.store(true, Ordering::Relaxed);
            }
        };
        let file = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let error = write(&contents, format, &file, &stop, &advance).unwrap_err();
        assert!(matches!(error, WriteError::Interrupted), "{format}: {error}");
        assert!(seen.load(Ordering::Relaxed) < memory.size(), "{format}");

        let full = File::options().read(true).write(true).open("/dev/full").unwrap();
        let error = write(&contents, format, &full, &AtomicBool::new(false), &|_| {}).unwrap_err();
        assert!(error.to_string().contains("no room is left"), "{format}: {error}");
    }
    let nothing = GuestMemory::builder().build().unwrap();
    let contents = Contents {
        memory: &nothing,
        ..contents
    };
    let mut file = tempfile::tempfile().unwrap();
    let error = write(&contents, OutFormat::Elf, &file, &AtomicBool::new(false), &|_| {}).unwrap_err();
    assert!(matches!(error, WriteError::Nothing));
    assert_eq!(file.seek(SeekFrom::End(0)).unwrap(), 0);
}

#[test]
fn firmware_below_4_gib_makes_no_raw_image_of_4_gib() {
    let firmware = Region {
        start: Gpa(0xfffc_0000),
        len: 0x4_0000,
    };
    let ram = vec![
        (Gpa(0), memory_like(4, 16)),
        (firmware.start, vec![1; firmware.len as usize]),
    ];
    let memory = GuestMemory::from_bytes(ram.clone()).unwrap();
    let out = scratch();
    let written = write_to(&out, &memory, OutFormat::Raw).unwrap();
    assert_eq!(
        (written.len, written.left_out),
        (16 * PAGE as u64, vec![firmware])
    );
    assert_same(&dump::open(&out.path, None).unwrap(), &ram[..1], "raw");
}

#[test]
fn more_regions_than_an_elf_header_can_count() {
    let page = |n: u64| (Gpa(n * 2 * PAGE as u64), vec![n as u8 | 1; PAGE]);
    let parts: Vec<_> = (0..65_600).map(page).collect();
    let bytes: Vec<u8> = parts.iter().flat_map(|(_, b)| b.clone()).collect();
    let mapping = vmsight_memory::Mapping::of_bytes(&bytes, vmsight_memory::MappingKind::Frozen).unwrap();
    let builder = (0..parts.len() as u64).fold(GuestMemory::builder(), |builder, n| {
        builder.mapped(Gpa(n * 2 * PAGE as u64), PAGE as u64, &mapping, n * PAGE as u64)
    });
    let memory = builder.build().unwrap();
    for format in [OutFormat::Elf, OutFormat::Kdump(Coding::Snappy)] {
        let out = scratch();
        let written = write_to(&out, &memory, format).unwrap();
        assert_eq!(written.regions.len(), parts.len());
        let dump = dump::open(&out.path, None).unwrap();
        assert_eq!(dump.memory.regions(), memory.regions());
        let (gpa, bytes) = &parts[65_599];
        assert_eq!(dump.memory.read_u8(*gpa), Ok(bytes[0]));
    }
}

#[test]
fn vmcoreinfo_is_found_wherever_it_lies() {
    let mut bytes = memory_like(5, 600);
    // A name without a text, and one across the border of what is looked at in one go.
    bytes[100..123].copy_from_slice(b"VMCOREINFO\0\0OSRELEASE=x");
    let at = (1 << 20) - 30;
    bytes[at..at + 12].copy_from_slice(b"VMCOREINFO\0\0");
    bytes[at + 12..][..INFO.len()].copy_from_slice(INFO.as_bytes());
    bytes[at + 12 + INFO.len()] = 0;
    let memory = GuestMemory::from_bytes(vec![(Gpa(0x10_0000), bytes)]).unwrap();
    let found = find_vmcoreinfo(&memory, &AtomicBool::new(false)).unwrap();
    assert_eq!(
        (found.text.as_str(), found.gpa),
        (INFO, Gpa(0x10_0000 + at as u64 + 12))
    );
    let nothing = GuestMemory::from_bytes(vec![(Gpa(0), vec![0; PAGE])]).unwrap();
    assert_eq!(find_vmcoreinfo(&nothing, &AtomicBool::new(false)), None);
}
