//! Walks through tables written by hand, one thing at a time; `model.rs` has the random ones.

use std::collections::BTreeMap;

use vmsight_arch::paging::{
    Absent, FaultReason, PageFault, PagingMode, TableMemory, mappings, resolve, walk,
};
use vmsight_arch::{Dtb, Gpa, Gva};

/// Memory of a few words; everything below `size` is backed.
struct Words {
    words: BTreeMap<u64, u64>,
    size: u64,
}

impl TableMemory for Words {
    fn entry_u64(&self, gpa: Gpa) -> Option<u64> {
        (gpa.0 < self.size).then(|| self.words.get(&gpa.0).copied().unwrap_or(0))
    }

    fn entry_u32(&self, gpa: Gpa) -> Option<u32> {
        self.entry_u64(Gpa(gpa.0 & !7))
            .map(|v| (v >> (8 * (gpa.0 & 4))) as u32)
    }
}

fn words(list: &[(u64, u64)]) -> Words {
    Words {
        words: list.iter().copied().collect(),
        size: 0x10_0000,
    }
}

const NX: u64 = 1 << 63;

/// 0xffff_8000_0020_3000 → 4 KiB, 0xffff_8000_0040_0000 → 2 MiB, 0xffff_8000_4000_0000 → 1 GiB.
fn level4() -> Words {
    words(&[
        (0x1000 + 256 * 8, 0x2003),
        (0x2000, 0x3003),
        (0x2000 + 8, 0x8000_0000 | 0x1e3 | NX),
        (0x3000 + 8, 0x4007),
        (0x3000 + 2 * 8, 0x1_4060_0000 | 0x83),
        (0x4000 + 3 * 8, 0x5_6789_a000 | 0x63),
        (0x4000 + 4 * 8, 0xdead_0000_0000_0002),
        (0x3000 + 3 * 8, 0x1_4061_0000 | 0x83),
        (0x3000 + 4 * 8, 0x7fff_f000_0003),
    ])
}

fn go(memory: &Words, gva: u64) -> Result<vmsight_arch::paging::Translation, PageFault> {
    walk(PagingMode::X86Level4, memory, Dtb(0x1000), Gva(gva))
}

#[test]
fn pages_of_every_size_resolve_with_their_rights() {
    let m = level4();
    let t = go(&m, 0xffff_8000_0020_3abc).unwrap();
    assert_eq!(
        (t.gpa, t.page_shift, t.page_gpa(), t.page_size()),
        (Gpa(0x5_6789_aabc), 12, Gpa(0x5_6789_a000), 4096)
    );
    assert!(t.access.write && t.access.execute && t.access.accessed && t.access.dirty);
    assert!(!t.access.user && !t.access.global && !t.access.user_execute);
    let levels: Vec<_> = t.steps.iter().map(|s| (s.level, s.entry_gpa.0)).collect();
    assert_eq!(levels, [(4, 0x1800), (3, 0x2000), (2, 0x3008), (1, 0x4018)]);

    let t = go(&m, 0xffff_8000_0041_2345).unwrap();
    assert_eq!((t.gpa, t.page_shift), (Gpa(0x1_4061_2345), 21));
    let t = go(&m, 0xffff_8000_7fff_ffff).unwrap();
    assert_eq!((t.gpa, t.page_shift), (Gpa(0xbfff_ffff), 30));
    assert!(t.access.global && !t.access.execute);
}

#[test]
fn faults_name_the_level_and_the_entry() {
    let m = level4();
    let f = go(&m, 0x0000_8000_0000_0000).unwrap_err();
    assert_eq!(
        (f.reason, f.level, f.entry(), f.steps.len()),
        (FaultReason::NonCanonical, 0, None, 0)
    );

    let f = go(&m, 0xffff_8000_0020_4000).unwrap_err();
    assert_eq!(
        (f.reason, f.level, f.entry()),
        (FaultReason::NotPresent, 1, Some(0xdead_0000_0000_0002))
    );
    assert!(f.is_paged_out());
    assert_eq!(f.steps.len(), 4);
    assert_eq!(
        f.to_string(),
        "0xffff800000204000: not present: level 1 entry at 0x4020 is 0xdead000000000002"
    );

    let f = go(&m, 0).unwrap_err();
    assert_eq!(
        (f.reason, f.level, f.entry_gpa),
        (FaultReason::NotPresent, 4, Gpa(0x1000))
    );
    assert!(!f.is_paged_out());

    let f = go(&m, 0xffff_8000_0060_0000).unwrap_err();
    assert_eq!((f.reason, f.level), (FaultReason::Reserved, 2));

    let f = go(&m, 0xffff_8000_0080_1000).unwrap_err();
    assert_eq!(
        (f.reason, f.level, f.entry_gpa),
        (FaultReason::Unbacked, 1, Gpa(0x7fff_f000_0008))
    );
    assert_eq!((f.entry(), f.steps.len()), (None, 3));
}

#[test]
fn the_listing_skips_holes_and_counts_what_is_broken() {
    let m = level4();
    let mut list = mappings(
        PagingMode::X86Level4,
        &m,
        Dtb(0x1000),
        Gva(0)..=Gva(u64::MAX),
        100,
    );
    let found: Vec<_> = list
        .by_ref()
        .map(|m| m.unwrap())
        .map(|m| (m.gva.0, m.translation.gpa.0))
        .collect();
    assert_eq!(
        found,
        [
            (0xffff_8000_0020_3000, 0x5_6789_a000),
            (0xffff_8000_0040_0000, 0x1_4060_0000),
            (0xffff_8000_4000_0000, 0x8000_0000)
        ]
    );
    assert_eq!(list.broken(), 2, "a reserved entry and a table without memory");
}

#[test]
fn a_range_that_begins_inside_a_large_page_lists_that_page() {
    let m = level4();
    let range = Gva(0xffff_8000_0050_0000)..=Gva(0xffff_8000_3fff_ffff);
    let found: Vec<_> = mappings(PagingMode::X86Level4, &m, Dtb(0x1000), range, 100).collect();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].unwrap().gva, Gva(0xffff_8000_0040_0000));
}

#[test]
fn a_table_that_serves_at_every_level_ends_at_the_callers_limit() {
    // Every entry of the one table points to the table: 2^36 pages for the asking.
    let list: Vec<_> = (0..512).map(|i| (0x1000 + i * 8, 0x1003)).collect();
    let m = words(&list);
    let mut n = 0u64;
    let mut last = None;
    for item in mappings(
        PagingMode::X86Level4,
        &m,
        Dtb(0x1000),
        Gva(0)..=Gva(u64::MAX),
        1000,
    ) {
        n += 1;
        last = Some(item);
    }
    let limit = last.unwrap().unwrap_err();
    assert_eq!(limit.tables, 1000);
    // The root, the first level 3 table and two level 2 tables; the rest are last tables of 512 pages each.
    assert_eq!(n - 1, (1000 - 4) * 512);
    // Nothing is lost before the limit and nothing listed behind it.
    assert_eq!(limit.at, Gva((1000 - 4) * 512 * 4096));
}

#[test]
fn resolve_agrees_with_walk() {
    let m = level4();
    for gva in [
        0,
        0xffff_8000_0020_3abc,
        0xffff_8000_0041_2345,
        0xffff_8000_0020_4000,
        0x8000_0000_0000,
    ] {
        let quick = resolve(PagingMode::X86Level4, &m, Dtb(0x1000), Gva(gva));
        assert_eq!(
            quick.map(|r| (r.gpa, r.page_shift)),
            go(&m, gva).ok().map(|t| (t.gpa, t.page_shift))
        );
    }
}

#[test]
fn reserved_bits_fault_at_the_level_that_sets_them() {
    use vmsight_arch::paging::Granule::{K4, K16, K64};
    let long = PagingMode::X86Level4;
    let arm = |granule, va_bits, lpa2| PagingMode::Arm64 {
        granule,
        va_bits,
        lpa2,
    };
    // One chain of tables at 0x1000, 0x2000 …, all at index 0 but for what is given; the last entry is the one
    // on trial. Its value, the level it stands at, and whether the bits are reserved there.
    let cases: &[(PagingMode, u8, u8, u64, bool)] = &[
        (long, 4, 4, 0x2083, true),                  // PS in a PML4E
        (PagingMode::X86Level5, 5, 5, 0x2083, true), // PS in a PML5E
        (PagingMode::X86Level5, 5, 4, 0x2083, true),
        (long, 4, 3, 0x4000_2083, true),  // 1 GiB page, bit 13
        (long, 4, 3, 0x4000_1083, false), // bit 12 is PAT
        (long, 4, 2, 0x0010_0083, true),  // 2 MiB page, bit 20
        (long, 4, 2, 0x0020_1083, false),
        (long, 4, 1, 0x0000_5083, false),           // bit 7 of a PTE is PAT
        (long, 4, 1, 0x7ff0_0000_0000_5003, false), // 62:52 are free or protection keys
        (PagingMode::X86Pae, 3, 3, 0x2003, true),   // PDPTE bits 2:1
        (PagingMode::X86Pae, 3, 3, 1 << 63 | 0x2001, true),
        (PagingMode::X86Pae, 3, 2, 0x0020_2083, true),
        (PagingMode::X86Pae, 3, 2, 1 << 63 | 0x0020_0083, false),
        (PagingMode::X86Pae, 3, 1, 1 << 52 | 0x5003, true),
        (PagingMode::X86_32 { pse: true }, 2, 2, 0x0020_0083, true), // bit 21
        (PagingMode::X86_32 { pse: true }, 2, 2, 0x001f_e083, false), // PSE-36
        (arm(K4, 48, false), 4, 4, 0x2401, true),                    // no 512 GiB blocks …
        (arm(K4, 48, true), 4, 4, 0x2401, false),                    // … without LPA2
        (arm(K4, 48, false), 4, 3, 0x4000_0401, false),
        (arm(K4, 48, false), 4, 1, 0x5401, true), // a block at the last level
        (arm(K16, 47, false), 3, 3, 0x2401, true),
        (arm(K16, 47, true), 3, 3, 0x2401, false),
        (arm(K64, 42, false), 2, 2, 0x2000_0401, false),
        (arm(K64, 42, false), 2, 1, 0x1_0401, true),
    ];
    for &(mode, levels, at, value, reserved) in cases {
        let mut list = Vec::new();
        for level in (at + 1..=levels).rev() {
            let table = 0x1_0000 * u64::from(levels - level + 1);
            // Present; for AArch64 a table: bit 1, which PDPTEs of PAE must not have.
            let flags = if matches!(mode, PagingMode::X86Pae) && level == 3 {
                1
            } else {
                3
            };
            list.push((table, (table + 0x1_0000) | flags));
        }
        let last = 0x1_0000 * u64::from(levels - at + 1);
        list.push((last, value));
        let got = walk(mode, &words(&list), Dtb(0x1_0000), Gva(0));
        if reserved {
            let fault = got.expect_err(&format!("{mode:?} level {at} {value:#x}"));
            assert_eq!(
                (fault.reason, fault.level),
                (FaultReason::Reserved, at),
                "{mode:?} {value:#x}"
            );
            assert_eq!(fault.entry(), Some(value));
            assert!(!fault.is_paged_out());
        } else {
            let page = got.unwrap_or_else(|f| panic!("{mode:?} level {at} {value:#x}: {f}"));
            assert_eq!(page.steps.last().map(|s| (s.level, s.value)), Some((at, value)));
        }
    }
}

#[test]
fn pse_36_reaches_forty_bits() {
    let m = words(&[(0x1008, 0x00cb_4083 << 32)]);
    let t = walk(
        PagingMode::X86_32 { pse: true },
        &m,
        Dtb(0x1000),
        Gva(0x00ff_ffff),
    )
    .unwrap();
    // 0x00cb_4083: bits 31:22 are 3, bits 20:13 are 0x5a.
    assert_eq!((t.gpa, t.page_shift), (Gpa(0x5a_00ff_ffff), 22));
}

/// The address bits of an entry, inverted as Linux keeps them where it takes all rights away.
fn inverted(address: u64, flags: u64) -> u64 {
    !address & 0x000f_ffff_ffff_f000 | flags
}

#[test]
fn a_page_without_rights_is_told_from_one_in_swap() {
    const PROT_NONE: u64 = 0x100;
    const LARGE: u64 = 0x80;
    let page = |level, value| Absent::Linux.page(PagingMode::X86Level4, level, value);
    assert_eq!(
        page(1, inverted(0x1234_5000, PROT_NONE | 0x60)),
        Some(Gpa(0x1234_5000))
    );
    assert_eq!(page(1, NX | inverted(0x1000, PROT_NONE)), Some(Gpa(0x1000)));
    assert_eq!(
        page(1, 0x1234_5000 | PROT_NONE),
        Some(Gpa(0x1234_5000)),
        "before 4.19"
    );
    assert_eq!(
        page(2, inverted(0x4060_0000, PROT_NONE | LARGE)),
        Some(Gpa(0x4060_0000))
    );
    assert_eq!(
        page(2, inverted(0x60_0000, LARGE)),
        Some(Gpa(0x60_0000)),
        "being split"
    );
    assert_eq!(
        page(3, inverted(0x4000_0000, PROT_NONE | LARGE)),
        Some(Gpa(0x4000_0000))
    );
    // Swap and migration, whose offsets are inverted too; nothing; a table; a page that is present.
    for (level, value) in [
        (1, inverted(0x1234_5000, 0)),
        (1, inverted(0x1234_5000, 2)),
        (2, inverted(0x1234_5000, 0)),
        (1, 0),
        (2, inverted(0x1000, PROT_NONE)),
        (3, inverted(0x4000_0000, LARGE)),
        (4, inverted(0x1000, PROT_NONE | LARGE)),
        (1, 0x1000 | PROT_NONE | 1),
    ] {
        assert_eq!(page(level, value), None, "level {level}: {value:#x}");
    }
    let value = inverted(0x1000, PROT_NONE);
    assert_eq!(Absent::NoPage.page(PagingMode::X86Level4, 1, value), None);
    assert_eq!(Absent::Linux.page(PagingMode::X86Pae, 1, value), None);
}

#[test]
fn pages_without_rights_are_found_by_whoever_asks_for_them() {
    let mut m = level4();
    m.words.insert(0x4000 + 5 * 8, inverted(0x8_9000, 0x140));
    m.words.insert(0x3000 + 5 * 8, inverted(0x20_0000, 0x180));
    let fault = go(&m, 0xffff_8000_0020_5abc).unwrap_err();
    let t = Absent::Linux.translation(PagingMode::X86Level4, &fault).unwrap();
    assert_eq!((t.gpa, t.page_shift, t.steps), (Gpa(0x8_9abc), 12, fault.steps));
    assert!(t.access.dirty && !t.access.user && !t.access.write && !t.access.execute && !t.access.global);
    let hole = go(&m, 0xffff_8000_0020_4000).unwrap_err();
    assert_eq!(Absent::Linux.translation(PagingMode::X86Level4, &hole), None);

    let list = |absent| -> Vec<_> {
        mappings(
            PagingMode::X86Level4,
            &m,
            Dtb(0x1000),
            Gva(0xffff_8000_0020_0000)..=Gva(0xffff_8000_3fff_ffff),
            100,
        )
        .with_absent(absent)
        .flatten()
        .map(|page| (page.gva.0, page.translation.gpa.0, page.translation.page_shift))
        .collect()
    };
    let present = list(Absent::NoPage);
    assert!(!present.iter().any(|page| page.0 == 0xffff_8000_0020_5000));
    let mut all = present.clone();
    all.push((0xffff_8000_0020_5000, 0x8_9000, 12));
    all.push((0xffff_8000_00a0_0000, 0x20_0000, 21));
    all.sort_unstable();
    assert_eq!(list(Absent::Linux), all);
}
