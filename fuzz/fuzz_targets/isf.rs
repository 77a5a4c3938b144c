//! Symbol tables of any bytes: read, or refused with a reason. What is read can be written, and read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmsight_symbols::{Kind, Profile, ProfileSource, export, import};

fuzz_target!(|data: &[u8]| {
    let Ok(imported) = import::isf_from_slice(data) else {
        return;
    };
    let (Some(symbols), Some(types)) = (imported.symbols, imported.types) else {
        return;
    };
    for t in types.iter().take(200) {
        let _ = (
            t.size(),
            types.type_name(t.id()).len(),
            t.members().count(),
            t.enumerators().count(),
        );
        let _ = types.member_of(t.id(), "a[1].b");
    }
    let count = |types: &vmsight_symbols::Types| types.iter().filter(|t| t.kind() == Kind::Struct).count();
    let structs = count(&types);
    let banner = imported.banner.unwrap_or_default();
    let profile = Profile::new(imported.build_id, banner, symbols, types, ProfileSource::Memory);
    let mut out = Vec::new();
    if export::isf(&profile, &mut out, None).is_ok() {
        let again = import::isf_from_slice(&out).expect("what is exported can be imported");
        assert_eq!(again.types.as_ref().map_or(0, count), structs);
    }
});
