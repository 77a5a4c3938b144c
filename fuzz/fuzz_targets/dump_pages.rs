//! Dumps whose pages must be looked up or unpacked, made of any bytes: what they say they have is sorted and disjoint, and each
//! page is found where it was said to be, whole or with an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmsight_arch::Gpa;
use vmsight_memory::dump::{DumpFormat, parse_headers, parse_vmware};

/// Pages looked at: what is unpacked bounds the time of a run.
const LOOKED_AT: u64 = 200;

fuzz_target!(|data: &[u8]| {
    let Some((&choice, data)) = data.split_last() else {
        return;
    };
    let format = match choice & 7 {
        0 => DumpFormat::Kdump,
        1 => DumpFormat::Avml,
        2 => DumpFormat::Migration,
        3 => DumpFormat::Elf,
        4 => DumpFormat::Vmware,
        _ => {
            // The state of a memory file of some length.
            let _ = parse_vmware(data, u64::from(choice) << 16);
            return;
        }
    };
    let file_len = data.len() as u64 + u64::from(choice >> 3) * 1000;
    let Ok(headers) = parse_headers(data, file_len, Some(format)) else {
        return;
    };
    let Some((runs, pages)) = headers.paged else {
        return;
    };
    assert!(runs.windows(2).all(|pair| pair[0].end() < pair[1].start));
    // A bit, and a page's record, are what a run takes at least.
    assert!(runs.len() <= 8 * data.len() + 8);
    let mut looked_at = 0;
    let mut bytes = Vec::new();
    for run in &runs {
        let mut at = run.start;
        while at < run.end() && looked_at < LOOKED_AT {
            looked_at += 1;
            let Ok(unit) = pages.unit(data, at) else {
                at = Gpa(at.0 + 4096);
                continue;
            };
            assert!(unit.len > 0 && unit.gpa <= at.0 && at.0 - unit.gpa < u64::from(unit.len));
            if pages.load(data, &unit, &mut bytes).is_ok() {
                assert_eq!(bytes.len(), unit.len as usize);
            }
            at = Gpa(unit.gpa + u64::from(unit.len));
        }
    }
});
