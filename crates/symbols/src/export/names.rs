//! Names for types in a form that knows types by name only: unique, and stable from run to run.

use std::collections::{HashMap, HashSet};

use crate::types::{Kind, TypeId, Types};

/// What each struct, union and enumeration is called. Those two sorts have separate dictionaries.
pub(super) struct Names {
    /// By the type's number within the blob.
    names: Vec<Option<Box<str>>>,
    first: u32,
}

impl Names {
    pub(super) fn new(types: &Types) -> Self {
        let first = types.ids().next().map_or(1, |id| id.0);
        let mut names = Self {
            names: vec![None; types.len()],
            first,
        };
        names.assign(types, Kind::is_composite);
        names.assign(types, Kind::is_enum);
        names
    }

    /// Gives out the names of one dictionary.
    fn assign(&mut self, types: &Types, sort: fn(Kind) -> bool) {
        // Names are the guest's, which could choose them to collide: so no hash that is known beforehand.
        let mut taken: HashSet<Box<str>> = HashSet::default();
        let mut next: HashMap<Box<str>, u32> = HashMap::default();
        // First come those with a name of their own; of several with the same name the first keeps it.
        let mut doubles = Vec::new();
        for t in types.iter().filter(|t| sort(t.kind()) && !t.name().is_empty()) {
            if taken.contains(t.name()) {
                doubles.push(t);
            } else {
                self.give(t.id(), t.name().into(), &mut taken);
            }
        }
        // Then anonymous ones that a typedef stands for, such as atomic_t.
        for typedef in types
            .iter()
            .filter(|t| t.kind() == Kind::Typedef && !t.name().is_empty())
        {
            let Some(target) = typedef.target().and_then(|id| types.get(id)) else {
                continue;
            };
            if sort(target.kind()) && self.get(target.id()).is_none() && !taken.contains(typedef.name()) {
                self.give(target.id(), typedef.name().into(), &mut taken);
            }
        }
        for t in doubles {
            let from = next.entry(t.name().into()).or_insert(2);
            *from = self.give_free(t.id(), t.name(), *from, &mut taken);
        }
        for t in types.iter().filter(|t| sort(t.kind())) {
            if self.get(t.id()).is_none() {
                self.give_free(t.id(), &format!("unnamed_{:x}", t.id().0), 1, &mut taken);
            }
        }
    }

    /// Gives `name`, or the first of name__2, name__3, … from `from` on that nobody has. Says where to go on for the next type of
    /// the same name: to begin anew each time would cost the square of their number.
    fn give_free(&mut self, id: TypeId, name: &str, from: u32, taken: &mut HashSet<Box<str>>) -> u32 {
        // There are fewer names than types, so the loop ends.
        let candidates = (from..).map(|n| {
            let candidate = if n == 1 {
                name.to_owned()
            } else {
                format!("{name}__{n}")
            };
            (n, candidate)
        });
        match candidates.into_iter().find(|(_, c)| !taken.contains(c.as_str())) {
            Some((n, free)) => {
                self.give(id, free.into(), taken);
                n.saturating_add(1)
            }
            None => from,
        }
    }

    fn give(&mut self, id: TypeId, name: Box<str>, taken: &mut HashSet<Box<str>>) {
        let index = id.0.checked_sub(self.first).map(|i| i as usize);
        if let Some(slot) = index.and_then(|i| self.names.get_mut(i)) {
            taken.insert(name.clone());
            *slot = Some(name);
        }
    }

    /// The name of a struct, union or enumeration.
    pub(super) fn get(&self, id: TypeId) -> Option<&str> {
        let index = id.0.checked_sub(self.first)? as usize;
        self.names.get(index)?.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Builder, Def};

    /// So many that trying each number anew for each of them would not end before whoever runs the tests gives up.
    #[test]
    fn any_number_of_types_of_one_name_get_names_of_their_own() {
        const COUNT: usize = 120_000;
        let mut b = Builder::new();
        let structure = |name: &str, b: &mut Builder| {
            b.add(&Def::Struct {
                name,
                size: 0,
                members: &[],
            })
        };
        // A name that a number would give is taken already.
        structure("twin__4", &mut b);
        let ids: Vec<TypeId> = (0..COUNT).map(|_| structure("twin", &mut b)).collect();
        let names = Names::new(&b.finish().unwrap());
        let of = |i: usize| ids.get(i).and_then(|&id| names.get(id)).unwrap_or("");
        let first: Vec<&str> = (0..5).map(of).collect();
        assert_eq!(first, ["twin", "twin__2", "twin__3", "twin__5", "twin__6"]);
        assert_eq!(of(COUNT - 1), format!("twin__{}", COUNT + 1));
    }
}
