//! Where a member lies that is named by a path such as `mm.pgd`, `files[3].next` or, through anonymous structs, `pid`.

use super::{Kind, TypeId, Types};

/// How many members one lookup may look at, in all structs of a name. The largest kernel structs have a few hundred, nested
/// ones included.
const MAX_VISITED: usize = 200_000;
/// How deep anonymous structs may nest.
const MAX_DEPTH: usize = 32;

/// The place of a member within the struct that the lookup started from.
///
/// To read it: take `size` bytes at `offset` as a little-endian number, shift it right by `bit_offset` and, for a
/// bitfield, keep `bit_size` bits. [`Field::extract`] does the last two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Offset in bytes.
    pub offset: u64,
    /// For a bitfield, how many bits of the bytes at `offset` lie below it; else 0.
    pub bit_offset: u8,
    /// For a bitfield, its width in bits (at most 64).
    pub bit_size: Option<u8>,
    /// Bytes to read at `offset`: the size of its type, or for a bitfield 1, 2, 4 or 8. 0 for a flexible array.
    pub size: u64,
    /// Its declared type.
    pub type_id: TypeId,
}

impl Field {
    /// The value of a bitfield, unsigned, from the number that was read; a plain member's is given back unchanged.
    pub fn extract(&self, raw: u64) -> u64 {
        match self.bit_size {
            None => raw,
            Some(bits) => {
                let mask = u64::MAX
                    .checked_shr(64u32.saturating_sub(u32::from(bits)))
                    .unwrap_or(0);
                raw.checked_shr(u32::from(self.bit_offset)).unwrap_or(0) & mask
            }
        }
    }
}

/// A member found within one struct.
struct Found {
    bit_offset: u64,
    bit_size: Option<u8>,
    type_id: TypeId,
}

impl Types {
    /// The place of `path` within the struct or union called `struct_name`.
    ///
    /// Where several have that name, the first that has such a member counts. `None` where there is no such struct
    /// or member; asking is how differences between kernel versions are found out.
    pub fn member(&self, struct_name: &str, path: &str) -> Option<Field> {
        let mut budget = MAX_VISITED;
        self.structs(struct_name)
            .find_map(|id| self.member_within(id, path, &mut budget))
    }

    /// The place of `path` within a type: members separated by dots, elements of arrays in brackets.
    ///
    /// Members of anonymous structs and unions count as the outer one's. Pointers are not followed. An index must lie
    /// within the array unless that is flexible.
    pub fn member_of(&self, id: TypeId, path: &str) -> Option<Field> {
        self.member_within(id, path, &mut MAX_VISITED.clone())
    }

    fn member_within(&self, id: TypeId, path: &str, budget: &mut usize) -> Option<Field> {
        // Also where the struct is empty: a guest may have any number of those.
        *budget = budget.checked_sub(1)?;
        let mut at = Found {
            bit_offset: 0,
            bit_size: None,
            type_id: id,
        };
        for (n, part) in path.split('.').enumerate() {
            let (name, indices) = part.find('[').map_or((part, ""), |open| part.split_at(open));
            // An array can be what the path starts from: "[2].next".
            if !(name.is_empty() && n == 0 && !indices.is_empty()) {
                let found = self.find_named(at.type_id, name, MAX_DEPTH, budget)?;
                let bit_offset = at.bit_offset.checked_add(found.bit_offset)?;
                at = Found { bit_offset, ..found };
            }
            let mut rest = indices;
            while !rest.is_empty() {
                let (index, after) = rest.strip_prefix('[')?.split_once(']')?;
                at = self.element(&at, parse_index(index)?)?;
                rest = after;
            }
        }
        self.field(&at)
    }

    /// The member called `name`, anonymous structs and unions seen through.
    fn find_named(&self, id: TypeId, name: &str, depth: usize, budget: &mut usize) -> Option<Found> {
        if name.is_empty() {
            return None;
        }
        // The struct's own members first: they are the common case, and looking deeper costs more.
        for member in self.members(id) {
            *budget = budget.checked_sub(1)?;
            if member.name == name {
                let (bit_offset, bit_size) = (member.bit_offset, member.bit_size);
                return Some(Found {
                    bit_offset,
                    bit_size,
                    type_id: member.type_id,
                });
            }
        }
        let depth = depth.checked_sub(1)?;
        for member in self.members(id).filter(|m| m.name.is_empty()) {
            *budget = budget.checked_sub(1)?;
            if let Some(found) = self.find_named(member.type_id, name, depth, budget) {
                return Some(Found {
                    bit_offset: member.bit_offset.checked_add(found.bit_offset)?,
                    ..found
                });
            }
        }
        None
    }

    fn element(&self, array: &Found, index: u64) -> Option<Found> {
        let info = self.get(self.resolve(array.type_id))?.array()?;
        if info.count != 0 && index >= u64::from(info.count) {
            return None;
        }
        let bits = self.size_of(info.element)?.checked_mul(8)?.checked_mul(index)?;
        Some(Found {
            bit_offset: array.bit_offset.checked_add(bits)?,
            bit_size: None,
            type_id: info.element,
        })
    }

    fn field(&self, found: &Found) -> Option<Field> {
        let type_id = found.type_id;
        let Some(bits) = found.bit_size else {
            let offset = found.bit_offset / 8;
            // Incomplete types and functions have no size, but a place.
            let size = self.size_of(type_id).unwrap_or(0);
            return Some(Field {
                offset,
                bit_offset: 0,
                bit_size: None,
                size,
                type_id,
            });
        };
        let (offset, bit_offset, size) = self.storage(type_id, found.bit_offset, bits)?;
        Some(Field {
            offset,
            bit_offset,
            bit_size: Some(bits),
            size,
            type_id,
        })
    }

    /// The bytes that hold a bitfield: (offset, bits below it, number of bytes).
    ///
    /// That is the naturally aligned unit of its type, as compilers lay it out; where it straddles two of these
    /// (packed structs), the fewest bytes from the one it starts in.
    pub(crate) fn storage(&self, type_id: TypeId, bit_offset: u64, bits: u8) -> Option<(u64, u8, u64)> {
        if bits == 0 || bits > 64 {
            return None;
        }
        let declared = match self.get(self.resolve(type_id)) {
            Some(t) if matches!(t.kind(), Kind::Int | Kind::Enum | Kind::Enum64) => t.size().unwrap_or(0),
            _ => 0,
        };
        let fewest = (bit_offset % 8 + u64::from(bits)).div_ceil(8).next_power_of_two();
        let unit = [declared, fewest].into_iter().find(|&unit| {
            matches!(unit, 1 | 2 | 4 | 8) && bit_offset % (unit * 8) + u64::from(bits) <= unit * 8
        });
        if let Some(unit) = unit {
            let offset = bit_offset / (unit * 8) * unit;
            return Some((offset, (bit_offset - offset * 8) as u8, unit));
        }
        // Nine bytes would be needed for more than 57 bits that do not begin on a byte; no compiler does that.
        (fewest <= 8).then_some((bit_offset / 8, (bit_offset % 8) as u8, fewest))
    }
}

fn parse_index(text: &str) -> Option<u64> {
    // `parse` alone would take a sign.
    (!text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().ok())?
}
