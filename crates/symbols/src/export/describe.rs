//! Types in ISF's words.

use std::io::{self, Write};

use super::globals::{Global, Shape};
use super::names::Names;
use super::{Comma, string};
use crate::types::{Kind, Member, Type, TypeId, Types};

pub(super) const VOID: &[u8] = b"{\"kind\":\"base\",\"name\":\"void\"}";
const FUNCTION: &[u8] = b"{\"kind\":\"function\"}";
/// Pointers to pointers to …, arrays of arrays of …: more levels than C code has, fewer than a JSON reader bears.
const MAX_DEPTH: u32 = 16;

pub(super) struct Describe<'a> {
    pub(super) types: &'a Types,
    pub(super) names: &'a Names,
}

/// A number type of ISF's `base_types`.
struct Base<'a> {
    name: &'a str,
    size: u64,
    signed: bool,
    kind: &'static str,
}

/// Base types which Volatility's plugins ask for by these names; clang calls most of them otherwise.
const EXPECTED: [(&str, u64, bool, &str); 12] = [
    ("char", 1, true, "char"),
    ("unsigned char", 1, false, "char"),
    ("short int", 2, true, "int"),
    ("short unsigned int", 2, false, "int"),
    ("int", 4, true, "int"),
    ("unsigned int", 4, false, "int"),
    ("long int", 0, true, "int"),
    ("long unsigned int", 0, false, "int"),
    ("unsigned long", 0, false, "int"),
    ("long long int", 8, true, "int"),
    ("long long unsigned int", 8, false, "int"),
    ("_Bool", 1, false, "bool"),
];

impl<'a> Describe<'a> {
    pub(super) fn base_types(&self, out: &mut dyn Write) -> io::Result<()> {
        let pointer_size = u64::from(self.types.pointer_size());
        let mut bases = vec![
            Base {
                name: "void",
                size: 0,
                signed: false,
                kind: "void",
            },
            Base {
                name: "pointer",
                size: pointer_size,
                signed: false,
                kind: "int",
            },
        ];
        for t in self.types.iter() {
            if let Some(base) = base(&t) {
                bases.push(base);
            }
        }
        for (name, size, signed, kind) in EXPECTED {
            let size = if size == 0 { pointer_size } else { size };
            bases.push(Base {
                name,
                size,
                signed,
                kind,
            });
        }
        let mut seen = std::collections::BTreeSet::new();
        let mut comma = Comma::default();
        for base in bases.iter().filter(|b| seen.insert(b.name)) {
            comma.write(out)?;
            string(out, base.name)?;
            let Base {
                size, signed, kind, ..
            } = base;
            write!(
                out,
                ":{{\"size\":{size},\"signed\":{signed},\"kind\":\"{kind}\",\"endian\":\"little\"}}"
            )?;
        }
        Ok(())
    }

    /// `"name": {kind, size, fields}`
    pub(super) fn user_type(&self, t: &Type<'a>, name: &str, out: &mut dyn Write) -> io::Result<()> {
        string(out, name)?;
        let size = t.declared_size().unwrap_or(0);
        write!(
            out,
            ":{{\"kind\":\"{}\",\"size\":{size},\"fields\":{{",
            t.kind().as_str()
        )?;
        for (n, member) in t.members().enumerate() {
            if n > 0 {
                out.write_all(b",")?;
            }
            self.field(n, &member, out)?;
        }
        out.write_all(b"}}")
    }

    fn field(&self, n: usize, member: &Member<'_>, out: &mut dyn Write) -> io::Result<()> {
        if member.name.is_empty() {
            write!(out, "\"unnamed_field_{n}\"")?;
        } else {
            string(out, member.name)?;
        }
        if let Some(bits) = member.bit_size
            && let Some((offset, below, unit)) = self.types.storage(member.type_id, member.bit_offset, bits)
        {
            out.write_all(b":{\"type\":{\"kind\":\"bitfield\",\"type\":")?;
            self.bitfield_base(member.type_id, unit, out)?;
            write!(
                out,
                ",\"bit_position\":{below},\"bit_length\":{bits}}},\"offset\":{offset}}}"
            )?;
            return Ok(());
        }
        out.write_all(b":{\"type\":")?;
        self.reference(member.type_id, MAX_DEPTH, out)?;
        write!(out, ",\"offset\":{}", member.offset())?;
        let inner = self.types.get(self.types.resolve(member.type_id));
        if member.name.is_empty() && inner.is_some_and(|t| t.kind().is_composite()) {
            out.write_all(b",\"anonymous\":true")?;
        }
        out.write_all(b"}")
    }

    /// The declared type of a bitfield, if a value of it fills the bytes the bits lie in; else a number that does.
    fn bitfield_base(&self, id: TypeId, unit: u64, out: &mut dyn Write) -> io::Result<()> {
        let declared = self.types.get(self.types.resolve(id));
        let fits = declared.filter(|t| t.size() == Some(unit) && (base(t).is_some() || t.kind().is_enum()));
        if fits.is_some() {
            return self.reference(id, MAX_DEPTH, out);
        }
        write!(out, "{{\"kind\":\"base\",\"name\":\"{}\"}}", unsigned(unit))
    }

    /// `"name": {size, base, constants}`
    pub(super) fn enumeration(&self, t: &Type<'a>, name: &str, out: &mut dyn Write) -> io::Result<()> {
        string(out, name)?;
        let size = t.declared_size().unwrap_or(4);
        let negative =
            t.enumerators().any(|e| e.value < 0) && (t.kind() != Kind::Enum64 || t.is_signed_enum());
        let base = match size {
            1 | 2 | 4 | 8 if negative => signed(u64::from(size)),
            size => unsigned(u64::from(size)),
        };
        write!(out, ":{{\"size\":{size},\"base\":\"{base}\",\"constants\":{{")?;
        for (n, e) in t.enumerators().enumerate() {
            if n > 0 {
                out.write_all(b",")?;
            }
            string(out, e.name)?;
            match negative || t.kind() != Kind::Enum64 {
                true => write!(out, ":{}", e.value)?,
                false => write!(out, ":{}", e.value as u64)?,
            }
        }
        out.write_all(b"}}")
    }

    /// What a member, element or pointer target is.
    pub(super) fn reference(&self, id: TypeId, depth: u32, out: &mut dyn Write) -> io::Result<()> {
        let Some(t) = self.types.get(self.types.resolve(id)) else {
            return out.write_all(VOID);
        };
        let Some(depth) = depth.checked_sub(1) else {
            return out.write_all(VOID);
        };
        match t.kind() {
            Kind::Ptr => {
                out.write_all(b"{\"kind\":\"pointer\",\"subtype\":")?;
                self.reference(t.target().unwrap_or_default(), depth, out)?;
                out.write_all(b"}")
            }
            Kind::Array => {
                let Some(array) = t.array() else {
                    return out.write_all(VOID);
                };
                write!(out, "{{\"kind\":\"array\",\"count\":{},\"subtype\":", array.count)?;
                self.reference(array.element, depth, out)?;
                out.write_all(b"}")
            }
            Kind::FuncProto => out.write_all(FUNCTION),
            Kind::Struct | Kind::Union | Kind::Enum | Kind::Enum64 => match self.names.get(t.id()) {
                Some(name) => self.named(t.kind().as_str(), name, out),
                None => out.write_all(VOID),
            },
            // If some other file of the kernel defines it, the name finds that; else whoever follows it will be told.
            Kind::Fwd if !t.name().is_empty() => {
                self.named(if t.is_union() { "union" } else { "struct" }, t.name(), out)
            }
            _ => match base(&t) {
                Some(base) => self.named("base", base.name, out),
                None => out.write_all(VOID),
            },
        }
    }

    fn named(&self, kind: &str, name: &str, out: &mut dyn Write) -> io::Result<()> {
        write!(out, "{{\"kind\":\"{kind}\",\"name\":")?;
        string(out, name)?;
        out.write_all(b"}")
    }

    /// The type of a global variable.
    pub(super) fn global(&self, global: &Global, out: &mut dyn Write) -> io::Result<()> {
        let subtype = |out: &mut dyn Write| self.reference(global.type_id, MAX_DEPTH, out);
        match global.shape {
            Shape::Value => subtype(out),
            Shape::Pointer => {
                out.write_all(b"{\"kind\":\"pointer\",\"subtype\":")?;
                subtype(out)?;
                out.write_all(b"}")
            }
            Shape::Array(count) => {
                write!(out, "{{\"kind\":\"array\",\"count\":{count},\"subtype\":")?;
                subtype(out)?;
                out.write_all(b"}")
            }
            Shape::PointerArray(count) => {
                let head = "{\"kind\":\"array\",\"count\":";
                write!(
                    out,
                    "{head}{count},\"subtype\":{{\"kind\":\"pointer\",\"subtype\":"
                )?;
                subtype(out)?;
                out.write_all(b"}}")
            }
        }
    }
}

/// A number type with a name.
fn base<'a>(t: &Type<'a>) -> Option<Base<'a>> {
    let name = t.name();
    let size = u64::from(t.declared_size()?);
    if name.is_empty() || size == 0 {
        return None;
    }
    if t.kind() == Kind::Float {
        return Some(Base {
            name,
            size,
            signed: true,
            kind: "float",
        });
    }
    let int = t.int()?;
    // An old-style bitfield's type has the name of the full one.
    if u64::from(int.bits) != size * 8 {
        return None;
    }
    let kind = match name {
        _ if int.is_bool => "bool",
        "char" | "signed char" | "unsigned char" => "char",
        _ if int.is_char => "char",
        _ => "int",
    };
    Some(Base {
        name,
        size,
        signed: int.signed,
        kind,
    })
}

/// The unsigned number of a size, one of [`EXPECTED`].
fn unsigned(size: u64) -> &'static str {
    match size {
        1 => "unsigned char",
        2 => "short unsigned int",
        4 => "unsigned int",
        _ => "long long unsigned int",
    }
}

fn signed(size: u64) -> &'static str {
    match size {
        1 => "char",
        2 => "short int",
        4 => "int",
        _ => "long long int",
    }
}
