//! What is hooked and how: the desired state, what was made of it, and the way from one to the other.
//!
//! Every change goes the same way: all vCPUs are brought out of the guest, INT3s, slots and the filter are made what they
//! should be, and a new [`Table`] is published. So a vCPU never meets a hook of which its table does not know.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvm_bindings::{KVM_MSR_EXIT_REASON_FILTER, kvm_userspace_memory_region};
use libc::c_int;
use vmsight_arch::Registers;
use vmsight_channel::Refusal;
use vmsight_hooks::{Access, Counts, Hook, HookId, HookKind, Range, Scope, Tallied};

use crate::agent::{Agent, failed};
use crate::filter::Filter;
use crate::guest::Guest;
use crate::kvm;
use crate::registers::from_kvm;
use crate::slots::{PAGE, Piece, Protection, Slot, cut};
use crate::table::{Armed, Patched, Span, Table};

/// INT3.
const BREAKPOINT: u8 = 0xcc;
/// Most hooks at a time.
const MOST_HOOKS: usize = 4096;
/// Most pages that are watched at a time.
const MOST_PAGES: usize = 1 << 16;
/// MSRs that cannot be written for the guest by the means that there are: KVM treats the host's writes of the time-stamp
/// counter as a wish to synchronise it (Linux, arch/x86/kvm/x86.c, kvm_synchronize_tsc).
const UNWRITABLE: [u32; 3] = [0x10, 0x3b, 0x6e0];

/// By which means a hook is armed.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Means {
    /// Hardware breakpoint with this number.
    Hardware(usize),
    /// INT3 at this physical address.
    Int3(u64),
    /// Pages: physical address, length, virtual address.
    Pages(Vec<(u64, u64, Option<u64>)>),
    /// What needs no place.
    Plain,
}

/// An INT3 that stands in memory.
#[derive(Clone, Copy, Debug)]
struct Patch {
    original: u8,
    /// What stood around it, 8 bytes at the aligned address, with the original: where that changed, the page has become
    /// something else, and nothing is put back.
    around: u64,
}

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
    vmm_filter: Filter,
    vmm_reasons: u32,
    /// Whether the filter in KVM is another than the VMM's.
    filtering: bool,
    last_id: u32,
}

impl State {
    /// Hooks that are armed.
    pub(crate) fn hooks(&self) -> impl Iterator<Item = &Armed> {
        self.hooks.values().map(|(armed, _)| &**armed)
    }

    /// What became of a hook's occurrences; nothing for one that is not armed.
    pub(crate) fn counts(&self, id: HookId) -> Counts {
        self.find(id).map_or_else(Counts::default, |a| a.counts())
    }

    /// What a hook's filter counted by key; nothing for one that is not armed.
    pub(crate) fn tallied(&self, id: HookId) -> Tallied {
        self.find(id).map_or_else(Tallied::default, |a| a.sieve.tallied())
    }

    fn find(&self, id: HookId) -> Option<&Arc<Armed>> {
        let armed = self.hooks.get(&id).map(|(armed, _)| armed);
        armed.or_else(|| self.ended.get(&id))
    }

    /// Whether guest debugging is in use by hooks.
    pub(crate) fn debugs(&self) -> bool {
        self.hooks.values().any(|(armed, means)| {
            matches!(means, Means::Hardware(_) | Means::Int3(_))
                || matches!(armed.hook.kind, HookKind::Step { .. })
        })
    }

    /// Arms a hook. From the return on no vCPU passes it unnoticed.
    pub(crate) fn arm(&mut self, agent: &Agent, hook: &Hook) -> Result<HookId, Refusal> {
        let limit = |why: String| Refusal::Limit {
            what: hook.kind.to_string(),
            why,
        };
        hook.validate().map_err(|e| limit(e.to_string()))?;
        for feature in hook.kind.features() {
            if !agent.kernel.can(feature) {
                return Err(Refusal::Unsupported { feature });
            }
        }
        if self.hooks.len() >= MOST_HOOKS {
            return Err(limit(format!("{MOST_HOOKS} hooks are armed already")));
        }
        let debugs = matches!(hook.kind, HookKind::Execute { .. } | HookKind::Step { .. });
        if debugs && agent.is_vmm_debugging() {
            return Err(Refusal::Busy {
                why: "a debugger is attached to the VMM's gdb stub".to_owned(),
            });
        }
        let stopped = agent.stop().ok_or_else(|| Refusal::Failed {
            why: "a vCPU did not come out of the guest".to_owned(),
        })?;
        let means = self.means(agent, hook).map_err(limit)?;
        self.last_id = self.last_id.wrapping_add(1);
        let id = HookId(self.last_id);
        let armed = Arc::new(Armed::new(id, hook.clone()));
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

    /// Takes all of them out.
    pub(crate) fn disarm_all(&mut self, agent: &Agent) {
        self.ended.clear();
        let all = self.hooks.keys().copied().collect();
        self.remove(agent, &all);
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
            agent.notice(None, format!("a hook could not be taken out whole: {error}"));
        }
        drop(stopped);
    }

    /// The hooks that a reset takes out are returned.
    pub(crate) fn machine_reset(&mut self, agent: &Agent) -> Vec<HookId> {
        let gone: BTreeSet<HookId> = self
            .hooks
            .iter()
            .filter(|(_, (armed, means))| {
                let virtual_range = matches!(
                    armed.hook.kind,
                    HookKind::Memory {
                        range: Range::Virtual { .. },
                        ..
                    }
                );
                matches!(means, Means::Int3(_)) || virtual_range
            })
            .map(|(id, _)| *id)
            .collect();
        self.remove(agent, &gone);
        gone.into_iter().collect()
    }

    /// Finds the means for a hook; why there are none otherwise.
    fn means(&self, agent: &Agent, hook: &Hook) -> Result<Means, String> {
        match hook.kind {
            HookKind::Execute { at } => self.breakpoint(agent, at.0, hook.scope),
            HookKind::Memory { range, access } => {
                let pages = self.pages(agent, range, hook.scope)?;
                let slots: Vec<Slot> = self.slots.values().copied().collect();
                let guest = Guest::new(&slots);
                for (gpa, len, _) in &pages {
                    let slot = guest
                        .slot(*gpa, *len)
                        .ok_or_else(|| format!("there is no memory at {gpa:#x}"))?;
                    if slot.is_logged() {
                        return Err(
                            "the VMM keeps account of writes to this memory (a migration, a snapshot)"
                                .to_owned(),
                        );
                    }
                }
                let watched: u64 = pages.iter().map(|(_, len, _)| len / PAGE + 1).sum();
                if watched > MOST_PAGES as u64 {
                    return Err(format!("more than {MOST_PAGES} pages would be watched"));
                }
                debug_assert!(!access.contains(Access::EXECUTE));
                Ok(Means::Pages(pages))
            }
            HookKind::Msr { index, access } => {
                if (0x800..0x900).contains(&index) {
                    return Err("KVM does not filter the MSRs of the x2APIC".to_owned());
                }
                if access.contains(Access::WRITE) && UNWRITABLE.contains(&index) {
                    return Err(
                        "KVM takes writes of the time-stamp counter from outside for another thing"
                            .to_owned(),
                    );
                }
                let mut watched = self.watched_msrs();
                *watched.entry(index).or_insert(Access::empty()) |= access;
                match self.vmm_filter.with(&watched) {
                    Some(_) => Ok(Means::Plain),
                    None => Err("KVM's filter has no room for so many MSRs so far apart".to_owned()),
                }
            }
            HookKind::Step { vcpu, .. } => {
                let known = agent.vcpus().iter().any(|v| v.index == vcpu);
                known
                    .then_some(Means::Plain)
                    .ok_or_else(|| format!("there is no vCPU {vcpu}"))
            }
            _ => Ok(Means::Plain),
        }
    }

    fn breakpoint(&self, agent: &Agent, at: u64, scope: Scope) -> Result<Means, String> {
        let hardware = self.hardware();
        let same = hardware.iter().position(|a| *a == Some(at));
        let free = hardware.iter().position(Option::is_none);
        if let Some(number) = same.or(free)
            && agent.kernel.hardware_breakpoints
        {
            return Ok(Means::Hardware(number));
        }
        let gpa = self
            .translate(agent, at, scope)
            .ok_or("all hardware breakpoints are in use, and for an INT3 no page is mapped there")?;
        let slots: Vec<Slot> = self.slots.values().copied().collect();
        let slot = Guest::new(&slots)
            .slot(gpa, 1)
            .copied()
            .ok_or("all hardware breakpoints are in use, and an INT3 needs memory, which is not there")?;
        if slot.is_logged() {
            return Err(
                "all hardware breakpoints are in use, and an INT3 would get into the migration or snapshot that is being made"
                    .to_owned(),
            );
        }
        Ok(Means::Int3(gpa))
    }

    fn hardware(&self) -> [Option<u64>; 4] {
        let mut hardware = [None; 4];
        for (armed, means) in self.hooks.values() {
            if let (Means::Hardware(n), HookKind::Execute { at }) = (means, armed.hook.kind)
                && let Some(slot) = hardware.get_mut(*n)
            {
                *slot = Some(at.0);
            }
        }
        hardware
    }

    /// Registers of all vCPUs, which are out of the guest.
    fn registers(agent: &Agent) -> Vec<Registers> {
        let read = |v: &&'static crate::vcpu::Vcpu| {
            let sregs = kvm::get_sregs(v.fd).ok()?;
            Some(from_kvm(v.index, &kvm_bindings::kvm_regs::default(), &sregs))
        };
        agent.vcpus().iter().filter_map(read).collect()
    }

    /// Where a virtual address lies: by the scope's page tables, or by those of the first vCPU that has it mapped. With
    /// page-table isolation a vCPU in user mode has little of the kernel: then the kernel's own root is tried.
    fn translate(&self, agent: &Agent, gva: u64, scope: Scope) -> Option<u64> {
        const USER_ROOT: u64 = 1 << 12;
        let slots: Vec<Slot> = self.slots.values().copied().collect();
        let guest = Guest::new(&slots);
        Self::registers(agent).iter().find_map(|r| {
            let roots = match scope {
                Scope::Dtb(dtb) => [dtb.0, dtb.0 ^ USER_ROOT],
                Scope::All => [r.cr3, r.cr3 & !USER_ROOT],
            };
            roots.iter().find_map(|cr3| guest.translate_by(r, *cr3, gva))
        })
    }

    /// The physical memory of a range, page by page.
    fn pages(
        &self,
        agent: &Agent,
        range: Range,
        scope: Scope,
    ) -> Result<Vec<(u64, u64, Option<u64>)>, String> {
        let (first, len) = (range.first(), range.len());
        if len / PAGE > MOST_PAGES as u64 {
            return Err(format!("more than {MOST_PAGES} pages would be watched"));
        }
        let mut pages = Vec::new();
        let mut at = 0;
        while at < len {
            let address = first.wrapping_add(at);
            let part = (PAGE - (address & (PAGE - 1))).min(len - at);
            match range {
                Range::Physical { .. } => pages.push((address, part, None)),
                Range::Virtual { .. } => {
                    let gpa = self
                        .translate(agent, address, scope)
                        .ok_or_else(|| format!("nothing is mapped at {address:#x}"))?;
                    pages.push((gpa, part, Some(address)));
                }
            }
            at += part;
        }
        Ok(pages)
    }

    fn watched_msrs(&self) -> BTreeMap<u32, Access> {
        let mut watched = BTreeMap::new();
        for (armed, _) in self.hooks.values() {
            if let HookKind::Msr { index, access } = armed.hook.kind {
                *watched.entry(index).or_insert(Access::empty()) |= access;
            }
        }
        watched
    }

    /// Makes KVM and the guest's memory what the hooks want, and publishes the table. All vCPUs are out of the guest.
    fn reconcile(&mut self, agent: &Agent) -> io::Result<()> {
        let slots: Vec<Slot> = self.slots.values().copied().collect();
        self.patch(&Guest::new(&slots));
        let pages = self.protections();
        let cut = self.cut(agent, &pages);
        let filtered = self.filter(agent);
        let table = self.table(agent, slots, pages);
        agent.publish(table);
        cut.and(filtered)
    }

    /// Puts INT3s where they should be, and takes out the others.
    fn patch(&mut self, guest: &Guest<'_>) {
        let loggable = |gpa: u64| guest.slot(gpa, 1).is_none_or(Slot::is_logged);
        let wanted: BTreeSet<u64> = self
            .hooks
            .values()
            .filter_map(|(_, means)| match means {
                Means::Int3(gpa) if !loggable(*gpa) => Some(*gpa),
                _ => None,
            })
            .collect();
        let there: Vec<(u64, Patch)> = self.patches.iter().map(|(gpa, p)| (*gpa, *p)).collect();
        for (gpa, patch) in there {
            if !wanted.contains(&gpa) {
                restore(guest, gpa, patch, &self.patches);
                self.patches.remove(&gpa);
            }
        }
        for gpa in wanted {
            if self.patches.contains_key(&gpa) {
                continue;
            }
            let (Some(original), Some(around)) = (guest.read(gpa, 1), around(guest, gpa, &self.patches))
            else {
                continue;
            };
            if guest.write(gpa, 1, BREAKPOINT.into()) {
                let original = original as u8;
                self.patches.insert(gpa, Patch { original, around });
            }
        }
    }

    fn protections(&self) -> BTreeMap<u64, Protection> {
        let mut pages = BTreeMap::new();
        for (armed, means) in self.hooks.values() {
            let (Means::Pages(parts), HookKind::Memory { access, .. }) = (means, armed.hook.kind) else {
                continue;
            };
            let protection = if access.contains(Access::READ) {
                Protection::All
            } else {
                Protection::Writes
            };
            for (gpa, ..) in parts {
                let page = pages.entry(gpa & !(PAGE - 1)).or_insert(protection);
                *page = protection.max(*page);
            }
        }
        pages
    }

    /// Cuts slots so that watched pages are slots of their own.
    fn cut(&mut self, agent: &Agent, pages: &BTreeMap<u64, Protection>) -> io::Result<()> {
        let mut result = Ok(());
        let slots: Vec<Slot> = self.slots.values().copied().collect();
        for slot in slots {
            let wanted = cut(&slot, pages);
            let whole = [Piece {
                gpa: slot.gpa,
                size: slot.size,
                hva: slot.hva,
                flags: slot.flags,
            }];
            let current: Vec<Piece> = match self.pieces.get(&slot.id) {
                Some(pieces) => pieces.iter().map(|(_, p)| *p).collect(),
                None => whole.to_vec(),
            };
            if wanted == current {
                continue;
            }
            let changed = self.recut(agent, &slot, &wanted);
            if changed.is_err() {
                result = changed;
                // As the VMM made it: that was possible before.
                let _ = self.recut(agent, &slot, &whole);
            }
        }
        result
    }

    /// Replaces what stands for a slot by these pieces.
    fn recut(&mut self, agent: &Agent, slot: &Slot, wanted: &[Piece]) -> io::Result<()> {
        let set = |id: u32, piece: &Piece, size: u64| {
            kvm::set_memory(
                agent.vm,
                &kvm_userspace_memory_region {
                    slot: id,
                    flags: piece.flags,
                    guest_phys_addr: piece.gpa,
                    memory_size: size,
                    userspace_addr: piece.hva,
                },
            )
        };
        let whole = Piece {
            gpa: slot.gpa,
            size: slot.size,
            hva: slot.hva,
            flags: slot.flags,
        };
        for (id, piece) in self
            .pieces
            .remove(&slot.id)
            .unwrap_or_else(|| vec![(slot.id, whole)])
        {
            set(id, &piece, 0)?;
        }
        let mut used: BTreeSet<u32> = self.slots.keys().copied().collect();
        used.extend(self.pieces.values().flatten().map(|(id, _)| *id));
        // Numbers from the top down: VMMs count from the bottom.
        let space = slot.id & !0xffff;
        let mut next = agent.kernel.slots.min(0x8000);
        let mut made = Vec::new();
        for (n, piece) in wanted.iter().enumerate() {
            let id = if n == 0 {
                Some(slot.id)
            } else {
                loop {
                    match next.checked_sub(1) {
                        None => break None,
                        Some(id) => {
                            next = id;
                            if !used.contains(&(space | id)) {
                                break Some(space | id);
                            }
                        }
                    }
                }
            };
            let done = match id {
                Some(id) => set(id, piece, piece.size).map(|()| id),
                None => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
            };
            match done {
                Ok(id) => made.push((id, *piece)),
                Err(error) => {
                    self.pieces.insert(slot.id, made);
                    return Err(error);
                }
            }
        }
        if wanted != [whole] {
            self.pieces.insert(slot.id, made);
        }
        Ok(())
    }

    /// Sets the filter of MSRs.
    fn filter(&mut self, agent: &Agent) -> io::Result<()> {
        let watched = self.watched_msrs();
        if watched.is_empty() && !self.filtering {
            return Ok(());
        }
        let merged = self
            .vmm_filter
            .with(&watched)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOSPC))?;
        let ours = if watched.is_empty() {
            0
        } else {
            KVM_MSR_EXIT_REASON_FILTER
        };
        if ours != 0 {
            kvm::exit_on_msr(agent.vm, self.vmm_reasons | ours)?;
            kvm::set_msr_filter(agent.vm, &merged)?;
        } else {
            kvm::set_msr_filter(agent.vm, &merged)?;
            kvm::exit_on_msr(agent.vm, self.vmm_reasons)?;
        }
        self.filtering = ours != 0;
        Ok(())
    }

    fn table(&self, agent: &Agent, slots: Vec<Slot>, pages: BTreeMap<u64, Protection>) -> Table {
        let mut table = Table {
            slots,
            hardware: self.hardware(),
            vmm_filter: self.vmm_filter.clone(),
            vmm_reasons: self.vmm_reasons,
            pages,
            active: !self.hooks.is_empty(),
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
                (HookKind::Execute { at }, Means::Hardware(_)) => {
                    table.execute.entry(at.0).or_default().push(own());
                }
                (HookKind::Execute { .. }, Means::Int3(gpa)) => {
                    if let Some(patched) = table.patches.get_mut(gpa) {
                        patched.hooks.push(own());
                    }
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
                (HookKind::Step { vcpu, count }, _) => {
                    table.last_step = armed.id.0;
                    table.steps.push((vcpu, count, own()));
                }
                _ => agent.notice(Some(armed.id), "a hook of a kind that is not served"),
            }
        }
        table
    }

    /// The VMM sets a slot.
    pub(crate) fn set_memory(&mut self, agent: &Agent, slot: Slot, real: impl FnOnce() -> c_int) -> c_int {
        if self.hooks.is_empty() {
            let result = real();
            if result >= 0 {
                self.note(slot);
                // Where a table names memory, it must not name what the VMM takes away next.
                if !agent.table().slots.is_empty() {
                    let slots = self.slots.values().copied().collect();
                    agent.publish(self.table(agent, slots, BTreeMap::new()));
                }
            }
            return result;
        }
        let stopped = agent.stop();
        // What is ours goes out of the slot before the VMM changes it, and all cuts with it: the VMM may use their numbers.
        let old = self.slots.get(&slot.id).copied();
        let _ = self.cut(agent, &BTreeMap::new());
        let slots: Vec<Slot> = self.slots.values().copied().collect();
        let guest = Guest::new(&slots);
        let leaves = |gpa: u64| old.is_some_and(|o| o.hva(gpa, 1).is_some());
        let there: Vec<(u64, Patch)> = self.patches.iter().map(|(g, p)| (*g, *p)).collect();
        for (gpa, patch) in there.into_iter().filter(|(gpa, _)| leaves(*gpa)) {
            restore(&guest, gpa, patch, &self.patches);
            self.patches.remove(&gpa);
        }
        let result = real();
        // errno is the caller's answer, and what follows would overwrite it.
        let error = io::Error::last_os_error();
        if result >= 0 {
            if slot.is_logged() && !old.is_some_and(|o| o.is_logged()) && self.touches(&slot) {
                agent.notice(
                    None,
                    "the VMM keeps account of writes (a migration, a snapshot): hooks in that memory rest meanwhile",
                );
            }
            self.note(slot);
        }
        if let Err(error) = self.reconcile(agent) {
            agent.notice(
                None,
                format!("a hook could not be kept as the VMM changed its memory: {error}"),
            );
        }
        drop(stopped);
        if result < 0 {
            crate::errno::set(error.raw_os_error().unwrap_or(libc::EINVAL));
        }
        result
    }

    /// Whether a hook is in this slot.
    fn touches(&self, slot: &Slot) -> bool {
        let inside = |gpa: u64| slot.hva(gpa, 1).is_some();
        self.hooks.values().any(|(_, means)| match means {
            Means::Int3(gpa) => inside(*gpa),
            Means::Pages(parts) => parts.iter().any(|(gpa, ..)| inside(*gpa)),
            Means::Hardware(_) | Means::Plain => false,
        })
    }

    fn note(&mut self, slot: Slot) {
        if slot.size == 0 {
            self.slots.remove(&slot.id);
        } else {
            self.slots.insert(slot.id, slot);
        }
    }

    /// The VMM sets its filter.
    pub(crate) fn set_filter(&mut self, agent: &Agent, filter: Filter) -> Result<(), i32> {
        let old = std::mem::replace(&mut self.vmm_filter, filter);
        let set = match self.vmm_filter.with(&self.watched_msrs()) {
            Some(merged) => kvm::set_msr_filter(agent.vm, &merged),
            None => Err(io::Error::from_raw_os_error(libc::E2BIG)),
        };
        match set {
            Ok(()) => {
                self.republish(agent);
                Ok(())
            }
            Err(error) => {
                self.vmm_filter = old;
                Err(error.raw_os_error().unwrap_or(libc::EINVAL))
            }
        }
    }

    /// The VMM says which MSR accesses it wants to see.
    pub(crate) fn set_reasons(&mut self, agent: &Agent, reasons: u32) -> Result<(), i32> {
        let ours = if self.filtering {
            KVM_MSR_EXIT_REASON_FILTER
        } else {
            0
        };
        kvm::exit_on_msr(agent.vm, reasons | ours).map_err(|e| e.raw_os_error().unwrap_or(libc::EINVAL))?;
        self.vmm_reasons = reasons;
        self.republish(agent);
        Ok(())
    }

    fn republish(&mut self, agent: &Agent) {
        let table = Table {
            vmm_filter: self.vmm_filter.clone(),
            vmm_reasons: self.vmm_reasons,
            ..Table::clone(&agent.table())
        };
        agent.publish(table);
    }
}

/// The 8 aligned bytes around an address, with the originals of all INT3s in them.
fn around(guest: &Guest<'_>, gpa: u64, patches: &BTreeMap<u64, Patch>) -> Option<u64> {
    let start = gpa & !7;
    let mut value = guest.read(start, 8)?;
    for (at, patch) in patches.range(start..start + 8) {
        let shift = 8 * (at - start);
        value = value & !(0xff << shift) | u64::from(patch.original) << shift;
    }
    Some(value)
}

/// Puts the original byte back, if the page is still the one that was patched.
fn restore(guest: &Guest<'_>, gpa: u64, patch: Patch, patches: &BTreeMap<u64, Patch>) {
    let still = guest.read(gpa, 1) == Some(BREAKPOINT.into());
    if still && around(guest, gpa, patches) == Some(patch.around) {
        guest.write(gpa, 1, patch.original.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> (Vec<u64>, [Slot; 1]) {
        let memory: Vec<u64> = (0..512).map(|i| (i & 0xff) * 0x0101_0101_0101_0101).collect();
        let slot = Slot {
            id: 0,
            flags: 0,
            gpa: 0,
            size: 4096,
            hva: memory.as_ptr() as u64,
            foreign: false,
        };
        (memory, [slot])
    }

    fn int3(state: &mut State, id: u32, gpa: u64) {
        let hook = Hook::execute(vmsight_arch::Gva(gpa));
        let armed = Arc::new(Armed::new(HookId(id), hook));
        state.hooks.insert(HookId(id), (armed, Means::Int3(gpa)));
    }

    #[test]
    fn patches_come_and_go_in_any_order() {
        let (memory, slots) = memory();
        let before = memory.clone();
        let guest = Guest::new(&slots);
        let mut state = State::default();
        // Three in one word, one of them hooked twice.
        for (id, gpa) in [(1, 0x41), (2, 0x42), (3, 0x47), (4, 0x42)] {
            int3(&mut state, id, gpa);
        }
        state.patch(&guest);
        for gpa in [0x41, 0x42, 0x47] {
            assert_eq!(guest.read(gpa, 1), Some(0xcc));
        }
        state.hooks.remove(&HookId(2));
        state.patch(&guest);
        assert_eq!(guest.read(0x42, 1), Some(0xcc), "another hook is still there");
        state.hooks.remove(&HookId(1));
        state.patch(&guest);
        assert_eq!(guest.read(0x41, 1), Some(0x08));
        state.hooks.clear();
        state.patch(&guest);
        assert_eq!(memory, before);
    }

    #[test]
    fn a_page_that_became_another_is_left_alone() {
        let (memory, slots) = memory();
        let guest = Guest::new(&slots);
        let mut state = State::default();
        int3(&mut state, 1, 0x80);
        int3(&mut state, 2, 0x100);
        state.patch(&guest);
        // Code of somebody else, with an INT3 of his own at the same place; and one that is overwritten.
        guest.write(0x80, 8, 0x1122_3344_5566_77cc);
        guest.write(0x100, 1, 0x90);
        state.hooks.clear();
        state.patch(&guest);
        assert_eq!(guest.read(0x80, 8), Some(0x1122_3344_5566_77cc));
        assert_eq!(guest.read(0x100, 1), Some(0x90));
        drop(memory);
    }

    #[test]
    fn memory_whose_writes_are_logged_holds_no_patches() {
        let (memory, mut slots) = memory();
        let mut state = State::default();
        int3(&mut state, 1, 0x80);
        state.patch(&Guest::new(&slots));
        assert_eq!(memory[16] & 0xff, 0xcc);
        slots[0].flags = kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;
        state.patch(&Guest::new(&slots));
        assert_eq!(memory[16] & 0xff, 0x10);
        slots[0].flags = 0;
        state.patch(&Guest::new(&slots));
        assert_eq!(memory[16] & 0xff, 0xcc);
    }
}
