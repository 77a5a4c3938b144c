//! Single facts out of debugging entries.

use gimli::{AttributeValue, DW_AT_data_member_location, DebuggingInformationEntry, DwAt, Dwarf, Operation};

use super::{Slice, Unit};

/// A debugging entry.
pub(super) type Entry<'abbrev, 'unit, 'a> = DebuggingInformationEntry<'abbrev, 'unit, Slice<'a>>;

pub(super) fn number(entry: &Entry<'_, '_, '_>, at: DwAt) -> Option<u64> {
    entry.attr(at).ok()??.udata_value()
}

pub(super) fn flag(entry: &Entry<'_, '_, '_>, at: DwAt) -> bool {
    matches!(entry.attr_value(at), Ok(Some(AttributeValue::Flag(true))))
}

/// A string; empty where there is none or it is not UTF-8.
pub(super) fn text<'a>(
    dwarf: &Dwarf<Slice<'a>>,
    unit: &Unit<'a>,
    entry: &Entry<'_, '_, 'a>,
    at: DwAt,
) -> &'a str {
    let value = entry.attr_value(at).ok().flatten();
    let bytes = value.and_then(|value| dwarf.attr_string(unit, value).ok());
    bytes
        .and_then(|bytes| std::str::from_utf8(bytes.slice()).ok())
        .unwrap_or("")
}

/// Where an entry refers to, from the start of `.debug_info`.
pub(super) fn reference(unit: &Unit<'_>, entry: &Entry<'_, '_, '_>, at: DwAt) -> Option<usize> {
    match entry.attr_value(at).ok()?? {
        AttributeValue::UnitRef(offset) => Some(offset.to_debug_info_offset(&unit.header)?.0),
        AttributeValue::DebugInfoRef(offset) => Some(offset.0),
        // Type units and supplementary files, which kernels are not built with.
        _ => None,
    }
}

/// Offset of a member in bytes: a number, or in DWARF 2 an expression that adds one.
pub(super) fn member_offset(unit: &Unit<'_>, entry: &Entry<'_, '_, '_>) -> Option<u64> {
    let attr = entry.attr(DW_AT_data_member_location).ok()??;
    if let Some(offset) = attr.udata_value() {
        return Some(offset);
    }
    let mut operations = attr.exprloc_value()?.operations(unit.encoding());
    match operations.next().ok()?? {
        Operation::PlusConstant { value } => Some(value),
        Operation::UnsignedConstant { value } => Some(value),
        _ => None,
    }
}

/// Whether a variable lies at a fixed address, as globals do.
pub(super) fn has_address(unit: &Unit<'_>, entry: &Entry<'_, '_, '_>) -> bool {
    let location = entry.attr_value(gimli::DW_AT_location).ok().flatten();
    let Some(AttributeValue::Exprloc(expression)) = location else {
        return false;
    };
    let first = expression.operations(unit.encoding()).next();
    matches!(
        first,
        Ok(Some(Operation::Address { .. } | Operation::AddressIndex { .. }))
    )
}
