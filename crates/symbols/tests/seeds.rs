//! The fuzz targets start from files that mean something: each is what its name says, or the search begins at nothing.

#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

use std::path::PathBuf;

use vmsight_symbols::import::{FileKind, Imported, open};
use vmsight_symbols::{Kinds, Types};

fn seed(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../fuzz/seeds")
        .join(name)
}

fn imported(name: &str, kind: FileKind) -> Imported {
    let imported = open(&seed(name)).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(imported.kind, kind, "{name}");
    imported
}

#[test]
fn elf_files_are_kernels() {
    for (name, kind, notes) in [
        ("elf/btf", FileKind::ElfBtf, 0),
        ("elf/dwarf", FileKind::Dwarf, 0),
        ("elf/symbols", FileKind::Elf, 0),
    ] {
        let file = imported(name, kind);
        assert_eq!(file.notes.len(), notes, "{name}: {:?}", file.notes);
        assert_eq!(file.build_id, Some((0..20).collect()), "{name}");
        let banner = file.banner.unwrap();
        assert!(banner.starts_with("Linux version 6.1.0-seed"), "{name}: {banner}");
        let symbols = file.symbols.unwrap();
        assert_eq!(
            symbols.address("init_task"),
            Some(0xffff_ffff_8100_0020),
            "{name}"
        );
        assert_eq!(file.types.is_some(), kind != FileKind::Elf);
    }
    let types = imported("elf/dwarf", FileKind::Dwarf).types.unwrap();
    let task = types.find_struct("task").unwrap();
    assert_eq!(types.member_of(task, "comm[2]").unwrap().offset, 14);
    assert_eq!(
        types.size_of(types.find("task_t", Kinds::TYPEDEF).unwrap()),
        Some(16)
    );
    assert_eq!(types.enumerators(types.find_enum("state").unwrap()).count(), 2);
    assert!(types.variable("init_task").is_some());
}

#[test]
fn lists_of_symbols_are_read() {
    let build = imported("system_map/build", FileKind::SystemMap).symbols.unwrap();
    assert_eq!((build.len(), build.address("current_task")), (7, Some(0x1fbc0)));
    let copy = imported("system_map/kallsyms", FileKind::SystemMap);
    assert_eq!(
        (copy.symbols.unwrap().len(), copy.notes.len()),
        (7, 2),
        "{:?}",
        copy.notes
    );
    let hidden = open(&seed("system_map/hidden")).unwrap_err().to_string();
    assert!(hidden.contains("without the right to see them"), "{hidden}");
}

#[test]
fn tables_of_types_are_read() {
    for name in ["isf/described", "isf/exported"] {
        let file = imported(name, FileKind::Isf);
        let types = file.types.unwrap();
        let pid = types.member("task_struct", "pid").unwrap();
        assert_eq!(pid.offset, 8, "{name}");
        assert_eq!(
            types.structs("task_struct").count(),
            1 + usize::from(name == "isf/exported")
        );
        assert!(file.symbols.unwrap().address("init_task").is_some());
    }
}

#[test]
fn blobs_are_whole_split_indexed_and_distilled() {
    let parts = |name: &str| {
        let data = std::fs::read(seed(name)).unwrap();
        let (data, &[low, high, choice]) = data.split_last_chunk::<3>().unwrap();
        let (first, second) = data.split_at(usize::from(u16::from_le_bytes([low, high])));
        (first.to_vec(), second.to_vec(), choice)
    };
    let (whole, rest, choice) = parts("btf/whole");
    assert_eq!((rest.len(), choice % 4), (0, 0));
    let kernel = Types::from_btf(whole.clone()).unwrap();
    assert_eq!(kernel.member("task_struct", "comm").unwrap().offset, 32);
    assert_eq!(kernel.member("task_struct", "three").unwrap().bit_size, Some(3));
    let (base, module, choice) = parts("btf/split");
    assert_eq!((base == whole, choice % 4), (true, 1));
    let split = Types::from_split_btf(&kernel, module.clone()).unwrap();
    assert_eq!(split.member("probe_state", "task.comm").unwrap().offset, 32);
    let (blob, index, choice) = parts("btf/index");
    assert_eq!(choice % 4, 2);
    let indexed = Types::from_parts(blob, index.clone(), None).unwrap();
    assert_eq!(
        index,
        kernel.index_bytes(),
        "what make-seeds writes is what vmsight does"
    );
    assert!(indexed.find_struct("list_head").is_some());
    let (base, module, choice) = parts("btf/distilled");
    assert_eq!(choice % 4, 3);
    let (types, _) = Types::from_distilled_btf(&kernel, base, module).unwrap();
    assert!(types.find_struct("probe_state").is_some());
}
