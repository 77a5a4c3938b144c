//! One instruction of the guest that writes to a page with hooks, done to a copy: see `vmsight_sim_hypervisor::attempt`.

use vmsight_sim_hypervisor::attempt::{self, Changes};
use vmsight_sim_hypervisor::{PAGE, exit, place, vmx};

use crate::exits::{self, DEBUG, HARDWARE_EXCEPTION, KIND, MACHINE_CHECK, Outcome, VALID};
use crate::guest::{GuestTables, Hypervisor};
use crate::processor::Processor;
use crate::{calls, hooks, machine, vmcs};

const TRAP: u64 = 1 << 8;
const INTERRUPTS: u64 = 1 << 9;
/// Of an EPT violation's qualification: a write, to what the linear address leads to.
const WRITE: u64 = 1 << 1;
const FETCH: u64 = 1 << 2;
const FINAL: u64 = 3 << 7;
/// Of a debug exception's: single step.
const STEPPED: u64 = 1 << 14;
const BREAKPOINTS: u64 = 15;
const PAGE_FAULT: u64 = 14;
/// An instruction is no longer.
const LONGEST: usize = 15;

/// What was changed for the sake of one step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Step {
    processor: usize,
    rip: u64,
    flags: u64,
    debug_control: u64,
    exceptions: u64,
}

impl Hypervisor {
    /// The guest writes to a page that is read-only. If it holds hooks and the write is a plain store, it is tried; `true`:
    /// the guest goes on.
    pub(crate) fn begin_step(&mut self, gpa: u64, processor: &Processor) -> bool {
        let gpa = gpa & !(PAGE - 1);
        let qualification = vmcs::read(vmcs::QUALIFICATION);
        let is_store = qualification & (WRITE | FETCH) == WRITE && qualification & FINAL == FINAL;
        let in_event = vmcs::read(vmcs::VECTORING_EVENT) & VALID != 0;
        let rip = vmcs::read(vmcs::GUEST_RIP);
        let allowed = is_store && !in_event && exits::privilege() == 0;
        if !allowed || !self.hooks.is_hooked(gpa) || !attempt::is_store(&code(rip)) {
            return false;
        }
        match self.hooks.step {
            // There is one set of copies: this processor tries again until the other is done.
            Some(step) if step.processor != processor.number() => return true,
            Some(step) if step.rip != rip => return false,
            _ => {}
        }
        let Some(content) = hooks::page(gpa) else {
            return false;
        };
        let guest = self.guest;
        let pointer = self
            .hooks
            .attempt
            .as_mut()
            .and_then(|attempt| attempt.begin(&mut self.pool, guest, gpa, content));
        let Some(pointer) = pointer else {
            return false;
        };
        if self.hooks.step.is_none() {
            self.hooks.step = Some(Step {
                processor: processor.number(),
                rip,
                flags: vmcs::read(vmcs::GUEST_RFLAGS),
                debug_control: vmcs::read(vmcs::GUEST_DEBUGCTL),
                exceptions: vmcs::read(vmcs::EXCEPTION_BITMAP),
            });
        }
        vmcs::write(vmcs::EPT_POINTER, pointer);
        // Nothing may run there but this instruction: no interrupt, and no exception is delivered.
        vmcs::write(vmcs::EXCEPTION_BITMAP, u64::from(u32::MAX));
        vmcs::write(vmcs::PAGE_FAULT_MASK, 0);
        vmcs::write(vmcs::PAGE_FAULT_MATCH, 0);
        let flags = vmcs::read(vmcs::GUEST_RFLAGS) & !INTERRUPTS;
        vmcs::write(vmcs::GUEST_RFLAGS, flags | TRAP);
        vmcs::write(vmcs::GUEST_DEBUGCTL, 0);
        // Whatever instruction it is; where there is no such flag, or it does not work (Bochs 2.7), the other is left.
        if has_monitor_trap() {
            let controls = vmcs::read(vmcs::PRIMARY_CONTROLS);
            vmcs::write(
                vmcs::PRIMARY_CONTROLS,
                controls | u64::from(vmx::primary::MONITOR_TRAP),
            );
        }
        let shadow = vmcs::read(vmcs::GUEST_INTERRUPTIBILITY);
        vmcs::write(vmcs::GUEST_INTERRUPTIBILITY, shadow & !3);
        calls::invalidate();
        true
    }

    /// The guest has left while a write was tried. `None`: nothing is tried any more, and the exit is one like any other.
    pub(crate) fn end_step(&mut self, reason: u16, processor: &Processor) -> Option<Outcome> {
        let step = self
            .hooks
            .step
            .filter(|step| step.processor == processor.number())?;
        let qualification = vmcs::read(vmcs::QUALIFICATION);
        if reason == exit::EPT_VIOLATION && self.begin_step(vmcs::read(vmcs::GUEST_PHYSICAL), processor) {
            return Some(Outcome::Again);
        }
        let event = vmcs::read(vmcs::EXIT_EVENT);
        let is_exception =
            reason == exit::EXCEPTION_OR_NMI && event & VALID != 0 && event & KIND != exits::NMI & KIND;
        let is_debug = is_exception && event & 0xff == DEBUG;
        let stepped = is_debug && qualification & STEPPED != 0;
        let done = reason == exit::MONITOR_TRAP || stepped;
        self.leave_step(step, done);
        if reason == exit::MONITOR_TRAP {
            // It comes before the single step, which is the guest's only where it asked for one.
            if step.flags & TRAP == 0 {
                let pending = vmcs::read(vmcs::GUEST_PENDING_DEBUG);
                vmcs::write(vmcs::GUEST_PENDING_DEBUG, pending & !STEPPED);
            }
            return Some(Outcome::Again);
        }
        if stepped {
            // What the guest itself wanted to be told of, it is.
            let own_trap = step.flags & TRAP != 0;
            let told = own_trap || qualification & BREAKPOINTS != 0;
            if told && !own_trap {
                // SAFETY: bits that the processor itself sets.
                unsafe { machine::set_dr6(machine::dr6() & !BREAKPOINTS | qualification & BREAKPOINTS) };
                return Some(Outcome::Exception(DEBUG));
            }
            return if told { None } else { Some(Outcome::Again) };
        }
        if !is_exception || is_debug || event & 0xff == MACHINE_CHECK {
            return None;
        }
        // The guest's own, which would not have left but for the step.
        if event & 0xff == PAGE_FAULT && event & KIND == HARDWARE_EXCEPTION & KIND {
            machine::set_cr2(qualification);
        }
        vmcs::write(vmcs::ENTRY_EVENT, event & !(1 << 12));
        vmcs::write(vmcs::ENTRY_ERROR_CODE, vmcs::read(vmcs::EXIT_ERROR_CODE));
        vmcs::write(
            vmcs::ENTRY_INSTRUCTION_LENGTH,
            vmcs::read(vmcs::INSTRUCTION_LENGTH),
        );
        Some(Outcome::Again)
    }

    /// Everything as it was before; with what the guest wrote, if it was `done`.
    fn leave_step(&mut self, step: Step, done: bool) {
        let mut changes = Changes::default();
        let mut attempt = self.hooks.attempt.take();
        if let Some(attempt) = &mut attempt {
            for page in attempt.open().filter(|_| done) {
                let Some(content) = hooks::page(page) else {
                    continue;
                };
                let hooks = &self.hooks;
                let one = attempt.take(&mut self.pool, page, content, |at| hooks.is_hook(page, at));
                changes.taken += one.taken;
                changes.refused += one.refused;
            }
            attempt.end();
        }
        self.hooks.attempt = attempt;
        self.hooks.step = None;
        vmcs::write(vmcs::EPT_POINTER, self.guest.pointer());
        vmcs::write(vmcs::EXCEPTION_BITMAP, step.exceptions);
        vmcs::write(vmcs::GUEST_DEBUGCTL, step.debug_control);
        let kept = TRAP | INTERRUPTS;
        let flags = vmcs::read(vmcs::GUEST_RFLAGS);
        vmcs::write(vmcs::GUEST_RFLAGS, flags & !kept | step.flags & kept);
        let controls = vmcs::read(vmcs::PRIMARY_CONTROLS);
        vmcs::write(
            vmcs::PRIMARY_CONTROLS,
            controls & !u64::from(vmx::primary::MONITOR_TRAP),
        );
        if changes.refused > 0 {
            self.hooks.tampered += 1;
            self.say_tampered(step.rip, changes);
        }
    }
}

/// Whether the processor leaves after an instruction without the guest's trap flag.
fn has_monitor_trap() -> bool {
    machine::rdmsr(vmx::msr::TRUE_PRIMARY) >> 32 & u64::from(vmx::primary::MONITOR_TRAP) != 0
}

/// The code at the guest's instruction pointer; zeros, which begin no store, where it cannot be read.
fn code(rip: u64) -> [u8; LONGEST] {
    let mut bytes = [0; LONGEST];
    let cr3 = vmcs::read(vmcs::GUEST_CR3);
    for (byte, address) in bytes.iter_mut().zip((0..).map(|n| rip.wrapping_add(n))) {
        let Some(gpa) = place::physical(&GuestTables, cr3, address) else {
            break;
        };
        let word = hooks::page(gpa & !(PAGE - 1)).and_then(|page| page.get((gpa % PAGE / 8) as usize));
        let Some(word) = word else { break };
        *byte = (*word >> (gpa % 8 * 8)) as u8;
    }
    bytes
}
