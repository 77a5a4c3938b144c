//! Types as C spells them.

use std::fmt::Write;

use super::{Kind, MAX_CHAIN, TypeId, Types};

/// How deep function types within function types are spelled out.
const MAX_DEPTH: usize = 4;
/// Longest declaration that is spelled out, in bytes. Hostile types can describe endless ones.
const MAX_LEN: usize = 4096;

impl Types {
    /// The name of a type as C spells it: `struct task_struct *`, `char [16]`, `int (*)(void *)`.
    ///
    /// Names are printable whatever the guest wrote.
    pub fn type_name(&self, id: TypeId) -> String {
        self.declare(id, "")
    }

    /// The declaration of `name` with this type: `char comm[16]`, `int (*handler)(void *)`.
    pub fn declare(&self, id: TypeId, name: &str) -> String {
        self.declare_within(id, name.to_owned(), MAX_DEPTH)
    }

    fn declare_within(&self, id: TypeId, name: String, depth: usize) -> String {
        let mut declarator = name;
        let mut qualifiers = String::new();
        let mut id = id;
        // A declarator is built from the inside out, as C reads it.
        for _ in 0..MAX_CHAIN {
            if declarator.len() > MAX_LEN {
                break;
            }
            let Some(t) = self.get(id) else {
                return join(&qualifiers, "?", &declarator);
            };
            match t.kind() {
                Kind::Const | Kind::Volatile | Kind::Restrict => {
                    id = t.target().unwrap_or_default();
                    let word = t.kind().as_str();
                    let on_pointer = self.get(id).is_some_and(|t| t.kind() == Kind::Ptr);
                    if on_pointer {
                        declarator = join("", word, &declarator);
                    } else if !qualifiers.split(' ').any(|q| q == word) {
                        let _ = write!(qualifiers, "{word} ");
                    }
                }
                Kind::TypeTag => id = t.target().unwrap_or_default(),
                Kind::Ptr => {
                    id = t.target().unwrap_or_default();
                    declarator.insert(0, '*');
                    let inner = self.get(self.untag(id)).map(|t| t.kind());
                    if matches!(inner, Some(Kind::Array | Kind::FuncProto)) {
                        declarator = format!("({declarator})");
                    }
                }
                Kind::Array => {
                    let Some(array) = t.array() else { break };
                    let _ = match array.count {
                        0 => write!(declarator, "[]"),
                        n => write!(declarator, "[{n}]"),
                    };
                    id = array.element;
                }
                Kind::FuncProto => {
                    let params = self.params(&t, depth);
                    let _ = write!(declarator, "({params})");
                    id = t.target().unwrap_or_default();
                }
                _ => return join(&qualifiers, &self.own_name(id), &declarator),
            }
        }
        join(&qualifiers, "...", &declarator)
    }

    /// The type behind type tags, which a pointer may carry between itself and an array or function.
    fn untag(&self, id: TypeId) -> TypeId {
        let mut id = id;
        for _ in 0..MAX_CHAIN {
            match self.get(id) {
                Some(t) if t.kind() == Kind::TypeTag => id = t.target().unwrap_or_default(),
                _ => break,
            }
        }
        id
    }

    fn params(&self, proto: &super::Type<'_>, depth: usize) -> String {
        let Some(depth) = depth.checked_sub(1) else {
            return "...".to_owned();
        };
        let mut out = String::new();
        for param in proto.params() {
            if !out.is_empty() {
                out.push_str(", ");
            }
            if out.len() > MAX_LEN / 4 {
                out.push_str("...");
                break;
            }
            if param.type_id == TypeId::VOID && param.name.is_empty() {
                out.push_str("...");
            } else {
                out.push_str(&self.declare_within(param.type_id, String::new(), depth));
            }
        }
        if out.is_empty() { "void".to_owned() } else { out }
    }

    /// The name of a type that has one, with the keyword C wants: `struct list_head`, `pid_t`, `void`.
    fn own_name(&self, id: TypeId) -> String {
        let Some(t) = self.get(id) else {
            return "?".to_owned();
        };
        let keyword = match t.kind() {
            Kind::Void => return "void".to_owned(),
            Kind::Struct => "struct ",
            Kind::Union => "union ",
            Kind::Enum | Kind::Enum64 => "enum ",
            Kind::Fwd if t.is_union() => "union ",
            Kind::Fwd => "struct ",
            _ => "",
        };
        let name = printable(t.name());
        if name.is_empty() {
            format!("{keyword}{{...}}")
        } else {
            format!("{keyword}{name}")
        }
    }
}

/// A name without anything a terminal would act on.
pub(crate) fn printable(name: &str) -> String {
    if name.chars().all(|c| !c.is_control()) {
        return name.to_owned();
    }
    name.chars()
        .flat_map(|c| {
            if c.is_control() {
                c.escape_default().collect()
            } else {
                vec![c]
            }
        })
        .collect()
}

fn join(qualifiers: &str, name: &str, declarator: &str) -> String {
    let gap = if declarator.is_empty() { "" } else { " " };
    format!("{qualifiers}{name}{gap}{declarator}")
}
