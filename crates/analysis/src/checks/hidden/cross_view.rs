//! Objects seen by several ways.

use std::collections::BTreeMap;

use vmsight_arch::Gva;

use crate::Evidence;

/// One way by which objects are found.
#[derive(Clone, Copy, Debug)]
struct View {
    name: &'static str,
    /// Every object must be in it; else that one is not says nothing.
    whole: bool,
}

/// Objects, and by which ways each was found.
#[derive(Clone, Debug, Default)]
pub(super) struct CrossView {
    views: Vec<View>,
    /// A bit for each view.
    objects: BTreeMap<Gva, u32>,
}

impl CrossView {
    /// Adds a view in which every object must be.
    pub(super) fn whole(&mut self, name: &'static str, objects: impl IntoIterator<Item = Gva>) {
        self.add(View { name, whole: true }, objects);
    }

    /// Adds a view in which some are: those that run, those that have something.
    pub(super) fn part(&mut self, name: &'static str, objects: impl IntoIterator<Item = Gva>) {
        self.add(View { name, whole: false }, objects);
    }

    fn add(&mut self, view: View, objects: impl IntoIterator<Item = Gva>) {
        let bit = 1u32.checked_shl(self.views.len() as u32).unwrap_or(0);
        self.views.push(view);
        for object in objects {
            *self.objects.entry(object).or_default() |= bit;
        }
    }

    /// How many objects there are.
    pub(super) fn len(&self) -> usize {
        self.objects.len()
    }

    /// All objects.
    pub(super) fn objects(&self) -> impl Iterator<Item = Gva> + '_ {
        self.objects.keys().copied()
    }

    /// The objects that a view lacks in which they must be.
    pub(super) fn missing(&self) -> impl Iterator<Item = Gva> + '_ {
        let must = self.views.iter().enumerate().filter(|(_, view)| view.whole);
        let must: u32 = must.map(|(index, _)| 1 << index).sum();
        let lacks = move |(object, seen): (&Gva, &u32)| (seen & must != must).then_some(*object);
        self.objects.iter().filter_map(lacks)
    }

    /// The names of the views that lack an object and must not.
    pub(super) fn lacking(&self, object: Gva) -> Vec<&'static str> {
        let seen = self.objects.get(&object).copied().unwrap_or(0);
        let views = self.views.iter().enumerate();
        views
            .filter(|(index, view)| view.whole && seen >> index & 1 == 0)
            .map(|(_, view)| view.name)
            .collect()
    }

    /// The answer of each view for an object.
    pub(super) fn evidence(&self, object: Gva) -> impl Iterator<Item = Evidence> + '_ {
        let seen = self.objects.get(&object).copied().unwrap_or(0);
        self.views.iter().enumerate().map(move |(index, view)| {
            let answer = match (seen >> index & 1 == 1, view.whole) {
                (true, _) => "yes",
                (false, true) => "no",
                (false, false) => "no, and need not be",
            };
            Evidence::value(view.name, answer)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_whole_view_lacks_is_missing_and_what_a_part_lacks_is_not() {
        let mut views = CrossView::default();
        views.whole("list", [Gva(1), Gva(2)]);
        views.whole("tree", [Gva(2), Gva(3)]);
        views.part("running", [Gva(2)]);
        assert_eq!(views.len(), 3);
        assert_eq!(views.missing().collect::<Vec<_>>(), [Gva(1), Gva(3)]);
        assert_eq!(views.lacking(Gva(3)), ["list"]);
        let answers: Vec<String> = views.evidence(Gva(3)).map(|e| e.to_string()).collect();
        assert_eq!(answers, ["list: no", "tree: yes", "running: no, and need not be"]);
    }
}
