//! What is hooked and how: the desired state, what was made of it, and the way from one to the other.
//!
//! Every change goes the same way: all vCPUs are brought out of the guest, INT3s, slots and the filter are made
//! what they should be, and a new [`Table`] is published. So a vCPU never meets a hook of which its table does not
//! know.

mod inside;
mod means;
mod memory;
mod msrs;
mod patches;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmsight_channel::Refusal;
use vmsight_hooks::{Expiry, Hook, HookId, HookKind, Range};

use crate::agent::{Agent, failed};
use crate::filter::Filter;
use crate::guest::Guest;
use crate::inside::Window;
use crate::pending::expiry;
use crate::session::Session;
use crate::slots::{Piece, Protection, Slot};
use crate::table::{Armed, Inside, Patched, Span, Table};
use inside::Detour;
use means::{Means, Place};
use patches::Patch;

/// Most hooks at a time.
const MOST_HOOKS: usize = 4096;

/// All of it. See [`Agent::state`].
#[derive(Debug, Default)]
pub(crate) struct State {
    slots: BTreeMap<u32, Slot>,
    /// Slots that are cut, by their own number: the numbers and places of the pieces.
    pieces: BTreeMap<u32, Vec<(u32, Piece)>>,
    hooks: BTreeMap<HookId, (Arc<Armed>, Means)>,
    /// Hooks that the agent took out by itself, until the monitor takes note.
    ended: BTreeMap<HookId, Arc<Armed>>,
    patches: BTreeMap<u64, Patch>,
    /// Where filters are judged in the guest, once one was to be.
    window: Option<Window>,
    /// Jumps that stand in memory, by their physical addresses.
    detours: BTreeMap<u64, Detour>,
    vmm_filter: Filter,
    vmm_reasons: u32,
    /// Whether the filter in KVM is another than the VMM's.
    filtering: bool,
    last_id: u32,
}

impl State {
    /// Whether a monitor has a hook that asks for the VM to be paused when it is gone.
    pub(crate) fn fails_closed(&self, session: u64) -> bool {
        let mut own = self.hooks.values().filter(|(a, _)| a.session.id == session);
        own.any(|(armed, _)| expiry(armed) == Expiry::Closed)
    }

    /// A monitor's hook, armed or ended by itself; `None` for what is not its own.
    pub(crate) fn find(&self, session: u64, id: HookId) -> Option<Arc<Armed>> {
        let armed = self.hooks.get(&id).map(|(armed, _)| armed);
        let armed = armed.or_else(|| self.ended.get(&id));
        armed.filter(|a| a.session.id == session).cloned()
    }

    /// Whether guest debugging is in use by hooks.
    pub(crate) fn debugs(&self) -> bool {
        self.hooks.values().any(|(armed, means)| {
            !means.breakpoints().is_empty()
                || means.detour().is_some()
                || matches!(
                    armed.hook.kind,
                    HookKind::Step { .. } | HookKind::StepUntil { .. }
                )
        })
    }

    /// Arms a hook. From the return on no vCPU passes it unnoticed.
    pub(crate) fn arm(
        &mut self,
        agent: &Agent,
        session: &Arc<Session>,
        hook: &Hook,
    ) -> Result<HookId, Refusal> {
        let limit = |why: String| Refusal::Limit {
            what: hook.kind.to_string(),
            why,
        };
        hook.validate().map_err(|e| limit(e.to_string()))?;
        for feature in hook.features() {
            if !agent.kernel.can(feature) {
                return Err(Refusal::Unsupported { feature });
            }
        }
        if self.hooks.len() >= MOST_HOOKS {
            return Err(limit(format!("{MOST_HOOKS} hooks are armed already")));
        }
        let debugs = matches!(
            hook.kind,
            HookKind::Execute { .. }
                | HookKind::Step { .. }
                | HookKind::StepUntil { .. }
                | HookKind::Interrupt { .. }
        );
        if debugs && agent.is_vmm_debugging() {
            return Err(Refusal::Busy {
                why: "a debugger is attached to the VMM's gdb stub".to_owned(),
            });
        }
        let stopped = agent.stop().ok_or_else(|| Refusal::Failed {
            why: "a vCPU did not come out of the guest".to_owned(),
        })?;
        let means = match hook.inside {
            Some(room) => self.detour(agent, hook, room.0),
            None => self.means(agent, hook),
        };
        let means = means.map_err(limit)?;
        let counter = means.detour().zip(self.window.as_ref());
        let counter = counter.map(|(detour, window)| window.counter(&detour.placed));
        self.last_id = self.last_id.wrapping_add(1);
        let id = HookId(self.last_id);
        let armed = Arc::new(Armed {
            handlers: means
                .breakpoints()
                .iter()
                .filter_map(|b| Some((b.at, b.vector?)))
                .collect(),
            put_away: counter.map(|counter| (counter, counter.load(Ordering::Relaxed))),
            ..Armed::new(id, Arc::clone(session), hook.clone())
        });
        self.hooks.insert(id, (armed, means));
        if let Err(error) = self.reconcile(agent) {
            self.hooks.remove(&id);
            // What was there before could be made before.
            let _ = self.reconcile(agent);
            return Err(failed("arm the hook", &error));
        }
        drop(stopped);
        Ok(id)
    }

    /// Takes a hook out.
    pub(crate) fn disarm(&mut self, agent: &Agent, id: HookId) {
        self.remove(agent, &BTreeSet::from([id]));
    }

    /// The monitor knows that a hook is out.
    pub(crate) fn forget(&mut self, id: HookId) {
        self.ended.remove(&id);
    }

    /// Takes all of a monitor's hooks out.
    pub(crate) fn disarm_all(&mut self, agent: &Agent, session: u64) {
        let own = self.hooks.iter().filter(|(_, (a, _))| a.session.id == session);
        let own = own.map(|(id, _)| *id).collect();
        self.remove(agent, &own);
        self.ended.retain(|_, armed| armed.session.id != session);
    }

    fn remove(&mut self, agent: &Agent, ids: &BTreeSet<HookId>) {
        let mut any = false;
        for (id, (armed, _)) in &self.hooks {
            if ids.contains(id) {
                armed.removed.store(true, Ordering::Release);
                if self.ended.len() < MOST_HOOKS {
                    self.ended.insert(*id, Arc::clone(armed));
                }
                any = true;
            }
        }
        if !any {
            return;
        }
        // A vCPU that does not come out is in the kernel: it cannot be in the guest either for so long.
        let stopped = agent.stop();
        self.hooks.retain(|id, _| !ids.contains(id));
        if let Err(error) = self.reconcile(agent) {
            agent.tell_all(&format!("a hook could not be taken out whole: {error}"));
        }
        drop(stopped);
    }

    /// The hooks that a reset takes out are returned.
    pub(crate) fn machine_reset(&mut self, agent: &Agent) -> Vec<Arc<Armed>> {
        let gone: Vec<Arc<Armed>> = self
            .hooks
            .values()
            .filter(|(armed, means)| {
                let by_address = matches!(
                    armed.hook.kind,
                    HookKind::Memory {
                        range: Range::Virtual { .. },
                        ..
                    } | HookKind::Interrupt { .. }
                );
                means.int3s().next().is_some() || means.detour().is_some() || by_address
            })
            .map(|(armed, _)| Arc::clone(armed))
            .collect();
        self.remove(agent, &gone.iter().map(|a| a.id).collect());
        if let Some(window) = &mut self.window {
            window.forget();
        }
        gone
    }

    /// Makes KVM and the guest's memory what the hooks want, and publishes the table. All vCPUs are out of the guest.
    fn reconcile(&mut self, agent: &Agent) -> io::Result<()> {
        let slots = self.all_slots();
        self.patch(&Guest::new(&slots));
        self.divert(&Guest::new(&slots));
        let pages = self.protections();
        let cut = self.cut(agent, &pages);
        let filtered = self.filter(agent);
        let table = self.table(slots, pages);
        agent.publish(table);
        cut.and(filtered)
    }

    fn table(&self, slots: Vec<Slot>, pages: BTreeMap<u64, Protection>) -> Table {
        let mut table = Table {
            slots,
            hardware: self.hardware(),
            vmm_filter: self.vmm_filter.clone(),
            vmm_reasons: self.vmm_reasons,
            pages,
            active: !self.hooks.is_empty(),
            window: self.window.as_ref().and_then(Window::range),
            replaced: self.detours.values().map(|d| (d.gpa, d.original)).collect(),
            ..Table::default()
        };
        for (gpa, patch) in &self.patches {
            table.patches.insert(
                *gpa,
                Patched {
                    original: patch.original,
                    hooks: Vec::new(),
                },
            );
        }
        for (armed, means) in self.hooks.values() {
            let own = || Arc::clone(armed);
            match (armed.hook.kind, means) {
                (_, Means::Breakpoints(list)) => {
                    for breakpoint in list {
                        match breakpoint.place {
                            Place::Hardware(_) => table.execute.entry(breakpoint.at).or_default().push(own()),
                            Place::Int3(gpa) => {
                                if let Some(patched) = table.patches.get_mut(&gpa) {
                                    patched.hooks.push(own());
                                }
                            }
                        }
                    }
                }
                (HookKind::Execute { at }, Means::Detour(detour)) => {
                    let inside = Inside {
                        at: at.0,
                        resume: detour.placed.resume,
                        hooks: vec![own()],
                    };
                    table.inside.insert(detour.placed.trap, inside);
                }
                (HookKind::Memory { access, .. }, Means::Pages(parts)) => {
                    table.spans.extend(parts.iter().map(|(gpa, len, gva)| Span {
                        gpa: *gpa,
                        len: *len,
                        gva: *gva,
                        access,
                        armed: own(),
                    }));
                }
                (HookKind::Msr { index, .. }, _) => table.msrs.entry(index).or_default().push(own()),
                (HookKind::Port { first, last, access }, _) => table.ports.push((first, last, access, own())),
                (HookKind::Step { vcpu, count } | HookKind::StepUntil { vcpu, most: count }, _) => {
                    table.last_step = armed.id.0;
                    table.steps.push((vcpu, count, own()));
                }
                _ => armed.notice("a hook of a kind that is not served"),
            }
        }
        table
    }
}
