//! Headers of dumps made of any bytes: what they describe is sorted, disjoint and within the file, whatever they claim.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmsight_memory::dump::{DumpFormat, RawLayout, parse_headers};

fuzz_target!(|data: &[u8]| {
    // The last byte chooses what the caller says; the length is the real one, or one of a file of which this is the start.
    let Some((&choice, data)) = data.split_last() else {
        return;
    };
    let format = match choice & 7 {
        0 => Some(DumpFormat::Lime),
        1 => Some(DumpFormat::Elf),
        2 => Some(DumpFormat::Raw(RawLayout::Flat)),
        3 => Some(DumpFormat::Raw(RawLayout::Split { below: 0x8000_0000 })),
        _ => None,
    };
    let file_len = match choice >> 3 {
        0 => u64::MAX,
        1 => 1 << 40,
        2 => data.len() as u64 / 2,
        _ => data.len() as u64,
    };
    let Ok(headers) = parse_headers(data, file_len, format) else {
        return;
    };
    let mut end = 0;
    for segment in &headers.segments {
        assert!(segment.len > 0 && segment.gpa.0 >= end);
        end = segment
            .gpa
            .0
            .checked_add(segment.len)
            .expect("within the address space");
        assert!(
            segment
                .offset
                .checked_add(segment.len)
                .is_some_and(|end| end <= file_len)
        );
    }
    assert!(
        headers
            .missing
            .windows(2)
            .all(|pair| pair[0].end() < pair[1].start)
    );
    assert!(headers.segments.len() <= 2 * data.len() + 2);
    assert!(headers.registers.len() <= data.len() / 12);
});
