//! What vCPUs look up when the guest stops: hooks by what they are hooked to. It is replaced as a whole, never changed.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vmsight_hooks::{Access, Counts, Hook, HookId, HookKind, Sieve};

use crate::filter::Filter;
use crate::inside::{JUMP, replaced};
use crate::session::Session;
use crate::slots::{Protection, Slot};
use crate::tcg::Wanted;

/// A hook that is armed, with what became of it.
#[derive(Debug)]
pub(crate) struct Armed {
    pub(crate) id: HookId,
    /// Whose it is.
    pub(crate) session: Arc<Session>,
    pub(crate) hook: Hook,
    /// Of a hook on vectors: where their handlers begin.
    pub(crate) handlers: Vec<(u64, u8)>,
    /// Its filter.
    pub(crate) sieve: Sieve,
    /// What it takes to say whether it wants an event, where each register costs a call.
    pub(crate) judged_by: Wanted,
    /// Set when its monitor was told that a verdict of it was not applied: once is enough.
    pub(crate) overruled: AtomicBool,
    /// Set when it is taken out: who waits with an event of it waits no longer.
    pub(crate) removed: AtomicBool,
    /// How many were put away inside the guest, and how many had been when it was armed. It is the guest's word.
    pub(crate) put_away: Option<(&'static AtomicU64, u64)>,
    pub(crate) occurred: AtomicU64,
    pub(crate) told: AtomicU64,
    pub(crate) dropped: AtomicU64,
    pub(crate) expired: AtomicU64,
}

impl Armed {
    pub(crate) fn new(id: HookId, session: Arc<Session>, hook: Hook) -> Self {
        let sieve = Sieve::new(hook.filter.clone());
        Self {
            id,
            session,
            handlers: Vec::new(),
            judged_by: Wanted::to_judge(hook.scope, sieve.looks()),
            sieve,
            hook,
            overruled: AtomicBool::new(false),
            removed: AtomicBool::new(false),
            put_away: None,
            occurred: AtomicU64::new(0),
            told: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            expired: AtomicU64::new(0),
        }
    }

    /// Whether it has a breakpoint on the instruction at `rip`.
    pub(crate) fn breaks_at(&self, rip: u64) -> bool {
        matches!(self.hook.kind, HookKind::Execute { at } if at.0 == rip) || self.vector_at(rip).is_some()
    }

    /// The vector whose handler begins at `rip`.
    pub(crate) fn vector_at(&self, rip: u64) -> Option<u8> {
        let found = self.handlers.iter().find(|(at, _)| *at == rip);
        found.map(|(_, vector)| *vector)
    }

    /// Tells its monitor about it.
    pub(crate) fn notice(&self, text: impl Into<String>) {
        self.session.notice(Some(self.id), text);
    }

    pub(crate) fn is_removed(&self) -> bool {
        self.removed.load(Ordering::Acquire)
    }

    pub(crate) fn counts(&self) -> Counts {
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        let mut counts = Counts {
            occurred: get(&self.occurred),
            told: get(&self.told),
            dropped: get(&self.dropped),
            expired: get(&self.expired),
            ..Counts::default()
        };
        self.sieve.count(&mut counts);
        if let Some((counter, before)) = self.put_away {
            let inside = get(counter).wrapping_sub(before);
            counts.occurred = counts.occurred.saturating_add(inside);
            counts.filtered = counts.filtered.saturating_add(inside);
        }
        counts
    }
}

/// Hooks in the order in which they were armed.
pub(crate) type Hooks = Vec<Arc<Armed>>;

/// A stretch of physical memory that is watched.
#[derive(Clone, Debug)]
pub(crate) struct Span {
    pub(crate) gpa: u64,
    pub(crate) len: u64,
    /// Where it lies in the address space for which it was hooked.
    pub(crate) gva: Option<u64>,
    pub(crate) access: Access,
    pub(crate) armed: Arc<Armed>,
}

/// An INT3 in the guest's memory.
#[derive(Clone, Debug, Default)]
pub(crate) struct Patched {
    /// What stands there without it.
    pub(crate) original: u8,
    pub(crate) hooks: Hooks,
}

/// An INT3 of ours behind a filter in the guest.
#[derive(Clone, Debug)]
pub(crate) struct Inside {
    /// The instruction that is hooked.
    pub(crate) at: u64,
    /// Where our code does it.
    pub(crate) resume: u64,
    /// The one that it is of.
    pub(crate) hooks: Hooks,
}

/// All of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Table {
    pub(crate) slots: Vec<Slot>,
    /// Hardware breakpoints 0 to 3.
    pub(crate) hardware: [Option<u64>; 4],
    pub(crate) execute: HashMap<u64, Hooks>,
    /// By physical address.
    pub(crate) patches: HashMap<u64, Patched>,
    /// By virtual address.
    pub(crate) inside: HashMap<u64, Inside>,
    /// What stands where there are jumps, by physical address.
    pub(crate) replaced: BTreeMap<u64, [u8; JUMP]>,
    /// The virtual addresses of our own code in the guest, the end excluded.
    pub(crate) window: Option<(u64, u64)>,
    pub(crate) msrs: HashMap<u32, Hooks>,
    pub(crate) vmm_filter: Filter,
    /// Why the VMM itself wants MSR accesses (KVM_MSR_EXIT_REASON_*).
    pub(crate) vmm_reasons: u32,
    pub(crate) spans: Vec<Span>,
    pub(crate) pages: BTreeMap<u64, Protection>,
    pub(crate) ports: Vec<(u16, u16, Access, Arc<Armed>)>,
    /// Steps: which vCPU, how many.
    pub(crate) steps: Vec<(u32, u64, Arc<Armed>)>,
    /// The id of the last of them.
    pub(crate) last_step: u32,
    /// Whether there is any hook.
    pub(crate) active: bool,
}

impl Table {
    /// What stands at a physical address without what is ours, where something is.
    pub(crate) fn original(&self, gpa: u64) -> Option<u8> {
        if let Some(patch) = self.patches.get(&gpa) {
            return Some(patch.original);
        }
        replaced(&self.replaced, |bytes| *bytes, gpa)
    }

    /// Whether an address is in our own code in the guest.
    pub(crate) fn is_ours(&self, rip: u64) -> bool {
        self.window.is_some_and(|(from, to)| (from..to).contains(&rip))
    }

    /// Hooks on these bytes.
    pub(crate) fn watching(&self, gpa: u64, len: u64, access: Access) -> impl Iterator<Item = &Span> {
        let end = gpa.saturating_add(len);
        self.spans
            .iter()
            .filter(move |s| s.access.intersects(access) && s.gpa < end && gpa < s.gpa.saturating_add(s.len))
    }
}
