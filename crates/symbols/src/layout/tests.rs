use super::*;
use crate::types::tests::sample;
use crate::types::{Builder, Def, MemberDef};

#[test]
fn a_struct_reads_like_its_declaration() {
    let types = sample();
    let id = types.find_struct("node").unwrap();
    let text = layout(&types, id, &LayoutOptions::default()).unwrap().to_string();
    let lines: Vec<String> = text
        .lines()
        .map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    assert_eq!(
        lines,
        [
            "struct node {",
            "struct node *next; /* 0 8 */",
            "union {",
            "int a; /* 8 4 */",
            "struct {",
            "unsigned int b:3; /* 8: 0 4 */",
            "unsigned int c:5; /* 8: 3 4 */",
            "/* hole: 12 bits */",
            "unsigned int d:9; /* 8:20 4 */",
            "}; /* 8 4 */",
            "}; /* 8 4 */",
            "char tag[4]; /* 12 4 */",
            "const struct list_head l[2]; /* 16 32 */",
            "/* size: 48, members: 4 */",
            "};",
        ]
    );
}

#[test]
fn every_row_names_a_path_to_itself() {
    let types = sample();
    let id = types.find_struct("node").unwrap();
    let shown = layout(
        &types,
        id,
        &LayoutOptions {
            expand: 3,
            cachelines: true,
        },
    )
    .unwrap();
    assert!(shown.rows().count() >= 6);
    for row in shown.rows() {
        let field = types
            .member_of(id, &row.name)
            .unwrap_or_else(|| panic!("{}", row.name));
        assert_eq!(
            (field.offset, field.size, field.bit_size),
            (row.offset, row.size, row.bit_size)
        );
        assert_eq!(field.bit_offset, row.bit_offset.unwrap_or(0));
    }
}

#[test]
fn holes_and_padding_are_told() {
    let mut b = Builder::new();
    let byte = b.add(&Def::int("char", 1, true));
    let long = b.add(&Def::int("long", 8, true));
    let member = |name, type_id, bit_offset| MemberDef {
        name,
        type_id,
        bit_offset,
        bit_size: None,
    };
    let members = [
        member("a", byte, 0),
        member("b", long, 64),
        member("c", byte, 128),
    ];
    let id = b.add(&Def::Struct {
        name: "loose",
        size: 24,
        members: &members,
    });
    let types = b.finish().unwrap();
    let text = layout(&types, id, &LayoutOptions::default()).unwrap().to_string();
    assert!(text.contains("/* hole: 7 bytes */"), "{text}");
    assert!(
        text.contains("/* size: 24, members: 3, holes: 1 (7 bytes), padding: 7 bytes */"),
        "{text}"
    );
}

#[test]
fn what_has_no_body_is_declared() {
    let types = sample();
    let text = |name: &str| {
        let id = named(&types, name)[0];
        layout(&types, id, &LayoutOptions::default()).unwrap().to_string()
    };
    assert_eq!(
        text("calls_t"),
        "typedef int (*calls_t[3])(struct node *, ...);\n/* size: 24 */\n"
    );
    assert_eq!(text("walk"), "int walk(struct node *, ...);\n");
    assert_eq!(
        text("current_node"),
        "struct node *current_node;\n/* size: 8 */\n"
    );
    assert_eq!(text("int"), "int;\n/* size: 4 */\n");
    assert!(text("enum state").starts_with("enum state {\n    DEAD "));
    assert!(text("atomic_t").starts_with("atomic_t {\n    int counter;"));
}

#[test]
fn nesting_without_end_is_cut() {
    let mut b = Builder::new();
    let s = b.reserve();
    let again = MemberDef {
        name: "",
        type_id: s,
        bit_offset: 0,
        bit_size: None,
    };
    b.define(
        s,
        &Def::Union {
            name: "",
            size: 8,
            members: &[again, again, again],
        },
    );
    let types = b.finish().unwrap();
    let shown = layout(&types, s, &LayoutOptions::default()).unwrap();
    assert!(shown.cut);
    assert!(shown.to_string().contains("cut:"));
}
