//! The hooks that are armed, and the breakpoints they share.

use std::collections::BTreeMap;
use std::sync::Arc;

use vmsight_arch::Dtb;
use vmsight_hooks::{Access, Delivery, Expiry, Hook, HookId, HookKind, Range, Sieve};
use vmsight_target::gdb::{Accelerator, Point};

/// Most bytes of a memory hook whose old values are kept.
const MAX_KEPT: u64 = 64 * 1024;

/// A hook that is armed.
#[derive(Debug)]
pub(super) struct Armed {
    pub(super) hook: Hook,
    /// Its filter.
    pub(super) sieve: Arc<Sieve>,
    /// What the memory of a memory hook held when it was last looked at.
    pub(super) before: Option<Kept>,
}

/// Bytes of memory as one address space had them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Kept {
    /// Which; `None` for addresses that all have in common.
    pub(super) dtb: Option<Dtb>,
    pub(super) bytes: Vec<u8>,
}

/// Something that stops the machine.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Place {
    pub(super) address: u64,
    pub(super) len: u64,
    /// Its kind, by the number of its packet: 1 for breakpoints of either kind.
    kind: u8,
}

impl Place {
    /// An instruction.
    pub(super) const fn instruction(address: u64) -> Self {
        Self {
            address,
            len: 1,
            kind: 1,
        }
    }

    fn memory(address: u64, len: u64, point: Point) -> Self {
        let kind = match point {
            Point::Write => 2,
            Point::Read => 3,
            _ => 4,
        };
        Self { address, len, kind }
    }

    /// Whether it is a watchpoint.
    pub(super) const fn is_watch(self) -> bool {
        self.kind > 1
    }

    /// By which packets it can be had, the better first. Under TCG both breakpoints are the same; under KVM the
    /// hardware's are invisible, and few.
    pub(super) fn points(self, accelerator: Accelerator) -> &'static [Point] {
        match (self.kind, accelerator) {
            (1, Accelerator::Tcg) => &[Point::Software],
            (1, Accelerator::Kvm) => &[Point::Hardware, Point::Software],
            (2, _) => &[Point::Write],
            (3, _) => &[Point::Read],
            _ => &[Point::Access],
        }
    }
}

/// How a place is armed, and for whom.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) point: Point,
    /// The vCPU through whose page tables it was armed.
    pub(super) vcpu: u32,
    pub(super) hooks: Vec<HookId>,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) hooks: BTreeMap<HookId, Armed>,
    pub(super) places: BTreeMap<Place, Shared>,
}

impl Table {
    /// The hooks on the instruction at `address`: those that hold nobody first, then in the order in which they
    /// were armed.
    pub(super) fn at(&self, address: u64) -> Vec<HookId> {
        let shared = self.places.get(&Place::instruction(address));
        let mut hooks = shared.map(|s| s.hooks.clone()).unwrap_or_default();
        hooks.sort_by_key(|id| (self.hooks.get(id).is_some_and(Armed::holds), *id));
        hooks
    }

    /// Whether a breakpoint is at `address`.
    pub(super) fn breaks(&self, address: u64) -> bool {
        self.places.contains_key(&Place::instruction(address))
    }

    /// Whether there are watchpoints.
    pub(super) fn watches(&self) -> bool {
        self.places.keys().any(|place| place.is_watch())
    }

    /// Whether a hook is there whose events must not go by unjudged.
    pub(super) fn fails_closed(&self) -> bool {
        self.hooks.values().any(|armed| {
            matches!(
                armed.hook.delivery,
                Delivery::Held {
                    expiry: Expiry::Closed,
                    ..
                }
            )
        })
    }

    /// The memory hooks: those that hold nobody first, then in the order in which they were armed.
    pub(super) fn memory(&self) -> Vec<(HookId, u64, u64, Access)> {
        let mut all: Vec<_> = self
            .hooks
            .iter()
            .filter_map(|(id, armed)| {
                let (start, len, access) = armed.memory()?;
                Some((armed.holds(), (*id, start, len, access)))
            })
            .collect();
        all.sort_by_key(|(holds, (id, ..))| (*holds, *id));
        all.into_iter().map(|(_, hook)| hook).collect()
    }
}

impl Armed {
    pub(super) fn new(hook: Hook) -> Self {
        Self {
            sieve: Arc::new(Sieve::new(hook.filter.clone())),
            hook,
            before: None,
        }
    }

    fn holds(&self) -> bool {
        matches!(self.hook.delivery, Delivery::Held { .. })
    }

    /// Start, length and access of a memory hook.
    pub(super) fn memory(&self) -> Option<(u64, u64, Access)> {
        match self.hook.kind {
            HookKind::Memory {
                range: Range::Virtual { start, len },
                access,
            } => Some((start.0, len, access)),
            _ => None,
        }
    }

    /// Whether its memory's old values are kept.
    pub(super) fn keeps(&self) -> bool {
        self.memory().is_some_and(|(_, len, _)| len <= MAX_KEPT)
    }

    /// The address space that is meant by an address seen with `cr3`: none in particular in the upper half, which
    /// is the kernel's.
    pub(super) fn space(address: u64, cr3: u64) -> Option<Dtb> {
        (address >> 63 == 0).then(|| Dtb::from_cr3(cr3))
    }
}

/// What has to stop the machine for a hook. The error is why that cannot be, in words.
pub(super) fn places(hook: &Hook, accelerator: Accelerator) -> Result<Vec<Place>, String> {
    match hook.kind {
        HookKind::Execute { at } => Ok(vec![Place::instruction(at.0)]),
        HookKind::Memory {
            range: Range::Virtual { start, len },
            access,
        } => {
            let (reads, writes) = (access.contains(Access::READ), access.contains(Access::WRITE));
            let place = |point| Place::memory(start.0, len, point);
            if accelerator == Accelerator::Tcg {
                let both = [(reads, Point::Read), (writes, Point::Write)];
                return Ok(both
                    .into_iter()
                    .filter(|(wanted, _)| *wanted)
                    .map(|(_, point)| place(point))
                    .collect());
            }
            if !matches!(len, 1 | 2 | 4 | 8) || !start.0.is_multiple_of(len) {
                return Err("debug registers watch 1, 2, 4 or 8 aligned bytes".to_owned());
            }
            match (reads, writes) {
                (true, false) => Err("debug registers cannot watch reads alone: hook writes too".to_owned()),
                (true, true) => Ok(vec![place(Point::Access)]),
                _ => Ok(vec![place(Point::Write)]),
            }
        }
        _ => Ok(Vec::new()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use vmsight_arch::Gva;
    use vmsight_hooks::{Delivery, Expiry, Overflow};

    use super::*;

    fn memory(start: u64, len: u64, access: Access) -> Hook {
        Hook::new(HookKind::Memory {
            range: Range::Virtual {
                start: Gva(start),
                len,
            },
            access,
        })
    }

    #[test]
    fn the_processor_watches_less_than_the_emulator() {
        let both = Access::READ | Access::WRITE;
        let count = |hook: &Hook, by| places(hook, by).map(|p| p.len());
        for (hook, tcg, kvm) in [
            (Hook::execute(Gva(1)), 1, Ok(1)),
            (memory(8, 8, Access::WRITE), 1, Ok(1)),
            (memory(8, 8, both), 2, Ok(1)),
            (memory(8, 8, Access::READ), 1, Err(())),
            (memory(9, 8, Access::WRITE), 1, Err(())),
            (memory(0, 4096, Access::WRITE), 1, Err(())),
        ] {
            assert_eq!(count(&hook, Accelerator::Tcg), Ok(tcg), "{hook:?}");
            assert_eq!(count(&hook, Accelerator::Kvm).map_err(drop), kvm, "{hook:?}");
        }
    }

    #[test]
    fn who_only_watches_is_told_first() {
        let mut table = Table::default();
        let told = Delivery::Told {
            overflow: Overflow::Drop,
        };
        let held = Delivery::Held {
            deadline: Duration::from_secs(1),
            expiry: Expiry::Open,
        };
        let at = Place::instruction(0x1000);
        let mut hooks = Vec::new();
        for (id, delivery) in [(1, held), (2, told), (3, held), (4, Delivery::Counted)] {
            let hook = Hook::execute(Gva(0x1000)).delivered(delivery);
            table.hooks.insert(HookId(id), Armed::new(hook));
            hooks.push(HookId(id));
        }
        let shared = Shared {
            point: Point::Software,
            vcpu: 0,
            hooks,
        };
        table.places.insert(at, shared);
        let order: Vec<u32> = table.at(0x1000).into_iter().map(|id| id.0).collect();
        assert_eq!(order, [2, 4, 1, 3]);
        assert!(table.at(0x1001).is_empty());
        assert!(table.breaks(0x1000) && !table.watches());
    }

    #[test]
    fn only_user_addresses_belong_to_somebody() {
        assert_eq!(Armed::space(0xffff_8000_0000_0000, 0x1000), None);
        assert_eq!(Armed::space(0x40_0000, 0x1005), Some(Dtb(0x1000)));
    }
}
