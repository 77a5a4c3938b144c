//! Headers of dumps with anything in them: no panic, no promise broken, no more memory than the file is long.

mod files;

use files::{Core, Load, lime, note, qemu_state, virtualbox_notes};
use proptest::prelude::*;
use std::path::Path;
use vmsight_memory::dump::parse_headers;

/// Files to break: one of each kind, small.
fn originals() -> Vec<Vec<u8>> {
    let mut notes = note("QEMU", 0, &qemu_state(0x1000, 440), true);
    notes.extend(note("CORE", 1, &vec![0; 336], true));
    notes.extend(note("VMCOREINFO", 0, b"OSRELEASE=x\n", true));
    let loads = || {
        vec![
            Load::new(0x1000, vec![1; 64]),
            Load::new(0x2000, vec![2; 64]),
            Load::new(0x1040, vec![3; 64]),
        ]
    };
    vec![
        lime(&[(0x1000, vec![1; 64]), (0x2000, vec![2; 64])]),
        Core {
            notes: notes.clone(),
            loads: loads(),
            ..Core::default()
        }
        .build(),
        Core {
            notes,
            loads: loads(),
            wide: false,
            machine: 3,
            ..Core::default()
        }
        .build(),
        Core {
            notes: virtualbox_notes(0x1_0005, &vec![0; 600]),
            loads: loads(),
            extended: true,
            ..Core::default()
        }
        .build(),
    ]
}

/// The promises of parse_headers, whatever it was given.
fn check(data: &[u8], file_len: u64) {
    let Ok(headers) = parse_headers(data, file_len, None) else {
        return;
    };
    let mut end = 0;
    for segment in &headers.segments {
        assert!(segment.len > 0 && segment.gpa.0 >= end, "sorted and disjoint");
        end = segment
            .gpa
            .0
            .checked_add(segment.len)
            .expect("within the address space");
        assert!(
            segment
                .offset
                .checked_add(segment.len)
                .is_some_and(|end| end <= file_len),
            "within the file"
        );
    }
    for pair in headers.missing.windows(2) {
        assert!(pair[0].end() < pair[1].start);
    }
    assert!(headers.segments.len() <= 2 * data.len() + 2 && headers.registers.len() <= data.len() / 12);
    assert!(headers.notes.iter().map(String::len).sum::<usize>() < 4096 + 64 * data.len());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn mutated_headers_do_no_harm(
        which in 0usize..4,
        edits in prop::collection::vec((0usize..4096, prop_oneof![any::<u8>(), Just(0xff), Just(0), Just(0x80)]), 1..12),
        words in prop::collection::vec((0usize..600, prop_oneof![any::<u64>(), Just(u64::MAX), Just(1 << 63), Just(0), 0u64..4096]), 0..4),
        cut in prop::option::of(0usize..4096),
        file_len in prop::option::of(any::<u64>()),
    ) {
        let mut data = originals().swap_remove(which);
        let len = data.len();
        for (at, byte) in edits {
            // Mostly the beginning, where the numbers are.
            data[at % len.min(700)] = byte;
        }
        for (at, word) in words {
            if let Some(place) = data.get_mut(at..at + 8) {
                place.copy_from_slice(&word.to_le_bytes());
            }
        }
        if let Some(cut) = cut {
            data.truncate(cut);
        }
        check(&data, file_len.unwrap_or(data.len() as u64));
    }

    #[test]
    fn every_cut_of_a_file_is_survived(which in 0usize..4, cut in 0usize..2000) {
        let data = originals().swap_remove(which);
        let cut = cut.min(data.len());
        check(&data[..cut], cut as u64);
        check(&data[..cut], data.len() as u64);
    }
}

#[test]
fn a_range_that_ends_at_the_last_address_of_an_endless_file_is_survived() {
    // Found by the fuzzer: the next header would lie just below 2^64.
    check(&files::lime_range(17, u64::MAX - 25, &[]), u64::MAX);
}

/// The fuzzer starts from these files. They are made here and committed; set VMSIGHT_WRITE_SEEDS to write them anew.
#[test]
fn the_fuzz_seeds_are_the_files_made_here() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds/dump_headers");
    for (name, bytes) in ["lime", "elf64", "elf32", "virtualbox"]
        .into_iter()
        .zip(originals())
    {
        let path = folder.join(name);
        if std::env::var_os("VMSIGHT_WRITE_SEEDS").is_some() {
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(&path, &bytes).unwrap();
        }
        assert!(
            std::fs::read(&path).unwrap() == bytes,
            "{} is not what this test makes",
            path.display()
        );
        assert!(parse_headers(&bytes, bytes.len() as u64, None).is_ok());
    }
}
