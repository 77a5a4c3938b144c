//! From ISF's words to BTF.

use std::collections::HashMap;
use std::path::Path;

use super::json::{BaseType, Enum, Mention, Metadata, Number, Symbol, UserType};
use crate::SymbolTableBuilder;
use crate::import::{FileKind, ImportError, Imported, base64};
use crate::types::{Builder, Def, MemberDef, TypeId};

/// How deep pointers to pointers and arrays of arrays are followed.
const MAX_DEPTH: usize = 64;
/// Most named types of one file. Kernels have some 15,000; one with all of Windows' would have a tenth of this.
const MAX_TYPES: usize = 1 << 21;
/// Longest banner that is believed. The kernel's own has some 300 bytes.
const MAX_BANNER: usize = 4096;

/// The dictionaries a name can belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Space {
    Base,
    User,
    Enum,
}

/// Types made up of others, which ISF repeats at each mention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Derived {
    Pointer(TypeId),
    Array(TypeId, u32),
}

/// What is known so far.
#[derive(Default)]
pub(super) struct Convert {
    builder: Builder,
    /// By dictionary and name: the id, and whether the type has been defined by now.
    named: HashMap<(Space, Box<str>), (TypeId, Known)>,
    derived: HashMap<Derived, TypeId>,
    function: Option<TypeId>,
    symbols: SymbolTableBuilder,
    symbol_count: usize,
    metadata: Metadata,
    banner: Option<String>,
    /// Things that made no sense: how many, and the first.
    odd: usize,
    first_odd: Option<String>,
}

/// How much of a type has been seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    /// Mentioned: as a union or not.
    Mentioned {
        union: bool,
    },
    Defined,
}

impl Convert {
    pub(super) fn metadata(&mut self, metadata: Metadata) -> Result<(), String> {
        let major = metadata.format.split('.').next().unwrap_or("");
        if !matches!(major, "4" | "5" | "6") {
            let format = metadata.format.escape_default();
            return Err(format!(
                "its format \"{format}\" is not known: schemas 4 to 6 are"
            ));
        }
        if metadata.windows.is_some() || metadata.mac.is_some() {
            return Err("it is a symbol table of Windows or macOS, not of Linux".to_owned());
        }
        self.metadata = metadata;
        Ok(())
    }

    pub(super) fn base_type(&mut self, name: String, t: BaseType) {
        // A pointer has a kind of its own in BTF, and void has none.
        if name == "void" || name == "pointer" {
            return;
        }
        if t.endian == "big" {
            return self.odd(|| format!("base type {} is big-endian", name.escape_default()));
        }
        let Ok(size @ 1..=64) = u32::try_from(t.size.0) else {
            return self.odd(|| format!("base type {} has {} bytes", name.escape_default(), t.size.0));
        };
        let Some(id) = self.defines(Space::Base, &name) else {
            return;
        };
        let (is_char, is_bool) = (t.kind == "char", t.kind == "bool");
        let def = match t.kind.as_str() {
            "float" => Def::Float { name: &name, size },
            _ => Def::Int {
                name: &name,
                size,
                signed: t.signed,
                is_char,
                is_bool,
            },
        };
        self.builder.define(id, &def);
    }

    pub(super) fn user_type(&mut self, name: String, t: UserType) {
        let Ok(size) = u32::try_from(t.size.0) else {
            return self.odd(|| format!("type {} has {} bytes", name.escape_default(), t.size.0));
        };
        let Some(id) = self.defines(Space::User, &name) else {
            return;
        };
        let mut members = Vec::with_capacity(t.fields.0.len());
        for (field, member) in &t.fields.0 {
            let Some(place) = self.member(&member.mention, member.offset) else {
                self.odd(|| format!("member {}.{}", name.escape_default(), field.escape_default()));
                continue;
            };
            // Before schema 6.2 a name was all that told an anonymous member.
            let anonymous = member.anonymous || field.starts_with("unnamed_field_");
            members.push((if anonymous { "" } else { field.as_str() }, place));
        }
        // JSON objects have no order; declarations do, and this is theirs but for unions.
        members.sort_by_key(|(_, place)| place.bit_offset);
        let defs = members.iter().map(|&(name, place)| MemberDef { name, ..place });
        let members: Vec<MemberDef<'_>> = defs.collect();
        let own = self.own_name(Space::User, &name);
        let def = match t.kind.as_str() {
            "union" => Def::Union {
                name: own,
                size,
                members: &members,
            },
            _ => Def::Struct {
                name: own,
                size,
                members: &members,
            },
        };
        self.builder.define(id, &def);
    }

    fn member(&mut self, mention: &Mention, offset: Number) -> Option<MemberDef<'static>> {
        let byte = u64::try_from(offset.0).ok()?;
        let bit_offset = byte.checked_mul(8)?;
        if mention.kind != "bitfield" {
            let type_id = self.mention(mention, MAX_DEPTH);
            return Some(MemberDef {
                name: "",
                type_id,
                bit_offset,
                bit_size: None,
            });
        }
        let position = u64::try_from(mention.bit_position?.0).ok()?;
        let width = u8::try_from(mention.bit_length?.0)
            .ok()
            .filter(|w| (1..=64).contains(w))?;
        let type_id = mention
            .of
            .as_deref()
            .map(|of| self.mention(of, MAX_DEPTH))
            .unwrap_or_default();
        Some(MemberDef {
            name: "",
            type_id,
            bit_offset: bit_offset.checked_add(position)?,
            bit_size: Some(width),
        })
    }

    pub(super) fn enumeration(&mut self, name: String, t: Enum) {
        let Ok(size @ 0..=8) = u32::try_from(t.size.0) else {
            return self.odd(|| format!("enum {} has {} bytes", name.escape_default(), t.size.0));
        };
        let Some(id) = self.defines(Space::Enum, &name) else {
            return;
        };
        // Beyond i64 are only the largest values of unsigned enumerations, which wrap as in `Enumerator`.
        let values = t
            .constants
            .0
            .iter()
            .map(|(name, value)| (name.as_str(), value.0 as i64));
        let values: Vec<_> = values.collect();
        let negative = t.constants.0.iter().any(|(_, value)| value.0 < 0);
        let signed = negative
            || matches!(
                t.base.as_str(),
                "int" | "char" | "short int" | "long int" | "long long int"
            );
        let own = self.own_name(Space::Enum, &name);
        self.builder.define(
            id,
            &Def::Enum {
                name: own,
                size,
                signed,
                values: &values,
            },
        );
    }

    pub(super) fn symbol(&mut self, name: String, symbol: Symbol) {
        let address = symbol.address.and_then(|n| u64::try_from(n.0).ok());
        let Some(address) = address else {
            return self.odd(|| format!("symbol {} has no address", name.escape_default()));
        };
        let mention = symbol.mention.as_ref();
        let function = mention.is_some_and(|m| m.kind == "function");
        // ISF has no letters; these tell at least code from data.
        let letter = if function { b'T' } else { b'D' };
        if !self.symbols.push(&name, address, letter) {
            let name = name.escape_default();
            return self.odd(|| format!("symbol {name} is one too many, or its name is too long"));
        }
        self.symbol_count += 1;
        if let Some(mention) = mention.filter(|m| !function && !is_void(m)) {
            let target = self.mention(mention, MAX_DEPTH);
            self.builder.add(&Def::Var {
                name: &name,
                target,
                linkage: 1,
            });
        }
        if name == "linux_banner" {
            let text = symbol.constant_data.and_then(|data| base64::decode(&data));
            self.banner = text.and_then(|bytes| {
                let end = bytes
                    .iter()
                    .position(|&b| b == 0)
                    .unwrap_or(bytes.len())
                    .min(MAX_BANNER);
                Some(std::str::from_utf8(bytes.get(..end)?).ok()?.trim().to_owned()).filter(|b| !b.is_empty())
            });
        }
    }

    /// The id of a mentioned type.
    fn mention(&mut self, mention: &Mention, depth: usize) -> TypeId {
        let Some(depth) = depth.checked_sub(1) else {
            return TypeId::VOID;
        };
        let name = mention.name.as_deref().unwrap_or("");
        match mention.kind.as_str() {
            "pointer" => {
                let target = mention
                    .subtype
                    .as_deref()
                    .map(|m| self.mention(m, depth))
                    .unwrap_or_default();
                self.derive(Derived::Pointer(target))
            }
            "array" => {
                let element = mention
                    .subtype
                    .as_deref()
                    .map(|m| self.mention(m, depth))
                    .unwrap_or_default();
                let count = mention.count.and_then(|n| u32::try_from(n.0).ok()).unwrap_or(0);
                self.derive(Derived::Array(element, count))
            }
            "function" => match self.function {
                Some(id) => id,
                None => {
                    let params = [("", TypeId::VOID)];
                    let id = self.builder.add(&Def::FuncProto {
                        result: TypeId::VOID,
                        params: &params,
                    });
                    *self.function.insert(id)
                }
            },
            "base" if name == "void" => TypeId::VOID,
            "base" if name == "pointer" => self.derive(Derived::Pointer(TypeId::VOID)),
            "base" => self.by_name(Space::Base, name, false),
            "struct" | "class" => self.by_name(Space::User, name, false),
            "union" => self.by_name(Space::User, name, true),
            "enum" => self.by_name(Space::Enum, name, false),
            kind => {
                self.odd(|| format!("a type of kind {}", kind.escape_default()));
                TypeId::VOID
            }
        }
    }

    fn derive(&mut self, derived: Derived) -> TypeId {
        let builder = &mut self.builder;
        *self.derived.entry(derived).or_insert_with(|| {
            builder.add(&match derived {
                Derived::Pointer(target) => Def::Ptr(target),
                Derived::Array(element, count) => Def::Array {
                    element,
                    index: TypeId::VOID,
                    count,
                },
            })
        })
    }

    fn by_name(&mut self, space: Space, name: &str, union: bool) -> TypeId {
        if let Some(&(id, _)) = self.named.get(&(space, name.into())) {
            return id;
        }
        if self.named.len() >= MAX_TYPES {
            self.odd(|| format!("{} is one type too many", name.escape_default()));
            return TypeId::VOID;
        }
        let id = self.builder.reserve();
        self.named
            .insert((space, name.into()), (id, Known::Mentioned { union }));
        id
    }

    /// The id for a definition; `None` where there is one already, which then stays.
    fn defines(&mut self, space: Space, name: &str) -> Option<TypeId> {
        let id = self.by_name(space, name, false);
        let known = &mut self.named.get_mut(&(space, name.into()))?.1;
        if *known == Known::Defined {
            self.odd(|| format!("{} is defined twice", name.escape_default()));
            return None;
        }
        *known = Known::Defined;
        Some(id)
    }

    /// The name a type has in C, from the one that makes it unique in the file.
    fn own_name<'a>(&self, space: Space, name: &'a str) -> &'a str {
        if name.starts_with("unnamed_") {
            return "";
        }
        // What vmsight's own export calls the second of a name.
        let ours = self.metadata.producer.name == "vmsight";
        match name.rsplit_once("__") {
            Some((first, n)) if ours && n.parse::<u32>().is_ok_and(|n| n >= 2) && self.has(space, first) => {
                first
            }
            _ => name,
        }
    }

    fn has(&self, space: Space, name: &str) -> bool {
        self.named.contains_key(&(space, name.into()))
    }

    fn odd(&mut self, what: impl FnOnce() -> String) {
        self.odd += 1;
        if self.first_odd.is_none() {
            self.first_odd = Some(what());
        }
    }

    pub(super) fn finish(mut self, path: &Path) -> Result<Imported, ImportError> {
        const KIND: FileKind = FileKind::Isf;
        let broken = |why: &str| ImportError::Broken {
            path: path.to_owned(),
            kind: KIND,
            why: why.to_owned(),
        };
        if self.metadata.format.is_empty() {
            return Err(broken("it has no metadata that says its format"));
        }
        // What is mentioned but never defined, in an order that does not depend on the hash table.
        let mut missing: Vec<_> = self
            .named
            .iter()
            .filter_map(|((space, name), &(id, known))| match known {
                Known::Mentioned { union } => Some((id, *space, name.clone(), union)),
                Known::Defined => None,
            })
            .collect();
        missing.sort_by_key(|&(id, ..)| id);
        let incomplete = missing.len();
        for (id, space, name, is_union) in missing {
            self.builder.define(
                id,
                &match space {
                    Space::User => Def::Fwd {
                        name: &name,
                        is_union,
                    },
                    Space::Enum => Def::Enum {
                        name: &name,
                        size: 4,
                        signed: false,
                        values: &[],
                    },
                    Space::Base => Def::Typedef {
                        name: &name,
                        target: TypeId::VOID,
                    },
                },
            );
        }
        let mut imported = Imported::nothing(path, KIND);
        // Nothing odd: C code mentions structs that only one source file, or a module, knows the inside of.
        tracing::debug!(
            "{}: {incomplete} types are mentioned, but not described",
            path.display()
        );
        if let Some(first) = self.first_odd {
            imported.notes.push(format!(
                "{} entries make no sense and were left out; the first: {first}",
                self.odd
            ));
        }
        if self.builder.dropped() > 0 {
            imported.notes.push(format!(
                "{} members or values could not be kept",
                self.builder.dropped()
            ));
        }
        imported.build_id = self
            .metadata
            .linux
            .and_then(|l| l.symbols.0.iter().find_map(|s| build_id(&s.name)));
        imported.banner = self.banner;
        imported.symbols = (self.symbol_count > 0).then(|| self.symbols.finish());
        let types = self.builder.finish();
        let types = types.map_err(|cause| ImportError::Types {
            path: path.to_owned(),
            kind: KIND,
            cause,
        })?;
        imported.types = (!types.is_empty()).then_some(types);
        if imported.symbols.is_none() && imported.types.is_none() {
            return Err(broken("it has neither symbols nor types"));
        }
        Ok(imported)
    }
}

fn is_void(mention: &Mention) -> bool {
    mention.kind == "base" && mention.name.as_deref() == Some("void")
}

/// The build-id in the free text that vmsight's export writes.
fn build_id(text: &str) -> Option<Vec<u8>> {
    let hex = text.rsplit_once("build-id ")?.1;
    if hex.is_empty() || hex.len() % 2 != 0 || hex.len() > 128 || !hex.is_ascii() {
        return None;
    }
    (0..hex.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(hex.get(i..i + 2)?, 16).ok())
        .collect()
}
