//! Sentences for the reader of a listing: each once, and only so many that somebody can read them.

use std::hash::{BuildHasher, Hasher};

use rustc_hash::{FxBuildHasher, FxHashSet};

/// Sentences that are kept.
pub(crate) const MAX_WARNINGS: usize = 256;
/// Sentences beyond those that are still told from one another.
const MAX_TOLD: usize = 1 << 16;

/// Which sentences were said, and how many found no room.
#[derive(Clone, Debug, Default)]
pub(crate) struct Told {
    hashes: FxHashSet<u64>,
    more: u64,
}

impl Told {
    /// Adds `sentence` to those of `shown`; the last place is for the number of those left out.
    pub(crate) fn add(&mut self, shown: &mut Vec<String>, sentence: String) {
        let kept = shown.len() - usize::from(self.more > 0).min(shown.len());
        if self.hashes.len() < kept {
            // Some came without passing here.
            self.hashes.extend(shown.iter().take(kept).map(|s| hash(s)));
        }
        let hash = hash(&sentence);
        if self.hashes.contains(&hash) {
            return;
        }
        if self.hashes.len() < MAX_TOLD {
            self.hashes.insert(hash);
        }
        if kept < MAX_WARNINGS {
            shown.push(sentence);
            return;
        }
        self.more += 1;
        shown.truncate(kept);
        shown.push(format!("and {} more warnings", self.more));
    }
}

fn hash(sentence: &str) -> u64 {
    let mut hasher = FxBuildHasher.build_hasher();
    hasher.write(sentence.as_bytes());
    hasher.finish()
}

/// Warnings that are collected before there is a listing.
#[derive(Clone, Debug, Default)]
pub(crate) struct Warnings {
    shown: Vec<String>,
    told: Told,
}

impl Warnings {
    /// Adds a sentence.
    pub(crate) fn add(&mut self, sentence: String) {
        self.told.add(&mut self.shown, sentence);
    }

    /// The sentences.
    pub(crate) fn as_slice(&self) -> &[String] {
        &self.shown
    }

    /// The sentences themselves.
    pub(crate) fn into_vec(self) -> Vec<String> {
        self.shown
    }
}

impl Extend<String> for Warnings {
    fn extend<I: IntoIterator<Item = String>>(&mut self, sentences: I) {
        sentences.into_iter().for_each(|sentence| self.add(sentence));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_said_once_and_the_rest_are_counted() {
        let mut warnings = Warnings::default();
        for round in 0..3 {
            warnings.extend((0..10).map(|n| format!("number {n}")));
            assert_eq!(warnings.as_slice().len(), 10, "round {round}");
        }
        warnings.extend((0..1_000_000).map(|n| format!("number {n}")));
        let shown = warnings.into_vec();
        assert_eq!(shown.len(), MAX_WARNINGS + 1);
        assert_eq!(shown[255], "number 255");
        assert_eq!(shown[256], format!("and {} more warnings", 1_000_000 - 256));
    }

    #[test]
    fn sentences_that_were_there_before_count() {
        let mut shown = vec!["a".to_owned(), "b".to_owned()];
        let mut told = Told::default();
        told.add(&mut shown, "a".to_owned());
        told.add(&mut shown, "c".to_owned());
        assert_eq!(shown, ["a", "b", "c"]);
    }
}
