//! Modules' files of any bytes: refused with a reason, or laid out as the loader would, with no more than the file has.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmsight_analysis::baseline::{AlternativeLayout, ModuleFile, Outside};
use vmsight_arch::Gva;

fuzz_target!(|data: &[u8]| {
    let Ok(file) = ModuleFile::parse(data) else { return };
    let sections = [".text", ".init.text", ".rodata", ".data", ".altinstr_replacement"];
    let sections: Vec<(&str, Gva)> = (0..)
        .zip(sections)
        .map(|(n, name)| (name, Gva(0xffff_ffff_c000_0000 + n * 4096)))
        .collect();
    let placed = file.placed(&Outside {
        sections: &sections,
        per_cpu: Some(Gva(0x1000)),
        symbol: &|name| (name.len() % 2 == 0).then_some(name.len() as u64),
    });
    for section in placed.code().chain(placed.constants()) {
        assert!(section.bytes.len() <= data.len());
        assert!(
            section
                .unknown
                .iter()
                .all(|place| place.end <= section.bytes.len())
        );
        assert!(section.pointers.iter().all(|at| at + 8 <= section.bytes.len()));
    }
    let layout = AlternativeLayout {
        size: 14,
        length: 12,
        replacement_length: 13,
    };
    // A site is a place that a table refers to, or a symbol.
    assert!(placed.sites(Some(layout)).len() <= data.len());
    assert!(placed.missing().count() + placed.exports().count() <= data.len());
});
