//! Random type graphs and random damage: what is written is what is read, and nothing panics.

use proptest::prelude::*;

use super::*;
use crate::layout::{LayoutOptions, layout};

/// A type that owns its parts; references are numbers modulo the number of types, or 0 for void.
#[derive(Clone, Debug)]
pub(crate) enum Plan {
    Int(String, u32, bool),
    Float(String, u32),
    Ptr(u32),
    Array(u32, u32),
    Composite {
        name: String,
        union: bool,
        size: u32,
        members: Vec<(String, u32, u64, Option<u8>)>,
    },
    Enum(String, u32, bool, Vec<(String, i64)>),
    Fwd(String, bool),
    Typedef(String, u32),
    Const(u32),
    Volatile(u32),
    Proto(u32, Vec<(String, u32)>),
    Func(String, u32),
    Var(String, u32),
    Datasec(String, Vec<(u32, u32, u32)>),
    DeclTag(String, u32, i32),
    TypeTag(String, u32),
}

fn name() -> impl Strategy<Value = String> {
    prop_oneof![3 => "[a-z_][a-z0-9_]{0,12}", 1 => Just(String::new())]
}

fn plan() -> impl Strategy<Value = Plan> {
    let id = || 0u32..64;
    let member = (name(), id(), 0u64..1 << 20, prop::option::weighted(0.3, 1u8..=64));
    prop_oneof![
        (
            "[a-z]{1,8}",
            prop::sample::select(vec![1u32, 2, 4, 8, 16]),
            any::<bool>()
        )
            .prop_map(|(n, s, signed)| Plan::Int(n, s, signed)),
        ("[a-z]{1,8}", prop::sample::select(vec![4u32, 8])).prop_map(|(n, s)| Plan::Float(n, s)),
        id().prop_map(Plan::Ptr),
        (id(), 0u32..1 << 20).prop_map(|(t, n)| Plan::Array(t, n)),
        (
            name(),
            any::<bool>(),
            0u32..1 << 17,
            prop::collection::vec(member, 0..8)
        )
            .prop_map(|(name, union, size, members)| Plan::Composite {
                name,
                union,
                size,
                members
            }),
        (
            name(),
            prop::sample::select(vec![1u32, 4, 8]),
            any::<bool>(),
            prop::collection::vec((name(), any::<i32>()), 0..6)
        )
            .prop_map(|(n, size, signed, values)| {
                let value = |v: i32| if signed { i64::from(v) } else { i64::from(v as u32) };
                Plan::Enum(
                    n,
                    size,
                    signed,
                    values.into_iter().map(|(n, v)| (n, value(v))).collect(),
                )
            }),
        (name(), any::<bool>()).prop_map(|(n, u)| Plan::Fwd(n, u)),
        (name(), id()).prop_map(|(n, t)| Plan::Typedef(n, t)),
        id().prop_map(Plan::Const),
        id().prop_map(Plan::Volatile),
        (id(), prop::collection::vec((name(), id()), 0..5)).prop_map(|(r, p)| Plan::Proto(r, p)),
        (name(), id()).prop_map(|(n, t)| Plan::Func(n, t)),
        (name(), id()).prop_map(|(n, t)| Plan::Var(n, t)),
        (
            name(),
            prop::collection::vec((id(), any::<u32>(), any::<u32>()), 0..4)
        )
            .prop_map(|(n, v)| Plan::Datasec(n, v)),
        (name(), id(), -1i32..9).prop_map(|(n, t, c)| Plan::DeclTag(n, t, c)),
        (name(), id()).prop_map(|(n, t)| Plan::TypeTag(n, t)),
    ]
}

pub(crate) fn plans() -> impl Strategy<Value = Vec<Plan>> {
    prop::collection::vec(plan(), 1..48)
}

/// Writes the plans with ids from `first` on.
pub(crate) fn write(builder: &mut Builder, plans: &[Plan]) -> Vec<TypeId> {
    let ids: Vec<TypeId> = plans.iter().map(|_| builder.reserve()).collect();
    let id = |n: u32| {
        if n == 0 {
            TypeId::VOID
        } else {
            ids[n as usize % ids.len()]
        }
    };
    for (&own, plan) in ids.iter().zip(plans) {
        match plan {
            Plan::Int(name, size, signed) => {
                let def = Def::int(name, *size, *signed);
                builder.define(own, &def);
            }
            Plan::Float(name, size) => builder.define(own, &Def::Float { name, size: *size }),
            Plan::Ptr(t) => builder.define(own, &Def::Ptr(id(*t))),
            Plan::Array(t, count) => {
                let def = Def::Array {
                    element: id(*t),
                    index: TypeId::VOID,
                    count: *count,
                };
                builder.define(own, &def);
            }
            Plan::Composite {
                name,
                union,
                size,
                members,
            } => {
                let members: Vec<_> = members
                    .iter()
                    .map(|(name, t, bit_offset, bit_size)| MemberDef {
                        name,
                        type_id: id(*t),
                        bit_offset: *bit_offset,
                        bit_size: *bit_size,
                    })
                    .collect();
                let (size, members) = (*size, members.as_slice());
                builder.define(
                    own,
                    &if *union {
                        Def::Union { name, size, members }
                    } else {
                        Def::Struct { name, size, members }
                    },
                );
            }
            Plan::Enum(name, size, signed, values) => {
                let values: Vec<_> = values.iter().map(|(n, v)| (n.as_str(), *v)).collect();
                builder.define(
                    own,
                    &Def::Enum {
                        name,
                        size: *size,
                        signed: *signed,
                        values: &values,
                    },
                );
            }
            Plan::Fwd(name, is_union) => builder.define(
                own,
                &Def::Fwd {
                    name,
                    is_union: *is_union,
                },
            ),
            Plan::Typedef(name, t) => builder.define(own, &Def::Typedef { name, target: id(*t) }),
            Plan::Const(t) => builder.define(own, &Def::Const(id(*t))),
            Plan::Volatile(t) => builder.define(own, &Def::Volatile(id(*t))),
            Plan::Proto(result, params) => {
                let params: Vec<_> = params.iter().map(|(n, t)| (n.as_str(), id(*t))).collect();
                builder.define(
                    own,
                    &Def::FuncProto {
                        result: id(*result),
                        params: &params,
                    },
                );
            }
            Plan::Func(name, t) => builder.define(
                own,
                &Def::Func {
                    name,
                    proto: id(*t),
                    linkage: 1,
                },
            ),
            Plan::Var(name, t) => builder.define(
                own,
                &Def::Var {
                    name,
                    target: id(*t),
                    linkage: 0,
                },
            ),
            Plan::Datasec(name, vars) => {
                let vars: Vec<_> = vars
                    .iter()
                    .map(|&(t, offset, size)| SectionVar {
                        variable: id(t),
                        offset,
                        size,
                    })
                    .collect();
                builder.define(
                    own,
                    &Def::Datasec {
                        name,
                        size: 7,
                        vars: &vars,
                    },
                );
            }
            Plan::DeclTag(name, t, component) => {
                builder.define(
                    own,
                    &Def::DeclTag {
                        name,
                        target: id(*t),
                        component: *component,
                    },
                );
            }
            Plan::TypeTag(name, t) => builder.define(own, &Def::TypeTag { name, target: id(*t) }),
        }
    }
    ids
}

fn check(types: &Types, ids: &[TypeId], own: TypeId, plan: &Plan) {
    let t = types.get(own).unwrap();
    let id = |n: u32| {
        if n == 0 {
            TypeId::VOID
        } else {
            ids[n as usize % ids.len()]
        }
    };
    let target = |n: u32| Some(id(n));
    match plan {
        Plan::Int(name, size, signed) => {
            assert_eq!(
                (t.kind(), t.name(), t.declared_size()),
                (Kind::Int, name.as_str(), Some(*size))
            );
            assert_eq!(
                t.int().map(|i| (i.signed, u32::from(i.bits))),
                Some((*signed, size * 8))
            );
        }
        Plan::Float(name, size) => {
            assert_eq!(
                (t.kind(), t.name(), t.declared_size()),
                (Kind::Float, name.as_str(), Some(*size))
            );
        }
        Plan::Ptr(n) => assert_eq!((t.kind(), t.target()), (Kind::Ptr, target(*n))),
        Plan::Const(n) => assert_eq!((t.kind(), t.target()), (Kind::Const, target(*n))),
        Plan::Volatile(n) => assert_eq!((t.kind(), t.target()), (Kind::Volatile, target(*n))),
        Plan::Array(n, count) => {
            assert_eq!(t.array().map(|a| (a.element, a.count)), Some((id(*n), *count)));
        }
        Plan::Composite {
            name,
            union,
            size,
            members,
        } => {
            let kind = if *union { Kind::Union } else { Kind::Struct };
            assert_eq!(
                (t.kind(), t.name(), t.declared_size()),
                (kind, name.as_str(), Some(*size))
            );
            let read: Vec<_> = t
                .members()
                .map(|m| (m.name.to_owned(), m.type_id, m.bit_offset, m.bit_size))
                .collect();
            let meant = members.iter().map(|(n, t, o, w)| (n.clone(), id(*t), *o, *w));
            assert_eq!(read, meant.collect::<Vec<_>>());
        }
        Plan::Enum(name, size, _, values) => {
            assert!(t.kind().is_enum());
            assert_eq!((t.name(), t.declared_size()), (name.as_str(), Some(*size)));
            let read = t.enumerators().zip(values);
            for (read, (name, value)) in read {
                assert_eq!((read.name, read.value as u32), (name.as_str(), *value as u32));
            }
            assert_eq!(t.enumerators().len(), values.len());
        }
        Plan::Fwd(name, union) => {
            assert_eq!(
                (t.kind(), t.name(), t.is_union()),
                (Kind::Fwd, name.as_str(), *union)
            );
        }
        Plan::Typedef(name, n) => assert_eq!(
            (t.kind(), t.name(), t.target()),
            (Kind::Typedef, name.as_str(), target(*n))
        ),
        Plan::TypeTag(name, n) => assert_eq!(
            (t.kind(), t.name(), t.target()),
            (Kind::TypeTag, name.as_str(), target(*n))
        ),
        Plan::Func(name, n) => assert_eq!(
            (t.kind(), t.name(), t.target()),
            (Kind::Func, name.as_str(), target(*n))
        ),
        Plan::Var(name, n) => assert_eq!(
            (t.kind(), t.name(), t.target()),
            (Kind::Var, name.as_str(), target(*n))
        ),
        Plan::Proto(result, params) => {
            assert_eq!((t.kind(), t.target()), (Kind::FuncProto, target(*result)));
            let read: Vec<_> = t.params().map(|p| (p.name.to_owned(), p.type_id)).collect();
            assert_eq!(
                read,
                params
                    .iter()
                    .map(|(n, t)| (n.clone(), id(*t)))
                    .collect::<Vec<_>>()
            );
        }
        Plan::Datasec(name, vars) => {
            assert_eq!((t.kind(), t.name()), (Kind::Datasec, name.as_str()));
            let read: Vec<_> = t.section_vars().map(|v| (v.variable, v.offset, v.size)).collect();
            assert_eq!(
                read,
                vars.iter().map(|&(t, o, s)| (id(t), o, s)).collect::<Vec<_>>()
            );
        }
        Plan::DeclTag(name, n, component) => {
            assert_eq!(
                (t.kind(), t.name(), t.target()),
                (Kind::DeclTag, name.as_str(), target(*n))
            );
            assert_eq!(t.component(), Some(*component));
        }
    }
}

/// Asks everything there is to ask, for the sake of what must not happen.
pub(crate) fn exercise(types: &Types) {
    let mut budget = 200;
    for t in types.iter().take(400) {
        let name = t.name();
        assert!(types.type_name(t.id()).len() < 1 << 20);
        let _ = (
            types.size_of(t.id()),
            types.resolve(t.id()),
            t.int(),
            t.array(),
            t.component(),
        );
        let _ = (
            t.params().count(),
            t.section_vars().count(),
            t.members().count(),
            t.enumerators().count(),
        );
        let _ = (
            types.member(name, "a"),
            types.member_of(t.id(), "[1].a[2].b"),
            types.find_struct(name),
        );
        if let Some(m) = t.members().last() {
            let _ = types.member_of(t.id(), m.name);
        }
        if budget > 0 && t.kind().is_composite() {
            budget -= 1;
            let _ = layout(
                types,
                t.id(),
                &LayoutOptions {
                    expand: 2,
                    cachelines: true,
                },
            )
            .map(|l| l.to_string());
        }
    }
    let _ = (
        types.enumerator("a"),
        types.find("a", Kinds::all()),
        types.variable("a"),
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn what_is_written_is_read(plans in plans()) {
        let mut builder = Builder::new();
        let ids = write(&mut builder, &plans);
        prop_assert_eq!(builder.dropped(), 0);
        let types = builder.finish().unwrap();
        prop_assert_eq!(types.len(), plans.len());
        for (&own, plan) in ids.iter().zip(&plans) {
            check(&types, &ids, own, plan);
            let name = types.get(own).unwrap().name();
            prop_assert!(name.is_empty() || types.all(name).any(|id| id == own));
        }
        exercise(&types);
        let again = Types::from_parts(types.btf().clone(), types.index_bytes(), None).unwrap();
        for (&own, plan) in ids.iter().zip(&plans) {
            check(&again, &ids, own, plan);
        }
    }

    #[test]
    fn split_types_are_read_over_any_base(base in plans(), split in plans()) {
        let mut builder = Builder::new();
        write(&mut builder, &base);
        let base = builder.finish().unwrap();
        let mut builder = Builder::over(&base).unwrap();
        let ids = write(&mut builder, &split);
        let types = builder.finish().unwrap();
        for (&own, plan) in ids.iter().zip(&split) {
            check(&types, &ids, own, plan);
        }
        exercise(&types);
    }

    #[test]
    fn damage_is_refused_or_read_as_it_stands(
        plans in plans(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
        index_damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut builder = Builder::new();
        write(&mut builder, &plans);
        let good = builder.finish().unwrap();
        let mut btf = good.btf().as_slice().to_vec();
        for (at, value) in &damage {
            let at = at.index(btf.len());
            btf[at] = *value;
        }
        if let Ok(types) = Types::from_btf(btf.clone()) {
            exercise(&types);
            let mut index = types.index_bytes();
            for (at, value) in &index_damage {
                let at = at.index(index.len());
                index[at] = *value;
            }
            if let Ok(types) = Types::from_parts(btf.clone(), index, None) {
                exercise(&types);
            }
        }
        if let Ok(types) = Types::from_split_btf(&good, btf.clone()) {
            exercise(&types);
        }
        if let Ok((types, _)) = Types::from_distilled_btf(&good, good.btf().clone(), btf.clone()) {
            exercise(&types);
        }
        btf.truncate(cut.index(btf.len()));
        if let Ok(types) = Types::from_btf(btf) {
            exercise(&types);
        }
    }
}

#[test]
fn a_distilled_base_is_found_again_in_the_kernel() {
    let kernel = tests::sample();
    // What resolve_btfids makes: what is held by value keeps its size, what is pointed to its name alone.
    let mut distilled = Builder::new();
    let int = distilled.add(&Def::int("int", 4, true));
    let head = distilled.add(&Def::Struct {
        name: "list_head",
        size: 16,
        members: &[],
    });
    let node = distilled.add(&Def::Fwd {
        name: "node",
        is_union: false,
    });
    let gone = distilled.add(&Def::Struct {
        name: "gone",
        size: 24,
        members: &[],
    });
    let state = distilled.add(&Def::Enum {
        name: "state",
        size: 4,
        signed: false,
        values: &[],
    });
    let distilled = distilled.finish().unwrap();
    let mut split = Builder::over(&distilled).unwrap();
    let node_ptr = split.add(&Def::Ptr(node));
    let member = |name, type_id, bit_offset| MemberDef {
        name,
        type_id,
        bit_offset,
        bit_size: None,
    };
    let members = [
        member("number", int, 0),
        member("state", state, 32),
        member("list", head, 64),
        member("node", node_ptr, 192),
        member("gone", gone, 256),
    ];
    let thing = split.add(&Def::Struct {
        name: "thing",
        size: 56,
        members: &members,
    });
    split.add(&Def::FuncProto {
        result: TypeId::VOID,
        params: &[("thing", thing)],
    });
    let split = split.into_bytes().unwrap();

    let (types, notes) = Types::from_distilled_btf(&kernel, distilled.btf().clone(), split).unwrap();
    assert_eq!(notes, ["struct gone: the kernel has no such type of this size"]);
    assert_eq!(types.member("thing", "list.prev").unwrap().offset, 16);
    let ids: Vec<_> = types
        .members(types.find_struct("thing").unwrap())
        .map(|m| m.type_id)
        .collect();
    assert_eq!(ids[0], kernel.find("int", Kinds::INT).unwrap());
    assert_eq!(ids[1], kernel.find_enum("state").unwrap());
    assert_eq!(ids[2], kernel.find_struct("list_head").unwrap());
    assert_eq!(types.type_name(ids[3]), "struct node *");
    assert_eq!(types.get(ids[3]).unwrap().target(), kernel.find_struct("node"));
    assert_eq!(
        (types.type_name(ids[4]), types.size_of(ids[4])),
        ("struct gone".into(), Some(24))
    );
    let proto = types.iter().find(|t| t.kind() == Kind::FuncProto).unwrap();
    assert_eq!(types.type_name(proto.id()), "void (struct thing)");
    assert_eq!(proto.params().next().unwrap().name, "thing");
}

#[test]
fn old_bitfields_have_integer_types_of_their_width() {
    // Before Linux 5.0: an integer of 3 bits at bit 5 of 4 bytes, in a struct without the flag for bitfields.
    let mut b = Builder::new();
    let plain = b.add(&Def::int("int", 4, true));
    let narrow = b.reserve();
    b.raw(
        narrow,
        b"int",
        1 << 24,
        4,
        &(1u32 << 24 | 5 << 16 | 3).to_le_bytes(),
    );
    let member = |name, type_id, bit_offset| MemberDef {
        name,
        type_id,
        bit_offset,
        bit_size: None,
    };
    let members = [member("whole", plain, 0), member("part", narrow, 32)];
    b.add(&Def::Struct {
        name: "old",
        size: 8,
        members: &members,
    });
    let types = b.finish().unwrap();
    let part = types.member("old", "part").unwrap();
    assert_eq!(
        (part.offset, part.bit_offset, part.bit_size, part.size),
        (4, 5, Some(3), 4)
    );
    assert_eq!(part.extract(0b1010_0000), 0b101);
    assert_eq!(types.member("old", "whole").unwrap().bit_size, None);
}

#[test]
fn kinds_from_the_future_are_stepped_over() {
    // Kind 42 with 4 bytes once and 8 per element, as the blob's own table of kinds says (Linux 7.1).
    let mut b = Builder::new();
    let future = b.reserve();
    b.raw(future, b"novel", 42 << 24 | 2, 0, &[0; 20]);
    let after = b.add(&Def::int("int", 4, true));
    let plain = b.into_bytes().unwrap();
    assert_eq!(
        Types::from_btf(plain.clone()).err(),
        Some(TypesError::UnknownKind { id: 1, kind: 42 })
    );
    let mut table = vec![0u8; 43 * 4];
    table[42 * 4] = 4;
    table[42 * 4 + 1] = 8;
    let body = plain.len() - 24;
    let mut btf = plain[..4].to_vec();
    btf.extend(32u32.to_le_bytes());
    btf.extend(&plain[8..24]);
    btf.extend((body as u32).to_le_bytes());
    btf.extend((table.len() as u32).to_le_bytes());
    btf.extend(&plain[24..]);
    btf.extend(&table);
    let types = Types::from_btf(btf).unwrap();
    assert_eq!(
        types.get(future).map(|t| (t.kind(), t.name().to_owned())),
        Some((Kind::Unknown, "novel".into()))
    );
    assert_eq!(types.find("int", Kinds::INT), Some(after));
    exercise(&types);
}
