//! Tables that the guest rewrites: what is remembered gives way to evidence, and no reader sees a mix.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vmsight_arch::{Dtb, Gva};
use vmsight_memory::{GvaReadOp, ReadCause};

use crate::image::{Guest, Image, LARGE, P};

const AT: u64 = 0xffff_8880_0123_4000;

fn live(image: &Image) -> [Guest; 2] {
    [Guest::live(image), Guest::process(image)]
}

#[test]
fn each_level_that_changes_is_noticed() {
    for level in 1..=4u32 {
        let mut image = Image::new(0x20_0000, 64);
        image.map(AT, 0x5000);
        // A second chain of tables, to another page, at an address that differs at this level only.
        let other = AT ^ (1 << (3 + 9 * level));
        image.map(other, 0x6000);
        let (old, new) = (
            image.entry(AT, level).unwrap(),
            image.entry(other, level).unwrap(),
        );
        for guest in live(&image) {
            let space = guest.space();
            for _ in 0..3 {
                assert_eq!(
                    space.read_u64(Gva(AT + 8)).unwrap(),
                    image.u64(0x5008),
                    "{}",
                    guest.kind
                );
            }
            // Where the chains part, the entry of the one becomes that of the other.
            guest.put(old, image.u64(new));
            for _ in 0..3 {
                assert_eq!(
                    space.read_u64(Gva(AT + 8)).unwrap(),
                    image.u64(0x6008),
                    "{} level {level}",
                    guest.kind
                );
            }
            guest.put(old, 0);
            let fault = *space.read_u64(Gva(AT + 8)).unwrap_err().page_fault().unwrap();
            assert_eq!(u32::from(fault.level), level);
            guest.put(old, image.u64(old));
            assert_eq!(space.read_u64(Gva(AT + 8)).unwrap(), image.u64(0x5008));
            // The same through batches and whole pages.
            guest.put(old, image.u64(new));
            let mut buf = vec![0; 0x1000];
            let mut ops = [GvaReadOp::new(Gva(AT), &mut buf)];
            space.read_batch(&mut ops);
            assert_eq!(ops[0].result, Ok(()));
            assert_eq!(buf, image.bytes[0x6000..0x7000], "{} level {level}", guest.kind);
            guest.put(old, image.u64(old));
            space.read(Gva(AT), &mut buf).unwrap();
            assert_eq!(buf, image.bytes[0x5000..0x6000]);
        }
    }
}

#[test]
fn a_large_page_that_is_split_is_noticed() {
    let mut image = Image::new(0x60_0000, 64);
    let large = 0xffff_8880_4000_0000;
    image.map_large(large, 0x20_0000);
    let entry = image.entry(large, 2).unwrap();
    // A table ready to take its place, with one page elsewhere.
    let other = 0xffff_8881_4000_0000;
    image.map(other + 0x3000, 0x7000);
    let split = image.entry(other, 2).unwrap();
    for guest in live(&image) {
        let space = guest.space();
        for page in [0, 3, 511] {
            assert_eq!(
                space.read_u64(Gva(large + page * 0x1000)).unwrap(),
                image.u64(0x20_0000 + page * 0x1000)
            );
        }
        guest.put(entry, image.u64(split));
        assert_eq!(
            space.read_u64(Gva(large + 0x3000)).unwrap(),
            image.u64(0x7000),
            "{}",
            guest.kind
        );
        assert!(space.read_u64(Gva(large + 0x2000)).is_err());
        guest.put(entry, 0x40_0000 | LARGE);
        assert_eq!(space.read_u64(Gva(large + 0x2000)).unwrap(), image.u64(0x40_2000));
    }
}

#[test]
fn each_level_above_a_large_page_that_changes_is_noticed() {
    for level in 2..=4u32 {
        // In two pieces of 4 MiB: one page is whole in each.
        let mut image = Image::new(0x80_0000, 64);
        let large = 0xffff_8880_4000_0000;
        image.map_large(large, 0x20_0000);
        // A second chain of tables, to another page, at an address that differs at this level only.
        let other = large ^ (1 << (3 + 9 * level));
        image.map_large(other, 0x40_0000);
        let (old, new) = (
            image.entry(large, level).unwrap(),
            image.entry(other, level).unwrap(),
        );
        for guest in live(&image) {
            let space = guest.space();
            let reads = |page: u64| {
                for at in [0, 0x1f_fff8, 0x3008] {
                    let gva = Gva(large + at);
                    assert_eq!(
                        space.read_u64(gva).unwrap(),
                        image.u64(page + at),
                        "{} level {level}",
                        guest.kind
                    );
                    let mut buf = [0; 8];
                    space.read(gva, &mut buf).unwrap();
                    assert_eq!(u64::from_le_bytes(buf), image.u64(page + at));
                    let mut ops = [GvaReadOp::new(gva, &mut buf)];
                    space.read_batch(&mut ops);
                    assert_eq!(ops[0].result, Ok(()));
                    assert_eq!(u64::from_le_bytes(buf), image.u64(page + at));
                }
            };
            reads(0x20_0000);
            guest.put(old, image.u64(new));
            reads(0x40_0000);
            guest.put(old, 0);
            assert!(
                space.read_u64(Gva(large)).is_err(),
                "{} level {level}",
                guest.kind
            );
            guest.put(old, image.u64(old));
            reads(0x20_0000);
        }
    }
}

#[test]
fn a_large_page_is_read_as_far_as_it_is_there() {
    let mut image = Image::new(0x80_0000, 64);
    let large = 0xffff_8880_4000_0000;
    image.map_large(large, 0x20_0000);
    // Memory lacks the last half of the page, as a dump may that leaves out what it thinks of no use.
    let there = [0..0x30_0000usize, 0x40_0000..image.bytes.len()];
    let frozen = vmsight_memory::GuestMemory::from_bytes(
        there
            .iter()
            .map(|range| {
                (
                    vmsight_arch::Gpa(range.start as u64),
                    image.bytes[range.clone()].to_vec(),
                )
            })
            .collect(),
    )
    .unwrap();
    let space = vmsight_memory::AddressSpace::new(frozen, crate::image::MODE, Dtb(image.root));
    for _ in 0..4 {
        for at in [0, 0xf_fff8] {
            assert_eq!(
                space.read_u64(Gva(large + at)).unwrap(),
                image.u64(0x20_0000 + at)
            );
        }
        for at in [0x10_0000, 0x1f_fff8] {
            let cause = space.read_u64(Gva(large + at)).unwrap_err().cause;
            assert!(matches!(cause, ReadCause::Memory(_)), "{cause:?}");
        }
    }
}

#[test]
fn a_space_of_another_root_shares_nothing_that_is_remembered() {
    let mut image = Image::new(0x20_0000, 64);
    image.map(AT, 0x5000);
    let second = 0x10_0000;
    let mut tables = Image::new(0x20_0000, 64);
    tables.map(AT, 0x6000);
    // The second root has the same top entry but for its own chain: copy the chain a megabyte down.
    for page in 0..4u64 {
        for word in 0..512u64 {
            let from = tables.root + page * 0x1000 + word * 8;
            let value = tables.u64(from);
            let moved = if value & P != 0 && value >= tables.root {
                value - tables.root + second
            } else {
                value
            };
            image.put(second + page * 0x1000 + word * 8, moved);
        }
    }
    for guest in Guest::all(&image) {
        let first = guest.space();
        let other = first.with_dtb(Dtb(second));
        for _ in 0..2 {
            assert_eq!(
                first.read_u64(Gva(AT)).unwrap(),
                image.u64(0x5000),
                "{}",
                guest.kind
            );
            assert_eq!(
                other.read_u64(Gva(AT)).unwrap(),
                image.u64(0x6000),
                "{}",
                guest.kind
            );
        }
        assert_eq!((first.dtb(), other.dtb()), (Dtb(image.root), Dtb(second)));
    }
}

/// A guest that moves a page about: it makes a table ready, puts it in place, and then fills the old table with entries
/// to a page of rubbish, as it would if that page were used for something else. Readers must see one of the good
/// pages, always.
fn hammer(guest: &Guest, pde: u64, tables: &[u64], rounds: u64) {
    const GOOD: u64 = 0x1000;
    const RUBBISH: u64 = 0x9000;
    let good = |n: u64| GOOD + n % 4 * 0x1000;
    for page in 0..4u64 {
        for word in 0..512u64 {
            guest.put(good(page) + word * 8, 0x600d_0000_0000_0000 | page << 32 | word);
        }
    }
    let spot = (AT >> 12 & 511) * 8;
    let set = |table: u64, value: u64| guest.put(table + spot, value);
    set(tables[0], good(0) | P);
    guest.put(pde, tables[0] | P);

    let stop = AtomicBool::new(false);
    let reads = AtomicU64::new(0);
    let space = guest.space();
    let check = |value: u64, word: u64| {
        assert_eq!(value >> 48, 0x600d, "{}: {value:#x} is rubbish", guest.kind);
        assert_eq!(value & 0xffff_ffff, word);
    };
    std::thread::scope(|scope| {
        for reader in 0..2u64 {
            let (stop, reads, space) = (&stop, &reads, &space);
            scope.spawn(move || {
                let mut buf = [0u8; 256];
                let mut n = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    let word = (n * 7 + reader) % 480;
                    let fine = match n % 3 {
                        0 => match space.read_u64(Gva(AT + word * 8)) {
                            Ok(value) => {
                                check(value, word);
                                true
                            }
                            Err(error) => unstable(error.cause),
                        },
                        1 => match space.read(Gva(AT + word * 8), &mut buf) {
                            Ok(()) => {
                                let words: Vec<u64> =
                                    buf.as_chunks().0.iter().map(|c| u64::from_le_bytes(*c)).collect();
                                for (i, &value) in words.iter().enumerate() {
                                    check(value, word + i as u64);
                                    assert_eq!(value >> 32, words[0] >> 32, "all of one page");
                                }
                                true
                            }
                            Err(error) => unstable(error.cause),
                        },
                        _ => {
                            let mut ops = [GvaReadOp::new(Gva(AT + word * 8), &mut buf[..8])];
                            space.read_batch(&mut ops);
                            let [op] = ops;
                            match op.result {
                                Ok(()) => {
                                    check(u64::from_le_bytes(op.buf.try_into().unwrap()), word);
                                    true
                                }
                                Err(error) => unstable(error.cause),
                            }
                        }
                    };
                    n += 1;
                    reads.fetch_add(u64::from(fine), Ordering::Relaxed);
                }
            });
        }
        let mut old = tables[0];
        for i in 1..=rounds {
            let new = tables[i as usize % tables.len()];
            set(new, good(i) | P);
            guest.put(pde, new | P);
            // Bits 58:52 are free: each rubbish entry is a new one, as what follows in a page that is used again.
            set(old, RUBBISH | P | (i & 0x7f) << 52 | (i >> 7 & 7) << 9);
            old = new;
            if i % 64 == 0 {
                // Let the readers have tables that hold still, too.
                std::thread::yield_now();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(
        reads.load(Ordering::Relaxed) > 0,
        "{}: the readers did read",
        guest.kind
    );
}

/// The only way a read may fail here.
fn unstable(cause: ReadCause) -> bool {
    assert_eq!(cause, ReadCause::Unstable);
    false
}

#[test]
fn readers_of_tables_that_are_rewritten_see_old_or_new_and_never_rubbish() {
    let mut image = Image::new(0x20_0000, 128);
    image.map(AT, 0x1000);
    let pde = image.entry(AT, 2).unwrap();
    // Two tables that take turns: an upper entry that looks as remembered proves little by itself.
    let mut table_of = |gva| {
        image.map(gva, 0x1000);
        let at = image.entry(gva, 2).unwrap();
        image.u64(at) & !0xfff
    };
    let tables = [table_of(AT), table_of(AT + 0x20_0000)];
    hammer(&Guest::live(&image), pde, &tables, 100_000);
    hammer(&Guest::process(&image), pde, &tables, 2_000);
}

/// Tables that move the page away as soon as their last entry was read, as a guest may at any time.
#[derive(Debug)]
struct Moving {
    tables: Vec<u8>,
    entry: u64,
    /// Where the page is, in this process, as a number.
    page: u64,
    armed: AtomicBool,
}

impl vmsight_memory::Source for Moving {
    fn len(&self) -> u64 {
        self.tables.len() as u64
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), String> {
        let from = self
            .tables
            .get(offset as usize..)
            .and_then(|b| b.get(..buf.len()));
        buf.copy_from_slice(from.ok_or("out of bounds")?);
        if offset == self.entry && self.armed.load(Ordering::SeqCst) {
            // SAFETY: a word of memory that the test keeps, only ever used as an atomic while it runs.
            unsafe { AtomicU64::from_ptr(self.page as *mut u64) }.store(0xbad, Ordering::SeqCst);
        }
        Ok(())
    }

    fn is_live(&self) -> bool {
        true
    }
}

#[test]
fn bytes_of_a_process_are_read_before_the_tables_that_prove_them() {
    let mut image = Image::new(0x20_0000, 64);
    image.map(AT, 0x5000);
    let entry = image.entry(AT, 1).unwrap();
    let word = Box::new([const { AtomicU64::new(0) }; 1024]);
    // A page of its own within the box.
    let page = (word.as_ptr() as u64).next_multiple_of(0x1000);
    // SAFETY: 512 words fit behind the first page boundary of 1024.
    let first = unsafe { AtomicU64::from_ptr(page as *mut u64) };
    first.store(0x600d, Ordering::SeqCst);
    let tables = std::sync::Arc::new(Moving {
        tables: image.bytes[image.root as usize..].to_vec(),
        entry: entry - image.root,
        page,
        armed: AtomicBool::new(false),
    });
    let process = std::sync::Arc::new(vmsight_memory::ProcessMemory::open(std::process::id()).unwrap());
    let memory = vmsight_memory::GuestMemory::builder()
        .process(vmsight_arch::Gpa(0x5000), 0x1000, &process, page, false)
        .custom(
            vmsight_arch::Gpa(image.root),
            tables.tables.len() as u64,
            tables.clone(),
            0,
        )
        .build()
        .unwrap();
    let space = vmsight_memory::AddressSpace::new(
        memory,
        vmsight_arch::paging::PagingMode::X86Level4,
        Dtb(image.root),
    );
    assert_eq!(space.read_u64(Gva(AT)), Ok(0x600d));
    // Remembered now: the bytes, and then the entries that say that they are this page's.
    tables.armed.store(true, Ordering::SeqCst);
    assert_eq!(space.read_u64(Gva(AT)), Ok(0x600d));
    assert_eq!(
        first.load(Ordering::SeqCst),
        0xbad,
        "the entry was read, afterwards"
    );
}

/// Memory of a guest that runs, which must be asked for, and by whom it was asked how often.
#[derive(Clone, Debug)]
struct Counted {
    words: std::sync::Arc<Vec<AtomicU64>>,
    asked: std::sync::Arc<AtomicU64>,
}

impl vmsight_memory::Source for Counted {
    fn len(&self) -> u64 {
        self.words.len() as u64 * 8
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), String> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let word = self.words[offset as usize / 8].load(Ordering::Relaxed);
        buf.copy_from_slice(&word.to_le_bytes());
        Ok(())
    }

    fn is_live(&self) -> bool {
        true
    }
}

#[test]
fn a_walk_begins_at_a_table_that_is_known_and_still_leads_there() {
    let mut image = Image::new(0x80_0000, 64);
    let gib = 0xffff_8880_4000_0000;
    let pages = [0x20_0000, 0x40_0000];
    for (i, &page) in pages.iter().enumerate() {
        image.map_large(gib + i as u64 * 0x20_0000, page);
    }
    for page in 1..4 {
        image.map(AT + page * 0x1000, 0x5000 + page * 0x1000);
    }
    // Another table for the same gibibyte, with the pages exchanged.
    let other = gib + 0x4000_0000;
    for (i, &page) in pages.iter().rev().enumerate() {
        image.map_large(other + i as u64 * 0x20_0000, page);
    }
    let (third, instead) = (image.entry(gib, 3).unwrap(), image.entry(other, 3).unwrap());
    let source = Counted {
        words: std::sync::Arc::new(
            (0..image.bytes.len() as u64 / 8)
                .map(|i| AtomicU64::new(image.u64(i * 8)))
                .collect(),
        ),
        asked: std::sync::Arc::default(),
    };
    let memory = vmsight_memory::GuestMemory::builder()
        .custom(
            vmsight_arch::Gpa(0),
            source.words.len() as u64 * 8,
            std::sync::Arc::new(source.clone()),
            0,
        )
        .build()
        .unwrap();
    let space = || vmsight_memory::AddressSpace::new(memory.clone(), crate::image::MODE, Dtb(image.root));
    let (known, fresh) = (space(), space());
    let cost = |space: &vmsight_memory::AddressSpace, gva: u64, gpa: u64| {
        let before = source.asked.load(Ordering::Relaxed);
        assert_eq!(space.read_u64(Gva(gva)).unwrap(), image.u64(gpa), "{gva:#x}");
        source.asked.load(Ordering::Relaxed) - before
    };
    // Two tables above a large page, three above a small one; bytes and proof are as dear as ever.
    let cold = cost(&known, gib, pages[0]);
    assert_eq!(cost(&known, gib + 0x20_0000, pages[1]), cold - 2);
    let cold = cost(&known, AT + 0x1000, 0x6000);
    assert_eq!(cost(&known, AT + 0x2000, 0x7000), cold - 3);
    // The guest puts the other table there: what is read next is found by it, a page that was not read before too.
    cost(&fresh, gib, pages[0]);
    source.words[third as usize / 8].store(image.u64(instead), Ordering::Relaxed);
    assert_eq!(fresh.read_u64(Gva(gib + 0x20_0000)).unwrap(), image.u64(pages[0]));
    assert_eq!(fresh.read_u64(Gva(gib)).unwrap(), image.u64(pages[1]));
}
