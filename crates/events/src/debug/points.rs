//! Breakpoints and watchpoints: what the debugger wants, and the hooks that are armed for it.

use std::collections::BTreeMap;
use std::time::Duration;

use gdbstub::target::ext::breakpoints::WatchKind;
use vmsight_arch::Gva;
use vmsight_hooks::{Access, Delivery, Expiry, Hook, HookId, HookKind, Range, Scope};

use crate::{EventError, HookGuard, Monitor};

/// How long an event is held: as long as somebody looks at it. Where the program ends, the guest goes on.
pub(super) const HELD: Delivery = Delivery::Held {
    deadline: Duration::from_secs(365 * 24 * 3600),
    expiry: Expiry::Open,
};

/// How memory is watched.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Watch {
    Write,
    Read,
    Both,
}

impl Watch {
    /// The debugger's word for it.
    pub(super) const fn kind(self) -> WatchKind {
        match self {
            Self::Write => WatchKind::Write,
            Self::Read => WatchKind::Read,
            Self::Both => WatchKind::ReadWrite,
        }
    }

    const fn access(self) -> Access {
        match self {
            Self::Write => Access::WRITE,
            Self::Read => Access::READ,
            Self::Both => Access::READ.union(Access::WRITE),
        }
    }
}

impl From<WatchKind> for Watch {
    fn from(kind: WatchKind) -> Self {
        match kind {
            WatchKind::Write => Self::Write,
            WatchKind::Read => Self::Read,
            WatchKind::ReadWrite => Self::Both,
        }
    }
}

/// Something to stop at.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Point {
    /// An instruction.
    Execute(u64),
    /// Bytes of memory.
    Memory { address: u64, len: u64, watch: Watch },
}

impl Point {
    fn hook(self, scope: Scope) -> Hook {
        let kind = match self {
            Self::Execute(at) => HookKind::Execute { at: Gva(at) },
            Self::Memory { address, len, watch } => HookKind::Memory {
                range: Range::Virtual {
                    start: Gva(address),
                    len,
                },
                access: watch.access(),
            },
        };
        Hook::new(kind).within(scope).delivered(HELD)
    }
}

#[derive(Debug)]
struct Armed {
    guard: HookGuard,
    /// How many of the debugger's own breakpoints it stands for: one set by software and one by hardware are
    /// the same here.
    wanted: u32,
}

/// All of them.
///
/// Debuggers take every breakpoint out when the guest stops and put it in again before it goes on. So what is
/// not wanted any more stays armed until the guest goes on ([`Self::prune`]): nothing is done twice in vain,
/// and the hook whose event is held is not taken out meanwhile, which would let its vCPU go.
#[derive(Debug)]
pub(super) struct Points {
    armed: BTreeMap<Point, Armed>,
    scope: Scope,
}

impl Points {
    pub(super) fn new(scope: Scope) -> Self {
        Self {
            armed: BTreeMap::new(),
            scope,
        }
    }

    /// Arms one, if it is not armed already.
    pub(super) fn add(&mut self, monitor: &Monitor, point: Point) -> Result<(), EventError> {
        if let Some(armed) = self.armed.get_mut(&point) {
            armed.wanted = armed.wanted.saturating_add(1);
            return Ok(());
        }
        let guard = monitor.hook(&point.hook(self.scope))?;
        self.armed.insert(point, Armed { guard, wanted: 1 });
        Ok(())
    }

    /// Wants one no more; false where it was not wanted.
    pub(super) fn remove(&mut self, point: Point) -> bool {
        match self.armed.get_mut(&point) {
            Some(armed) if armed.wanted > 0 => {
                armed.wanted -= 1;
                true
            }
            _ => false,
        }
    }

    /// What is wanted of a hook's events.
    pub(super) fn of(&self, hook: HookId) -> Option<Point> {
        let mut wanted = self.armed.iter().filter(|(_, armed)| armed.wanted > 0);
        wanted
            .find(|(_, armed)| armed.guard.id() == hook)
            .map(|(point, _)| *point)
    }

    /// Takes out what is not wanted, but for hooks whose events are held.
    pub(super) fn prune(&mut self, held: &[HookId]) {
        self.armed
            .retain(|_, armed| armed.wanted > 0 || held.contains(&armed.guard.id()));
    }

    /// Wants none any more.
    pub(super) fn want_none(&mut self) {
        self.armed.values_mut().for_each(|armed| armed.wanted = 0);
    }
}
