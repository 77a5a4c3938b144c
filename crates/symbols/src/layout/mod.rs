//! How a type lies in memory: its members with offset and size, its holes, as C text or as rows.

mod search;
#[cfg(test)]
mod tests;
mod text;
mod walk;

use serde::Serialize;

use crate::types::{Kind, TypeId, Types};

pub use search::{Summary, matches, named, search};

/// What [`layout`] shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayoutOptions {
    /// How many levels of named structs and unions are opened up. Anonymous ones always are.
    pub expand: u32,
    /// Mark where each 64-byte cache line begins.
    pub cachelines: bool,
}

/// One member, flat: what `-o json` prints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// Offset from the start of the type in bytes.
    pub offset: u64,
    /// For a bitfield: how many bits of the bytes at `offset` lie below it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bit_offset: Option<u8>,
    /// For a bitfield: its width in bits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bit_size: Option<u8>,
    /// Size in bytes; for a bitfield, of the bytes to read. 0 for a flexible array.
    pub size: u64,
    /// Its type as C spells it.
    #[serde(rename = "type")]
    pub type_name: String,
    /// Its name, with the names of those members it lies in: a path that [`Types::member_of`] takes.
    pub name: String,
}

/// One value of an enumeration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Value {
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: i64,
}

/// A type laid out. `Display` gives C text much like pahole's.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Its id.
    pub id: TypeId,
    /// What it is.
    pub kind: Kind,
    /// How it is spelled: `struct task_struct`.
    pub name: String,
    /// Size in bytes, where it has one.
    pub size: Option<u64>,
    /// The names of an enumeration.
    pub values: Vec<Value>,
    /// The type has more members than are shown: nesting without end, made up by a hostile guest.
    pub cut: bool,
    lines: Vec<walk::Line>,
    totals: walk::Totals,
    /// For everything that has no body: the declaration.
    declaration: Option<String>,
}

impl Layout {
    /// The members in the order of declaration.
    pub fn rows(&self) -> impl Iterator<Item = &Row> {
        self.lines.iter().filter_map(|line| match line {
            walk::Line::Member { row, .. } => Some(row),
            _ => None,
        })
    }
}

/// Lays a type out; `None` where the id means nothing. A typedef shows what it stands for.
pub fn layout(types: &Types, id: TypeId, options: &LayoutOptions) -> Option<Layout> {
    let t = types.get(id)?;
    let body = types.get(types.resolve(id))?;
    let name = match (t.kind(), t.name()) {
        (Kind::Func | Kind::Var, name) => crate::types::printable(name),
        _ => types.type_name(id),
    };
    let mut walk = walk::Walk::new(types, *options);
    if body.kind().is_composite() {
        walk.body(body.id());
    }
    let values = body.enumerators().map(|e| Value {
        name: crate::types::printable(e.name),
        value: e.value,
    });
    let declaration = match (t.kind(), t.name()) {
        (Kind::Func | Kind::Var, name) => Some(types.declare(t.target()?, &crate::types::printable(name))),
        (Kind::Typedef, name) if !body.kind().is_composite() && !body.kind().is_enum() => Some(format!(
            "typedef {}",
            types.declare(t.target()?, &crate::types::printable(name))
        )),
        _ if body.kind().is_composite() || body.kind().is_enum() => None,
        _ => Some(name.clone()),
    };
    Some(Layout {
        id,
        kind: body.kind(),
        size: types.size_of(id),
        values: values.collect(),
        cut: walk.cut,
        lines: walk.lines,
        totals: walk.totals,
        declaration,
        name,
    })
}
