//! Members of structs and unions, bitfields of both encodings included.

use super::bytes::word;
use super::{Kind, Type, TypeId, Types};

/// A member as its struct declares it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member<'a> {
    /// Name; empty for an anonymous struct or union, whose members are spoken of as the outer one's.
    pub name: &'a str,
    /// Its declared type.
    pub type_id: TypeId,
    /// Offset from the start of the struct, in bits.
    pub bit_offset: u64,
    /// Width in bits, where it is a bitfield.
    pub bit_size: Option<u8>,
}

impl Member<'_> {
    /// Offset from the start of the struct in whole bytes; for a bitfield the byte its first bit lies in.
    pub fn offset(&self) -> u64 {
        self.bit_offset / 8
    }
}

/// The members of one struct or union in the order of their declaration.
#[derive(Clone)]
pub struct Members<'a> {
    types: &'a Types,
    records: std::slice::ChunksExact<'a, u8>,
    /// The upper byte of each offset is the width of a bitfield.
    packed: bool,
}

impl<'a> Iterator for Members<'a> {
    type Item = Member<'a>;

    fn next(&mut self) -> Option<Member<'a>> {
        let record = self.records.next()?;
        let name = std::str::from_utf8(self.types.string(word(record, 0)?)).unwrap_or("");
        let (type_id, offset) = (TypeId(word(record, 4)?), word(record, 8)?);
        let (bit_offset, bit_size) = if self.packed {
            let width = (offset >> 24) as u8;
            (u64::from(offset & 0xff_ffff), (width != 0).then_some(width))
        } else {
            // Before kind_flag (Linux 5.0) a bitfield had an integer type of its own width.
            match self
                .types
                .get(self.types.resolve(type_id))
                .and_then(|t| Some((t.int()?, t.declared_size()?)))
            {
                Some((int, size)) if int.bit_offset != 0 || u32::from(int.bits) != size.saturating_mul(8) => {
                    (u64::from(offset) + u64::from(int.bit_offset), Some(int.bits))
                }
                _ => (u64::from(offset), None),
            }
        };
        Some(Member {
            name,
            type_id,
            bit_offset,
            bit_size,
        })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.records.size_hint()
    }
}

impl ExactSizeIterator for Members<'_> {}

impl<'a> Type<'a> {
    /// Its members; none where it is no struct or union.
    pub fn members(&self) -> Members<'a> {
        let composite = matches!(self.kind(), Kind::Struct | Kind::Union);
        Members {
            types: self.types,
            records: self.elements(composite, 12),
            packed: self.flag(),
        }
    }
}

impl Types {
    /// The members of a struct or union, typedefs and qualifiers stripped; none where it is something else.
    pub fn members(&self, id: TypeId) -> Members<'_> {
        self.get(self.resolve(id)).unwrap_or(Type::void(self)).members()
    }
}
