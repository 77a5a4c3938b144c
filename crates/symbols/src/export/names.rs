//! Names for types in a form that knows types by name only: unique, and stable from run to run.

use rustc_hash::FxHashSet;

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
        let mut taken: FxHashSet<Box<str>> = FxHashSet::default();
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
            self.give_free(t.id(), t.name(), 2, &mut taken);
        }
        for t in types.iter().filter(|t| sort(t.kind())) {
            if self.get(t.id()).is_none() {
                self.give_free(t.id(), &format!("unnamed_{:x}", t.id().0), 1, &mut taken);
            }
        }
    }

    /// Gives `name`, or the first of name__2, name__3, … that nobody has.
    fn give_free(&mut self, id: TypeId, name: &str, from: u32, taken: &mut FxHashSet<Box<str>>) {
        // There are fewer names than types, so the loop ends.
        let candidates = (from..).map(|n| {
            if n == 1 {
                name.to_owned()
            } else {
                format!("{name}__{n}")
            }
        });
        if let Some(free) = candidates.into_iter().find(|c| !taken.contains(c.as_str())) {
            self.give(id, free.into(), taken);
        }
    }

    fn give(&mut self, id: TypeId, name: Box<str>, taken: &mut FxHashSet<Box<str>>) {
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
