//! Objects of kernel types as rows: member, type, value.

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};
use vmsight_arch::Gva;
use vmsight_memory::AddressSpace;
use vmsight_symbols::{Kind, TypeId, Types, layout};

use super::{Session, closest};

/// The most rows one object becomes; the largest kernel structures have some hundred members.
const ROWS: usize = 4096;
/// How deep structures inside structures are opened.
const DEPTH: usize = 6;
/// Elements of an array that are shown.
const ELEMENTS: u32 = 64;

/// Reads an object: all its members, or those named.
pub(crate) fn read(
    session: &Session,
    space: &AddressSpace,
    at: Gva,
    type_name: &str,
    fields: &[String],
) -> Result<Vec<Map<String, Value>>> {
    let types = session.kernel()?.types();
    let id = find(types, type_name)?;
    let mut reader = Reader {
        session,
        types,
        space,
        rows: Vec::new(),
    };
    if fields.is_empty() {
        reader.value(String::new(), at, types.resolve(id), None, 0);
    }
    for path in fields {
        let field = types.member_of(id, path).with_context(|| {
            let names: Vec<_> = types.members(id).map(|m| m.name.to_owned()).collect();
            let hint = closest(path, names.iter().map(String::as_str));
            format!("{type_name} of this kernel has no member {path:?}{hint}")
        })?;
        let bits = field.bit_size.map(|size| (field.bit_offset, size));
        reader.value(
            path.clone(),
            at.wrapping_add(field.offset),
            field.type_id,
            bits,
            DEPTH - 1,
        );
    }
    Ok(reader.rows)
}

/// A type by the name people give it: `task_struct`, `struct task_struct`, `pid_t`.
pub(crate) fn find(types: &Types, name: &str) -> Result<TypeId> {
    if let Some(id) = layout::named(types, name).first() {
        return Ok(*id);
    }
    let names = types.iter().map(|t| t.name()).filter(|n| !n.is_empty());
    bail!("this kernel has no type {name:?}{}", closest(name, names))
}

struct Reader<'k> {
    session: &'k Session,
    types: &'k Types,
    space: &'k AddressSpace,
    rows: Vec<Map<String, Value>>,
}

impl Reader<'_> {
    /// Adds the rows of one value; structures are opened, members of anonymous ones named as the outer one's.
    fn value(&mut self, name: String, at: Gva, type_id: TypeId, bits: Option<(u8, u8)>, depth: usize) {
        if self.rows.len() >= ROWS {
            return;
        }
        let id = self.types.resolve(type_id);
        let Some(ty) = self.types.get(id) else {
            return self.row(name, at, type_id, Value::Null);
        };
        match ty.kind() {
            Kind::Struct | Kind::Union if depth < DEPTH => {
                let members: Vec<_> = ty.members().collect();
                for m in members {
                    let path = match (name.is_empty(), m.name.is_empty()) {
                        (true, _) => m.name.to_owned(),
                        (false, true) => name.clone(),
                        (false, false) => format!("{name}.{}", m.name),
                    };
                    let bits = m.bit_size.map(|size| ((m.bit_offset % 8) as u8, size));
                    // An anonymous structure is no level of its own.
                    let depth = if m.name.is_empty() { depth } else { depth + 1 };
                    self.value(path, at.wrapping_add(m.offset()), m.type_id, bits, depth);
                }
            }
            Kind::Array => {
                let Some(array) = ty.array() else { return };
                let size = self.types.size_of(array.element).unwrap_or(0);
                if size == 1 {
                    let value = self.text(at, array.count.min(4096));
                    return self.row(name, at, type_id, value);
                }
                let scalar = self
                    .types
                    .get(self.types.resolve(array.element))
                    .is_some_and(|t| !t.kind().is_composite());
                if scalar && size <= 8 {
                    let values = (0..array.count.min(ELEMENTS))
                        .map(|i| self.scalar(at.wrapping_add(u64::from(i) * size), array.element, None))
                        .collect();
                    return self.row(name, at, type_id, Value::Array(values));
                }
                for i in 0..array.count.min(ELEMENTS) {
                    let element = at.wrapping_add(u64::from(i).wrapping_mul(size));
                    self.value(format!("{name}[{i}]"), element, array.element, None, depth + 1);
                }
            }
            Kind::Struct | Kind::Union => self.row(name, at, type_id, Value::from("{…}")),
            _ => {
                let value = self.scalar(at, type_id, bits);
                self.row(name, at, type_id, value);
            }
        }
    }

    fn row(&mut self, name: String, at: Gva, type_id: TypeId, value: Value) {
        let mut row = Map::new();
        row.insert("address".into(), format!("{at:#x}").into());
        row.insert(
            "member".into(),
            if name.is_empty() {
                "(itself)".into()
            } else {
                name.into()
            },
        );
        row.insert("type".into(), self.types.type_name(type_id).into());
        if value.is_null() {
            row.insert("problems".into(), Value::from(vec!["value: unreadable"]));
        }
        row.insert("value".into(), value);
        self.rows.push(row);
    }

    /// A number, flag, enumerator name or pointer with its symbol; null where it cannot be read.
    fn scalar(&self, at: Gva, type_id: TypeId, bits: Option<(u8, u8)>) -> Value {
        let id = self.types.resolve(type_id);
        let Some(ty) = self.types.get(id) else {
            return Value::Null;
        };
        let size = match bits {
            Some((low, width)) => usize::from(low + width).div_ceil(8),
            None => self.types.size_of(id).unwrap_or(0) as usize,
        };
        let mut bytes = [0u8; 8];
        let Some(buffer) = bytes.get_mut(..size).filter(|b| !b.is_empty()) else {
            return Value::Null;
        };
        if self.space.read(at, buffer).is_err() {
            return Value::Null;
        }
        let mut raw = u64::from_le_bytes(bytes);
        let mut width = (size * 8) as u32;
        if let Some((low, size)) = bits {
            width = u32::from(size);
            raw = raw.checked_shr(u32::from(low)).unwrap_or(0);
        }
        if width < 64 {
            raw &= (1u64 << width) - 1;
        }
        let signed = || {
            let unused = 64 - width.clamp(1, 64);
            ((raw << unused) as i64) >> unused
        };
        match ty.kind() {
            Kind::Ptr => {
                let mut text = format!("{raw:#x}");
                if let Some(name) = self.session.name_of(Gva(raw)) {
                    text = format!("{text} <{name}>");
                }
                text.into()
            }
            Kind::Enum | Kind::Enum64 => {
                let value = if ty.is_signed_enum() { signed() } else { raw as i64 };
                match self.types.enumerators(id).find(|e| e.value == value) {
                    Some(e) => format!("{} ({value})", e.name).into(),
                    None => value.into(),
                }
            }
            Kind::Int => match ty.int() {
                Some(int) if int.is_bool => (raw != 0).into(),
                Some(int) if int.signed => signed().into(),
                _ => raw.into(),
            },
            _ => format!("{raw:#x}").into(),
        }
    }

    /// A char array as text up to its zero, or as hexadecimal where it is none.
    fn text(&self, at: Gva, length: u32) -> Value {
        let mut bytes = vec![0; length as usize];
        if self.space.read(at, &mut bytes).is_err() {
            return Value::Null;
        }
        let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
        match std::str::from_utf8(&bytes[..end]) {
            Ok(text) if !text.chars().any(|c| c.is_control() && c != '\n' && c != '\t') => text.into(),
            _ => bytes
                .iter()
                .map(|b| format!("{b:02x}"))
                .collect::<String>()
                .into(),
        }
    }
}
