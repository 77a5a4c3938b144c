//! Goes through the members of a type, nested ones included, and finds the holes between them.

use super::{LayoutOptions, Row};
use crate::types::{Kind, Member, TypeId, Types, printable};

/// Most lines that are shown. `struct task_struct` with everything opened up has some 5,000.
const MAX_LINES: usize = 50_000;
const MAX_DEPTH: u32 = 24;

/// One line of the text.
#[derive(Clone, Debug)]
pub(super) enum Line {
    /// A nested struct or union begins.
    Open { depth: u32, keyword: String },
    /// A nested struct or union ends; `name` is empty where it is anonymous.
    Close {
        depth: u32,
        name: String,
        offset: u64,
        size: u64,
    },
    /// A member; `declaration` is the C text without the semicolon.
    Member {
        depth: u32,
        declaration: String,
        row: Row,
    },
    /// Bits which no member uses.
    Hole { depth: u32, bits: u64 },
    /// A cache line begins with the next line.
    Cacheline { number: u64, offset: u64 },
}

/// Sums over the members of the outermost level.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Totals {
    pub(super) members: u64,
    pub(super) holes: u64,
    pub(super) hole_bits: u64,
    pub(super) padding_bits: u64,
}

pub(super) struct Walk<'a> {
    types: &'a Types,
    options: LayoutOptions,
    cacheline: u64,
    pub(super) lines: Vec<Line>,
    pub(super) totals: Totals,
    pub(super) cut: bool,
}

/// Where a body lies within the whole.
struct At<'a> {
    depth: u32,
    expand: u32,
    bit_offset: u64,
    path: &'a str,
}

impl<'a> Walk<'a> {
    pub(super) fn new(types: &'a Types, options: LayoutOptions) -> Self {
        Self {
            types,
            options,
            cacheline: 0,
            lines: Vec::new(),
            totals: Totals::default(),
            cut: false,
        }
    }

    /// Goes through a struct or union.
    pub(super) fn body(&mut self, id: TypeId) {
        self.members(
            id,
            &At {
                depth: 1,
                expand: self.options.expand,
                bit_offset: 0,
                path: "",
            },
        );
    }

    fn members(&mut self, id: TypeId, at: &At<'_>) {
        let types = self.types;
        let Some(t) = types.get(id) else { return };
        // In a union all members begin at the start, so there is nothing between them.
        let gaps = t.kind() == Kind::Struct;
        let mut end = 0u64;
        for member in t.members() {
            if self.lines.len() >= MAX_LINES || at.depth > MAX_DEPTH {
                self.cut = true;
                return;
            }
            if gaps && member.bit_offset > end {
                self.hole(at, member.bit_offset - end);
            }
            let bits = match member.bit_size {
                Some(bits) => u64::from(bits),
                None => types.size_of(member.type_id).unwrap_or(0).saturating_mul(8),
            };
            end = end.max(member.bit_offset.saturating_add(bits));
            if at.depth == 1 {
                self.totals.members += 1;
            }
            self.member(&member, at);
        }
        let size = u64::from(t.declared_size().unwrap_or(0)).saturating_mul(8);
        if gaps && end != 0 && size > end && at.depth == 1 {
            self.totals.padding_bits = size - end;
        }
    }

    fn hole(&mut self, at: &At<'_>, bits: u64) {
        if at.depth == 1 {
            self.totals.holes += 1;
            self.totals.hole_bits = self.totals.hole_bits.saturating_add(bits);
        }
        self.lines.push(Line::Hole {
            depth: at.depth,
            bits,
        });
    }

    fn member(&mut self, member: &Member<'_>, at: &At<'_>) {
        let bit_offset = at.bit_offset.saturating_add(member.bit_offset);
        if self.options.cachelines && bit_offset / 512 > self.cacheline {
            self.cacheline = bit_offset / 512;
            self.lines.push(Line::Cacheline {
                number: self.cacheline,
                offset: self.cacheline * 64,
            });
        }
        let name = printable(member.name);
        let (inner, dimensions) = self.innermost(member.type_id);
        // An empty struct has nothing to open up.
        let nested = self
            .types
            .get(inner)
            .filter(|t| t.kind().is_composite() && t.vlen() > 0);
        let nested =
            nested.filter(|t| t.name().is_empty() || (at.expand > 0 && self.named(member.type_id, inner)));
        let Some(nested) = nested else {
            return self.plain(member, &name, bit_offset, at);
        };
        let (depth, offset) = (at.depth, bit_offset / 8);
        let size = self.types.size_of(member.type_id).unwrap_or(0);
        let tag = printable(nested.name());
        let keyword = format!(
            "{}{}{tag}",
            nested.kind().as_str(),
            if tag.is_empty() { "" } else { " " }
        );
        self.lines.push(Line::Open { depth, keyword });
        let elements: String = dimensions.iter().map(|_| "[0]").collect();
        let path = match (at.path, name.as_str()) {
            (path, "") => path.to_owned(),
            ("", name) => format!("{name}{elements}"),
            (path, name) => format!("{path}.{name}{elements}"),
        };
        let expand = at.expand.saturating_sub(u32::from(!nested.name().is_empty()));
        self.members(
            nested.id(),
            &At {
                depth: depth + 1,
                expand,
                bit_offset,
                path: &path,
            },
        );
        let dimensions: String = dimensions.iter().map(|n| format!("[{n}]")).collect();
        self.lines.push(Line::Close {
            depth,
            name: format!("{name}{dimensions}"),
            offset,
            size,
        });
    }

    fn plain(&mut self, member: &Member<'_>, name: &str, bit_offset: u64, at: &At<'_>) {
        let types = self.types;
        let mut row = Row {
            offset: bit_offset / 8,
            bit_offset: None,
            bit_size: None,
            size: types.size_of(member.type_id).unwrap_or(0),
            type_name: types.type_name(member.type_id),
            name: if at.path.is_empty() {
                name.to_owned()
            } else {
                format!("{}.{name}", at.path)
            },
        };
        let mut declaration = types.declare(member.type_id, name);
        if let Some(bits) = member.bit_size {
            declaration.push_str(&format!(":{bits}"));
            row.bit_size = Some(bits);
            row.bit_offset = Some((bit_offset % 8) as u8);
            if let Some((offset, below, size)) = types.storage(member.type_id, bit_offset, bits) {
                (row.offset, row.bit_offset, row.size) = (offset, Some(below), size);
            }
        }
        self.lines.push(Line::Member {
            depth: at.depth,
            declaration,
            row,
        });
    }

    /// The type of an array's elements, and its dimensions; qualifiers are stripped, typedefs are not.
    fn innermost(&self, id: TypeId) -> (TypeId, Vec<u32>) {
        let mut dimensions = Vec::new();
        let mut id = id;
        for _ in 0..crate::types::MAX_CHAIN {
            match self.types.get(id) {
                Some(t) if matches!(t.kind(), Kind::Const | Kind::Volatile) => {
                    id = t.target().unwrap_or_default()
                }
                Some(t) if t.kind() == Kind::Array => {
                    let Some(array) = t.array() else { break };
                    dimensions.push(array.count);
                    id = array.element;
                }
                _ => break,
            }
        }
        (id, dimensions)
    }

    /// Whether a named struct is held by value and not as a long array, whose first element alone would be shown.
    fn named(&self, declared: TypeId, inner: TypeId) -> bool {
        self.types.resolve(declared) == inner
    }
}
