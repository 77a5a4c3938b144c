//! The kallsyms decoder against tables made by a writer of its own, in every layout that kernels have had.

#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

mod support;

use std::ops::Range;

use proptest::prelude::*;
use support::tables::{Addresses, LAYOUTS, Layout, Sym, encode, kernel_symbols, sym};
use vmsight_symbols::kallsyms::{Encoding, Image, Kallsyms, KallsymsError, Section, decode};

const LINK: u64 = 0xffff_ffff_8100_0000;
const SLIDE: u64 = 0x1280_0000;
const TEXT: u64 = LINK + SLIDE;
const LEN: u64 = 0x300_0000;
const RODATA: u64 = TEXT + 0x100_0000;

fn image() -> Image {
    Image {
        span: TEXT..TEXT + LEN,
        slide: SLIDE,
    }
}

/// Read-only data with a table in the middle of other things.
fn rodata(symbols: &[Sym], layout: Layout) -> Vec<u8> {
    let mut out: Vec<u8> = (0..0x3000_u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    // Small numbers and ascending ones, such as might be taken for a count or an index.
    out.extend((0..600_u16).flat_map(|i| (i * 3).to_le_bytes()));
    out.resize(out.len().next_multiple_of(64), 0);
    encode(&mut out, RODATA, symbols, layout);
    out.extend((0..0x2000_u32).map(|i| (i.wrapping_mul(40_503) >> 7) as u8));
    out
}

fn run(bytes: &[u8]) -> Result<Kallsyms, KallsymsError> {
    decode(
        Section {
            bytes,
            address: RODATA,
        },
        &image(),
    )
}

fn expected(symbols: &[Sym]) -> Vec<(String, u64, u8)> {
    let link = |a: u64| if a < 1 << 47 { a } else { a - SLIDE };
    symbols
        .iter()
        .map(|s| (s.name.clone(), link(s.address), s.kind))
        .collect()
}

fn got(k: &Kallsyms) -> Vec<(String, u64, u8)> {
    k.symbols
        .iter()
        .map(|s| (s.name.to_owned(), s.address, s.kind))
        .collect()
}

fn symbols_for(layout: Layout, count: usize) -> Vec<Sym> {
    let percpu = matches!(layout.addresses, Addresses::AbsolutePercpu | Addresses::Absolute);
    kernel_symbols(TEXT, TEXT + LEN, count, percpu)
}

#[test]
fn every_layout_is_read() {
    for (name, layout) in LAYOUTS {
        // One block, full blocks, a rest.
        for count in [40, 250, 251, 256, 3000] {
            let symbols = symbols_for(layout, count);
            let bytes = rodata(&symbols, layout);
            let k = run(&bytes).unwrap_or_else(|e| panic!("{name} with {count}: {e}"));
            assert_eq!(got(&k), expected(&symbols), "{name} with {count}");
            let want = match layout.addresses {
                Addresses::Absolute => Encoding::Absolute,
                Addresses::BaseRelative => Encoding::BaseRelative,
                Addresses::AbsolutePercpu => Encoding::AbsolutePercpu,
                Addresses::PlaceRelative => Encoding::PlaceRelative,
            };
            assert_eq!(k.encoding, want, "{name}");
            assert_eq!(k.damaged_blocks, 0, "{name}");
            assert_eq!(k.symbols.address("_text"), Some(LINK));
            assert_eq!(
                k.symbols.find("dup.constprop.0").count(),
                symbols.iter().filter(|s| s.name.starts_with("dup")).count()
            );
        }
    }
}

#[test]
fn the_sources_decide_everything() {
    // What lies outside of the sources may change without changing the symbols: the cache relies on it.
    for (name, layout) in LAYOUTS {
        let symbols = symbols_for(layout, 700);
        let bytes = rodata(&symbols, layout);
        let k = run(&bytes).unwrap();
        let mut scrambled: Vec<u8> = bytes.iter().map(|b| !b).collect();
        for range in &k.sources {
            scrambled[range.clone()].copy_from_slice(&bytes[range.clone()]);
        }
        if let Some(at) = k.relative_base_at {
            scrambled[at..at + 8].copy_from_slice(&bytes[at..at + 8]);
        }
        // The padding behind the count is not a source, but has to be there.
        let count = k.sources.iter().find(|r| r.len() == 4).unwrap();
        let names = k.sources.iter().find(|r| r.start >= count.end).unwrap();
        scrambled[count.end..names.start].fill(0);
        let again = run(&scrambled).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(got(&again), got(&k), "{name}");
        assert_eq!(again.sources, k.sources, "{name}");
    }
}

#[test]
fn a_damaged_block_costs_its_symbols_only() {
    for (name, layout) in LAYOUTS {
        let symbols = symbols_for(layout, 2000);
        let mut bytes = rodata(&symbols, layout);
        let k = run(&bytes).unwrap();
        let big = |r: &&Range<usize>| r.len() > 8000 && r.len() != 8 * symbols.len();
        let names = k
            .sources
            .iter()
            .find(|r| big(r) && r.len() != 4 * symbols.len())
            .unwrap();
        // A page in the middle reads as zeros, as in a smeared dump.
        let page = (names.start + names.len() / 2) & !0xff;
        bytes[page..page + 0x100].fill(0);
        let k = run(&bytes).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(
            (1..=2).contains(&k.damaged_blocks),
            "{name}: {}",
            k.damaged_blocks
        );
        let want = expected(&symbols);
        assert_eq!(k.symbols.len(), want.len() - 256 * k.damaged_blocks, "{name}");
        assert!(
            got(&k).iter().all(|s| want.contains(s)),
            "{name}: no symbol is made up"
        );
    }
}

/// Code in Rust has names that hold whole paths, and they lie together: a block of them has far more bytes than the mean.
#[test]
fn blocks_of_long_names_are_read_and_tables_of_nothing_else_are_bounded() {
    let layout = LAYOUTS[5].1;
    let long = |i: usize| format!("_RNvNtCs9x1{i:04}_{}", "6kernel4init9pin_data".repeat(13));
    let mut symbols = symbols_for(layout, 3000);
    for (i, s) in symbols.iter_mut().enumerate().skip(512).take(256) {
        s.name = long(i);
    }
    let k = run(&rodata(&symbols, layout)).unwrap();
    assert_eq!(k.damaged_blocks, 0);
    assert_eq!(got(&k), expected(&symbols));

    // As long in the whole table as no kernel's are.
    for (i, s) in symbols.iter_mut().enumerate().skip(16) {
        s.name = long(i);
    }
    let k = run(&rodata(&symbols, layout)).unwrap();
    assert!(k.damaged_blocks > 0);
    let names: usize = k.symbols.iter().map(|s| s.name.len()).sum();
    assert!(names <= symbols.len().next_multiple_of(256) * 128, "{names}");
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    let (_, layout) = LAYOUTS[0];
    assert!(matches!(run(&[]), Err(KallsymsError::NoTokens { searched: 0 })));
    assert!(matches!(
        run(&vec![0; 1 << 16]),
        Err(KallsymsError::NoTokens { .. })
    ));

    // The table of another kernel: its _text is not where the page tables put it.
    let mut symbols = symbols_for(layout, 300);
    symbols
        .iter_mut()
        .filter(|s| s.address > 1 << 47)
        .for_each(|s| s.address += 0x20_0000);
    let error = run(&rodata(&symbols, layout)).unwrap_err();
    assert!(
        matches!(error, KallsymsError::NoAddresses { names, .. } if names == symbols.len()),
        "{error}"
    );
    assert!(error.to_string().contains("_text would be at"), "{error}");

    // Names that nothing counts.
    let symbols = symbols_for(layout, 300);
    let mut bytes = rodata(&symbols, layout);
    let k = run(&bytes).unwrap();
    let count = k.sources.iter().find(|r| r.len() == 4).unwrap().clone();
    bytes[count].fill(0xff);
    assert!(matches!(run(&bytes), Err(KallsymsError::NoNames { .. })));
}

#[test]
fn a_kernel_without_text_symbols_must_fit_exactly() {
    let (_, layout) = LAYOUTS[8];
    let all: Vec<Sym> = symbols_for(layout, 300)
        .into_iter()
        .filter(|s| !["_text", "_stext", "startup_64"].contains(&s.name.as_str()))
        .collect();
    assert_eq!(got(&run(&rodata(&all, layout)).unwrap()), expected(&all));
    let mut outside = all.clone();
    outside.push(sym(TEXT + LEN + 0x1000, 'd', "outside"));
    assert!(matches!(
        run(&rodata(&outside, layout)),
        Err(KallsymsError::NoAddresses { .. })
    ));
}

#[test]
fn unprintable_names_are_escaped() {
    for (name, layout) in LAYOUTS {
        let mut symbols = symbols_for(layout, 300);
        symbols[20].name = "wipe\u{fffd} screen".to_owned();
        let k = run(&rodata(&symbols, layout)).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(
            k.symbols
                .iter()
                .all(|s| s.name.bytes().all(|b| b.is_ascii_graphic())),
            "{name}"
        );
        assert!(
            k.symbols.address("wipe\\xef\\xbf\\xbd\\x20screen").is_some(),
            "{name}"
        );
    }
}

/// Memory full of likenesses: bounded time, whatever a guest makes up.
#[test]
fn likenesses_without_number_end_soon() {
    let (_, layout) = LAYOUTS[8];
    let symbols = symbols_for(layout, 300);
    let one = rodata(&symbols, layout);
    let names = run(&one).unwrap().sources[1].clone();
    let code = one[names.start + 1];
    // Every third word is the count of 300 names that begin at the next word but one, and none has markers.
    let mut bytes = Vec::new();
    while bytes.len() < 24 << 20 {
        bytes.extend([11, code, code, code, 44, 1, 0, 0, code, code, code, code]);
    }
    bytes.extend_from_slice(&one[names.end..]);
    // And many tables of tokens.
    for _ in 0..200 {
        bytes.resize(bytes.len().next_multiple_of(64), 0);
        bytes.extend_from_slice(&one[names.end..]);
    }
    let start = std::time::Instant::now();
    assert!(run(&bytes).is_err());
    assert!(start.elapsed().as_secs() < 60, "{:?}", start.elapsed());
}

/// The seeds of the fuzz target `kallsyms` are tables of this writer; with VMSIGHT_WRITE_SEEDS set they are written anew.
#[test]
fn the_fuzz_seeds_are_tables_of_every_layout() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds/kallsyms");
    for (name, layout) in LAYOUTS {
        let mut bytes = Vec::new();
        encode(&mut bytes, RODATA, &symbols_for(layout, 24), layout);
        assert!(run(&bytes).is_ok(), "{name}");
        let path = folder.join(name.replace(' ', "_"));
        if std::env::var_os("VMSIGHT_WRITE_SEEDS").is_some() {
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(&path, &bytes).unwrap();
        }
        assert_eq!(
            std::fs::read(&path).unwrap(),
            bytes,
            "{} is not what the tests write",
            path.display()
        );
    }
    let mut symbols = symbols_for(LAYOUTS[0].1, 24);
    symbols.retain(|s| s.address > 1 << 47);
    let table: vmsight_symbols::SymbolTable = symbols
        .iter()
        .map(|s| (s.name.as_str(), s.address, s.kind))
        .collect();
    let path = folder.join("symbol_table");
    if std::env::var_os("VMSIGHT_WRITE_SEEDS").is_some() {
        std::fs::write(&path, table.as_bytes()).unwrap();
    }
    assert_eq!(std::fs::read(&path).unwrap(), table.as_bytes());
}

fn arbitrary_symbols() -> impl Strategy<Value = Vec<Sym>> {
    let name = "[a-zA-Z0-9_.$]{1,60}";
    let one = (0..LEN, "[tTdDrRbBwWvVA]", name).prop_map(|(at, kind, name)| Sym {
        address: TEXT + at,
        kind: kind.as_bytes()[0],
        name,
    });
    prop::collection::vec(one, 1..900).prop_map(|mut all| {
        all.push(sym(TEXT, 'T', "_text"));
        // What makes the tokens stand out in every real kernel: all digits occur.
        all.push(sym(TEXT, 't', "digits_0123456789T"));
        all.sort_by_key(|s| s.address);
        all
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn what_was_written_is_read(symbols in arbitrary_symbols(), which in 0..LAYOUTS.len()) {
        let (name, layout) = LAYOUTS[which];
        let k = run(&rodata(&symbols, layout));
        let k = k.map_err(|e| TestCaseError::fail(format!("{name}: {e}")))?;
        prop_assert_eq!(got(&k), expected(&symbols), "{}", name);
    }

    #[test]
    fn forged_tables_never_panic(
        which in 0..LAYOUTS.len(),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..40),
        words in prop::collection::vec((any::<prop::sample::Index>(), any::<u32>()), 0..8),
        cut in any::<prop::sample::Index>(),
    ) {
        let (_, layout) = LAYOUTS[which];
        let mut bytes = rodata(&symbols_for(layout, 600), layout);
        let start = 0x3000;
        for (at, v) in flips {
            let at = start + at.index(bytes.len() - start);
            bytes[at] = v;
        }
        for (at, v) in words {
            let at = (start + at.index(bytes.len() - start - 8)) & !3;
            bytes[at..at + 4].copy_from_slice(&v.to_le_bytes());
        }
        bytes.truncate(bytes.len() - cut.index(bytes.len()) / 4);
        if let Ok(k) = run(&bytes) {
            prop_assert!(k.symbols.as_bytes().len() < 1 << 20);
            k.symbols.iter().for_each(drop);
        }
    }
}
