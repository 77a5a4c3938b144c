//! From debugging entries to BTF.

use std::collections::HashMap;
use std::hash::BuildHasher;
use std::rc::Rc;

use gimli::constants::{self, self as dw};
use gimli::{AttributeValue, DebugInfoOffset, DwTag, Dwarf, UnitHeader, UnitOffset, UnitSectionOffset};
use rustc_hash::FxHashMap;

use super::read::{Entry, flag, has_address, member_offset, number, reference, text};
use super::{Made, Slice, Unit};
use crate::types::{Builder, Def, MemberDef, TypeId, TypesError};

/// How many pointers, qualifiers and typedefs in a row are followed.
const MAX_DEPTH: usize = 64;
/// How many entries of one unit are taken for types, and how many types of all. A kernel has less than a tenth.
const MAX_TYPES: usize = 1 << 23;
/// How many units are kept open for references from others.
const MAX_OPEN: usize = 64;

/// Types made up of one other, which every unit repeats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Derived {
    Pointer(TypeId),
    Const(TypeId),
    Volatile(TypeId),
    Restrict(TypeId),
    Array(TypeId, u32),
}

/// What tells one named type from another: tag, name, size, line of declaration.
type Key = (DwTag, u32, u64, u64);

/// A struct or union whose members are still to be read.
struct Pending {
    unit: usize,
    offset: UnitOffset,
    id: TypeId,
}

pub(super) struct Convert<'d, 'a> {
    dwarf: &'d Dwarf<Slice<'a>>,
    /// All units by ascending offset.
    headers: Vec<UnitHeader<Slice<'a>>>,
    open: FxHashMap<usize, Rc<Unit<'a>>>,
    builder: Builder,
    // Offsets are bounded by the file's size, which leaves no room to make many of them collide; all other keys are chosen freely.
    /// By offset in the section, for the unit at hand and what it refers to.
    ids: FxHashMap<usize, TypeId>,
    named: HashMap<Key, TypeId>,
    /// By tag and name: the first definition, or what is declared only, so far.
    by_name: HashMap<(DwTag, u32), (TypeId, bool)>,
    derived: HashMap<Derived, TypeId>,
    variables: HashMap<(u32, TypeId), ()>,
    /// By a hash of line and values.
    anonymous_enums: HashMap<u64, TypeId>,
    pending: Vec<Pending>,
    broken_units: usize,
    foreign: usize,
    first_error: Option<gimli::Error>,
    too_many: bool,
}

impl<'d, 'a> Convert<'d, 'a> {
    pub(super) fn new(dwarf: &'d Dwarf<Slice<'a>>) -> Self {
        let mut new = Self {
            dwarf,
            headers: Vec::new(),
            open: FxHashMap::default(),
            builder: Builder::new(),
            ids: FxHashMap::default(),
            named: HashMap::default(),
            by_name: HashMap::default(),
            derived: HashMap::default(),
            variables: HashMap::default(),
            anonymous_enums: HashMap::default(),
            pending: Vec::new(),
            broken_units: 0,
            foreign: 0,
            first_error: None,
            too_many: false,
        };
        let mut units = dwarf.units();
        loop {
            match units.next() {
                Ok(Some(header)) => new.headers.push(header),
                Ok(None) => break,
                Err(error) => {
                    new.fault(error);
                    break;
                }
            }
        }
        new
    }

    fn fault(&mut self, error: gimli::Error) {
        self.broken_units += 1;
        self.first_error.get_or_insert(error);
    }

    pub(super) fn all(&mut self) {
        for index in 0..self.headers.len() {
            // Anonymous types of earlier units are of no use to later ones, but for references across units, which
            // then convert them again.
            self.ids.clear();
            if let Err(error) = self.unit(index) {
                self.fault(error);
            }
            self.members();
        }
    }

    fn open(&mut self, index: usize) -> Result<Rc<Unit<'a>>, gimli::Error> {
        if let Some(unit) = self.open.get(&index) {
            return Ok(Rc::clone(unit));
        }
        let header = self.headers.get(index).ok_or(gimli::Error::OffsetOutOfBounds)?;
        let unit = Rc::new(self.dwarf.unit(*header)?);
        if self.open.len() >= MAX_OPEN {
            self.open.clear();
        }
        self.open.insert(index, Rc::clone(&unit));
        Ok(unit)
    }

    /// Goes through the outermost entries of a unit.
    fn unit(&mut self, index: usize) -> Result<(), gimli::Error> {
        let unit = self.open(index)?;
        let mut entries = unit.entries();
        let Some((_, root)) = entries.next_dfs()? else {
            return Ok(());
        };
        // Rust's types are not laid out as C's, and have names that mean nothing to C.
        let language = root.attr_value(constants::DW_AT_language)?;
        if matches!(language, Some(gimli::AttributeValue::Language(dw::DW_LANG_Rust))) {
            self.foreign += 1;
            return Ok(());
        }
        let Some((1, _)) = entries.next_dfs()? else {
            return Ok(());
        };
        while let Some(entry) = entries.current() {
            match entry.tag() {
                dw::DW_TAG_structure_type | dw::DW_TAG_union_type | dw::DW_TAG_class_type
                    if flag(entry, constants::DW_AT_declaration)
                        // Anonymous ones come with what they are part of, which is there once.
                        || entry.attr(constants::DW_AT_name)?.is_none() => {}
                dw::DW_TAG_structure_type
                | dw::DW_TAG_union_type
                | dw::DW_TAG_class_type
                | dw::DW_TAG_enumeration_type
                | dw::DW_TAG_typedef
                | dw::DW_TAG_base_type => {
                    self.entry(index, &unit, entry, MAX_DEPTH);
                }
                dw::DW_TAG_variable => self.variable(index, &unit, entry),
                _ => {}
            }
            if entries.next_sibling()?.is_none() {
                break;
            }
        }
        Ok(())
    }

    /// Reads the members that were put off, and those which they bring about.
    fn members(&mut self) {
        while let Some(Pending {
            unit: index,
            offset,
            id,
        }) = self.pending.pop()
        {
            let done = self
                .open(index)
                .and_then(|unit| self.body(index, &unit, offset, id));
            if let Err(error) = done {
                self.fault(error);
            }
        }
    }

    /// The type at an offset of the section.
    fn at(&mut self, offset: usize, depth: usize) -> TypeId {
        if let Some(&id) = self.ids.get(&offset) {
            return id;
        }
        let place = self
            .headers
            .partition_point(|h| start(h) <= offset)
            .checked_sub(1);
        let Some((index, depth)) = place.zip(depth.checked_sub(1)) else {
            return TypeId::VOID;
        };
        let Ok(unit) = self.open(index) else {
            return TypeId::VOID;
        };
        let Some(inner) = DebugInfoOffset(offset).to_unit_offset(&unit.header) else {
            return TypeId::VOID;
        };
        match unit.entry(inner) {
            Ok(entry) => self.entry(index, &unit, &entry, depth),
            Err(_) => TypeId::VOID,
        }
    }

    /// The type an entry refers to by DW_AT_type; `void` where it does not.
    fn target(&mut self, unit: &Unit<'a>, entry: &Entry<'_, '_, 'a>, depth: usize) -> TypeId {
        match reference(unit, entry, constants::DW_AT_type) {
            Some(offset) => self.at(offset, depth),
            None => TypeId::VOID,
        }
    }

    /// The type an entry describes.
    fn entry(&mut self, index: usize, unit: &Unit<'a>, entry: &Entry<'_, '_, 'a>, depth: usize) -> TypeId {
        let Some(offset) = entry.offset().to_debug_info_offset(&unit.header).map(|o| o.0) else {
            return TypeId::VOID;
        };
        if let Some(&id) = self.ids.get(&offset) {
            return id;
        }
        if self.ids.len().max(self.builder.len()) >= MAX_TYPES {
            self.too_many = true;
            return TypeId::VOID;
        }
        let id = match entry.tag() {
            dw::DW_TAG_base_type => self.base(unit, entry),
            dw::DW_TAG_pointer_type | dw::DW_TAG_reference_type | dw::DW_TAG_rvalue_reference_type => {
                let target = self.target(unit, entry, depth);
                self.derive(Derived::Pointer(target))
            }
            dw::DW_TAG_const_type => {
                let target = self.target(unit, entry, depth);
                self.derive(Derived::Const(target))
            }
            dw::DW_TAG_volatile_type => {
                let target = self.target(unit, entry, depth);
                self.derive(Derived::Volatile(target))
            }
            dw::DW_TAG_restrict_type => {
                let target = self.target(unit, entry, depth);
                self.derive(Derived::Restrict(target))
            }
            dw::DW_TAG_atomic_type => self.target(unit, entry, depth),
            dw::DW_TAG_array_type => self.array(unit, entry, depth),
            dw::DW_TAG_typedef => return self.typedef(unit, entry, offset, depth),
            dw::DW_TAG_subroutine_type => return self.prototype(unit, entry, offset, depth),
            dw::DW_TAG_enumeration_type => self.enumeration(unit, entry),
            dw::DW_TAG_structure_type | dw::DW_TAG_union_type | dw::DW_TAG_class_type => {
                self.composite(index, unit, entry)
            }
            _ => TypeId::VOID,
        };
        self.ids.insert(offset, id);
        id
    }

    fn derive(&mut self, derived: Derived) -> TypeId {
        let builder = &mut self.builder;
        *self.derived.entry(derived).or_insert_with(|| {
            builder.add(&match derived {
                Derived::Pointer(target) => Def::Ptr(target),
                Derived::Const(target) => Def::Const(target),
                Derived::Volatile(target) => Def::Volatile(target),
                Derived::Restrict(target) => Def::Restrict(target),
                Derived::Array(element, count) => Def::Array {
                    element,
                    index: TypeId::VOID,
                    count,
                },
            })
        })
    }

    /// The key of a named type, its size in bytes, and its name.
    fn key(&mut self, unit: &Unit<'a>, entry: &Entry<'_, '_, 'a>) -> (Key, &'a str, u32) {
        let name = text(self.dwarf, unit, entry, constants::DW_AT_name);
        let size = number(entry, constants::DW_AT_byte_size).unwrap_or(0);
        let line = number(entry, constants::DW_AT_decl_line).unwrap_or(0);
        let key = (entry.tag(), self.builder.string(name.as_bytes()), size, line);
        (key, name, u32::try_from(size).unwrap_or(u32::MAX))
    }

    fn base(&mut self, unit: &Unit<'a>, entry: &Entry<'_, '_, 'a>) -> TypeId {
        let (key, name, size) = self.key(unit, entry);
        if let Some(&id) = self.named.get(&key) {
            return id;
        }
        let encoding = number_encoding(entry);
        let signed = matches!(encoding, dw::DW_ATE_signed | dw::DW_ATE_signed_char);
        let is_bool = encoding == dw::DW_ATE_boolean;
        let id = self.builder.add(&match encoding {
            dw::DW_ATE_float | dw::DW_ATE_complex_float => Def::Float { name, size },
            _ => Def::Int {
                name,
                size,
                signed,
                is_char: false,
                is_bool,
            },
        });
        self.named.insert(key, id);
        id
    }

    fn typedef(&mut self, unit: &Unit<'a>, entry: &Entry<'_, '_, 'a>, offset: usize, depth: usize) -> TypeId {
        let (key, name, _) = self.key(unit, entry);
        if let Some(&id) = self.named.get(&key) {
            self.ids.insert(offset, id);
            return id;
        }
        // Known before its target is: a function type it stands for may mention it.
        let id = self.builder.reserve();
        self.named.insert(key, id);
        self.ids.insert(offset, id);
        let target = self.target(unit, entry, depth);
        self.builder.define(id, &Def::Typedef { name, target });
        id
    }

    fn array(&mut self, unit: &Unit<'a>, entry: &Entry<'_, '_, 'a>, depth: usize) -> TypeId {
        let mut element = self.target(unit, entry, depth);
        let mut counts = Vec::new();
        let _ = children(unit, entry.offset(), |child| {
            if child.tag() == dw::DW_TAG_subrange_type && counts.len() < MAX_DEPTH {
                let count = number(child, constants::DW_AT_count).or_else(|| {
                    // An upper bound of -1 says "none" for a flexible array.
                    number(child, constants::DW_AT_upper_bound)?.checked_add(1)
                });
                counts.push(u32::try_from(count.unwrap_or(0)).unwrap_or(0));
            }
        });
        // The last dimension is the innermost.
        for count in counts.into_iter().rev() {
            element = self.derive(Derived::Array(element, count));
        }
        element
    }

    fn prototype(
        &mut self,
        unit: &Unit<'a>,
        entry: &Entry<'_, '_, 'a>,
        offset: usize,
        depth: usize,
    ) -> TypeId {
        let id = self.builder.reserve();
        self.ids.insert(offset, id);
        let result = self.target(unit, entry, depth);
        let mut types = Vec::new();
        let _ = children(unit, entry.offset(), |child| match child.tag() {
            dw::DW_TAG_formal_parameter => types.push(reference(unit, child, constants::DW_AT_type)),
            dw::DW_TAG_unspecified_parameters => types.push(None),
            _ => {}
        });
        let params = types
            .into_iter()
            .map(|at| ("", at.map_or(TypeId::VOID, |at| self.at(at, depth))));
        let params: Vec<_> = params.collect();
        self.builder.define(
            id,
            &Def::FuncProto {
                result,
                params: &params,
            },
        );
        id
    }

    fn enumeration(&mut self, unit: &Unit<'a>, entry: &Entry<'_, '_, 'a>) -> TypeId {
        let (key, name, size) = self.key(unit, entry);
        if let Some(&id) = self.named.get(&key).filter(|_| !name.is_empty()) {
            return id;
        }
        let base = reference(unit, entry, constants::DW_AT_type)
            .and_then(|at| DebugInfoOffset(at).to_unit_offset(&unit.header))
            .and_then(|at| unit.entry(at).ok());
        let mut signed = base
            .as_ref()
            .is_some_and(|b| matches!(number_encoding(b), dw::DW_ATE_signed | dw::DW_ATE_signed_char));
        let mut values = Vec::new();
        let _ = children(unit, entry.offset(), |child| {
            let value = child.attr(constants::DW_AT_const_value).ok().flatten();
            if let Some(value) = value.filter(|_| child.tag() == dw::DW_TAG_enumerator) {
                // Forms of a fixed size hold what is not negative, in as few bytes as will do.
                let value = match value.raw_value() {
                    AttributeValue::Sdata(value) => Some(value),
                    other => other
                        .udata_value()
                        .map(|value| value as i64)
                        .or_else(|| value.sdata_value()),
                };
                let name = text(self.dwarf, unit, child, constants::DW_AT_name);
                values.extend(value.map(|value| (name, value)));
            }
        });
        // Without a base type (before DWARF 3) only a negative value tells.
        signed |= base.is_none() && values.iter().any(|&(_, v)| v < 0);
        if signed && size == 4 {
            values
                .iter_mut()
                .for_each(|(_, value)| *value = i64::from(*value as i32));
        }
        // An anonymous one is known by its values.
        let anonymous = name
            .is_empty()
            .then(|| self.anonymous_enums.hasher().hash_one((key.3, size, &values)));
        if let Some(&id) = anonymous.and_then(|hash| self.anonymous_enums.get(&hash)) {
            return id;
        }
        let id = self.builder.add(&Def::Enum {
            name,
            size,
            signed,
            values: &values,
        });
        match anonymous {
            Some(hash) => self.anonymous_enums.insert(hash, id),
            None => self.named.insert(key, id),
        };
        id
    }

    fn composite(&mut self, index: usize, unit: &Unit<'a>, entry: &Entry<'_, '_, 'a>) -> TypeId {
        let (key, name, _) = self.key(unit, entry);
        let by_name = (key.0, key.1);
        if !name.is_empty() && flag(entry, constants::DW_AT_declaration) {
            let builder = &mut self.builder;
            return self
                .by_name
                .entry(by_name)
                .or_insert_with(|| (builder.reserve(), false))
                .0;
        }
        if let Some(&id) = self.named.get(&key).filter(|_| !name.is_empty()) {
            return id;
        }
        let id = match self.by_name.get(&by_name) {
            // So far it was only declared: this is what was meant.
            Some(&(id, false)) if !name.is_empty() => id,
            _ => self.builder.reserve(),
        };
        if !name.is_empty() {
            self.named.insert(key, id);
            let first = self.by_name.entry(by_name).or_insert((id, true));
            first.1 = true;
        }
        // Its members may lead back to it, so they come when it has its id.
        self.pending.push(Pending {
            unit: index,
            offset: entry.offset(),
            id,
        });
        id
    }

    fn body(
        &mut self,
        index: usize,
        unit: &Unit<'a>,
        offset: UnitOffset,
        id: TypeId,
    ) -> Result<(), gimli::Error> {
        let entry = unit.entry(offset)?;
        let (key, name, size) = self.key(unit, &entry);
        let mut members: Vec<(&'a str, Option<usize>, u64, Option<u8>)> = Vec::new();
        let mut seen = Vec::new();
        children(unit, offset, |child| {
            // Static members of C++ have no place within.
            if child.tag() == dw::DW_TAG_member && !flag(child, constants::DW_AT_external) {
                let name = text(self.dwarf, unit, child, constants::DW_AT_name);
                let (bit_offset, width) = place(unit, child);
                members.push((
                    name,
                    reference(unit, child, constants::DW_AT_type),
                    bit_offset,
                    width,
                ));
            }
            if matches!(
                child.tag(),
                dw::DW_TAG_structure_type | dw::DW_TAG_union_type | dw::DW_TAG_enumeration_type
            ) {
                seen.push(child.offset());
            }
        })?;
        // Types declared within are types of the kernel like any other (GCC puts them outside, clang inside).
        for nested in seen {
            let entry = unit.entry(nested)?;
            self.entry(index, unit, &entry, MAX_DEPTH);
        }
        let members = members.into_iter().map(|(name, at, bit_offset, bit_size)| {
            let type_id = at.map_or(TypeId::VOID, |at| self.at(at, MAX_DEPTH));
            MemberDef {
                name,
                type_id,
                bit_offset,
                bit_size,
            }
        });
        let members: Vec<MemberDef<'_>> = members.collect();
        self.builder.define(
            id,
            &match key.0 {
                dw::DW_TAG_union_type => Def::Union {
                    name,
                    size,
                    members: &members,
                },
                _ => Def::Struct {
                    name,
                    size,
                    members: &members,
                },
            },
        );
        Ok(())
    }

    fn variable(&mut self, index: usize, unit: &Unit<'a>, entry: &Entry<'_, '_, 'a>) {
        if !has_address(unit, entry) {
            return;
        }
        // A definition apart from its declaration refers to that for name and type.
        let declaration = reference(unit, entry, constants::DW_AT_specification)
            .and_then(|at| DebugInfoOffset(at).to_unit_offset(&unit.header))
            .and_then(|at| unit.entry(at).ok());
        let mut name = text(self.dwarf, unit, entry, constants::DW_AT_name);
        // The definition's type is the more complete one: an array has its size there.
        let own = reference(unit, entry, constants::DW_AT_type);
        let mut at = own;
        if let Some(declaration) = &declaration {
            if name.is_empty() {
                name = text(self.dwarf, unit, declaration, constants::DW_AT_name);
            }
            at = at.or_else(|| reference(unit, declaration, constants::DW_AT_type));
        }
        let _ = index;
        let Some(at) = at.filter(|_| !name.is_empty()) else {
            return;
        };
        let target = self.at(at, MAX_DEPTH);
        let key = (self.builder.string(name.as_bytes()), target);
        if self.variables.insert(key, ()).is_none() {
            self.builder.add(&Def::Var {
                name,
                target,
                linkage: 1,
            });
        }
    }

    pub(super) fn finish(mut self) -> Result<Made, TypesError> {
        let mut declared: Vec<_> = self
            .by_name
            .iter()
            .filter(|(_, v)| !v.1)
            .map(|(&(tag, name), &(id, _))| (id, tag, name))
            .collect();
        declared.sort_by_key(|&(id, ..)| id);
        for (id, tag, name) in declared {
            let name = self.builder.text(name).to_owned();
            self.builder.define(
                id,
                &Def::Fwd {
                    name: &name,
                    is_union: tag == dw::DW_TAG_union_type,
                },
            );
        }
        let mut notes = Vec::new();
        if let Some(error) = self.first_error {
            notes.push(format!(
                "DWARF: {} units are damaged; the first: {error}",
                self.broken_units
            ));
        }
        if self.too_many {
            notes.push(format!(
                "DWARF: there are more than {MAX_TYPES} types; the rest was left out"
            ));
        }
        if self.foreign > 0 {
            notes.push(format!("DWARF: {} units of Rust were passed over", self.foreign));
        }
        if self.builder.dropped() > 0 {
            notes.push(format!(
                "DWARF: {} members or values could not be kept",
                self.builder.dropped()
            ));
        }
        Ok(Made {
            types: self.builder.finish()?,
            notes,
        })
    }
}

/// Where a unit begins in `.debug_info`.
fn start(header: &UnitHeader<Slice<'_>>) -> usize {
    match header.offset() {
        UnitSectionOffset::DebugInfoOffset(offset) => offset.0,
        UnitSectionOffset::DebugTypesOffset(_) => usize::MAX,
    }
}

/// Calls `each` with the children of an entry.
fn children<'a>(
    unit: &Unit<'a>,
    offset: UnitOffset,
    mut each: impl FnMut(&Entry<'_, '_, 'a>),
) -> Result<(), gimli::Error> {
    let mut tree = unit.entries_tree(Some(offset))?;
    let mut children = tree.root()?.children();
    while let Some(child) = children.next()? {
        each(child.entry());
    }
    Ok(())
}

fn number_encoding(entry: &Entry<'_, '_, '_>) -> gimli::DwAte {
    match entry.attr_value(constants::DW_AT_encoding) {
        Ok(Some(gimli::AttributeValue::Encoding(encoding))) => encoding,
        _ => dw::DW_ATE_unsigned,
    }
}

/// A member's offset in bits, and its width where it is a bitfield.
fn place(unit: &Unit<'_>, member: &Entry<'_, '_, '_>) -> (u64, Option<u8>) {
    let bytes = member_offset(unit, member).unwrap_or(0);
    let width = number(member, constants::DW_AT_bit_size)
        .and_then(|w| u8::try_from(w).ok())
        .filter(|&w| w > 0);
    let Some(width) = width else {
        return (bytes.saturating_mul(8), None);
    };
    if let Some(bits) = number(member, constants::DW_AT_data_bit_offset) {
        return (bits, Some(width));
    }
    // DWARF 2 and 3 count from the most significant bit of the storage unit.
    let from_top = number(member, constants::DW_AT_bit_offset).unwrap_or(0);
    let unit_bytes = number(member, constants::DW_AT_byte_size)
        .or_else(|| declared_size(unit, member))
        .unwrap_or(4);
    let below = unit_bytes
        .saturating_mul(8)
        .saturating_sub(from_top)
        .saturating_sub(u64::from(width));
    (bytes.saturating_mul(8).saturating_add(below), Some(width))
}

/// Size of a member's declared number type, typedefs and qualifiers passed.
fn declared_size(unit: &Unit<'_>, member: &Entry<'_, '_, '_>) -> Option<u64> {
    let mut at = reference(unit, member, constants::DW_AT_type)?;
    for _ in 0..MAX_DEPTH {
        let entry = unit
            .entry(DebugInfoOffset(at).to_unit_offset(&unit.header)?)
            .ok()?;
        if let Some(size) = number(&entry, constants::DW_AT_byte_size) {
            return Some(size);
        }
        at = reference(unit, &entry, constants::DW_AT_type)?;
    }
    None
}
