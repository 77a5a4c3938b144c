use super::*;

/// `struct node { struct node *next; union { int a; unsigned b : 3, c : 5; }; char tag[4]; struct list_head l[2]; }`
/// and what it takes.
pub(crate) fn sample() -> Types {
    let mut b = Builder::new();
    let int = b.add(&Def::int("int", 4, true));
    let uint = b.add(&Def::int("unsigned int", 4, false));
    let char = b.add(&Def::int("char", 1, true));
    b.add(&Def::int("unsigned long", 8, false));
    let node = b.reserve();
    let next = b.add(&Def::Ptr(node));
    let member = |name, type_id, bit_offset| MemberDef {
        name,
        type_id,
        bit_offset,
        bit_size: None,
    };
    let bits = b.add(&Def::Struct {
        name: "",
        size: 4,
        members: &[
            MemberDef {
                bit_size: Some(3),
                ..member("b", uint, 0)
            },
            MemberDef {
                bit_size: Some(5),
                ..member("c", uint, 3)
            },
            MemberDef {
                bit_size: Some(9),
                ..member("d", uint, 20)
            },
        ],
    });
    let either = b.add(&Def::Union {
        name: "",
        size: 4,
        members: &[member("a", int, 0), member("", bits, 0)],
    });
    let tag = b.add(&Def::Array {
        element: char,
        index: uint,
        count: 4,
    });
    let head = b.reserve();
    let head_ptr = b.add(&Def::Ptr(head));
    let heads = [member("next", head_ptr, 0), member("prev", head_ptr, 64)];
    b.define(
        head,
        &Def::Struct {
            name: "list_head",
            size: 16,
            members: &heads,
        },
    );
    let links = b.add(&Def::Array {
        element: head,
        index: uint,
        count: 2,
    });
    let links = b.add(&Def::Const(links));
    let members = [
        member("next", next, 0),
        member("", either, 64),
        member("tag", tag, 96),
        member("l", links, 128),
    ];
    b.define(
        node,
        &Def::Struct {
            name: "node",
            size: 48,
            members: &members,
        },
    );
    b.add(&Def::Typedef {
        name: "node_t",
        target: node,
    });
    let anonymous = b.add(&Def::Struct {
        name: "",
        size: 4,
        members: &[member("counter", int, 0)],
    });
    b.add(&Def::Typedef {
        name: "atomic_t",
        target: anonymous,
    });
    // A second struct of the same name.
    b.add(&Def::Struct {
        name: "node",
        size: 4,
        members: &[member("other", int, 0)],
    });
    b.add(&Def::Enum {
        name: "state",
        size: 4,
        signed: true,
        values: &[("DEAD", -1), ("RUNNING", 0)],
    });
    b.add(&Def::Enum {
        name: "big",
        size: 8,
        signed: false,
        values: &[("HUGE", 1 << 40)],
    });
    let proto = b.add(&Def::FuncProto {
        result: int,
        params: &[("n", next), ("", TypeId::VOID)],
    });
    b.add(&Def::Func {
        name: "walk",
        proto,
        linkage: 1,
    });
    let call = b.add(&Def::Ptr(proto));
    let calls = b.add(&Def::Array {
        element: call,
        index: uint,
        count: 3,
    });
    b.add(&Def::Typedef {
        name: "calls_t",
        target: calls,
    });
    let var = b.add(&Def::Var {
        name: "current_node",
        target: next,
        linkage: 1,
    });
    let vars = [SectionVar {
        variable: var,
        offset: 64,
        size: 8,
    }];
    b.add(&Def::Datasec {
        name: ".data..percpu",
        size: 128,
        vars: &vars,
    });
    assert_eq!(b.dropped(), 0);
    b.finish().unwrap()
}

#[test]
fn members_are_found_by_path() {
    let t = sample();
    let at = |path: &str| {
        t.member("node", path)
            .map(|f| (f.offset, f.bit_offset, f.bit_size, f.size))
    };
    assert_eq!(at("next"), Some((0, 0, None, 8)));
    assert_eq!(at("a"), Some((8, 0, None, 4)));
    assert_eq!(at("b"), Some((8, 0, Some(3), 4)));
    assert_eq!(at("c"), Some((8, 3, Some(5), 4)));
    assert_eq!(at("d"), Some((8, 20, Some(9), 4)));
    assert_eq!(at("tag"), Some((12, 0, None, 4)));
    assert_eq!(at("tag[3]"), Some((15, 0, None, 1)));
    assert_eq!(at("l[1].prev"), Some((40, 0, None, 8)));
    // The second struct of the name has it.
    assert_eq!(at("other"), Some((0, 0, None, 4)));
    for none in [
        "",
        "nope",
        "tag[4]",
        "tag[",
        "tag[x]",
        "tag[+1]",
        "next.next",
        "l.prev",
        "a.b",
        ".a",
        "a.",
    ] {
        assert_eq!(at(none), None, "{none:?}");
    }
    assert_eq!(t.member("node_t", "tag").unwrap().offset, 12);
    assert_eq!(t.member("atomic_t", "counter").unwrap().offset, 0);
    assert_eq!(t.member("nothing", "a"), None);
    let links = t.member("node", "l").unwrap().type_id;
    assert_eq!(t.member_of(links, "[1].prev").unwrap().offset, 24);
    assert_eq!(t.member_of(links, "").map(|f| f.size), None);
    assert_eq!(t.member("node", "d").unwrap().extract(0xffff_ffff), 0x1ff);
}

#[test]
fn names_are_looked_up_by_kind() {
    let t = sample();
    assert_eq!(t.all("node").count(), 2);
    let node = t.find_struct("node").unwrap();
    assert_eq!(
        (t.get(node).unwrap().kind(), t.size_of(node)),
        (Kind::Struct, Some(48))
    );
    assert_eq!(t.find("node", Kinds::UNION), None);
    assert_eq!(t.find("", Kinds::all()), None);
    assert_eq!(t.enumerator("DEAD"), Some(-1));
    assert_eq!(t.enumerator("HUGE"), Some(1 << 40));
    assert_eq!(t.enumerator("ABSENT"), None);
    let current = t.variable("current_node").unwrap();
    assert_eq!(t.type_name(current), "struct node *");
    let section = t.get(t.find(".data..percpu", Kinds::DATASEC).unwrap()).unwrap();
    assert_eq!(section.section_vars().next().unwrap().offset, 64);
    let walk = t.get(t.find("walk", Kinds::FUNC).unwrap()).unwrap();
    assert_eq!(
        t.declare(walk.target().unwrap(), "walk"),
        "int walk(struct node *, ...)"
    );
    let calls = t.get(t.find("calls_t", Kinds::TYPEDEF).unwrap()).unwrap();
    assert_eq!(
        t.declare(calls.target().unwrap(), "f"),
        "int (*f[3])(struct node *, ...)"
    );
    assert_eq!(t.size_of(calls.id()), Some(24));
    assert_eq!(
        t.type_name(t.member("node", "l").unwrap().type_id),
        "const struct list_head [2]"
    );
}

#[test]
fn an_index_can_be_kept_and_used_again() {
    let t = sample();
    let again = Types::from_parts(t.btf().clone(), t.index_bytes(), None).unwrap();
    assert_eq!(again.len(), t.len());
    assert_eq!(again.pointer_size(), 8);
    assert_eq!(again.member("node", "l[1].prev"), t.member("node", "l[1].prev"));
    assert_eq!(again.enumerator("DEAD"), Some(-1));
    let mut index = t.index_bytes();
    index.push(0);
    assert!(matches!(
        Types::from_parts(t.btf().clone(), index, None),
        Err(TypesError::Index { .. })
    ));
}

#[test]
fn a_module_is_laid_over_its_kernel() {
    let kernel = sample();
    let node = kernel.find_struct("node").unwrap();
    let mut b = Builder::over(&kernel).unwrap();
    let member = MemberDef {
        name: "first",
        type_id: node,
        bit_offset: 0,
        bit_size: None,
    };
    b.add(&Def::Struct {
        name: "module_thing",
        size: 48,
        members: &[member],
    });
    b.add(&Def::Struct {
        name: "node",
        size: 8,
        members: &[],
    });
    let module = b.finish().unwrap();
    assert_eq!(
        module.member("module_thing", "first.l[0].next").unwrap().offset,
        16
    );
    // Its own first, then the kernel's two.
    let sizes: Vec<_> = module.all("node").map(|id| module.size_of(id).unwrap()).collect();
    assert_eq!(sizes, [8, 48, 4]);
    assert_eq!(module.enumerator("RUNNING"), Some(0));
    assert_eq!(module.len(), 2);
    assert_eq!(kernel.find_struct("module_thing"), None);
    assert!(matches!(
        Types::from_split_btf(&module, Vec::new()),
        Err(TypesError::TooShort { .. })
    ));
    let again = Types::from_parts(module.btf().clone(), module.index_bytes(), Some(&kernel)).unwrap();
    assert_eq!(again.member("module_thing", "first.tag").unwrap().offset, 12);
}

#[test]
fn a_hostile_graph_ends() {
    let mut b = Builder::new();
    // A typedef of itself, an array of itself, a struct that holds itself anonymously, twice.
    let td = b.reserve();
    b.define(
        td,
        &Def::Typedef {
            name: "loop_t",
            target: td,
        },
    );
    let array = b.reserve();
    b.define(
        array,
        &Def::Array {
            element: array,
            index: td,
            count: u32::MAX,
        },
    );
    let s = b.reserve();
    let again = MemberDef {
        name: "",
        type_id: s,
        bit_offset: 8,
        bit_size: None,
    };
    b.define(
        s,
        &Def::Struct {
            name: "self",
            size: 8,
            members: &[again, again],
        },
    );
    let ptr = b.reserve();
    b.define(ptr, &Def::Ptr(ptr));
    let proto = b.reserve();
    let pp = b.add(&Def::Ptr(proto));
    b.define(
        proto,
        &Def::FuncProto {
            result: pp,
            params: &[("a", pp), ("b", pp), ("c", pp)],
        },
    );
    let t = b.finish().unwrap();
    assert_eq!(t.resolve(td), TypeId::VOID);
    assert_eq!(t.size_of(array), None);
    assert_eq!(t.size_of(td), None);
    assert_eq!(t.member("self", "x"), None);
    for id in t.ids() {
        assert!(t.type_name(id).len() < 64 * 1024);
    }
    assert!(t.get(TypeId(u32::MAX)).is_none());
}

#[test]
fn broken_blobs_are_refused_with_the_reason() {
    let blob = sample().btf().as_slice().to_vec();
    let with = |at: usize, value: u32| {
        let mut b = blob.clone();
        b[at..at + 4].copy_from_slice(&value.to_le_bytes());
        Types::from_btf(b).err()
    };
    assert_eq!(with(0, 0x0001_9feb), Some(TypesError::BigEndian));
    assert_eq!(with(0, 0x0001_0000), Some(TypesError::Magic { found: 0 }));
    assert_eq!(with(0, 0x0002_eb9f), Some(TypesError::Version { found: 2 }));
    assert!(matches!(
        with(4, 8),
        Some(TypesError::Section {
            section: "header",
            ..
        })
    ));
    assert!(matches!(
        with(12, u32::MAX),
        Some(TypesError::Section { section: "type", .. })
    ));
    assert!(matches!(
        with(16, u32::MAX),
        Some(TypesError::Section {
            section: "string",
            ..
        })
    ));
    // The first type's kind and number of elements.
    assert_eq!(
        with(28, 0x3f00_0000),
        Some(TypesError::UnknownKind { id: 1, kind: 0x3f })
    );
    assert!(matches!(
        with(28, 0x04ff_ffff),
        Some(TypesError::Cut { id: 1, .. })
    ));
    assert!(matches!(
        Types::from_btf(blob[..23].to_vec()),
        Err(TypesError::TooShort { len: 23 })
    ));
}

/// A guest that overwrites the NULs between its strings makes each as long as all that follow.
#[test]
fn names_end_where_no_kernel_s_is_longer() {
    let mut b = Builder::new();
    for i in 0..3000 {
        b.add(&Def::int(&format!("type_{i}"), 4, false));
    }
    let mut btf = b.into_bytes().unwrap();
    let header = Header::parse(&btf).unwrap();
    for byte in btf[header.strings].iter_mut().skip(1).filter(|b| **b == 0) {
        *byte = b'x';
    }
    let types = Types::from_btf(btf).unwrap();
    let longest = types.iter().map(|t| t.name().len()).max();
    assert_eq!(longest, Some(512));
    assert!(
        types
            .find(types.iter().next().unwrap().name(), Kinds::all())
            .is_some()
    );
}

/// What one lookup may cost does not grow with the number of types that share the name.
#[test]
fn one_lookup_has_one_budget() {
    let mut b = Builder::new();
    let int = b.add(&Def::int("int", 4, true));
    let member = |name| MemberDef {
        name,
        type_id: int,
        bit_offset: 0,
        bit_size: None,
    };
    let structure = |members: &[MemberDef<'_>], b: &mut Builder| {
        b.add(&Def::Struct {
            name: "twin",
            size: 4,
            members,
        })
    };
    let many = vec![member("other"); 120_000];
    structure(&[member("first")], &mut b);
    structure(&many, &mut b);
    structure(&[member("second")], &mut b);
    structure(&many, &mut b);
    let last = structure(&[member("third")], &mut b);
    let types = b.finish().unwrap();
    assert!(types.member("twin", "first").is_some());
    assert!(types.member("twin", "second").is_some());
    assert!(types.member("twin", "third").is_none(), "past the budget");
    assert!(types.member_of(last, "third").is_some());
}

/// A guest that gives all its types one name does not make each lookup a scan of them all.
#[test]
fn of_types_without_number_that_share_a_name_some_are_seen() {
    let mut b = Builder::new();
    for _ in 0..30_000 {
        b.add(&Def::Struct {
            name: "twin",
            size: 4,
            members: &[],
        });
    }
    let types = b.finish().unwrap();
    assert_eq!(types.all("twin").count(), 10_000);
}
