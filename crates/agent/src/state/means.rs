//! By which means a hook can be armed.

use vmsight_arch::Registers;
use vmsight_arch::registers::control::EFER_LMA;
use vmsight_hooks::{Access, Hook, HookKind, Range, Scope, Vectors};

use super::State;
use super::inside::Detour;
use crate::agent::Agent;
use crate::guest::Guest;
use crate::kvm;
use crate::registers::from_kvm;
use crate::slots::{PAGE, Slot};

/// Most pages that are watched at a time.
const MOST_PAGES: usize = 1 << 16;
/// The bit in which the roots of a process differ with page-table isolation (Linux, arch/x86/entry/calling.h).
pub(super) const USER_ROOT: u64 = 1 << 12;
/// Most vectors of one hook.
const MOST_VECTORS: usize = 32;
/// MSRs that cannot be written for the guest by the means that there are: KVM treats the host's writes of the
/// time-stamp counter as a wish to synchronise it (Linux, arch/x86/kvm/x86.c, kvm_synchronize_tsc).
const UNWRITABLE: [u32; 3] = [0x10, 0x3b, 0x6e0];

/// By which means a hook is armed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Means {
    /// Breakpoints: one for the execution of an instruction, one for each vector of an interrupt.
    Breakpoints(Vec<Breakpoint>),
    /// A jump to code of ours in the guest, which judges the hook's filter.
    Detour(Detour),
    /// Pages: physical address, length, virtual address.
    Pages(Vec<(u64, u64, Option<u64>)>),
    /// What needs no place.
    Plain,
}

/// A breakpoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Breakpoint {
    /// The virtual address of the instruction.
    pub(super) at: u64,
    pub(super) place: Place,
    /// The vector whose handler begins there.
    pub(super) vector: Option<u8>,
}

/// What makes a vCPU stop there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Place {
    /// Hardware breakpoint with this number.
    Hardware(usize),
    /// INT3 at this physical address.
    Int3(u64),
}

impl Means {
    pub(super) fn breakpoints(&self) -> &[Breakpoint] {
        match self {
            Self::Breakpoints(list) => list,
            _ => &[],
        }
    }

    pub(super) const fn detour(&self) -> Option<&Detour> {
        match self {
            Self::Detour(detour) => Some(detour),
            _ => None,
        }
    }

    /// Where there are INT3s: physical addresses.
    pub(super) fn int3s(&self) -> impl Iterator<Item = u64> {
        self.breakpoints().iter().filter_map(|b| match b.place {
            Place::Int3(gpa) => Some(gpa),
            Place::Hardware(_) => None,
        })
    }
}

impl State {
    /// Finds the means for a hook; why there are none otherwise.
    pub(super) fn means(&self, agent: &Agent, hook: &Hook) -> Result<Means, String> {
        match hook.kind {
            HookKind::Execute { at } => self.breakpoints(agent, &[(at.0, None)], hook.scope),
            HookKind::Interrupt { vectors } => {
                let handlers = self.handlers(agent, vectors)?;
                self.breakpoints(agent, &handlers, hook.scope)
            }
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
            HookKind::Step { vcpu, .. } | HookKind::StepUntil { vcpu, .. } => {
                let known = agent.vcpus().iter().any(|v| v.index == vcpu);
                known
                    .then_some(Means::Plain)
                    .ok_or_else(|| format!("there is no vCPU {vcpu}"))
            }
            _ => Ok(Means::Plain),
        }
    }

    /// Breakpoints on these instructions, or on none of them.
    fn breakpoints(
        &self,
        agent: &Agent,
        instructions: &[(u64, Option<u8>)],
        scope: Scope,
    ) -> Result<Means, String> {
        let mut hardware = self.hardware();
        let mut breakpoints = Vec::new();
        for (at, vector) in instructions.iter().copied() {
            let place = self.breakpoint(agent, &mut hardware, at, scope)?;
            breakpoints.push(Breakpoint { at, place, vector });
        }
        Ok(Means::Breakpoints(breakpoints))
    }

    fn breakpoint(
        &self,
        agent: &Agent,
        hardware: &mut [Option<u64>; 4],
        at: u64,
        scope: Scope,
    ) -> Result<Place, String> {
        let alone = "another hook has its filter inside the guest there, and needs the instruction alone";
        if self.is_replaced(|detour| at.wrapping_sub(detour.at)) {
            return Err(alone.to_owned());
        }
        let same = hardware.iter().position(|a| *a == Some(at));
        let free = hardware.iter().position(Option::is_none);
        if let Some(number) = same.or(free)
            && agent.kernel.hardware_breakpoints
        {
            if let Some(register) = hardware.get_mut(number) {
                *register = Some(at);
            }
            return Ok(Place::Hardware(number));
        }
        let gpa = self
            .translate(agent, at, scope)
            .ok_or("all hardware breakpoints are in use, and for an INT3 no page is mapped there")?;
        if self.is_replaced(|detour| gpa.wrapping_sub(detour.gpa)) {
            return Err(alone.to_owned());
        }
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
        Ok(Place::Int3(gpa))
    }

    /// Where the handlers of these vectors begin, by the IDTs that the vCPUs have now (SDM vol. 3A 6.14.1).
    fn handlers(&self, agent: &Agent, vectors: Vectors) -> Result<Vec<(u64, Option<u8>)>, String> {
        let count = usize::from(vectors.last - vectors.first) + 1;
        if count > MOST_VECTORS {
            return Err(format!("at most {MOST_VECTORS} vectors at a time"));
        }
        let slots: Vec<Slot> = self.slots.values().copied().collect();
        let guest = Guest::new(&slots);
        let mut handlers: Vec<(u64, Option<u8>)> = Vec::new();
        // Those that have not begun yet have none.
        let ready = |r: &Registers| r.efer & EFER_LMA != 0 && r.idt.limit > 0;
        for registers in Self::registers(agent).iter().filter(|r| ready(r)) {
            for vector in vectors.first..=vectors.last {
                let handler = handler(&guest, registers, vector)
                    .ok_or_else(|| format!("vCPU {} has no handler for vector {vector}", registers.vcpu))?;
                match handlers.iter().find(|(at, _)| *at == handler) {
                    None => handlers.push((handler, Some(vector))),
                    Some((_, of)) if *of == Some(vector) => {}
                    Some(_) => {
                        return Err(format!(
                            "the handler of vector {vector} is another vector's, too: they cannot be told apart"
                        ));
                    }
                }
            }
        }
        if handlers.is_empty() {
            return Err("no vCPU is in 64-bit mode with an IDT".to_owned());
        }
        Ok(handlers)
    }

    /// Hardware breakpoints that are in use.
    pub(super) fn hardware(&self) -> [Option<u64>; 4] {
        let mut hardware = [None; 4];
        for breakpoint in self.hooks.values().flat_map(|(_, means)| means.breakpoints()) {
            if let Place::Hardware(n) = breakpoint.place
                && let Some(slot) = hardware.get_mut(n)
            {
                *slot = Some(breakpoint.at);
            }
        }
        hardware
    }

    /// Registers of all vCPUs, which are out of the guest.
    pub(super) fn registers(agent: &Agent) -> Vec<Registers> {
        let read = |v: &&'static crate::vcpu::Vcpu| {
            let sregs = kvm::get_sregs(v.fd).ok()?;
            Some(from_kvm(v.index, &kvm_bindings::kvm_regs::default(), &sregs))
        };
        agent.vcpus().iter().filter_map(read).collect()
    }

    /// Where a virtual address lies: by the scope's page tables, or by those of the first vCPU that has it mapped.
    /// With page-table isolation a vCPU in user mode has little of the kernel: then the kernel's own root is tried.
    pub(super) fn translate(&self, agent: &Agent, gva: u64, scope: Scope) -> Option<u64> {
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
}

/// Where the handler of a vector begins; `None` where there is none.
fn handler(guest: &Guest<'_>, registers: &Registers, vector: u8) -> Option<u64> {
    const GATE: u64 = 16;
    const PRESENT: u64 = 1 << 47;
    let offset = GATE * u64::from(vector);
    if offset + GATE - 1 > u64::from(registers.idt.limit) {
        return None;
    }
    let at = registers.idt.base.0.wrapping_add(offset);
    // With page-table isolation the IDT is mapped for both roots.
    let low = guest.read_virtual_u64(registers, at)?;
    let high = guest.read_virtual_u64(registers, at.wrapping_add(8))?;
    (low & PRESENT != 0).then_some(low & 0xffff | low >> 32 & 0xffff_0000 | high << 32)
}
