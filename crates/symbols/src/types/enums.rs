//! Enumerations and the names of their values.

use super::bytes::word;
use super::index::{Buckets, hash};
use super::{Kind, Type, TypeId, Types};

/// One name of an enumeration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Enumerator<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its value. Values of unsigned enumerations above 2^63 wrap round.
    pub value: i64,
}

/// The names of one enumeration in the order of their declaration.
#[derive(Clone)]
pub struct Enumerators<'a> {
    types: &'a Types,
    records: std::slice::ChunksExact<'a, u8>,
    signed: bool,
}

impl<'a> Iterator for Enumerators<'a> {
    type Item = Enumerator<'a>;

    fn next(&mut self) -> Option<Enumerator<'a>> {
        let record = self.records.next()?;
        let name = std::str::from_utf8(self.types.string(word(record, 0)?)).unwrap_or("");
        let low = word(record, 4)?;
        let value = match word(record, 8) {
            Some(high) => (u64::from(high) << 32 | u64::from(low)) as i64,
            None if self.signed => i64::from(low as i32),
            None => i64::from(low),
        };
        Some(Enumerator { name, value })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.records.size_hint()
    }
}

impl ExactSizeIterator for Enumerators<'_> {}

impl<'a> Type<'a> {
    /// Its names and values; none where it is no enumeration.
    pub fn enumerators(&self) -> Enumerators<'a> {
        let size = if self.kind() == Kind::Enum64 { 12 } else { 8 };
        Enumerators {
            types: self.types,
            records: self.elements(self.kind().is_enum(), size),
            // Where the encoder never marks an enumeration as signed, -1 must not read as 4294967295.
            signed: self.flag() || !self.types.0.signed_enums,
        }
    }

    /// Whether it is an enumeration marked as signed.
    pub fn is_signed_enum(&self) -> bool {
        self.kind().is_enum() && self.flag()
    }
}

impl Types {
    /// The names and values of an enumeration, typedefs and qualifiers stripped; none for anything else.
    pub fn enumerators(&self, id: TypeId) -> Enumerators<'_> {
        self.get(self.resolve(id))
            .unwrap_or(Type::void(self))
            .enumerators()
    }

    /// The value of an enumeration's name, whichever enumeration it belongs to (the blob's own first).
    pub fn enumerator(&self, name: &str) -> Option<i64> {
        let mut last = None;
        let own = self
            .enumerator_index()
            .candidates(hash(name.as_bytes()))
            .find_map(|id| {
                // A hostile blob can list one large enumeration many times under one hash.
                if last.replace(id) == Some(id) {
                    return None;
                }
                self.get(TypeId(id))?
                    .enumerators()
                    .find(|e| e.name == name)
                    .map(|e| e.value)
            });
        own.or_else(|| self.base()?.enumerator(name))
    }

    pub(super) fn enumerator_index(&self) -> &Buckets {
        self.0.enumerators.get_or_init(|| {
            let enums = self.iter().filter(|t| t.kind().is_enum());
            let named = enums.flat_map(|t| t.enumerators().map(move |e| (hash(e.name.as_bytes()), t.id().0)));
            Buckets::build(&named.collect::<Vec<_>>())
        })
    }
}
