//! Memory of real processes and real files: another process's, a memfd's, a file that is cut.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use vmsight_arch::Gpa;
use vmsight_memory::{Chunk, GuestMemory, Mapping, MemoryError, ProcessMemory, ReadOp, ScanOptions};

const PAGE: usize = 4096;

/// A child that holds the memory it was forked with and does nothing, until dropped.
struct Child(libc::pid_t);

impl Child {
    fn fork() -> Self {
        // SAFETY: the child only makes system calls, which are async-signal-safe.
        match unsafe { libc::fork() } {
            0 => {
                // SAFETY: plain system calls.
                unsafe {
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                    loop {
                        libc::pause();
                    }
                }
            }
            pid if pid > 0 => Self(pid),
            _ => panic!("fork: {}", std::io::Error::last_os_error()),
        }
    }

    fn pid(&self) -> u32 {
        self.0 as u32
    }

    fn kill(&self) {
        // SAFETY: our own child, not yet waited for.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
        // SAFETY: our own child, waited for once.
        unsafe { libc::waitpid(self.0, std::ptr::null_mut(), 0) };
    }
}

/// Private anonymous memory, page-aligned. Not huge pages: the test counts small ones.
struct Anonymous {
    start: *mut u8,
    len: usize,
}

impl Anonymous {
    fn new(len: usize) -> Self {
        // SAFETY: a new mapping; the result is checked.
        let start = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let start = libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                -1,
                0,
            );
            assert_ne!(start, libc::MAP_FAILED);
            libc::madvise(start, len, libc::MADV_NOHUGEPAGE);
            start
        };
        Self {
            start: start.cast(),
            len,
        }
    }

    fn hva(&self) -> u64 {
        self.start as u64
    }

    fn fill(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.len);
        // SAFETY: inside the mapping; nobody else uses it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.add(at), bytes.len()) };
    }

    /// Makes pages unreadable. Not unmapped: something else could come to lie there.
    fn forbid(&self, at: usize, len: usize) {
        // SAFETY: inside our mapping, whole pages, not touched again.
        let result = unsafe { libc::mprotect(self.start.add(at).cast(), len, libc::PROT_NONE) };
        assert_eq!(result, 0);
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 23) as u8)
        .collect()
}

fn memfd(len: u64) -> File {
    // SAFETY: a constant name; the descriptor is ours alone.
    let file = unsafe {
        let fd = libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.set_len(len).expect("a memfd can grow");
    file
}

#[test]
fn another_process_is_read_written_and_noticed_when_it_exits() {
    let bytes = pattern(64 * PAGE);
    let area = Anonymous::new(bytes.len());
    area.fill(0, &bytes);
    let child = Child::fork();
    // What we do to our copy from now on is not what the child sees.
    area.fill(0, &vec![0; bytes.len()]);
    let process = Arc::new(ProcessMemory::open(child.pid()).unwrap());
    let len = bytes.len() as u64;
    let memory = GuestMemory::builder()
        .process(Gpa(0x10_0000), len / 2, &process, area.hva(), true)
        .process(Gpa(0x4000_0000), len / 2, &process, area.hva() + len / 2, false)
        .build()
        .unwrap();
    assert!(memory.is_live() && memory.is_writable());
    assert!(memory.frozen(Gpa(0x10_0000), 8).is_none());

    let mut all = vec![0; bytes.len() / 2];
    memory.read(Gpa(0x10_0000), &mut all).unwrap();
    assert_eq!(all, bytes[..bytes.len() / 2]);
    memory.read(Gpa(0x4000_0000), &mut all).unwrap();
    assert_eq!(all, bytes[bytes.len() / 2..]);
    assert_eq!(
        memory.read_u64(Gpa(0x10_0123)).unwrap(),
        u64::from_le_bytes(bytes[0x123..0x12b].try_into().unwrap())
    );

    memory.write(Gpa(0x10_0ffc), b"written!").unwrap();
    assert_eq!(
        memory.read_u64(Gpa(0x10_0ffc)).unwrap(),
        u64::from_le_bytes(*b"written!")
    );
    assert!(matches!(
        memory.write(Gpa(0x4000_0000), &[1]),
        Err(MemoryError::ReadOnly { .. })
    ));

    child.kill();
    while !process.has_exited() {
        std::thread::yield_now();
    }
    let error = memory.read_u64(Gpa(0x10_0000)).unwrap_err();
    assert_eq!(error, MemoryError::Exited { pid: child.pid() });
    assert!(error.is_final());
    let mut buf = [0; 8];
    let mut ops = [ReadOp::new(Gpa(0x10_0000), &mut buf)];
    memory.read_batch(&mut ops);
    assert_eq!(ops[0].result, Err(MemoryError::Exited { pid: child.pid() }));
    assert!(matches!(
        memory.write(Gpa(0x10_0000), &[1]),
        Err(MemoryError::Exited { .. })
    ));
}

#[test]
fn a_batch_over_a_process_has_a_result_for_every_item() {
    // More than one call's worth of vectors, with pages taken away in between.
    let pages = 3000;
    let bytes = pattern(pages * PAGE);
    let area = Anonymous::new(bytes.len());
    area.fill(0, &bytes);
    let gone = [0, 5, 6, 1023, 1024, 1025, 2999];
    for page in gone {
        area.forbid(page * PAGE, PAGE);
    }
    let process = Arc::new(ProcessMemory::open(std::process::id()).unwrap());
    let memory = GuestMemory::builder()
        .process(Gpa(0), bytes.len() as u64, &process, area.hva(), false)
        .build()
        .unwrap();
    let mut buffers = vec![[0u8; 64]; pages + 1];
    let mut ops: Vec<_> = buffers
        .iter_mut()
        .enumerate()
        .map(|(i, buf)| ReadOp::new(Gpa((i * PAGE + 100) as u64), buf))
        .collect();
    memory.read_batch(&mut ops);
    for (page, op) in ops.iter().enumerate() {
        if page == pages {
            assert!(matches!(op.result, Err(MemoryError::Unbacked { .. })));
        } else if gone.contains(&page) {
            let hva = area.hva() + (page * PAGE + 100) as u64;
            assert_eq!(
                op.result,
                Err(MemoryError::NotMapped {
                    gpa: op.gpa,
                    pid: std::process::id(),
                    hva
                })
            );
        } else {
            assert_eq!(op.result, Ok(()), "page {page}");
            assert_eq!(
                &op.buf[..],
                &bytes[page * PAGE + 100..page * PAGE + 164],
                "page {page}"
            );
        }
    }
    // A read that runs into a page that is gone says where.
    let mut long = vec![0; 4 * PAGE];
    let error = memory.read(Gpa(3 * PAGE as u64), &mut long).unwrap_err();
    assert!(
        matches!(error, MemoryError::NotMapped { gpa, .. } if gpa.0 == 5 * PAGE as u64),
        "{error}"
    );
}

#[test]
fn a_process_we_may_not_read_is_named_as_such() {
    let child = Child::fork();
    let pid = child.pid();
    let result = std::thread::spawn(move || {
        // SAFETY: the raw call changes the ids of this thread only (glibc's would change all), and the thread ends.
        // Not root: then even our own child can be read, but pid 1 cannot.
        let pid = unsafe {
            if libc::geteuid() == 0 {
                assert_eq!(libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534), 0);
                pid
            } else {
                1
            }
        };
        let process = Arc::new(ProcessMemory::open(pid).unwrap());
        let memory = GuestMemory::builder()
            .process(Gpa(0), 4096, &process, 0x1000, true)
            .build()
            .unwrap();
        (pid, memory.read_u64(Gpa(0)), memory.write(Gpa(0), &[0]))
    })
    .join()
    .unwrap();
    let (pid, read, write) = result;
    assert_eq!(read, Err(MemoryError::NoPermission { pid }));
    assert_eq!(write, Err(MemoryError::NoPermission { pid }));
}

#[test]
fn a_memfd_is_read_and_written_by_both_sides() {
    use std::os::unix::fs::FileExt;
    let file = memfd(8 * PAGE as u64);
    let mapping = Mapping::live(&file, 0, 8 * PAGE as u64, true).unwrap();
    // Split at the hole below 4 GiB, as QEMU does.
    let half = 4 * PAGE as u64;
    let memory = GuestMemory::builder()
        .mapped(Gpa(0), half, &mapping, 0)
        .mapped(Gpa(1 << 32), half, &mapping, half)
        .build()
        .unwrap();
    file.write_all_at(b"by the VM", half + 5).unwrap();
    let mut buf = [0; 9];
    memory.read(Gpa((1 << 32) + 5), &mut buf).unwrap();
    assert_eq!(&buf, b"by the VM");
    memory.write(Gpa(7), b"by us").unwrap();
    let mut buf = [0; 5];
    file.read_exact_at(&mut buf, 7).unwrap();
    assert_eq!(&buf, b"by us");
    assert!(memory.frozen(Gpa(0), 8).is_none());

    let read_only = Mapping::live(&file, 0, half, false).unwrap();
    let memory = GuestMemory::builder()
        .mapped(Gpa(0), half, &read_only, 0)
        .build()
        .unwrap();
    assert!(matches!(
        memory.write(Gpa(0), &[1]),
        Err(MemoryError::ReadOnly { .. })
    ));
    assert!(Mapping::live(&file, 0, 9 * PAGE as u64, true).is_err());
    assert!(Mapping::live(&file, u64::MAX, 2, true).is_err());
}

#[test]
fn a_file_cut_while_mapped_fails_the_reads_behind_the_cut_and_only_those() {
    let file = tempfile::tempfile().unwrap();
    let bytes = pattern(16 * PAGE);
    std::io::Write::write_all(&mut &file, &bytes).unwrap();
    let len = bytes.len() as u64;
    let frozen = GuestMemory::builder()
        .mapped(Gpa(0), len, &Mapping::frozen(&file, 0, len).unwrap(), 0)
        .build()
        .unwrap();
    let live = GuestMemory::builder()
        .mapped(Gpa(0), len, &Mapping::live(&file, 0, len, true).unwrap(), 0)
        .build()
        .unwrap();
    file.set_len(6 * PAGE as u64).unwrap();
    std::thread::scope(|scope| {
        for memory in [&frozen, &live] {
            for _ in 0..2 {
                scope.spawn(move || {
                    let mut page = vec![0; PAGE];
                    for at in [9, 15, 3, 6, 5, 0, 12].map(|page| page * PAGE) {
                        let result = memory.read(Gpa(at as u64), &mut page);
                        let word = memory.read_u64(Gpa(at as u64 + 8));
                        if at < 6 * PAGE {
                            assert_eq!(result, Ok(()));
                            assert_eq!(page, bytes_at(at));
                            assert!(word.is_ok());
                        } else {
                            assert_eq!(result, Err(MemoryError::Lost { gpa: Gpa(at as u64) }));
                            assert_eq!(
                                word,
                                Err(MemoryError::Lost {
                                    gpa: Gpa(at as u64 + 8)
                                })
                            );
                        }
                    }
                });
            }
        }
    });
    assert!(live.write(Gpa(7 * PAGE as u64), &[1]).is_err());
    assert!(frozen.frozen(Gpa(0), PAGE).is_some());
    assert!(frozen.frozen(Gpa(9 * PAGE as u64), PAGE).is_none());

    // The same through a scan: all is seen, and what is gone is a problem.
    let scan = frozen.scan(
        &ScanOptions {
            step: PAGE,
            ..Default::default()
        },
        &AtomicBool::new(false),
        |chunk, bytes| vec![(chunk.gpa, bytes.iter().any(|&b| b != 0))],
    );
    assert!(!scan.stopped);
    let lost = scan
        .problems
        .iter()
        .filter(|p| matches!(p, MemoryError::Lost { .. }))
        .count();
    // Holes behind the end are skipped where the file system tells; what was looked at either had data or is a problem.
    assert_eq!(scan.found.iter().filter(|(_, data)| !data).count(), lost);

    fn bytes_at(at: usize) -> Vec<u8> {
        pattern(16 * PAGE)[at..at + PAGE].to_vec()
    }
}

/// Bytes found at a guest address that are not zero, page by page.
fn touched(memory: &GuestMemory, options: &ScanOptions) -> (Vec<Chunk>, Vec<u64>) {
    let chunks: Vec<Chunk> = memory.chunks(options).collect();
    let scan = memory.scan(options, &AtomicBool::new(false), |chunk, bytes| {
        assert_eq!(bytes.len(), chunk.len);
        let own = &bytes[..chunk.own];
        own.iter()
            .enumerate()
            .filter(|(_, b)| **b != 0)
            .map(|(i, _)| chunk.gpa.0 + i as u64)
            .collect()
    });
    assert!(scan.problems.is_empty(), "{:?}", scan.problems);
    (chunks, scan.found)
}

#[test]
fn a_scan_sees_everything_once_and_skips_what_was_never_touched() {
    let pages = 4096usize;
    let marks: Vec<usize> = vec![3, 4, 700, 701, 702, 1500, 4095]
        .into_iter()
        .map(|p| p * PAGE + 17)
        .collect();
    let len = (pages * PAGE) as u64;

    let area = Anonymous::new(pages * PAGE);
    let file = memfd(len);
    for &mark in &marks {
        area.fill(mark, &[0xaa]);
        std::os::unix::fs::FileExt::write_all_at(&file, &[0xaa], mark as u64).unwrap();
    }
    let process = Arc::new(ProcessMemory::open(std::process::id()).unwrap());
    let mapping = Mapping::live(&file, 0, len, false).unwrap();
    let of_process = GuestMemory::builder()
        .process(Gpa(0x5000), len / 2, &process, area.hva(), false)
        .process(
            Gpa(0x5000 + len / 2),
            len / 2,
            &process,
            area.hva() + len / 2,
            false,
        )
        .build()
        .unwrap();
    let of_memfd = GuestMemory::builder()
        .mapped(Gpa(0x5000), len / 2, &mapping, 0)
        .mapped(Gpa(0x1_0000_0000), len / 2, &mapping, len / 2)
        .build()
        .unwrap();
    let expect_process: Vec<u64> = marks.iter().map(|m| *m as u64 + 0x5000).collect();
    let expect_memfd: Vec<u64> = marks
        .iter()
        .map(|&m| m as u64)
        .map(|m| {
            if m < len / 2 {
                m + 0x5000
            } else {
                m - len / 2 + 0x1_0000_0000
            }
        })
        .collect();
    for (memory, expect) in [(&of_process, &expect_process), (&of_memfd, &expect_memfd)] {
        for step in [1, 3 * PAGE, 1 << 20, usize::MAX / 2] {
            let options = ScanOptions {
                step,
                ..Default::default()
            };
            let (chunks, found) = touched(memory, &options);
            assert_eq!(&found, expect, "step {step}");
            let seen: usize = chunks.iter().map(|c| c.own).sum();
            // A chunk starts with a page that was touched.
            let most = step.max(PAGE).saturating_mul(7);
            assert!(seen <= most, "{seen:#x} bytes looked at, 7 pages were touched");
        }
    }
    for (memory, expect) in [(&of_process, expect_process), (&of_memfd, expect_memfd)] {
        let options = ScanOptions {
            skip_untouched: false,
            ..Default::default()
        };
        let (chunks, found) = touched(memory, &options);
        assert_eq!(found, expect);
        assert_eq!(chunks.iter().map(|c| c.own as u64).sum::<u64>(), len);
    }
    // Being looked at did not make the guest bigger, not even where it never was.
    // SAFETY: a plain query with a valid buffer.
    let blocks = unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        assert_eq!(libc::fstat(file.as_raw_fd(), &mut stat), 0);
        stat.st_blocks
    };
    assert_eq!(blocks as usize * 512, 7 * PAGE);
}

#[test]
fn chunks_overlap_across_slots_and_stay_in_their_region() {
    let part = |start: u64, len: usize, fill: u8| (Gpa(start), vec![fill; len]);
    let memory = GuestMemory::from_bytes(vec![
        part(0x1000, 0x3000, 1),
        part(0x4000, 0x1800, 2),
        part(0x9000, 0x10, 3),
    ])
    .unwrap();
    let options = ScanOptions {
        step: 0x2000,
        overlap: 0x20,
        ..Default::default()
    };
    let chunks: Vec<Chunk> = memory.chunks(&options).collect();
    let expect = [
        (0x1000, 0x2000, 0x2020),
        (0x3000, 0x1000, 0x1020),
        (0x4000, 0x1800, 0x1800),
        (0x9000, 0x10, 0x10),
    ];
    assert_eq!(
        chunks,
        expect.map(|(gpa, own, len)| Chunk {
            gpa: Gpa(gpa),
            own,
            len
        })
    );
    let mut scratch = Vec::new();
    let crossing = memory.chunk_bytes(&chunks[1], &mut scratch).unwrap();
    assert_eq!((crossing[0xfff], crossing[0x1000]), (1, 2));

    let within = Some(vmsight_memory::Region {
        start: Gpa(0x3800),
        len: 0x1000,
    });
    let chunks: Vec<Chunk> = memory.chunks(&ScanOptions { within, ..options }).collect();
    assert_eq!(
        chunks.iter().map(|c| (c.gpa.0, c.own)).collect::<Vec<_>>(),
        [(0x3800, 0x800), (0x4000, 0x800)]
    );
}

#[test]
fn a_scan_can_be_stopped() {
    let memory = GuestMemory::live_from_bytes(vec![(Gpa(0), vec![1; 1 << 20])]).unwrap();
    let stop = AtomicBool::new(false);
    let scan = memory.scan(
        &ScanOptions {
            step: PAGE,
            ..Default::default()
        },
        &stop,
        |chunk, _| {
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            vec![chunk.gpa]
        },
    );
    assert!(scan.stopped && !scan.found.is_empty() && scan.found.len() < 256);
}

#[test]
fn a_live_mapping_takes_no_reservation() {
    let path = std::env::temp_dir().join(format!("vmsight-noreserve-{}", std::process::id()));
    std::fs::write(&path, [7; 4 * PAGE]).unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let _mapping = Mapping::live(&file, 0, 4 * PAGE as u64, true).unwrap();
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    std::fs::remove_file(&path).unwrap();
    // The mapping's lines: its head, and the flags further down ("nr" is MAP_NORESERVE).
    let of_file = maps.split_once(path.to_str().unwrap()).expect("it is mapped").1;
    let flags = of_file.lines().find(|l| l.starts_with("VmFlags:")).unwrap();
    assert!(flags.split(' ').any(|flag| flag == "nr"), "{flags}");
}

#[test]
fn pieces_are_what_goes_on_in_the_source() {
    let mapping = Mapping::of_bytes(&[1; 8 * PAGE], vmsight_memory::MappingKind::Frozen).unwrap();
    let other = Mapping::of_bytes(&[2; 2 * PAGE], vmsight_memory::MappingKind::Frozen).unwrap();
    let page = PAGE as u64;
    let memory = GuestMemory::builder()
        .mapped(Gpa(0), 2 * page, &mapping, 0)
        .mapped(Gpa(2 * page), 2 * page, &other, 0)
        .mapped(Gpa(0x1_0000), 3 * page, &mapping, 2 * page)
        .mapped(Gpa(0x2_0000), page, &mapping, 7 * page)
        .build()
        .unwrap();
    let pieces: Vec<Vec<(u64, u64)>> = memory
        .pieces()
        .iter()
        .map(|piece| piece.iter().map(|r| (r.start.0, r.len)).collect())
        .collect();
    assert_eq!(
        pieces,
        [
            vec![(0, 2 * page), (0x1_0000, 3 * page)],
            vec![(2 * page, 2 * page)],
            vec![(0x2_0000, page)],
        ]
    );
}
