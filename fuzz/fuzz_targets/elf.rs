//! ELF files of any bytes, as vmlinux with a symbol table, BTF or DWARF: read, or refused with a reason, in bounded time.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use vmsight_symbols::import;

/// Files are read here and there, so the input has to be one.
static FILE: LazyLock<PathBuf> =
    LazyLock::new(|| std::env::temp_dir().join(format!("vmsight-fuzz-elf-{}", std::process::id())));

fuzz_target!(|data: &[u8]| {
    // Anything else is another target's.
    if !data.starts_with(b"\x7fELF") {
        return;
    }
    std::fs::write(&*FILE, data).expect("a file in the folder for temporary ones");
    let Ok(imported) = import::open(&FILE) else { return };
    assert!(imported.symbols.is_some() || imported.types.is_some());
    if let Some(symbols) = &imported.symbols {
        let mut last = 0;
        for symbol in symbols.iter() {
            assert!(symbol.address >= last);
            last = symbol.address;
        }
    }
    let Some(types) = &imported.types else { return };
    for t in types.iter().take(500) {
        assert!(types.type_name(t.id()).len() < 1 << 20);
        let _ = (t.size(), t.enumerators().count());
        for member in t.members().take(8) {
            let _ = types.member_of(t.id(), member.name);
        }
    }
});
