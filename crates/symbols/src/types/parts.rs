//! The index of a blob as bytes, so that the next run need not make it again.

use std::sync::{Arc, OnceLock};

use super::bytes::{Words, word};
use super::error::TypesError;
use super::header::Header;
use super::index::Buckets;
use super::{Bytes, Inner, Types};

/// "VTI" and the format's version: to be raised with every change of the index or of its hash.
const MAGIC: u32 = u32::from_le_bytes(*b"VTI1");
/// Magic, flags, types, then starts and entries of both tables.
const HEADER_WORDS: usize = 7;

impl Types {
    /// The index of this blob (not of its base) as bytes for [`Types::from_parts`]. Makes what is not made yet.
    pub fn index_bytes(&self) -> Vec<u8> {
        let (names, enumerators) = (self.names().parts(), self.enumerator_index().parts());
        let arrays = [
            self.0.offsets.as_bytes(),
            names.0,
            names.1,
            enumerators.0,
            enumerators.1,
        ];
        let flags = u32::from(self.0.signed_enums) | u32::from(self.0.pointer_size) << 8;
        let len = HEADER_WORDS * 4 + arrays.iter().map(|a| a.len()).sum::<usize>();
        let mut out = Vec::with_capacity(len);
        out.extend(MAGIC.to_le_bytes());
        out.extend(flags.to_le_bytes());
        for array in arrays {
            // Each has fewer elements than the blob has bytes, and its offsets fit 32 bits.
            out.extend(((array.len() / 4) as u32).to_le_bytes());
        }
        for array in arrays {
            out.extend(array);
        }
        out
    }

    /// Puts a blob and the index that [`Types::index_bytes`] made for it together again, without reading through
    /// either.
    ///
    /// A wrong index is found out where its sizes do not fit; else it makes lookups fail or find the wrong record,
    /// but never panic or read outside the blob. Whoever keeps the bytes must see to it that they are the right ones.
    pub fn from_parts(
        btf: impl Into<Bytes>,
        index: impl Into<Bytes>,
        base: Option<&Self>,
    ) -> Result<Self, TypesError> {
        let (btf, index) = (btf.into(), index.into());
        let header = Header::parse(btf.as_slice())?;
        let (first_id, first_string) = Self::first_numbers(base)?;
        let bytes = index.as_slice();
        let field = |n: usize| {
            word(bytes, n * 4).ok_or(TypesError::Index {
                why: "it is too short",
            })
        };
        if field(0)? != MAGIC {
            return Err(TypesError::Index {
                why: "it is of another format",
            });
        }
        let flags = field(1)?;
        let pointer_size = (flags >> 8) as u8;
        if !matches!(pointer_size, 4 | 8) {
            return Err(TypesError::Index {
                why: "it names no possible size of a pointer",
            });
        }
        let mut at = HEADER_WORDS * 4;
        let mut array = |n: usize| {
            let end = (field(n)? as usize)
                .checked_mul(4)
                .and_then(|len| at.checked_add(len));
            let part = end.and_then(|end| index.slice(at..end));
            let part = part.ok_or(TypesError::Index {
                why: "it is too short",
            })?;
            at += part.len();
            Ok(part)
        };
        let offsets = Words::new(array(2)?);
        let (starts, entries) = (array(3)?, array(4)?);
        let names = Buckets::from_parts(starts, entries);
        let (starts, entries) = (array(5)?, array(6)?);
        let enumerators = Buckets::from_parts(starts, entries);
        if at != index.len() {
            return Err(TypesError::Index {
                why: "it is too long",
            });
        }
        let (Some(names), Some(enumerators)) = (names, enumerators) else {
            return Err(TypesError::Index {
                why: "its tables have impossible sizes",
            });
        };
        let count = u32::try_from(offsets.len())
            .ok()
            .and_then(|n| n.checked_add(first_id));
        let strings = u32::try_from(header.strings.len())
            .ok()
            .and_then(|n| n.checked_add(first_string));
        if count.is_none() || strings.is_none() {
            return Err(TypesError::TooMany);
        }
        // The smallest record has 12 bytes.
        if offsets.len() > header.types.len() / 12 {
            return Err(TypesError::Index {
                why: "it has more types than the blob has room for",
            });
        }
        Ok(Self(Arc::new(Inner {
            types: header.types,
            strings: header.strings,
            btf,
            base: base.cloned(),
            first_id,
            first_string,
            offsets,
            signed_enums: flags & 1 != 0,
            pointer_size,
            names: OnceLock::from(names),
            enumerators: OnceLock::from(enumerators),
        })))
    }
}
