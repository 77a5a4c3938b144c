//! Finding types by what a person types.

use serde::Serialize;

use crate::types::{Kind, Kinds, TypeId, Types, printable};

/// A type in a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Its id.
    pub id: u32,
    /// `struct`, `union`, `enum`, `typedef`, `function`, ….
    pub kind: &'static str,
    /// Its name.
    pub name: String,
    /// Size in bytes, where it has one.
    pub size: Option<u64>,
    /// Members, values or parameters; `None` for what has none by nature.
    pub members: Option<u64>,
}

/// What a person means by `struct task_struct`, `union sigval`, `enum pid_type`, `pid_t` or plain `task_struct`: all
/// types of that name (names are not unique), those with members first.
pub fn named(types: &Types, text: &str) -> Vec<TypeId> {
    let text = text.trim();
    let (kinds, name) = match text.split_once(char::is_whitespace) {
        Some(("struct", name)) => (Kinds::STRUCT | Kinds::FWD, name.trim()),
        Some(("union", name)) => (Kinds::UNION | Kinds::FWD, name.trim()),
        Some(("enum", name)) => (Kinds::ENUM, name.trim()),
        // "unsigned long" is a name as it stands.
        _ => (Kinds::all(), text),
    };
    let mut found: Vec<(u8, TypeId)> = types
        .all(name)
        .filter_map(|id| {
            let kind = types.get(id)?.kind();
            let rank = match kind {
                Kind::Struct | Kind::Union => 0,
                Kind::Enum | Kind::Enum64 => 1,
                Kind::Typedef => 2,
                Kind::Fwd => 4,
                _ => 3,
            };
            kinds.has(kind).then_some((rank, id))
        })
        .collect();
    found.sort_by_key(|&(rank, id)| (rank, id));
    // A declaration says nothing where there is a definition.
    if found.first().is_some_and(|&(rank, _)| rank == 0) {
        found.retain(|&(rank, _)| rank != 4);
    }
    found.into_iter().map(|(_, id)| id).collect()
}

/// The named types of some kinds whose name matches: `*` and `?` as in a shell, else any part of the name.
pub fn search<'a>(types: &'a Types, pattern: &'a str, kinds: Kinds) -> impl Iterator<Item = Summary> + 'a {
    let named = types
        .iter()
        .filter(move |t| kinds.has(t.kind()) && !t.name().is_empty());
    let matching = named.filter(move |t| matches(pattern, t.name()));
    matching.map(|t| Summary {
        id: t.id().0,
        kind: t.kind().as_str(),
        name: printable(t.name()),
        size: t.size(),
        members: match t.kind() {
            Kind::Struct | Kind::Union | Kind::Enum | Kind::Enum64 | Kind::Datasec => {
                Some(u64::from(t.vlen()))
            }
            Kind::Func => types
                .get(t.target().unwrap_or_default())
                .map(|p| p.params().len() as u64),
            _ => None,
        },
    })
}

/// Whether a name is what a person means by `pattern`: `*` and `?` as in a shell, else any part of the name.
pub fn matches(pattern: &str, name: &str) -> bool {
    if pattern.contains(['*', '?']) {
        glob(pattern.as_bytes(), name.as_bytes())
    } else {
        name.contains(pattern)
    }
}

/// Shell matching with `*` and `?`, in time linear in the product of both lengths at worst.
pub(crate) fn glob(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n) = (0, 0);
    // After the last star: where to go on in the pattern, and what it has swallowed so far.
    let mut star = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p + 1, n));
                p += 1;
            }
            Some(&c) if c == b'?' || c == name[n] => {
                p += 1;
                n += 1;
            }
            _ => {
                let Some((after, swallowed)) = star else {
                    return false;
                };
                star = Some((after, swallowed + 1));
                (p, n) = (after, swallowed + 1);
            }
        }
    }
    pattern[p..].iter().all(|&c| c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_match_as_in_a_shell() {
        for (pattern, name, yes) in [
            ("task_*", "task_struct", true),
            ("*_struct", "task_struct", true),
            ("*s*s*t", "task_struct", true),
            ("t?sk_struct", "task_struct", true),
            ("task", "task_struct", false),
            ("*", "", true),
            ("?", "", false),
            ("a*b*c", "axxbyyb", false),
        ] {
            assert_eq!(glob(pattern.as_bytes(), name.as_bytes()), yes, "{pattern} {name}");
        }
    }

    #[test]
    fn a_keyword_narrows_the_kind() {
        let types = crate::types::tests::sample();
        assert_eq!(named(&types, "node").len(), 2);
        assert_eq!(named(&types, "struct  node").len(), 2);
        assert_eq!(named(&types, "union node").len(), 0);
        assert_eq!(named(&types, "enum state").len(), 1);
        assert_eq!(named(&types, "unsigned int").len(), 1);
        let found: Vec<_> = search(&types, "n?de*", Kinds::COMPOSITE)
            .map(|s| (s.name, s.size, s.members))
            .collect();
        assert_eq!(
            found,
            [
                ("node".into(), Some(48), Some(4)),
                ("node".into(), Some(4), Some(1))
            ]
        );
        assert_eq!(search(&types, "tomi", Kinds::all()).count(), 1);
    }
}
