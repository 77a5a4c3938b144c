use super::*;
use vmsight_symbols::types::{Builder, Def, MemberDef};

/// A member of a structure.
pub(crate) fn member(
    name: &'static str,
    type_id: TypeId,
    bit_offset: u64,
    bit_size: Option<u8>,
) -> MemberDef<'static> {
    MemberDef {
        name,
        type_id,
        bit_offset,
        bit_size,
    }
}

/// An unsigned integer.
pub(crate) fn int(builder: &mut Builder, name: &'static str, size: u32) -> TypeId {
    builder.add(&Def::Int {
        name,
        size,
        signed: false,
        is_char: size == 1,
        is_bool: false,
    })
}

/// The object `name` in memory that holds `memory` from address 0x1000 on and nothing else.
fn object(builder: Builder, memory: &[u8], name: &str, fields: &[&str]) -> Object {
    let types = builder.finish().unwrap();
    let read = |at: Gva, buf: &mut [u8]| {
        let from = usize::try_from(at.0.wrapping_sub(0x1000)).unwrap_or(usize::MAX);
        match from.checked_add(buf.len()).and_then(|to| memory.get(from..to)) {
            Some(bytes) => {
                buf.copy_from_slice(bytes);
                Ok(())
            }
            None => Err(nothing_there(at)),
        }
    };
    let name_of = |at: Gva| (at.0 == 0xffff_8000_0000_1234).then(|| "somewhere".to_owned());
    let source = Source {
        types: &types,
        read: &read,
        name_of: &name_of,
    };
    let fields: Vec<String> = fields.iter().map(|f| (*f).to_owned()).collect();
    super::read(&source, Gva(0x1000), name, &fields).unwrap()
}

fn nothing_there(gva: Gva) -> ReadError {
    ReadError {
        gva,
        cause: vmsight_memory::ReadCause::Unstable,
    }
}

fn value<'o>(object: &'o Object, member: &str) -> &'o Map<String, Value> {
    object.rows.iter().find(|r| r["member"] == member).unwrap()
}

/// A structure that contains itself without a name, as type data made up by a guest can say: no end, no rows.
#[test]
fn a_structure_that_is_its_own_anonymous_member_ends() {
    let mut b = Builder::new();
    let id = b.reserve();
    let members: Vec<_> = (0..8).map(|_| member("", id, 0, None)).collect();
    b.define(
        id,
        &Def::Struct {
            name: "ouroboros",
            size: 8,
            members: &members,
        },
    );
    let object = object(b, &[0; 64], "ouroboros", &[]);
    assert!(object.rows.is_empty());
    assert_eq!(object.warnings.len(), 1, "{:?}", object.warnings);
}

#[test]
fn an_array_of_itself_ends() {
    let mut b = Builder::new();
    let index = int(&mut b, "int", 4);
    let id = b.reserve();
    b.define(
        id,
        &Def::Array {
            element: id,
            index,
            count: 1000,
        },
    );
    b.add(&Def::Struct {
        name: "holder",
        size: 8,
        members: &[member("a", id, 0, None)],
    });
    let object = object(b, &[0; 64], "holder", &[]);
    assert!(object.rows.len() <= ROWS && !object.warnings.is_empty());
}

/// Widths and offsets that no compiler makes.
#[test]
fn impossible_bitfields_are_marked() {
    let mut b = Builder::new();
    let long = int(&mut b, "long", 8);
    b.add(&Def::Struct {
        name: "bits",
        size: 64,
        members: &[
            member("good", long, 3, Some(5)),
            member("whole", long, 9, Some(64)),
            member("wide", long, 7, Some(255)),
        ],
    });
    let mut memory = [0u8; 64];
    memory[0] = 0b1010_1111;
    memory[1..10].fill(0xff);
    let object = object(b, &memory, "bits", &[]);
    assert_eq!(value(&object, "good")["value"], 0b10101);
    assert_eq!(value(&object, "whole")["value"], u64::MAX);
    assert!(value(&object, "wide")["value"].is_null());
    assert_eq!(
        value(&object, "wide")["problems"][0],
        "value: it has more than 64 bits"
    );
}

/// Rows have the same keys, and a member may be called what a column is called.
#[test]
fn values_by_kind() {
    let mut b = Builder::new();
    let (int4, void) = (int(&mut b, "int", 4), TypeId::VOID);
    let pointer = b.add(&Def::Ptr(void));
    let kinds = b.add(&Def::Enum {
        name: "kind",
        size: 4,
        signed: true,
        values: &[("GOOD", 1), ("BAD", -1)],
    });
    b.add(&Def::Struct {
        name: "thing",
        size: 32,
        members: &[
            member("address", int4, 0, None),
            member("known", kinds, 32, None),
            member("unknown", kinds, 64, None),
            member("to", pointer, 128, None),
            member("away", int4, 8 * 4096, None),
        ],
    });
    let mut memory = [0u8; 32];
    memory[0] = 7;
    memory[4..8].fill(0xff);
    memory[8] = 9;
    memory[16..24].copy_from_slice(&0xffff_8000_0000_1234u64.to_le_bytes());
    let object = object(b, &memory, "thing", &[]);
    for row in &object.rows {
        assert_eq!(row.keys().map(String::as_str).collect::<Vec<_>>(), COLUMNS);
    }
    let row = value(&object, "address");
    assert_eq!((&row["address"], &row["value"]), (&"0x1000".into(), &7.into()));
    assert_eq!(value(&object, "known")["value"], "BAD");
    assert_eq!(value(&object, "unknown")["value"], "9");
    assert_eq!(value(&object, "to")["value"], "0xffff800000001234");
    assert_eq!(value(&object, "to")["symbol"], "somewhere");
    let away = value(&object, "away");
    assert!(away["value"].is_null() && object.unreadable);
    assert!(
        away["problems"][0].as_str().unwrap().starts_with("value: "),
        "{away:?}"
    );
}

#[test]
fn what_is_cut_says_so() {
    let mut b = Builder::new();
    let (int4, char1) = (int(&mut b, "int", 4), int(&mut b, "char", 1));
    let numbers = b.add(&Def::Array {
        element: int4,
        index: int4,
        count: 100,
    });
    let text = b.add(&Def::Array {
        element: char1,
        index: int4,
        count: 5000,
    });
    let inner = b.add(&Def::Struct {
        name: "inner",
        size: 4,
        members: &[member("x", int4, 0, None)],
    });
    let many = b.add(&Def::Array {
        element: inner,
        index: int4,
        count: 70,
    });
    b.add(&Def::Struct {
        name: "outer",
        size: 8192,
        members: &[
            member("numbers", numbers, 0, None),
            member("text", text, 0, None),
            member("many", many, 0, None),
        ],
    });
    let memory = vec![b'x'; 8192];
    let object = object(b, &memory, "outer", &[]);
    assert_eq!(value(&object, "numbers")["value"].as_array().unwrap().len(), 64);
    assert_eq!(
        value(&object, "numbers")["problems"][0],
        "value: the first 64 of 100 elements"
    );
    assert_eq!(value(&object, "text")["value"].as_str().unwrap().len(), 4096);
    assert_eq!(
        value(&object, "text")["problems"][0],
        "value: the first 4096 of 5000 bytes"
    );
    assert_eq!(
        value(&object, "many[…]")["problems"][0],
        "value: the first 64 of 70 elements"
    );
    assert!(
        object.warnings[0].starts_with("3 of the values"),
        "{:?}",
        object.warnings
    );
    assert!(!object.unreadable);
}

#[test]
fn more_members_than_rows_is_said() {
    let mut b = Builder::new();
    let int4 = int(&mut b, "int", 4);
    let index = int4;
    let row = b.add(&Def::Array {
        element: int4,
        index,
        count: 1,
    });
    let columns = b.add(&Def::Array {
        element: row,
        index,
        count: 64,
    });
    let planes = b.add(&Def::Array {
        element: columns,
        index,
        count: 64,
    });
    let space = b.add(&Def::Array {
        element: planes,
        index,
        count: 2,
    });
    b.add(&Def::Struct {
        name: "big",
        size: 32768,
        members: &[member("a", space, 0, None)],
    });
    let object = object(b, &vec![0; 32768], "big", &[]);
    assert_eq!(object.rows.len(), ROWS);
    assert!(
        object.warnings.last().unwrap().contains("--fields"),
        "{:?}",
        object.warnings
    );
}

/// `cred.uid` of a task: a dot behind a pointer follows it; where it leads nowhere, that is a row and its reason.
#[test]
fn members_behind_pointers() {
    let mut b = Builder::new();
    let u32_type = int(&mut b, "unsigned int", 4);
    let inner = b.add(&Def::Struct {
        name: "cred",
        size: 8,
        members: &[member("uid", u32_type, 32, None)],
    });
    let pointer = b.add(&Def::Ptr(inner));
    b.add(&Def::Struct {
        name: "task",
        size: 24,
        members: &[
            member("cred", pointer, 0, None),
            member("none", pointer, 64, None),
            member("wild", pointer, 128, None),
        ],
    });
    let mut memory = [0u8; 32];
    memory[..8].copy_from_slice(&0x1018u64.to_le_bytes());
    memory[16..24].copy_from_slice(&0xdead_0000u64.to_le_bytes());
    memory[28..].copy_from_slice(&1000u32.to_le_bytes());
    let object = object(b, &memory, "task", &["cred.uid", "none.uid", "wild.uid"]);
    assert_eq!(value(&object, "cred.uid")["value"], 1000);
    assert_eq!(value(&object, "cred.uid")["address"], "0x101c");
    let reason = |name: &str| value(&object, name)[PROBLEMS][0].as_str().unwrap().to_owned();
    assert!(
        reason("none.uid").contains("none is null"),
        "{}",
        reason("none.uid")
    );
    assert_eq!(value(&object, "wild.uid")["value"], Value::Null);
    assert!(object.unreadable);
}
