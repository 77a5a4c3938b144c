use std::io::{Read, Write};

use proptest::prelude::*;

use super::*;
use crate::layout::{LayoutOptions, Row, layout};
use crate::types::random::{exercise, plans, write};
use crate::types::{Builder, Def, MemberDef, TypeId};
use crate::{Profile, ProfileSource, export};

const BANNER: &str = "Linux version 6.1.0-test (me@there) (gcc) #1 SMP";

/// A kernel of a few types and symbols.
fn profile() -> Profile {
    let mut b = Builder::new();
    let int = b.add(&Def::int("int", 4, true));
    let uint = b.add(&Def::int("unsigned int", 4, false));
    let char = b.add(&Def::int("char", 1, true));
    let bool = b.add(&Def::Int {
        name: "_Bool",
        size: 1,
        signed: false,
        is_char: false,
        is_bool: true,
    });
    let member = |name, type_id, bit_offset| MemberDef {
        name,
        type_id,
        bit_offset,
        bit_size: None,
    };
    let head = b.reserve();
    let next = b.add(&Def::Ptr(head));
    let heads = [member("next", next, 0), member("prev", next, 64)];
    b.define(
        head,
        &Def::Struct {
            name: "list_head",
            size: 16,
            members: &heads,
        },
    );
    let counter = b.add(&Def::Struct {
        name: "",
        size: 4,
        members: &[member("counter", int, 0)],
    });
    let atomic = b.add(&Def::Typedef {
        name: "atomic_t",
        target: counter,
    });
    let either = b.add(&Def::Union {
        name: "",
        size: 4,
        members: &[member("signed_one", int, 0), member("unsigned_one", uint, 0)],
    });
    let state = b.add(&Def::Enum {
        name: "state",
        size: 4,
        signed: true,
        values: &[("GONE", -1), ("HERE", 7)],
    });
    let proto = b.add(&Def::FuncProto {
        result: int,
        params: &[("x", int)],
    });
    let call = b.add(&Def::Ptr(proto));
    let hidden = b.add(&Def::Fwd {
        name: "hidden",
        is_union: false,
    });
    let hidden_ptr = b.add(&Def::Ptr(hidden));
    let comm = b.add(&Def::Array {
        element: char,
        index: uint,
        count: 16,
    });
    let task = b.reserve();
    let parent = b.add(&Def::Ptr(task));
    let bit = |name, bit_offset, width| MemberDef {
        bit_size: Some(width),
        ..member(name, uint, bit_offset)
    };
    let members = [
        member("tasks", head, 0),
        member("usage", atomic, 128),
        member("", either, 160),
        bit("in_exec", 192, 1),
        bit("wide", 197, 11),
        member("state", state, 224),
        member("call", call, 256),
        member("secret", hidden_ptr, 320),
        member("comm", comm, 384),
        member("parent", parent, 512),
        member("done", bool, 576),
    ];
    b.define(
        task,
        &Def::Struct {
            name: "task_struct",
            size: 80,
            members: &members,
        },
    );
    // A second one of the same name.
    b.add(&Def::Struct {
        name: "list_head",
        size: 8,
        members: &[member("other", int, 0)],
    });
    let symbols = [
        ("_text", 0xffff_ffff_8100_0000, b'T'),
        ("schedule", 0xffff_ffff_8110_0000, b'T'),
        ("twice", 0xffff_ffff_8110_1000, b't'),
        ("twice", 0xffff_ffff_8110_2000, b'T'),
        ("linux_banner", 0xffff_ffff_8200_0000, b'D'),
        ("init_task", 0xffff_ffff_8260_0000, b'D'),
        ("modules", 0xffff_ffff_8260_1000, b'd'),
    ];
    let symbols = symbols.into_iter().collect();
    let types = b.finish().unwrap();
    Profile::new(
        Some(vec![0xab; 20]),
        BANNER,
        symbols,
        types,
        ProfileSource::Memory,
    )
}

fn exported(profile: &Profile, xz: Option<u32>) -> Vec<u8> {
    let mut out = Vec::new();
    export::isf(profile, &mut out, xz).unwrap();
    out
}

fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// The rows of a type, in an order that does not depend on that of union members.
fn rows(types: &Types, id: TypeId) -> Vec<Row> {
    let mut rows: Vec<Row> = layout(types, id, &LayoutOptions::default())
        .unwrap()
        .rows()
        .cloned()
        .collect();
    rows.sort_by(|a, b| (a.offset, a.bit_offset, &a.name).cmp(&(b.offset, b.bit_offset, &b.name)));
    rows
}

#[test]
fn what_is_exported_is_imported() {
    let profile = profile();
    for xz in [None, Some(1)] {
        let bytes = exported(&profile, xz);
        assert_eq!(
            bytes,
            exported(&profile, xz),
            "the same profile gives the same bytes"
        );
        let imported = open(file(&bytes).path()).unwrap();
        assert_eq!(imported.kind, FileKind::Isf);
        assert_eq!(imported.banner.as_deref(), Some(BANNER));
        assert_eq!(imported.build_id, profile.build_id);
        assert!(imported.notes.is_empty(), "{:?}", imported.notes);
        assert_eq!(imported.check(&(&profile).into()), Ok(Checked::BuildId));
        let symbols = imported.symbols.unwrap();
        for name in ["_text", "schedule", "linux_banner", "init_task", "modules"] {
            assert_eq!(symbols.address(name), profile.symbols.address(name), "{name}");
        }
        assert_eq!(
            symbols.address("twice"),
            Some(0xffff_ffff_8110_2000),
            "the global one"
        );
        let types = imported.types.unwrap();
        let task = types.find_struct("task_struct").unwrap();
        let mut meant = rows(&profile.types, profile.types.find_struct("task_struct").unwrap());
        // Typedefs and the parameters of functions are what this form does not keep.
        for row in &mut meant {
            row.type_name = match row.type_name.as_str() {
                "atomic_t" => "struct atomic_t".into(),
                "int (*)(int)" => "void (*)(...)".into(),
                same => same.into(),
            };
        }
        assert_eq!(rows(&types, task), meant);
        assert_eq!(types.enumerator("GONE"), Some(-1));
        assert_eq!(types.all("list_head").count(), 2);
        assert_eq!(types.member("list_head", "other").unwrap().offset, 0);
        assert_eq!(types.variable("init_task"), Some(task));
        assert_eq!(types.variable("modules"), types.find_struct("list_head"));
        assert_eq!(types.variable("schedule"), None);
        // And once more: nothing is lost on the way back.
        let again = Profile::new(
            Some(vec![0xab; 20]),
            BANNER,
            symbols,
            types.clone(),
            ProfileSource::Memory,
        );
        let second = isf_from_slice(&exported(&again, None)).unwrap().types.unwrap();
        assert_eq!(rows(&second, second.find_struct("task_struct").unwrap()), meant);
    }
}

#[test]
fn a_table_in_dwarf2jsons_words_is_read() {
    let json = r#"{
      "base_types": {"int": {"size": 4, "signed": true, "kind": "int", "endian": "little"},
                     "pointer": {"size": 8, "signed": false, "kind": "int", "endian": "little"},
                     "void": {"size": 0, "signed": false, "kind": "void", "endian": "little"}},
      "enums": {"pid_type": {"size": 4, "base": "unsigned int", "constants": {"PIDTYPE_PID": 0, "PIDTYPE_MAX": 4}}},
      "metadata": {"linux": {"symbols": [{"kind": "dwarf", "name": "vmlinux", "hash_type": "sha256", "hash_value": "00"}]},
                   "producer": {"name": "dwarf2json", "version": "0.9.0"}, "format": "6.2.0"},
      "symbols": {"init_task": {"type": {"kind": "struct", "name": "task_struct"}, "address": 18446744071600000000},
                  "linux_banner": {"type": {"count": 9, "kind": "array", "subtype": {"kind": "base", "name": "int"}},
                                   "address": 18446744071590000000, "constant_data": "TGludXggdmVyc2lvbiA2CgA="}},
      "user_types": {
        "task_struct": {"size": 24, "kind": "struct", "fields": {
            "unnamed_field_8": {"type": {"kind": "union", "name": "unnamed_5b"}, "offset": 8, "anonymous": true},
            "flag": {"type": {"kind": "bitfield", "bit_position": 3, "bit_length": 2, "type": {"kind": "base", "name": "int"}}, "offset": 4},
            "next": {"type": {"kind": "pointer", "subtype": {"kind": "struct", "name": "task_struct"}}, "offset": 16}}},
        "unnamed_5b": {"size": 8, "kind": "union", "fields": {
            "pid": {"type": {"kind": "base", "name": "int"}, "offset": 0},
            "kind": {"type": {"kind": "enum", "name": "pid_type"}, "offset": 0}}}}
    }"#;
    let imported = open(file(json.as_bytes()).path()).unwrap();
    assert_eq!(imported.banner.as_deref(), Some("Linux version 6"));
    assert_eq!((imported.build_id, imported.notes), (None, vec![]));
    let types = imported.types.unwrap();
    let field = |path| {
        types
            .member("task_struct", path)
            .map(|f| (f.offset, f.bit_offset, f.bit_size, f.size))
    };
    assert_eq!(field("pid"), Some((8, 0, None, 4)));
    assert_eq!(field("flag"), Some((4, 3, Some(2), 4)));
    assert_eq!(field("next"), Some((16, 0, None, 8)));
    assert_eq!(types.enumerator("PIDTYPE_MAX"), Some(4));
    assert_eq!(
        imported.symbols.unwrap().address("init_task"),
        Some(18446744071600000000)
    );
}

#[test]
fn the_wrong_file_is_refused_with_both_marks() {
    let profile = profile();
    let imported = isf_from_slice(&exported(&profile, None)).unwrap();
    let mut other = profile.clone();
    other.build_id = Some(vec![0xcd; 20]);
    let error = imported.check(&(&other).into()).unwrap_err();
    assert_eq!(
        (error.by, error.file.as_str(), error.target.as_str()),
        ("build-id", &*"ab".repeat(20), &*"cd".repeat(20))
    );
    other.build_id = None;
    other.banner = "Linux version 6.1.0-other".into();
    let error = imported.check(&(&other).into()).unwrap_err();
    assert_eq!(
        (error.by, error.file.as_str(), error.target.as_str()),
        ("banner", BANNER, "Linux version 6.1.0-other")
    );
    let text = error.to_string();
    assert!(text.contains(BANNER) && text.contains("6.1.0-other"), "{text}");
    other.banner = BANNER.into();
    assert_eq!(imported.check(&(&other).into()), Ok(Checked::Banner));
    let before = profile.clone();
    let mut kept = before.clone();
    kept.build_id = Some(vec![1; 20]);
    assert!(imported.apply(&mut kept).is_err());
    assert_eq!(kept.symbols, before.symbols);
}

#[test]
fn a_system_map_is_compared_by_its_addresses() {
    let map = |slide: u64| -> String {
        (0..500u64)
            .map(|i| {
                format!(
                    "{:016x} T function_{i}\n",
                    0xffff_ffff_8100_0000 + i * 64 + slide * i
                )
            })
            .collect()
    };
    let read = |text: &str| open(file(text.as_bytes()).path());
    let right = read(&map(0)).unwrap();
    assert_eq!(
        (right.kind, right.symbols.as_ref().map(|s| s.len())),
        (FileKind::SystemMap, Some(500))
    );
    let symbols = right.symbols.clone().unwrap();
    let kernel = Identity {
        symbols: Some(&symbols),
        ..Identity::default()
    };
    assert_eq!(right.check(&kernel), Ok(Checked::Symbols));
    let error = read(&map(16)).unwrap().check(&kernel).unwrap_err();
    assert_eq!(
        (error.by, error.file.as_str()),
        ("symbols", "function_1 at 0xffffffff81000050")
    );
    assert_eq!(right.check(&Identity::default()), Ok(Checked::Unchecked));

    let odd = read(
        "ffffffff81000000 T _text\nrubbish\n\nffffffffc0000000 t init\t[ext4]\nffffffff81000010 D x y z\n",
    )
    .unwrap();
    assert_eq!(odd.symbols.unwrap().len(), 1);
    assert_eq!(odd.notes.len(), 2, "{:?}", odd.notes);
    let error = read("0000000000000000 T _text\n0000000000000000 T _stext\n")
        .unwrap_err()
        .to_string();
    assert!(error.contains("/proc/kallsyms"), "{error}");
}

#[test]
fn files_are_known_by_their_first_bytes() {
    let types = profile().types;
    let bare = open(file(types.btf().as_slice()).path()).unwrap();
    assert_eq!(
        (bare.kind, bare.types.unwrap().len()),
        (FileKind::Btf, types.len())
    );
    for nothing in [
        &b""[..],
        b"hello",
        b"\x7fELF",
        b"\x1f\x8bxx",
        b"{",
        b"{}",
        b"\xfd7zXZ\0oops",
        b"\x9f\xeb\x01",
    ] {
        let error = open(file(nothing).path()).unwrap_err().to_string();
        assert!(error.starts_with("reading /"), "{error}");
    }
    assert!(open(Path::new("/nonexistent/file")).is_err());
    assert!(open(Path::new("/dev/null")).is_err());
    let mac = r#"{"metadata": {"format": "6.2.0", "mac": {}}, "symbols": {}}"#;
    assert!(
        open(file(mac.as_bytes()).path())
            .unwrap_err()
            .to_string()
            .contains("macOS")
    );
}

#[test]
fn gzip_and_bzip2_are_unpacked() {
    let json = exported(&profile(), None);
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(&json).unwrap();
    let mut bz = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
    bz.write_all(&json).unwrap();
    for packed in [gz.finish().unwrap(), bz.finish().unwrap()] {
        assert_eq!(open(file(&packed).path()).unwrap().symbols.unwrap().len(), 6);
        let cut = &packed[..packed.len() / 2];
        assert!(open(file(cut).path()).is_err());
    }
}

#[test]
fn a_small_file_cannot_unpack_into_all_memory() {
    let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 0);
    xz.write_all(b"{").unwrap();
    xz.write_all(&vec![b' '; 3 << 20]).unwrap();
    let packed = file(&xz.finish().unwrap());
    let error = source::Source::open(packed.path())
        .unwrap()
        .all(packed.path(), FileKind::Isf, 2)
        .unwrap_err();
    assert!(
        matches!(
            error,
            ImportError::TooLarge {
                limit: 2,
                unpacked: true,
                ..
            }
        ),
        "{error}"
    );
    let mut all = Vec::new();
    source::Source::open(packed.path())
        .unwrap()
        .reader(4)
        .read_to_end(&mut all)
        .unwrap();
    assert_eq!(all.len(), (3 << 20) + 1);
}

#[test]
fn nesting_without_end_is_refused() {
    let deep = format!(
        r#"{{"metadata":{{"format":"6.2.0"}},"symbols":{{"x":{{"address":1,"type":{}{}}}}}}}"#,
        r#"{"kind":"pointer","subtype":"#.repeat(100_000),
        "}".repeat(100_000)
    );
    assert!(isf_from_slice(deep.as_bytes()).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn random_types_survive_the_way_out_and_back(plans in plans()) {
        let mut builder = Builder::new();
        write(&mut builder, &plans);
        let types = builder.finish().unwrap();
        let symbols = [("_text", 0xffff_ffff_8100_0000, b'T')].into_iter().collect();
        let profile = Profile::new(None, BANNER, symbols, types, ProfileSource::Memory);
        let json = exported(&profile, None);
        let parsed: serde_json::Value = serde_json::from_slice(&json).unwrap();
        let back = isf_from_slice(&json).unwrap().types.unwrap();
        exercise(&back);
        // Every struct and union is there under a name of its own, with its size.
        let composites: Vec<_> = profile.types.iter().filter(|t| t.kind().is_composite()).collect();
        prop_assert_eq!(parsed["user_types"].as_object().unwrap().len(), composites.len());
        // "x__2" is what export calls the second x, so a type of that very name comes back as another x.
        let double = |name: &str| name.rsplit_once("__").is_some_and(|(_, n)| n.parse::<u32>().is_ok());
        for t in composites.iter().filter(|t| !t.name().is_empty() && !double(t.name())) {
            let same = |id| back.get(id).is_some_and(|b| b.kind() == t.kind() && b.declared_size() == t.declared_size());
            prop_assert!(back.all(t.name()).any(same), "{}", t.name());
        }
    }

    #[test]
    fn a_damaged_table_is_refused_or_read(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        numbers in prop::collection::vec((any::<prop::sample::Index>(), any::<i64>()), 0..6),
    ) {
        let mut json = exported(&profile(), None);
        // Other numbers make sense as JSON, and none as a table.
        for (at, number) in &numbers {
            let digits: Vec<usize> = (1..json.len()).filter(|&i| json[i].is_ascii_digit() && json[i - 1] == b':').collect();
            let start = digits[at.index(digits.len())];
            let end = (start..json.len()).find(|&i| !json[i].is_ascii_digit()).unwrap();
            json.splice(start..end, number.to_string().into_bytes());
        }
        if let Ok(imported) = isf_from_slice(&json) {
            imported.types.iter().for_each(exercise);
        }
        for (at, value) in &damage {
            let at = at.index(json.len());
            json[at] = *value;
        }
        if let Ok(imported) = isf_from_slice(&json) {
            imported.types.iter().for_each(exercise);
        }
    }
}
