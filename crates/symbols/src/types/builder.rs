//! Makes BTF: what ISF and DWARF are converted into, and what the tests of this crate are fed with.

use std::collections::HashMap;

use super::error::TypesError;
use super::{Kind, SectionVar, TypeId, Types};

/// A member for [`Def::Struct`] and [`Def::Union`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemberDef<'a> {
    /// Name; empty for an anonymous struct or union.
    pub name: &'a str,
    /// Type.
    pub type_id: TypeId,
    /// Offset from the start of the struct in bits.
    pub bit_offset: u64,
    /// Width in bits of a bitfield.
    pub bit_size: Option<u8>,
}

/// A type to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Def<'a> {
    /// An integer.
    Int {
        /// Name.
        name: &'a str,
        /// Size in bytes.
        size: u32,
        /// Signed.
        signed: bool,
        /// A character.
        is_char: bool,
        /// A `bool`.
        is_bool: bool,
    },
    /// A floating-point number.
    Float {
        /// Name.
        name: &'a str,
        /// Size in bytes.
        size: u32,
    },
    /// A pointer to a type.
    Ptr(TypeId),
    /// An array.
    Array {
        /// Type of an element.
        element: TypeId,
        /// Type of an index (any integer, or `void`).
        index: TypeId,
        /// Number of elements; 0 for a flexible array.
        count: u32,
    },
    /// A structure.
    Struct {
        /// Name; empty for an anonymous one.
        name: &'a str,
        /// Size in bytes.
        size: u32,
        /// Members in the order of declaration.
        members: &'a [MemberDef<'a>],
    },
    /// A union.
    Union {
        /// Name; empty for an anonymous one.
        name: &'a str,
        /// Size in bytes.
        size: u32,
        /// Members in the order of declaration.
        members: &'a [MemberDef<'a>],
    },
    /// An enumeration. Becomes [`Kind::Enum64`] where a size above 4 or a value asks for that.
    Enum {
        /// Name; empty for an anonymous one.
        name: &'a str,
        /// Size in bytes.
        size: u32,
        /// Values are signed.
        signed: bool,
        /// Names and values.
        values: &'a [(&'a str, i64)],
    },
    /// A struct or union that is only declared.
    Fwd {
        /// Name.
        name: &'a str,
        /// A union.
        is_union: bool,
    },
    /// Another name for a type.
    Typedef {
        /// The name.
        name: &'a str,
        /// The type.
        target: TypeId,
    },
    /// `const`
    Const(TypeId),
    /// `volatile`
    Volatile(TypeId),
    /// `restrict`
    Restrict(TypeId),
    /// A function type.
    FuncProto {
        /// What it returns; `void` for nothing.
        result: TypeId,
        /// Names and types of its parameters; ("", void) at the end for `...`.
        params: &'a [(&'a str, TypeId)],
    },
    /// A function.
    Func {
        /// Name.
        name: &'a str,
        /// A [`Def::FuncProto`].
        proto: TypeId,
        /// 0 static, 1 global, 2 extern.
        linkage: u32,
    },
    /// A variable.
    Var {
        /// Name.
        name: &'a str,
        /// Type.
        target: TypeId,
        /// 0 static, 1 global, 2 extern.
        linkage: u32,
    },
    /// A section with variables.
    Datasec {
        /// Name.
        name: &'a str,
        /// Size in bytes.
        size: u32,
        /// Its variables.
        vars: &'a [SectionVar],
    },
    /// A note on a declaration.
    DeclTag {
        /// The note.
        name: &'a str,
        /// The declaration: a struct, function, variable, ….
        target: TypeId,
        /// Number of the member or parameter; -1 for the whole.
        component: i32,
    },
    /// A note on a type.
    TypeTag {
        /// The note.
        name: &'a str,
        /// The type.
        target: TypeId,
    },
}

impl<'a> Def<'a> {
    /// An integer that is neither a character nor a `bool`.
    pub const fn int(name: &'a str, size: u32, signed: bool) -> Self {
        Self::Int {
            name,
            size,
            signed,
            is_char: false,
            is_bool: false,
        }
    }
}

/// Collects types and writes them as BTF.
///
/// Ids are given in the order of asking, and a type may be [reserved](Builder::reserve) before it is known, since C's
/// types refer to each other in circles.
#[derive(Debug)]
pub struct Builder {
    base: Option<Types>,
    first_id: u32,
    first_string: u32,
    strings: Vec<u8>,
    numbers: HashMap<Box<[u8]>, u32>,
    records: Vec<u8>,
    /// Where each type's record lies in `records`; empty until it is defined.
    spans: Vec<(u32, u32)>,
    dropped: usize,
}

impl Default for Builder {
    fn default() -> Self {
        Self::new()
    }
}

impl Builder {
    /// For types that stand for themselves.
    pub fn new() -> Self {
        Self {
            base: None,
            first_id: 1,
            first_string: 0,
            strings: vec![0],
            numbers: HashMap::from_iter([(Box::default(), 0)]),
            records: Vec::new(),
            spans: Vec::new(),
            dropped: 0,
        }
    }

    /// For types laid over those of a kernel: split BTF.
    pub fn over(base: &Types) -> Result<Self, TypesError> {
        let (first_id, first_string) = Types::first_numbers(Some(base))?;
        // The base's string 0 is the empty name for both, so the own strings need none.
        Ok(Self {
            base: Some(base.clone()),
            first_id,
            first_string,
            strings: Vec::new(),
            ..Self::new()
        })
    }

    /// How many types have an id already.
    pub fn len(&self) -> usize {
        self.spans.len()
    }

    /// Whether there is no type yet.
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// How many members, sizes or values could not be written as BTF (offsets from 512 MiB on, for instance) and
    /// have been left out or cut.
    pub fn dropped(&self) -> usize {
        self.dropped
    }

    /// An id for a type that will be [defined](Builder::define) later. If it never is, it becomes an anonymous
    /// forward declaration.
    pub fn reserve(&mut self) -> TypeId {
        let id = TypeId(self.first_id.wrapping_add(self.spans.len() as u32));
        self.spans.push((0, 0));
        id
    }

    /// Adds a type.
    pub fn add(&mut self, def: &Def<'_>) -> TypeId {
        let id = self.reserve();
        self.define(id, def);
        id
    }

    /// Says what a reserved type is. Defining one again replaces it.
    pub fn define(&mut self, id: TypeId, def: &Def<'_>) {
        match *def {
            Def::Int {
                name,
                size,
                signed,
                is_char,
                is_bool,
            } => {
                let encoding = u32::from(signed) | u32::from(is_char) << 1 | u32::from(is_bool) << 2;
                let bits = size.saturating_mul(8).min(255);
                self.record(
                    id,
                    Kind::Int,
                    false,
                    0,
                    name,
                    size,
                    &(encoding << 24 | bits).to_le_bytes(),
                );
            }
            Def::Float { name, size } => self.record(id, Kind::Float, false, 0, name, size, &[]),
            Def::Ptr(target) => self.record(id, Kind::Ptr, false, 0, "", target.0, &[]),
            Def::Array {
                element,
                index,
                count,
            } => {
                let tail = [element.0, index.0, count].map(u32::to_le_bytes);
                self.record(id, Kind::Array, false, 0, "", 0, tail.as_flattened());
            }
            Def::Struct { name, size, members } => self.composite(id, Kind::Struct, name, size, members),
            Def::Union { name, size, members } => self.composite(id, Kind::Union, name, size, members),
            Def::Enum {
                name,
                size,
                signed,
                values,
            } => self.enumeration(id, name, size, signed, values),
            Def::Fwd { name, is_union } => self.record(id, Kind::Fwd, is_union, 0, name, 0, &[]),
            Def::Typedef { name, target } => self.record(id, Kind::Typedef, false, 0, name, target.0, &[]),
            Def::Const(target) => self.record(id, Kind::Const, false, 0, "", target.0, &[]),
            Def::Volatile(target) => self.record(id, Kind::Volatile, false, 0, "", target.0, &[]),
            Def::Restrict(target) => self.record(id, Kind::Restrict, false, 0, "", target.0, &[]),
            Def::FuncProto { result, params } => {
                let params = self.capped(params);
                let mut tail = Vec::with_capacity(params.len() * 8);
                for &(name, type_id) in params {
                    tail.extend(self.string(name.as_bytes()).to_le_bytes());
                    tail.extend(type_id.0.to_le_bytes());
                }
                self.record(id, Kind::FuncProto, false, params.len(), "", result.0, &tail);
            }
            Def::Func { name, proto, linkage } => {
                self.record(id, Kind::Func, false, linkage.min(2) as usize, name, proto.0, &[]);
            }
            Def::Var {
                name,
                target,
                linkage,
            } => {
                self.record(id, Kind::Var, false, 0, name, target.0, &linkage.to_le_bytes());
            }
            Def::Datasec { name, size, vars } => {
                let vars = self.capped(vars);
                let words = vars.iter().flat_map(|v| [v.variable.0, v.offset, v.size]);
                let tail: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
                self.record(id, Kind::Datasec, false, vars.len(), name, size, &tail);
            }
            Def::DeclTag {
                name,
                target,
                component,
            } => {
                self.record(
                    id,
                    Kind::DeclTag,
                    false,
                    0,
                    name,
                    target.0,
                    &component.to_le_bytes(),
                );
            }
            Def::TypeTag { name, target } => self.record(id, Kind::TypeTag, false, 0, name, target.0, &[]),
        }
    }

    fn composite(&mut self, id: TypeId, kind: Kind, name: &str, size: u32, members: &[MemberDef<'_>]) {
        let members = self.capped(members);
        let packed = members.iter().any(|m| m.bit_size.is_some());
        // With bitfields an offset has 24 bits. A struct that has both bitfields and members beyond 2 MiB keeps the
        // members and loses the widths.
        let roomy = members.iter().all(|m| m.bit_offset < 1 << 24);
        let flag = packed && roomy;
        let mut tail = Vec::with_capacity(members.len() * 12);
        let mut count = 0;
        for member in members {
            let width = u32::from(member.bit_size.unwrap_or(0));
            let Ok(offset) = u32::try_from(member.bit_offset) else {
                self.dropped += 1;
                continue;
            };
            if width != 0 && !flag {
                self.dropped += 1;
            }
            tail.extend(self.string(member.name.as_bytes()).to_le_bytes());
            tail.extend(member.type_id.0.to_le_bytes());
            tail.extend(if flag { width << 24 | offset } else { offset }.to_le_bytes());
            count += 1;
        }
        self.record(id, kind, flag, count, name, size, &tail);
    }

    fn enumeration(&mut self, id: TypeId, name: &str, size: u32, signed: bool, values: &[(&str, i64)]) {
        let values = self.capped(values);
        let fits = |v: i64| {
            if signed {
                i32::try_from(v).is_ok()
            } else {
                u32::try_from(v).is_ok()
            }
        };
        let wide = size > 4 || !values.iter().all(|&(_, v)| fits(v));
        let mut tail = Vec::with_capacity(values.len() * 12);
        for &(name, value) in values {
            tail.extend(self.string(name.as_bytes()).to_le_bytes());
            tail.extend(&value.to_le_bytes()[..if wide { 8 } else { 4 }]);
        }
        let kind = if wide { Kind::Enum64 } else { Kind::Enum };
        self.record(id, kind, signed, values.len(), name, size, &tail);
    }

    /// As many elements as a record can count.
    fn capped<'a, T>(&mut self, elements: &'a [T]) -> &'a [T] {
        const MOST: usize = 0xff_ffff;
        self.dropped += elements.len().saturating_sub(MOST);
        elements.get(..MOST).unwrap_or(elements)
    }

    #[expect(clippy::too_many_arguments, reason = "one for each field of the record")]
    fn record(
        &mut self,
        id: TypeId,
        kind: Kind,
        flag: bool,
        vlen: usize,
        name: &str,
        word: u32,
        tail: &[u8],
    ) {
        let info = u32::from(flag) << 31 | (kind as u32) << 24 | vlen as u32;
        self.raw(id, name.as_bytes(), info, word, tail);
    }

    /// Writes a record whose parts are encoded already.
    pub(super) fn raw(&mut self, id: TypeId, name: &[u8], info: u32, word: u32, tail: &[u8]) {
        let name = self.string(name);
        let start = self.records.len();
        for word in [name, info, word] {
            self.records.extend(word.to_le_bytes());
        }
        self.records.extend(tail);
        let span = u32::try_from(start)
            .ok()
            .zip(u32::try_from(self.records.len() - start).ok());
        let index = id.0.checked_sub(self.first_id).map(|i| i as usize);
        match (index.and_then(|i| self.spans.get_mut(i)), span) {
            (Some(slot), Some(span)) => *slot = span,
            // An id of another builder, or 4 GiB of records.
            _ => self.dropped += 1,
        }
    }

    /// The number of a string, which is stored once.
    pub(crate) fn string(&mut self, text: &[u8]) -> u32 {
        // A NUL would end it for every reader.
        let text = text.split(|&b| b == 0).next().unwrap_or(&[]);
        if let Some(&number) = self.numbers.get(text) {
            return number;
        }
        let number = u32::try_from(self.strings.len())
            .ok()
            .and_then(|n| n.checked_add(self.first_string));
        let Some(number) = number else {
            self.dropped += 1;
            return 0;
        };
        self.strings.extend(text);
        self.strings.push(0);
        self.numbers.insert(text.into(), number);
        number
    }

    /// The text of a string's number; empty where it is none of this builder's.
    pub(crate) fn text(&self, number: u32) -> &str {
        let at = number.checked_sub(self.first_string).unwrap_or(u32::MAX);
        std::str::from_utf8(super::header::string(&self.strings, at)).unwrap_or("")
    }

    /// Writes the blob and opens it.
    pub fn finish(self) -> Result<Types, TypesError> {
        let base = self.base.clone();
        let blob = self.into_bytes()?;
        Types::open(blob.into(), base.as_ref())
    }

    /// Writes the blob: header, types in the order of their ids, strings.
    pub fn into_bytes(mut self) -> Result<Vec<u8>, TypesError> {
        for index in 0..self.spans.len() {
            if self.spans[index].1 == 0 {
                let id = TypeId(self.first_id.wrapping_add(index as u32));
                self.define(
                    id,
                    &Def::Fwd {
                        name: "",
                        is_union: false,
                    },
                );
            }
        }
        let records = || {
            self.spans
                .iter()
                .map(|&(start, len)| (start as usize, len as usize))
        };
        let length = |len: usize| u32::try_from(len).map_err(|_| TypesError::TooMany);
        let types = length(records().map(|(_, len)| len).sum())?;
        let strings = length(self.strings.len())?;
        let mut out = Vec::with_capacity(24 + types as usize + strings as usize);
        // Magic, version 1, no flags; length of this header; then offset and length of both sections.
        for word in [0x0001_eb9f, 24, 0, types, types, strings] {
            out.extend(u32::to_le_bytes(word));
        }
        for (start, len) in records() {
            out.extend(self.records.get(start..start + len).unwrap_or(&[]));
        }
        out.extend(&self.strings);
        Ok(out)
    }
}
