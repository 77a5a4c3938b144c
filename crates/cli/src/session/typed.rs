//! Objects of kernel types as rows: member, type, value.

use anyhow::{Context, Result};
use serde_json::{Map, Value};
use vmsight_arch::Gva;
use vmsight_linux::Problem;
use vmsight_memory::ReadError;
use vmsight_symbols::types::Field;
use vmsight_symbols::{Kind, TypeId, Types, layout};

use super::{Missing, closest};
use crate::output::PROBLEMS;

/// The most rows one object becomes; the largest kernel structures have some hundred members.
const ROWS: usize = 4096;
/// How deep structures inside structures are opened.
const DEPTH: usize = 6;
/// Elements of an array that are shown.
const ELEMENTS: u32 = 64;
/// Bytes of text that are shown.
const TEXT: u32 = 4096;
/// How deep types may lie in each other, anonymous ones and arrays included. C code does not come near it; type data
/// out of a hostile guest can have a structure that contains itself.
const NESTING: usize = 32;
/// Types that are visited for one object.
const VISITS: usize = 1 << 16;

/// The columns of an object's rows.
pub(crate) const COLUMNS: &[&str] = &["address", "member", "type", "value", "symbol", PROBLEMS];

/// Fills a buffer from an address on.
pub(crate) type ReadMemory<'a> = dyn Fn(Gva, &mut [u8]) -> Result<(), ReadError> + 'a;

/// What of a guest an object is read from.
pub(crate) struct Source<'a> {
    pub(crate) types: &'a Types,
    /// Reads memory.
    pub(crate) read: &'a ReadMemory<'a>,
    /// The symbol at an address.
    pub(crate) name_of: &'a dyn Fn(Gva) -> Option<String>,
}

/// An object's members.
#[derive(Debug, Default)]
pub(crate) struct Object {
    pub(crate) rows: Vec<Map<String, Value>>,
    /// What is not shown, and why.
    pub(crate) warnings: Vec<String>,
    /// Something could not be read.
    pub(crate) unreadable: bool,
}

/// Reads an object: all its members, or those named.
pub(crate) fn read(source: &Source<'_>, at: Gva, type_name: &str, fields: &[String]) -> Result<Object> {
    let types = source.types;
    let id = find(types, type_name)?;
    let mut reader = Reader {
        source,
        object: Object::default(),
        visits: 0,
        partial: 0,
        cut: false,
    };
    if fields.is_empty() {
        let place = Place {
            at,
            depth: 0,
            nesting: 0,
        };
        reader.value(String::new(), place, types.resolve(id), None);
    }
    for path in fields {
        let found = member(source, at, id, path).with_context(|| {
            let names: Vec<_> = types.members(id).map(|m| m.name.to_owned()).collect();
            let hint = closest(path, names.iter().map(String::as_str));
            format!("{type_name} of this kernel has no member {path:?}{hint}")
        })?;
        match found {
            Member::There(at, field) => {
                let bits = field.bit_size.map(|size| (field.bit_offset, size));
                let place = Place {
                    at,
                    depth: DEPTH - 1,
                    nesting: 0,
                };
                reader.value(path.clone(), place, field.type_id, bits);
            }
            Member::Behind(at, type_id, read) => {
                reader.object.unreadable = true;
                reader.row(path.clone(), at, type_id, read);
            }
        }
    }
    let mut object = reader.object;
    if reader.partial > 0 {
        object.warnings.push(format!(
            "{} of the values are not shown whole; the column problems says what is left out",
            reader.partial
        ));
    }
    if reader.cut {
        let shown = object.rows.len();
        object.warnings.push(format!(
            "{type_name} has more than the {shown} members shown: name those wanted with --fields"
        ));
    }
    Ok(object)
}

/// Where a path leads.
enum Member {
    There(Gva, Field),
    /// Behind a pointer of this type, here, that could not be followed.
    Behind(Gva, TypeId, Read),
}

/// The member `path` of the object at `at`. A dot after a pointer follows it, as in `cred.uid`: C has `->` for that, but there
/// is no telling them apart by mistake. `None` where the types have no such member.
fn member(source: &Source<'_>, at: Gva, id: TypeId, path: &str) -> Option<Member> {
    let types = source.types;
    if let Some(field) = types.member_of(id, path) {
        return Some(Member::There(at.wrapping_add(field.offset), field));
    }
    path.rmatch_indices('.').find_map(|(dot, _)| {
        let pointer = types.member_of(id, &path[..dot])?;
        let ty = types.get(types.resolve(pointer.type_id))?;
        let target = (ty.kind() == Kind::Ptr).then(|| ty.target()).flatten()?;
        let rest = &path[dot + 1..];
        let here = at.wrapping_add(pointer.offset);
        let mut raw = [0; 8];
        let to = match (source.read)(here, &mut raw) {
            Ok(()) => u64::from_le_bytes(raw),
            Err(error) => {
                let read = Read::failed(&error);
                return Some(Member::Behind(here, pointer.type_id, read));
            }
        };
        let behind = member(source, Gva(to), types.resolve(target), rest)?;
        Some(match to {
            0 => Member::Behind(
                here,
                pointer.type_id,
                Read::not(&format!("{} is null", &path[..dot])),
            ),
            _ => behind,
        })
    })
}

/// A type by the name people give it: `task_struct`, `struct task_struct`, `pid_t`.
pub(crate) fn find(types: &Types, name: &str) -> Result<TypeId> {
    if let Some(id) = layout::named(types, name).first() {
        return Ok(*id);
    }
    let names = types.iter().map(|t| t.name()).filter(|n| !n.is_empty());
    Err(Missing(format!(
        "this kernel has no type {name:?}{}",
        closest(name, names)
    ))
    .into())
}

struct Reader<'k> {
    source: &'k Source<'k>,
    object: Object,
    visits: usize,
    /// Values that are shown in part.
    partial: usize,
    /// A bound was met.
    cut: bool,
}

/// Where a value lies, in memory and in the object.
#[derive(Clone, Copy)]
struct Place {
    at: Gva,
    /// Named structures around it.
    depth: usize,
    /// Types of any kind around it.
    nesting: usize,
}

impl Place {
    fn inside(self, offset: u64, named: bool) -> Place {
        Place {
            at: self.at.wrapping_add(offset),
            depth: self.depth + usize::from(named),
            nesting: self.nesting + 1,
        }
    }
}

/// What was read of a value.
struct Read {
    value: Value,
    symbol: Option<String>,
    problem: Option<Problem>,
}

impl Read {
    fn of(value: impl Into<Value>) -> Read {
        Read {
            value: value.into(),
            symbol: None,
            problem: None,
        }
    }

    fn not(reason: &str) -> Read {
        Read {
            problem: Some(Problem::new("value", reason)),
            ..Read::of(Value::Null)
        }
    }

    fn failed(error: &ReadError) -> Read {
        Read {
            problem: Some(Problem::read("value", error)),
            ..Read::of(Value::Null)
        }
    }

    fn note(self, note: String) -> Read {
        Read {
            problem: self.problem.or_else(|| Some(Problem::new("value", note))),
            ..self
        }
    }
}

impl Reader<'_> {
    /// Adds the rows of one value; structures are opened, members of anonymous ones named as the outer one's.
    fn value(&mut self, name: String, place: Place, type_id: TypeId, bits: Option<(u8, u8)>) {
        self.visits += 1;
        if self.object.rows.len() >= ROWS || self.visits > VISITS || place.nesting > NESTING {
            self.cut = true;
            return;
        }
        let types = self.source.types;
        let id = types.resolve(type_id);
        let Some(ty) = types.get(id) else {
            return self.row(name, place.at, type_id, Read::not("its type is not known"));
        };
        match ty.kind() {
            Kind::Struct | Kind::Union if place.depth < DEPTH => {
                for m in ty.members() {
                    if self.cut && (self.object.rows.len() >= ROWS || self.visits > VISITS) {
                        return;
                    }
                    let path = match (name.is_empty(), m.name.is_empty()) {
                        (true, _) => m.name.to_owned(),
                        (false, true) => name.clone(),
                        (false, false) => format!("{name}.{}", m.name),
                    };
                    let bits = m.bit_size.map(|size| ((m.bit_offset % 8) as u8, size));
                    // An anonymous structure is no level of its own.
                    let inside = place.inside(m.offset(), !m.name.is_empty());
                    self.value(path, inside, m.type_id, bits);
                }
            }
            Kind::Array => self.array(name, place, type_id, id),
            Kind::Struct | Kind::Union => {
                let note = "not opened here: name its members with --fields".to_owned();
                self.row(name, place.at, type_id, Read::of("{…}").note(note));
            }
            _ => {
                let read = self.scalar(place.at, type_id, bits);
                self.row(name, place.at, type_id, read);
            }
        }
    }

    /// Text in one row, numbers in one row, pointers and structures each in rows of their own.
    fn array(&mut self, name: String, place: Place, type_id: TypeId, id: TypeId) {
        let types = self.source.types;
        let Some(array) = types.get(id).and_then(|t| t.array()) else {
            return self.row(name, place.at, type_id, Read::not("its type is not known"));
        };
        let size = types.size_of(array.element).unwrap_or(0);
        let element = types.get(types.resolve(array.element)).map(|t| t.kind());
        let shown = array.count.min(ELEMENTS);
        let cut = (shown < array.count).then(|| format!("the first {shown} of {} elements", array.count));
        match element {
            Some(kind) if size == 1 && !kind.is_composite() && kind != Kind::Array => {
                let read = self.text(place.at, array.count);
                self.row(name, place.at, type_id, read);
            }
            Some(kind) if size <= 8 && !kind.is_composite() && !matches!(kind, Kind::Array | Kind::Ptr) => {
                let mut values = Vec::new();
                let mut problem = None;
                for i in 0..shown {
                    let at = place.at.wrapping_add(u64::from(i) * size);
                    let read = self.scalar(at, array.element, None);
                    problem = problem.or(read.problem);
                    values.push(read.value);
                }
                self.object.unreadable |= problem.is_some();
                let read = Read {
                    problem,
                    ..Read::of(values)
                };
                let read = match cut {
                    Some(cut) => read.note(cut),
                    None => read,
                };
                self.row(name, place.at, type_id, read);
            }
            _ => {
                for i in 0..shown {
                    let inside = place.inside(u64::from(i).wrapping_mul(size), true);
                    self.value(format!("{name}[{i}]"), inside, array.element, None);
                }
                if let Some(cut) = cut {
                    self.row(format!("{name}[…]"), place.at, type_id, Read::of("…").note(cut));
                }
            }
        }
    }

    fn row(&mut self, name: String, at: Gva, type_id: TypeId, read: Read) {
        let name = if name.is_empty() {
            "(itself)".to_owned()
        } else {
            name
        };
        self.object.unreadable |= read.value.is_null();
        self.partial += usize::from(read.problem.is_some() && !read.value.is_null());
        let problems = read.problem.iter().map(|p| p.to_string().into()).collect();
        let row = [
            ("address", format!("{at:#x}").into()),
            ("member", name.into()),
            ("type", self.source.types.type_name(type_id).into()),
            ("value", read.value),
            ("symbol", read.symbol.map_or(Value::Null, Value::from)),
            (PROBLEMS, Value::Array(problems)),
        ];
        self.object
            .rows
            .push(row.into_iter().map(|(k, v)| (k.to_owned(), v)).collect());
    }

    /// A number, flag, enumerator's name or pointer with its symbol.
    fn scalar(&self, at: Gva, type_id: TypeId, bits: Option<(u8, u8)>) -> Read {
        let types = self.source.types;
        let id = types.resolve(type_id);
        let Some(ty) = types.get(id) else {
            return Read::not("its type is not known");
        };
        // A bitfield of up to 64 bits may begin anywhere in its first byte.
        let (low, width) = match bits {
            Some((low, width)) => (u32::from(low), u32::from(width)),
            None => (
                0,
                u32::try_from(types.size_of(id).unwrap_or(0).saturating_mul(8)).unwrap_or(u32::MAX),
            ),
        };
        if width == 0 {
            return Read::not("it has no size");
        }
        if width > 64 || low > 7 {
            return Read::not("it has more than 64 bits");
        }
        let mut bytes = [0u8; 16];
        let Some(buffer) = bytes.get_mut(..(low + width).div_ceil(8) as usize) else {
            return Read::not("it has more than 64 bits");
        };
        if let Err(error) = (self.source.read)(at, buffer) {
            return Read::failed(&error);
        }
        let mut raw = (u128::from_le_bytes(bytes) >> low) as u64;
        if width < 64 {
            raw &= (1u64 << width) - 1;
        }
        let signed = ((raw << (64 - width)) as i64) >> (64 - width);
        match ty.kind() {
            Kind::Ptr => Read {
                symbol: (self.source.name_of)(Gva(raw)),
                ..Read::of(format!("{raw:#x}"))
            },
            Kind::Enum | Kind::Enum64 => {
                let value = if ty.is_signed_enum() { signed } else { raw as i64 };
                let known = types.enumerators(id).find(|e| e.value == value);
                Read::of(known.map_or_else(|| value.to_string(), |e| e.name.to_owned()))
            }
            Kind::Int => match ty.int() {
                Some(int) if int.is_bool => Read::of(raw != 0),
                Some(int) if int.signed => Read::of(signed),
                _ => Read::of(raw),
            },
            _ => Read::of(format!("{raw:#x}")),
        }
    }

    /// A char array as text up to its zero, or as hexadecimal where it is none.
    fn text(&self, at: Gva, length: u32) -> Read {
        let shown = length.min(TEXT);
        let mut bytes = vec![0; shown as usize];
        if let Err(error) = (self.source.read)(at, &mut bytes) {
            return Read::failed(&error);
        }
        let end = bytes.iter().position(|b| *b == 0);
        let text = std::str::from_utf8(&bytes[..end.unwrap_or(bytes.len())]).ok();
        let read = match text.filter(|t| !t.chars().any(|c| c.is_control() && c != '\n' && c != '\t')) {
            // What is behind the zero of a text is no part of it.
            Some(text) if end.is_some() => return Read::of(text),
            Some(text) => Read::of(text),
            None => Read::of(bytes.iter().map(|b| format!("{b:02x}")).collect::<String>()),
        };
        if shown < length {
            return read.note(format!("the first {shown} of {length} bytes"));
        }
        read
    }
}

#[cfg(test)]
#[path = "typed_tests.rs"]
pub(crate) mod tests;
