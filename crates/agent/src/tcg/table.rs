//! What vCPUs look up: hooks by what they are on. It is replaced as a whole while no vCPU is in the guest, and
//! never changed.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmsight_hooks::{Access, HookKind, Range};

use super::instruction::Act;
use super::interrupt::Handlers;
use super::shadow::Shadow;
use crate::guest::UPPER_HALF;
use crate::table::{Armed, Hooks};

const PAGE_OFFSET: u64 = 0xfff;

/// A hook with what belongs to it as long as it is armed.
#[derive(Clone, Debug)]
pub(super) struct Hooked {
    pub(super) armed: Arc<Armed>,
    /// What the memory that it is on held last, where that is kept.
    pub(super) shadow: Option<Arc<Shadow>>,
    /// Instructions that are still to be executed, plus one; 0 when the event was told.
    pub(super) left: Arc<AtomicU64>,
}

/// A stretch of memory that is watched.
#[derive(Debug)]
pub(super) struct Watch {
    pub(super) first: u64,
    pub(super) last: u64,
    pub(super) physical: bool,
    pub(super) access: Access,
    pub(super) hooked: Hooked,
}

impl Watch {
    /// Whether one of the bytes from `first` to `last` is its.
    pub(super) fn covers(&self, first: u64, last: u64) -> bool {
        self.first <= last && first <= self.last
    }
}

/// An instruction that does something that is hooked.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Site {
    pub(super) translated: u64,
    pub(super) act: Act,
}

/// All of it.
#[derive(Debug, Default)]
pub(super) struct Table {
    /// Looked up at each call: for the few hooks that there mostly are this is faster than hashing an address.
    pub(super) execute: BTreeMap<u64, Hooks>,
    /// Where in their pages instructions of programs are hooked: whose page it is is known when they are executed.
    offsets: HashSet<u64>,
    pub(super) ranges: Vec<Watch>,
    pub(super) memory: Vec<Watch>,
    /// Kinds of accesses to memory that are watched.
    pub(super) accesses: Kinds,
    pub(super) instructions: Hooks,
    pub(super) steps: Vec<(u32, Hooked)>,
    /// By the address of the handler.
    pub(super) interrupts: BTreeMap<u64, Vec<(u8, Arc<Armed>)>>,
    /// Whether it matters which gates the guest has.
    pub(super) has_interrupts: bool,
    /// Instructions that translated code has pointers to. They go with the code.
    sites: Mutex<HashMap<Site, Box<Site>>>,
}

/// Which accesses callbacks are needed for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Kinds {
    pub(super) reads: bool,
    pub(super) writes: bool,
}

impl Table {
    /// What these hooks come to, in a guest with these handlers.
    pub(super) fn new<'h>(hooks: impl Iterator<Item = &'h Hooked>, handlers: &Handlers) -> Self {
        let mut table = Self::default();
        for hooked in hooks {
            let armed = &hooked.armed;
            match armed.hook.kind {
                HookKind::Execute { at } => {
                    table.execute.entry(at.0).or_default().push(Arc::clone(armed));
                    if at.0 < UPPER_HALF {
                        table.offsets.insert(at.0 & PAGE_OFFSET);
                    }
                }
                HookKind::Memory { range, access } => {
                    let watch = |access| Watch {
                        first: range.first(),
                        last: range.first().saturating_add(range.len().saturating_sub(1)),
                        physical: matches!(range, Range::Physical { .. }),
                        access,
                        hooked: hooked.clone(),
                    };
                    if access.contains(Access::EXECUTE) {
                        table.ranges.push(watch(Access::EXECUTE));
                    }
                    let data = access & (Access::READ | Access::WRITE);
                    if !data.is_empty() {
                        table.accesses.reads |= data.contains(Access::READ);
                        table.accesses.writes |= data.contains(Access::WRITE);
                        table.memory.push(watch(data));
                    }
                }
                HookKind::Step { vcpu, .. } | HookKind::StepUntil { vcpu, .. } => {
                    if hooked.left.load(Ordering::Relaxed) > 0 {
                        table.steps.push((vcpu, hooked.clone()));
                    }
                }
                HookKind::Interrupt { vectors } => {
                    table.has_interrupts = true;
                    for (handler, vector) in handlers.of(vectors).unwrap_or_default() {
                        let hooks = table.interrupts.entry(handler).or_default();
                        hooks.push((vector, Arc::clone(armed)));
                    }
                }
                _ => table.instructions.push(Arc::clone(armed)),
            }
        }
        table
    }

    /// Whether there is no hook.
    pub(super) fn is_empty(&self) -> bool {
        self.execute.is_empty()
            && self.ranges.is_empty()
            && self.memory.is_empty()
            && self.instructions.is_empty()
            && self.steps.is_empty()
            && !self.has_interrupts
    }

    /// Whether the instruction that is being translated at `address` may be one whose execution is hooked.
    pub(super) fn may_be_hooked(&self, address: u64) -> bool {
        if self.execute.contains_key(&address) || self.interrupts.contains_key(&address) {
            return true;
        }
        let user = address < UPPER_HALF;
        if user && self.offsets.contains(&(address & PAGE_OFFSET)) {
            return true;
        }
        self.ranges.iter().any(|r| {
            // A program's page may be executed at any address: then it is looked at when it is.
            r.covers(address, address) || user && r.first < UPPER_HALF
        })
    }

    /// Whether instructions are looked at while they are translated.
    pub(super) fn decodes(&self) -> bool {
        !self.instructions.is_empty() || self.has_interrupts
    }

    /// A place for an instruction that lives as long as the code that is translated now.
    pub(super) fn site(&self, site: Site) -> *const Site {
        let mut sites = self.sites.lock().unwrap_or_else(PoisonError::into_inner);
        let kept: &Site = sites.entry(site).or_insert_with(|| Box::new(site));
        kept
    }

    /// All translated code is gone.
    pub(super) fn forget_sites(&self) {
        self.sites.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::Session;
    use vmsight_arch::{Gpa, Gva};
    use vmsight_hooks::{Hook, HookId};

    fn table(kinds: &[HookKind]) -> Table {
        let session = Arc::new(Session::new(1).unwrap().0);
        let hooks: Vec<Hooked> = (1..)
            .zip(kinds)
            .map(|(id, kind)| Hooked {
                armed: Arc::new(Armed::new(HookId(id), Arc::clone(&session), Hook::new(*kind))),
                shadow: None,
                left: Arc::default(),
            })
            .collect();
        Table::new(hooks.iter(), &Handlers::default())
    }

    #[test]
    fn a_programs_instruction_is_looked_for_wherever_its_page_may_be_mapped() {
        let table = table(&[
            HookKind::Execute {
                at: Gva(0x5555_0000_1123),
            },
            HookKind::Execute {
                at: Gva(0xffff_ffff_8100_0456),
            },
        ]);
        assert!(table.may_be_hooked(0x5555_0000_1123));
        assert!(
            table.may_be_hooked(0x7fff_1234_5123),
            "the same place in another page"
        );
        assert!(!table.may_be_hooked(0x5555_0000_1124));
        // The kernel's code has one address.
        assert!(table.may_be_hooked(0xffff_ffff_8100_0456));
        assert!(!table.may_be_hooked(0xffff_ffff_8200_0456));
        assert!(!table.may_be_hooked(0x7fff_0000_0456));
    }

    #[test]
    fn accesses_are_watched_as_they_were_asked_for() {
        let physical = Range::Physical {
            start: Gpa(0x1000),
            len: 8,
        };
        let table = table(&[HookKind::Memory {
            range: physical,
            access: Access::WRITE | Access::READ,
        }]);
        let watch = &table.memory[0];
        assert!(watch.physical && table.ranges.is_empty());
        assert!(table.accesses.reads && table.accesses.writes);
        assert!(watch.covers(0xff8, 0x1000) && watch.covers(0x1007, 0x100e));
        assert!(!watch.covers(0xff8, 0xfff) && !watch.covers(0x1008, 0x100f));
        // To the very end of the address space.
        let end = Range::Virtual {
            start: Gva(u64::MAX - 7),
            len: 8,
        };
        let table = self::table(&[HookKind::Memory {
            range: end,
            access: Access::WRITE,
        }]);
        assert!(table.memory[0].covers(u64::MAX, u64::MAX) && !table.accesses.reads);
    }

    #[test]
    fn a_site_stays_where_it_is_until_its_code_goes() {
        let table = table(&[]);
        assert!(table.is_empty());
        let site = Site {
            translated: 0x1000,
            act: Act::Cpuid,
        };
        let place = table.site(site);
        for n in 0..1000 {
            table.site(Site {
                translated: n,
                act: Act::Hypercall,
            });
        }
        assert_eq!(table.site(site), place);
        table.forget_sites();
    }
}
