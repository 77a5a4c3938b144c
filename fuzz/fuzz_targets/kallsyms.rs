//! Read-only data of a kernel made of any bytes: symbols come out sorted and in print, or a reason; and a symbol table out of
//! any bytes answers every question.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmsight_symbols::kallsyms::{Image, Section, decode, exports};
use vmsight_symbols::{Bytes, SymbolTable};

/// What the seeds are made for: the tests of the symbols crate write them.
const TEXT: u64 = 0xffff_ffff_9380_0000;
const LEN: u64 = 0x300_0000;
const RODATA: u64 = TEXT + 0x100_0000;
const SLIDE: u64 = 0x1280_0000;

fuzz_target!(|data: &[u8]| {
    let section = Section {
        bytes: data,
        address: RODATA,
    };
    let image = Image {
        span: TEXT..TEXT + LEN,
        slide: SLIDE,
    };
    if let Ok(found) = decode(section, &image) {
        let symbols = &found.symbols;
        // Each byte of the table can stand for at most 128 on the average of a block.
        assert!(symbols.as_bytes().len() <= 200 * data.len() + (1 << 10));
        assert!(
            found
                .sources
                .iter()
                .all(|r| r.start <= r.end && r.end <= data.len())
        );
        let mut last = 0;
        for symbol in symbols.iter() {
            assert!(symbol.address >= last);
            assert!(symbol.name.bytes().all(|b| b.is_ascii_graphic()));
            last = symbol.address;
        }
        if let Some(first) = symbols.get(symbols.len() / 2) {
            assert!(symbols.addresses(first.name).any(|a| a == first.address));
        }
    }
    for export in exports::find(section, &image).symbols {
        assert!(!export.name.is_empty());
    }
    if let Ok(table) = SymbolTable::from_bytes(Bytes::from(data.to_vec())) {
        table.iter().for_each(drop);
        let _ = table.nearest(TEXT);
        let _ = table.addresses("init_task").count();
    }
});
