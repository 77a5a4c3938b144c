//! Whose doings are told.

use rustc_hash::FxHashSet;
use vmsight_hooks::Condition;
use vmsight_linux::{Current, CurrentReader};

use super::filter::current_pid;

/// Most processes that are followed.
const MAX_FOLLOWED: usize = 1 << 16;

/// Everybody, or some processes and perhaps their children.
#[derive(Default, Debug)]
pub(super) struct Whose {
    /// All where `None`.
    pids: Option<FxHashSet<i32>>,
    follow: bool,
}

impl Whose {
    /// Only these; with `follow` also those that they start from now on.
    pub(super) fn only(pids: impl IntoIterator<Item = i32>, follow: bool) -> Self {
        Self {
            pids: Some(pids.into_iter().collect()),
            follow,
        }
    }

    /// The same for a filter, where it does not change while it is looked at.
    pub(super) fn condition(&self, reader: &CurrentReader) -> Option<Condition> {
        let pids = self.pids.as_ref().filter(|_| !self.follow)?;
        // As the four bytes that they are in the kernel.
        let numbers = pids.iter().map(|pid| u64::from(pid.cast_unsigned()));
        Some(current_pid(reader).is_one_of(numbers))
    }

    /// Whether somebody is one of them; where children are followed he becomes one if his parent is.
    pub(super) fn concerns(&mut self, reader: &CurrentReader, current: &Current) -> bool {
        let Some(pids) = &mut self.pids else { return true };
        if pids.contains(&current.pid) {
            return true;
        }
        let child = self.follow
            && reader
                .parent(current.task)
                .is_ok_and(|parent| pids.contains(&parent));
        if child && pids.len() < MAX_FOLLOWED {
            pids.insert(current.pid);
        }
        child
    }
}
