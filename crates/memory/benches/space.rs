//! What a read of guest memory costs next to a plain read of the same mapping, in one run.
//!
//! `cargo bench -p vmsight-memory --bench space`: a table of nanoseconds a read, the ratio to the plain read, and the
//! ratio that is aimed at. A shared memory file of 512 MiB stands for the guest, with page tables of four levels in
//! it that map every frame, in random order, by pages of 4 KiB; and further tables that map all of it, in order, by pages of
//! 2 MiB ("large pages"), as a kernel's direct map does, in which most of what is read of a kernel lies. Rounds of all reads take turns, so that a noisy
//! machine is noisy for all; time is the thread's own; the median of the rounds is printed.
//!
//! Each round of each row reads pages that are drawn for it, of 131,072, each at another place: a row that reads what the one before
//! has read finds it in the caches, and the ratios then tell the order of the rows.
//!
//! "random page": addresses are known beforehand, so the processor has many reads under way at once, as many as its window
//! of a few hundred instructions holds, and of loads fewer. A plain read is one of each; ours are about 35
//! instructions (physical), 60 (virtual, with the proof; 22 of them load), 45 (the same in a large page; 18 load) and about 100 (a walk),
//! so fewer are under way: what is lost is not time spent on instructions, and the more is lost the longer memory takes to
//! answer ("chained: raw mmap" says how long). Batches get it back. "by hand" is what a read that walks and proves takes at least, without
//! a library around it and of a guest that is one mapping.
//! "chained": each address depends on the last value, as when a list is followed; one read is under way in any case.
//!
//! The goal of a remembered address, 1.5, is held against the two ways to read that there are: in a batch where addresses are known
//! beforehand, and one by one where they are not. One by one where they are known has none, for it is out of reach (see docs/bench.md).
//!
//! With `--json` the table is one JSON array. Without `--bench` (as a test) the guest is small and nothing is measured to be
//! believed.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a bench stops at the first surprise"
)]
#![allow(
    clippy::cast_ptr_alignment,
    reason = "all addresses here are multiples of 8 in a mapping"
)]

use std::fs::File;
use std::hint::black_box;
use std::os::fd::FromRawFd;
use std::sync::Arc;

use vmsight_arch::paging::PagingMode;
use vmsight_arch::{Dtb, Gpa, Gva};
use vmsight_memory::{AddressSpace, GuestMemory, GvaReadOp, Mapping, ProcessMemory};

/// Where the guest maps its frames.
const BASE: u64 = 0xffff_8880_0000_0000;
/// Where it maps all memory in order, by large pages.
const LARGE: u64 = 0xffff_c880_0000_0000;
/// A working set that the second-level cache holds.
const HOT_PAGES: usize = 64;

struct Guest {
    map: memmap2::MmapRaw,
    live: GuestMemory,
    dump: GuestMemory,
    process: GuestMemory,
    root: u64,
    /// The root of tables that map all of memory by large pages.
    large: u64,
    /// The frame of each virtual page.
    frames: Vec<u32>,
}

fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    state.wrapping_mul(0x2545_f491_4f6c_dd1d)
}

impl Guest {
    fn new(size: u64) -> Self {
        // SAFETY: a plain system call; the descriptor is ours alone.
        let file = unsafe {
            let fd = libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0, "memfd_create: {}", std::io::Error::last_os_error());
            File::from_raw_fd(fd)
        };
        file.set_len(size).unwrap();
        let map = memmap2::MmapOptions::new()
            .len(size as usize)
            .map_raw(&file)
            .unwrap();
        let total = size / 0x1000;
        // A table for 512 pages, one for 512 tables, and two above; for large pages one level less. At random places like all
        // frames.
        let tables = total / 512 + total / (512 * 512) + 4 + total / (512 * 512) + 4;
        let mut order: Vec<u32> = (0..total as u32).collect();
        let mut state = 0x1234_5678_9abc_def1;
        for i in (1..order.len()).rev() {
            order.swap(i, (random(&mut state) % (i as u64 + 1)) as usize);
        }
        let frames = order.split_off(tables as usize);
        let mut free = order.into_iter().map(|frame| u64::from(frame) << 12);
        let root = free.next().unwrap();
        let put = |gpa: u64, value: u64| {
            assert!(gpa + 8 <= size);
            // SAFETY: inside the mapping, aligned, and nobody else looks yet.
            unsafe {
                map.as_mut_ptr()
                    .add(gpa as usize)
                    .cast::<u64>()
                    .write_volatile(value)
            }
        };
        for gpa in (0..size).step_by(64) {
            put(gpa, gpa | 1 << 62);
        }
        let get = |gpa: u64| {
            // SAFETY: as above.
            unsafe { map.as_ptr().add(gpa as usize).cast::<u64>().read_volatile() }
        };
        let clear = |table: u64| (0..512).for_each(|i| put(table + i * 8, 0));
        clear(root);
        for (page, &frame) in frames.iter().enumerate() {
            let gva = BASE + page as u64 * 0x1000;
            let mut table = root;
            for level in (2..=4).rev() {
                let at = table + (gva >> (3 + 9 * level) & 511) * 8;
                if get(at) == 0 {
                    let new = free.next().expect("enough tables were counted");
                    clear(new);
                    put(at, new | 0x63);
                }
                table = get(at) & 0x000f_ffff_ffff_f000;
            }
            put(table + (gva >> 12 & 511) * 8, u64::from(frame) << 12 | 0x63);
        }
        let large = free.next().expect("enough tables were counted");
        clear(large);
        for gpa in (0..size).step_by(0x20_0000) {
            let gva = LARGE + gpa;
            let mut table = large;
            for level in (3..=4).rev() {
                let at = table + (gva >> (3 + 9 * level) & 511) * 8;
                if get(at) == 0 {
                    let new = free.next().expect("enough tables were counted");
                    clear(new);
                    put(at, new | 0x63);
                }
                table = get(at) & 0x000f_ffff_ffff_f000;
            }
            put(table + (gva >> 21 & 511) * 8, gpa | 0xe3);
        }
        let build = |mapping| {
            GuestMemory::builder()
                .mapped(Gpa(0), size, &mapping, 0)
                .build()
                .unwrap()
        };
        let live = build(Mapping::live(&file, 0, size, false).unwrap());
        let dump = build(Mapping::frozen(&file, 0, size).unwrap());
        let process = Arc::new(ProcessMemory::open(std::process::id()).unwrap());
        let hva = map.as_ptr().expose_provenance() as u64;
        let process = GuestMemory::builder()
            .process(Gpa(0), size, &process, hva, false)
            .build()
            .unwrap();
        // Every page of every mapping is touched once, so that no round pays for the host's page faults.
        let mut sum = 0;
        for gpa in (0..size).step_by(0x1000) {
            sum += get(gpa) ^ live.read_u64(Gpa(gpa)).unwrap() ^ dump.read_u64(Gpa(gpa)).unwrap();
        }
        black_box(sum);
        Self {
            map,
            live,
            dump,
            process,
            root,
            large,
            frames,
        }
    }

    fn space(&self, memory: &GuestMemory) -> AddressSpace {
        AddressSpace::new(memory.clone(), PagingMode::X86Level4, Dtb(self.root))
    }

    /// What a read of `gva` that is proven takes at least: four levels walked in the one mapping that this guest is, and each entry
    /// looked at again.
    #[inline(always)]
    fn by_hand(&self, gva: u64) -> Option<u64> {
        const PRESENT: u64 = 1;
        const LARGE: u64 = 1 << 7;
        const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
        let len = self.map.len() as u64;
        let load = |gpa: u64| {
            // SAFETY: inside the mapping, and all addresses are multiples of 8.
            let read = || unsafe { self.map.as_ptr().add(gpa as usize).cast::<u64>().read_volatile() };
            (gpa < len).then(read)
        };
        let canonical = ((gva as i64) << 16 >> 16) as u64;
        if canonical != gva {
            return None;
        }
        let mut seen = [(0, 0); 4];
        let mut table = self.root;
        for (i, seen) in seen.iter_mut().enumerate() {
            let place = table + (gva >> (36 - 9 * i) & 0xff8);
            let entry = load(place)?;
            let unwanted = if i == 1 || i == 2 { LARGE } else { 0 };
            if entry & (PRESENT | unwanted) != PRESENT {
                return None;
            }
            *seen = (place, entry);
            table = entry & ADDRESS;
        }
        let value = load(table + (gva & 0xfff))?;
        std::sync::atomic::fence(std::sync::atomic::Ordering::Acquire);
        let holds = seen.iter().all(|&(place, entry)| load(place) == Some(entry));
        holds.then_some(value)
    }

    fn large_space(&self, memory: &GuestMemory) -> AddressSpace {
        AddressSpace::new(memory.clone(), PagingMode::X86Level4, Dtb(self.large))
    }
}

/// Nanoseconds that this thread has run: on a machine that is shared, a long round must not cost more than a short one
/// for being interrupted more often.
fn cpu_time() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes one timespec, ours.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut now) };
    assert_eq!(failed, 0, "clock_gettime");
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// One of the reads of a random page: the page's virtual and physical address, and an offset that moves about.
#[derive(Clone, Copy)]
struct Target {
    gva: u64,
    gpa: u64,
}

struct Row {
    name: &'static str,
    /// What its ratio is to.
    base: &'static str,
    goal: Option<f64>,
    times: Vec<f64>,
}

struct Table<'g> {
    rows: Vec<Row>,
    guest: &'g Guest,
    state: u64,
    reads: usize,
}

impl<'g> Table<'g> {
    fn new(guest: &'g Guest, reads: usize) -> Self {
        Self {
            rows: Vec::new(),
            guest,
            state: 0xfeed_f00d_dead_beef,
            reads,
        }
    }

    /// Pages that nobody has chosen before, each with an offset: what one row has brought into the caches must not be there for the next.
    fn draw(&mut self, reads: usize) -> Vec<Target> {
        (0..reads)
            .map(|_| {
                let r = random(&mut self.state);
                let page = r as usize % self.guest.frames.len();
                let offset = (r >> 40 & 63) * 64;
                Target {
                    gva: BASE + page as u64 * 0x1000 + offset,
                    gpa: (u64::from(self.guest.frames[page]) << 12) + offset,
                }
            })
            .collect()
    }

    /// Times `run` with one part of `share` of all reads, as one round of `name`.
    fn round(
        &mut self,
        name: &'static str,
        base: &'static str,
        goal: Option<f64>,
        share: usize,
        run: impl FnOnce(&[Target]),
    ) {
        let targets = self.draw(self.reads / share);
        let start = cpu_time();
        run(&targets);
        let ns = (cpu_time() - start) as f64 / targets.len() as f64;
        match self.rows.iter_mut().find(|row| row.name == name) {
            Some(row) => row.times.push(ns),
            None => self.rows.push(Row {
                name,
                base,
                goal,
                times: vec![ns],
            }),
        }
    }

    fn median(&self, name: &str) -> f64 {
        let row = self
            .rows
            .iter()
            .find(|row| row.name == name)
            .expect("every base is a row");
        let mut times = row.times.clone();
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    }

    fn print(&self, json: bool) {
        let lines: Vec<_> = self
            .rows
            .iter()
            .map(|row| {
                let ns = self.median(row.name);
                (row.name, ns, ns / self.median(row.base), row.base, row.goal)
            })
            .collect();
        if json {
            let rows: Vec<String> = lines
                .iter()
                .map(|(name, ns, ratio, base, goal)| {
                    let goal = goal.map_or("null".to_owned(), |g| g.to_string());
                    format!(
                        r#"{{"name":"{name}","ns":{ns:.2},"ratio":{ratio:.3},"to":"{base}","goal":{goal}}}"#
                    )
                })
                .collect();
            println!("[{}]", rows.join(",\n "));
            return;
        }
        println!("{:<44} {:>9} {:>7} {:>6}", "read", "ns", "ratio", "goal");
        for (name, ns, ratio, base, goal) in lines {
            let goal = goal.map_or(String::new(), |g| {
                format!("{g:>6.1}  {}", if ratio <= g { "ok" } else { "MISSED" })
            });
            println!(
                "{name:<44} {ns:>9.1} {:>7} {goal}",
                if name == base {
                    "1".into()
                } else {
                    format!("{ratio:.2}")
                }
            );
        }
    }
}

const RAW: &str = "u64 random page: raw mmap";
const CHAIN: &str = "u64 chained: raw mmap";
const ASKED: &str = "u64 of another process: physical";
const COPY: &str = "4 KiB random page: memcpy";
const HOT: &str = "4 KiB of 64 pages: memcpy";

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let has = |name: &str| arguments.iter().any(|a| a == name);
    let real = has("--bench");
    let (size, rounds, reads) = if real {
        (512 << 20, 101, 40_000)
    } else {
        (8 << 20, 1, 2000)
    };
    let guest = Guest::new(size);
    let warm = guest.space(&guest.live);
    let large = guest.large_space(&guest.live);
    let large_dump = guest.large_space(&guest.dump);
    let dump = guest.space(&guest.dump);
    // One slot: nearly every read misses what is remembered, walks, and remembers.
    let cold = AddressSpace::with_slots(guest.live.clone(), PagingMode::X86Level4, Dtb(guest.root), 0);
    let cold_dump = AddressSpace::with_slots(guest.dump.clone(), PagingMode::X86Level4, Dtb(guest.root), 0);
    let warm_process =
        AddressSpace::with_slots(guest.process.clone(), PagingMode::X86Level4, Dtb(guest.root), 18);
    let cold_process =
        AddressSpace::with_slots(guest.process.clone(), PagingMode::X86Level4, Dtb(guest.root), 0);
    let raw = |gpa: u64| {
        // SAFETY: the frames lie inside the mapping.
        unsafe { guest.map.as_ptr().add(gpa as usize).cast::<u64>().read_volatile() }
    };
    let mut table = Table::new(&guest, reads);
    for t in table.draw(1000) {
        assert_eq!(
            raw(t.gpa),
            t.gpa | 1 << 62,
            "the bench reads what it thinks it reads"
        );
        for space in [&warm, &dump, &cold, &cold_dump] {
            assert_eq!(space.read_u64(Gva(t.gva)).unwrap(), t.gpa | 1 << 62);
        }
        assert_eq!(guest.by_hand(t.gva), Some(t.gpa | 1 << 62));
        for space in [&large, &large_dump] {
            assert_eq!(space.read_u64(Gva(LARGE + t.gpa)).unwrap(), t.gpa | 1 << 62);
        }
    }

    let mut page = vec![0u8; 0x1000];
    let mut many = vec![0u8; 16 * 0x1000];
    for _ in 0..rounds {
        table.round(RAW, RAW, None, 1, |targets| {
            black_box(targets.iter().fold(0, |s, t| s ^ raw(t.gpa)));
        });
        table.round("u64 random page: physical", RAW, Some(1.5), 1, |targets| {
            let read = |t: &Target| guest.live.read_u64(Gpa(t.gpa)).unwrap_or(1);
            black_box(targets.iter().fold(0, |s, t| s ^ read(t)));
        });
        for (name, goal, space) in [
            ("u64 random page: virtual, cold", Some(6.0), &cold),
            ("u64 random page: virtual, warm", None, &warm),
            ("u64 random page: virtual, cold, dump", None, &cold_dump),
            ("u64 random page: virtual, warm, dump", None, &dump),
        ] {
            table.round(name, RAW, goal, 1, |targets| u64s(space, targets, |t| t.gva));
        }
        table.round("u64 random page: virtual, by hand", RAW, None, 1, |targets| {
            let read = |t: &Target| guest.by_hand(t.gva).unwrap_or(1);
            black_box(targets.iter().fold(0, |s, t| s ^ read(t)));
        });
        for (name, goal, space) in [
            ("u64 random page: virtual, cold, batched", 6.0, &cold),
            ("u64 random page: virtual, warm, batched", 1.5, &warm),
        ] {
            table.round(name, RAW, Some(goal), 1, |targets| {
                batched(space, targets, |t| t.gva)
            });
        }
        for (name, space) in [
            ("u64 random page: large pages, warm", &large),
            ("u64 random page: large pages, warm, dump", &large_dump),
        ] {
            table.round(name, RAW, None, 1, |targets| {
                u64s(space, targets, |t| LARGE + t.gpa);
            });
        }
        let name = "u64 random page: large pages, warm, batched";
        table.round(name, RAW, Some(1.5), 1, |targets| {
            batched(&large, targets, |t| LARGE + t.gpa);
        });

        // One after the other, as when a list is followed: each address waits for the last value.
        table.round(CHAIN, CHAIN, None, 1, |targets| {
            black_box(targets.iter().fold(0, |s, t| raw(t.gpa ^ (s >> 63))));
        });
        table.round("u64 chained: physical", CHAIN, None, 1, |targets| {
            let read = |gpa| guest.live.read_u64(Gpa(gpa)).unwrap_or(1);
            black_box(targets.iter().fold(0, |s, t| read(t.gpa ^ (s >> 63))));
        });
        for (name, goal, space) in [
            ("u64 chained: virtual, cold", 6.0, &cold),
            ("u64 chained: virtual, warm", 1.5, &warm),
        ] {
            table.round(name, CHAIN, Some(goal), 1, |targets| {
                chained(space, targets, |t| t.gva)
            });
        }
        table.round("u64 chained: large pages, warm", CHAIN, Some(1.5), 1, |targets| {
            chained(&large, targets, |t| LARGE + t.gpa);
        });

        // A guest whose memory is not shared: a system call a read, or a batch.
        table.round(ASKED, ASKED, None, 40, |targets| {
            let read = |t: &Target| guest.process.read_u64(Gpa(t.gpa)).unwrap_or(1);
            black_box(targets.iter().fold(0, |s, t| s ^ read(t)));
        });
        for (name, space) in [
            ("u64 of another process: virtual, cold", &cold_process),
            ("u64 of another process: virtual, warm", &warm_process),
        ] {
            table.round(name, ASKED, None, 40, |targets| u64s(space, targets, |t| t.gva));
        }
        for (name, space) in [
            ("u64 of another process: cold, batched", &cold_process),
            ("u64 of another process: warm, batched", &warm_process),
        ] {
            table.round(name, ASKED, None, 40, |targets| {
                batched(space, targets, |t| t.gva)
            });
        }

        for (name, base, goal, which) in [
            (COPY, COPY, None, 0u8),
            ("4 KiB random page: physical", COPY, None, 1),
            ("4 KiB random page: virtual", COPY, Some(1.3), 2),
            (HOT, HOT, None, 3),
            ("4 KiB of 64 pages: physical", HOT, None, 4),
            ("4 KiB of 64 pages: virtual", HOT, Some(1.3), 5),
        ] {
            table.round(name, base, goal, 8, |targets| {
                let among = if which < 3 {
                    targets.len()
                } else {
                    HOT_PAGES.min(targets.len())
                };
                for t in targets.iter().take(among).cycle().take(targets.len()) {
                    let (gva, gpa) = (t.gva & !0xfff, t.gpa & !0xfff);
                    match which % 3 {
                        // SAFETY: a whole frame inside the mapping; nobody writes to it now.
                        0 => unsafe {
                            let from = guest.map.as_ptr().add(gpa as usize);
                            std::ptr::copy_nonoverlapping(from, page.as_mut_ptr(), 0x1000);
                        },
                        1 => guest.live.read(Gpa(gpa), &mut page).expect("backed"),
                        _ => warm.read(Gva(gva), &mut page).expect("mapped"),
                    }
                    black_box(&mut page);
                }
            });
        }
        table.round(
            "4 KiB random page: virtual, batched",
            COPY,
            Some(1.3),
            8,
            |targets| {
                for chunk in targets.chunks(16) {
                    let mut ops: Vec<_> = chunk
                        .iter()
                        .zip(many.chunks_mut(0x1000))
                        .map(|(t, buf)| GvaReadOp::new(Gva(t.gva & !0xfff), buf))
                        .collect();
                    warm.read_batch(&mut ops);
                    black_box(&mut ops);
                }
            },
        );
    }
    table.print(has("--json"));
}

/// Reads one word at each address, all of which are known beforehand.
#[inline(always)]
fn u64s(space: &AddressSpace, targets: &[Target], gva: impl Fn(&Target) -> u64) {
    let read = |t| space.read_u64(Gva(gva(t))).unwrap_or(1);
    black_box(targets.iter().fold(0, |s, t| s ^ read(t)));
}

/// The same, where each address is known only when the word before was read.
#[inline(always)]
fn chained(space: &AddressSpace, targets: &[Target], gva: impl Fn(&Target) -> u64) {
    let read = |gva| space.read_u64(Gva(gva)).unwrap_or(1);
    black_box(targets.iter().fold(0, |s, t| read(gva(t) ^ (s >> 63))));
}

#[inline(always)]
fn batched(space: &AddressSpace, targets: &[Target], gva: impl Fn(&Target) -> u64) {
    let mut total = 0;
    let mut words = [[0u8; 8]; 64];
    for chunk in targets.chunks(64) {
        let mut ops: [GvaReadOp<'_>; 64] = {
            let mut words = words.iter_mut();
            let mut chunk = chunk.iter().cycle();
            std::array::from_fn(|_| {
                GvaReadOp::new(
                    Gva(gva(chunk.next().expect("not empty"))),
                    words.next().expect("64"),
                )
            })
        };
        let used = chunk.len().min(64);
        space.read_batch(&mut ops[..used]);
        total ^= ops[..used].iter().filter(|op| op.result.is_ok()).count() as u64;
        for word in &words[..used] {
            total ^= u64::from_le_bytes(*word);
        }
    }
    black_box(total);
}
