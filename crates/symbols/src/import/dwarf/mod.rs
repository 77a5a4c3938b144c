//! Types out of DWARF, versions 2 to 5, unit by unit.
//!
//! A kernel describes the same types once for each of its thousands of source files. Those with a name are told apart
//! by name, size and line of declaration, so that each is converted once; anonymous ones are converted where the first
//! user of them is. Pointers, arrays and qualifiers are shared. What functions hold inside is passed over.

mod convert;
mod read;
#[cfg(test)]
mod tests;

use gimli::{Dwarf, DwarfSections, EndianSlice, LittleEndian, SectionId};

use super::ImportError;
use crate::Types;
use crate::types::TypesError;

use convert::Convert;

/// Bytes of DWARF.
type Slice<'a> = EndianSlice<'a, LittleEndian>;
type Unit<'a> = gimli::Unit<Slice<'a>>;

/// The sections that types are spread over.
pub(super) struct Sections(DwarfSections<Vec<u8>>);

impl Sections {
    /// Loads what is needed besides `.debug_info`.
    pub(super) fn load(
        debug_info: Vec<u8>,
        mut load: impl FnMut(&str) -> Result<Option<Vec<u8>>, ImportError>,
    ) -> Result<Self, ImportError> {
        let mut debug_info = Some(debug_info);
        let sections = DwarfSections::load(|id| match id {
            SectionId::DebugInfo => Ok(debug_info.take().unwrap_or_default()),
            SectionId::DebugAbbrev
            | SectionId::DebugStr
            // Not for lines, but because a unit is not opened without the header it points to.
            | SectionId::DebugLine
            | SectionId::DebugLineStr
            | SectionId::DebugStrOffsets
            | SectionId::DebugAddr => Ok(load(id.name())?.unwrap_or_default()),
            _ => Ok(Vec::new()),
        });
        Ok(Self(sections?))
    }
}

/// What DWARF gave.
pub(super) struct Made {
    pub(super) types: Types,
    pub(super) notes: Vec<String>,
}

/// Converts all types, and the types of global variables.
pub(super) fn types(sections: &Sections) -> Result<Made, TypesError> {
    let mut dwarf: Dwarf<Slice<'_>> = sections
        .0
        .borrow(|section| EndianSlice::new(section, LittleEndian));
    dwarf.populate_abbreviations_cache(gimli::AbbreviationsCacheStrategy::Duplicates);
    let mut convert = Convert::new(&dwarf);
    convert.all();
    convert.finish()
}
