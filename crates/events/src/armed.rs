//! Several hooks, each with what it is there for.

use std::fmt;

use rustc_hash::FxHashMap;
use vmsight_hooks::{Hook, HookId};

use crate::{EventError, HookGuard, Monitor};

/// Hooks that are armed, and what each is there for. They are taken out when this is dropped, in the order in which they were armed.
pub struct Armed<T> {
    purposes: FxHashMap<HookId, T>,
    guards: Vec<HookGuard>,
}

impl<T> Armed<T> {
    /// Arms one more.
    ///
    /// # Errors
    /// As [`Monitor::hook`].
    pub fn arm(&mut self, monitor: &Monitor, hook: &Hook, purpose: T) -> Result<(), EventError> {
        let guard = monitor.hook(hook)?;
        self.purposes.insert(guard.id(), purpose);
        self.guards.push(guard);
        Ok(())
    }

    /// What a hook is there for; `None` for those of somebody else.
    pub fn get(&self, id: HookId) -> Option<&T> {
        self.purposes.get(&id)
    }

    /// All of them, in the order in which they were armed, each with what it is there for.
    pub fn guards(&self) -> impl Iterator<Item = (&HookGuard, &T)> {
        self.guards
            .iter()
            .filter_map(|guard| Some((guard, self.purposes.get(&guard.id())?)))
    }

    /// What all of them are there for, in no order.
    pub fn purposes(&self) -> impl ExactSizeIterator<Item = &T> {
        self.purposes.values()
    }
}

impl<T> Default for Armed<T> {
    fn default() -> Self {
        Self {
            purposes: FxHashMap::default(),
            guards: Vec::new(),
        }
    }
}

impl<T: fmt::Debug> fmt::Debug for Armed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.purposes.fmt(f)
    }
}
