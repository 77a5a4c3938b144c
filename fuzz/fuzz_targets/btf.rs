//! BTF of any bytes, whole or split, with any index: whatever is asked of it, the answer comes, in bounded time.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmsight_symbols::layout::{LayoutOptions, layout, named, search};
use vmsight_symbols::{Kinds, Types};

fuzz_target!(|data: &[u8]| {
    // The last bytes choose how the rest is taken: the kind of blob, and where a first blob ends and a second begins.
    let Some((data, &[low, high, choice])) = data.split_last_chunk::<3>() else {
        return;
    };
    let (first, second) = data.split_at(usize::from(u16::from_le_bytes([low, high])).min(data.len()));
    match choice % 4 {
        0 => {
            if let Ok(types) = Types::from_btf(data.to_vec()) {
                let parts = Types::from_parts(types.btf().clone(), types.index_bytes(), None);
                let again = parts.expect("an index fits the blob it was made of");
                assert_eq!(again.len(), types.len());
                for t in types.iter().take(50) {
                    assert_eq!(
                        again.find(t.name(), Kinds::all()),
                        types.find(t.name(), Kinds::all())
                    );
                }
                ask(&types);
            }
        }
        1 => {
            let Ok(base) = Types::from_btf(first.to_vec()) else {
                return;
            };
            if let Ok(types) = Types::from_split_btf(&base, second.to_vec()) {
                ask(&types);
            }
        }
        2 => {
            if let Ok(types) = Types::from_parts(first.to_vec(), second.to_vec(), None) {
                ask(&types);
            }
        }
        // A kernel that is its own distilled base, as far as the names go.
        _ => {
            let Ok(base) = Types::from_btf(first.to_vec()) else {
                return;
            };
            if let Ok((types, _)) = Types::from_distilled_btf(&base, first.to_vec(), second.to_vec()) {
                ask(&types);
            }
        }
    }
});

fn ask(types: &Types) {
    let mut layouts = 8;
    for t in types.iter().take(200) {
        let name = t.name();
        assert!(types.type_name(t.id()).len() < 1 << 20);
        let _ = (
            t.size(),
            types.resolve(t.id()),
            t.int(),
            t.array(),
            t.component(),
            t.is_union(),
        );
        let _ = (t.params().count(), t.section_vars().count());
        assert!(t.members().count() <= t.vlen() as usize);
        assert!(t.enumerators().count() <= t.vlen() as usize);
        let _ = (
            types.find_struct(name),
            types.find_enum(name),
            types.variable(name),
            named(types, name),
        );
        for member in t.members().take(4) {
            if let Some(field) = types.member_of(t.id(), member.name) {
                assert!(field.bit_size.is_none() || matches!(field.size, 1 | 2 | 4 | 8));
                let _ = field.extract(u64::MAX);
            }
        }
        if let Some(e) = t.enumerators().last() {
            let _ = types.enumerator(e.name);
        }
        if layouts > 0 && t.kind().is_composite() {
            layouts -= 1;
            let shown = layout(
                types,
                t.id(),
                &LayoutOptions {
                    expand: 1,
                    cachelines: true,
                },
            );
            let _ = shown.map(|l| l.to_string().len());
        }
    }
    let _ = search(types, "*a?b*", Kinds::all()).count();
}
