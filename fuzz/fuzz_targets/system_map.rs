//! Lists of symbols of any bytes: read, or refused with a reason; and put into a profile, they are checked against its own.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use vmsight_symbols::import::{self, FileKind};
use vmsight_symbols::{Profile, ProfileSource, SymbolTable, Types};

static FILE: LazyLock<PathBuf> =
    LazyLock::new(|| std::env::temp_dir().join(format!("vmsight-fuzz-map-{}", std::process::id())));

/// A BTF header, no types, and the empty string.
const NO_TYPES: [u8; 25] = [
    0x9f, 0xeb, 1, 0, 24, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0,
];

/// What the guest has: forty symbols, so that there is enough to compare.
static OWN: LazyLock<SymbolTable> = LazyLock::new(|| {
    let names: Vec<String> = (0..40).map(|i| format!("f{i}")).collect();
    let text = ("_text", 0xffff_ffff_8100_0000, b'T');
    let rest = names
        .iter()
        .enumerate()
        .map(|(i, n)| (n.as_str(), text.1 + 16 * i as u64, b't'));
    std::iter::once(text).chain(rest).collect()
});

fuzz_target!(|data: &[u8]| {
    std::fs::write(&*FILE, data).expect("a file in the folder for temporary ones");
    let Ok(imported) = import::open(&FILE) else { return };
    if imported.kind != FileKind::SystemMap {
        return;
    }
    let symbols = imported
        .symbols
        .clone()
        .expect("a list without symbols is refused");
    assert!(!symbols.is_empty() && symbols.len() <= data.len() / 12);
    let types = Types::from_btf(NO_TYPES.to_vec()).expect("these bytes are whole");
    let mut profile = Profile::new(None, "", OWN.clone(), types, ProfileSource::Memory);
    if imported.apply(&mut profile).is_ok() {
        assert_eq!(profile.symbols, symbols);
        for symbol in symbols.iter() {
            assert!(
                profile
                    .symbols
                    .addresses(symbol.name)
                    .any(|a| a == symbol.address)
            );
        }
        let _ = profile.symbols.nearest(profile.text_start);
    }
});
