//! What is done when the guest leaves: as little as can be.

use core::arch::x86_64::__cpuid_count;
use core::fmt::Write;
use core::mem::offset_of;
use core::sync::atomic::Ordering;

use vmsight_arch::registers::control::{CR0_PE, CR4_PKE, EFER_LMA};
use vmsight_arch::registers::msr;
use vmsight_sim_abi::{Call, SIGNATURE, SIGNATURE_LEAF, State};
use vmsight_sim_hypervisor::ept::{MemoryType, Permissions};
use vmsight_sim_hypervisor::vmx::primary::NMI_WINDOW;
use vmsight_sim_hypervisor::{exit, gate};

use crate::boot::Registers;
use crate::guest::{self, Hypervisor};
use crate::park::{self, Turn};
use crate::processor::Processor;
use crate::serial::Console;
use crate::{calls, io, kept, machine, msrs, stop, timer, vmcs};

const CR4_OSXSAVE: u64 = 1 << 18;
/// Events as the VMCS has them.
pub(crate) const VALID: u64 = 1 << 31;
const HAS_ERROR_CODE: u64 = 1 << 11;
pub(crate) const HARDWARE_EXCEPTION: u64 = 3 << 8;
pub(crate) const NMI: u64 = VALID | 2 << 8 | 2;
pub(crate) const KIND: u64 = 7 << 8;
/// Kinds of events that bring an instruction's length: software interrupts and exceptions.
const WITH_LENGTH: core::ops::RangeInclusive<u64> = 4 << 8..=6 << 8;
/// Exceptions.
pub(crate) const DEBUG: u64 = 1;
pub(crate) const INVALID_OPCODE: u64 = 6;
pub(crate) const DOUBLE_FAULT: u64 = 8;
pub(crate) const PROTECTION: u64 = 13;
pub(crate) const MACHINE_CHECK: u64 = 18;

/// What a guest's interruptibility has in it: the shadow of STI and of MOV SS, and that SMIs and NMIs are blocked.
const SHADOW: u64 = 3;
const SMIS_BLOCKED: u64 = 4;
const NMIS_BLOCKED: u64 = 8;

/// How an exit was handled.
pub(crate) enum Outcome {
    /// The instruction was done: go on after it.
    Done,
    /// The same for one that is so many bytes long: after some exits, the processor does not say.
    Past(u64),
    /// Go on where the guest left.
    Again,
    /// The guest gets an exception.
    Exception(u64),
}

/// Called by the exit's entry with the guest's registers.
#[unsafe(no_mangle)]
extern "C" fn handle_exit(registers: &mut Registers, processor: &'static Processor) {
    let _turn = Turn::wait(processor);
    // SAFETY: once, with the turn.
    let Some(hypervisor) = (unsafe { Hypervisor::get() }) else {
        stop(format_args!("an exit before there is a guest"))
    };
    park::settle(processor);
    let whole = vmcs::read(vmcs::EXIT_REASON);
    let reason = whole as u16;
    if let Some(count) = hypervisor.counts.get_mut(usize::from(reason)) {
        *count += 1;
    }
    if whole >> 31 & 1 != 0 {
        stop(format_args!(
            "the guest's state is not one that can be: {}",
            exit::name(reason)
        ));
    }
    // Bochs 2.7 leaves SMIs blocked after a SIPI, which no guest can be outside of system management mode.
    interruptibility(SMIS_BLOCKED);
    // An event that was being delivered when the guest left is delivered again, unless something else comes of it.
    let vectoring = vmcs::read(vmcs::VECTORING_EVENT);
    if vectoring & VALID != 0 {
        vmcs::write(vmcs::ENTRY_EVENT, vectoring & !(1 << 12));
        vmcs::write(vmcs::ENTRY_ERROR_CODE, vmcs::read(vmcs::VECTORING_ERROR_CODE));
        if WITH_LENGTH.contains(&(vectoring & KIND)) {
            vmcs::write(
                vmcs::ENTRY_INSTRUCTION_LENGTH,
                vmcs::read(vmcs::INSTRUCTION_LENGTH),
            );
        }
    }
    let outcome = if let Some(outcome) = hypervisor.end_step(reason, processor) {
        outcome
    } else if hypervisor.is_doorbell(registers, processor, reason) {
        hypervisor.drain();
        Outcome::Done
    } else {
        match reason {
            // These are for nothing that the guest does, in whatever view, and it goes on where it is.
            exit::NMI_WINDOW | exit::MONITOR_TRAP => Outcome::Again,
            exit::EXCEPTION_OR_NMI if is_nmi() => {
                machine::unblock_nmis();
                if !park::is_ours(processor) {
                    processor.nmis.store(1, Ordering::Relaxed);
                }
                Outcome::Again
            }
            exit::PREEMPTION_TIMER => hypervisor.timer(registers, processor),
            exit::INIT => hypervisor.init(registers, processor),
            exit::SIPI => hypervisor.sipi(processor),
            _ if hypervisor.in_own_view() => handle(hypervisor, registers, processor, reason),
            _ => hypervisor.recover(registers, processor),
        }
    };
    match outcome {
        Outcome::Done => skip(vmcs::read(vmcs::INSTRUCTION_LENGTH)),
        Outcome::Past(length) => skip(length),
        Outcome::Again => {}
        Outcome::Exception(vector) => {
            // Real mode has no error codes.
            let protected = vmcs::read(vmcs::GUEST_CR0) & CR0_PE != 0;
            let with_code = protected && matches!(vector, DOUBLE_FAULT | PROTECTION);
            let code = if with_code { HAS_ERROR_CODE } else { 0 };
            vmcs::write(vmcs::ENTRY_EVENT, VALID | HARDWARE_EXCEPTION | code | vector);
            vmcs::write(vmcs::ENTRY_ERROR_CODE, 0);
        }
    }
    hypervisor.talk(processor);
    hypervisor.deliver_nmi(processor);
}

/// Goes on after an instruction, which ends the shadow of the one before it.
fn skip(length: u64) {
    vmcs::write(vmcs::GUEST_RIP, vmcs::read(vmcs::GUEST_RIP) + length);
    interruptibility(SHADOW);
}

/// Takes bits out of the guest's interruptibility.
fn interruptibility(bits: u64) {
    let state = vmcs::read(vmcs::GUEST_INTERRUPTIBILITY);
    if state & bits != 0 {
        vmcs::write(vmcs::GUEST_INTERRUPTIBILITY, state & !bits);
    }
}

/// Whether the guest left for an NMI.
fn is_nmi() -> bool {
    vmcs::read(vmcs::EXIT_EVENT) & (VALID | KIND) == NMI & (VALID | KIND)
}

fn handle(
    hypervisor: &mut Hypervisor,
    registers: &mut Registers,
    processor: &Processor,
    reason: u16,
) -> Outcome {
    match reason {
        exit::CPUID => {
            if privilege() == 3 {
                hypervisor.user_mode(processor, registers.rax as u32);
            }
            cpuid(registers)
        }
        exit::IO_INSTRUCTION => io::access(hypervisor, registers),
        exit::VMCALL => calls::handle(hypervisor, registers, processor),
        exit::EPT_VIOLATION => violation(hypervisor, registers, processor),
        exit::CONTROL_REGISTER => control_register(registers),
        exit::RDMSR => match msrs::read(registers.rcx as u32) {
            Some(value) => {
                (registers.rax, registers.rdx) = (value & 0xffff_ffff, value >> 32);
                Outcome::Done
            }
            None => Outcome::Exception(PROTECTION),
        },
        exit::WRMSR => {
            let value = registers.rdx << 32 | registers.rax & 0xffff_ffff;
            if registers.rcx as u32 == msr::LSTAR && !hypervisor.locked {
                return entry(hypervisor, value);
            }
            match msrs::write(registers.rcx as u32, value) {
                Some(()) => Outcome::Done,
                None => Outcome::Exception(PROTECTION),
            }
        }
        exit::XSETBV => xsetbv(registers),
        // Without writing back, INVD would lose what the hypervisor wrote.
        exit::INVD | exit::WBINVD => {
            machine::wbinvd();
            Outcome::Done
        }
        exit::EXCEPTION_OR_NMI => exception(),
        exit::VMFUNC => Outcome::Exception(INVALID_OPCODE),
        _ if exit::is_hidden_instruction(reason) => Outcome::Exception(INVALID_OPCODE),
        exit::TRIPLE_FAULT => shutdown(hypervisor),
        _ => stop(format_args!(
            "{} ({reason}) at {:#x}, qualification {:#x}",
            exit::name(reason),
            vmcs::read(vmcs::GUEST_RIP),
            vmcs::read(vmcs::QUALIFICATION)
        )),
    }
}

impl Hypervisor {
    /// Whether the monitor asks for its ring to be emptied.
    fn is_doorbell(&self, registers: &Registers, processor: &Processor, reason: u16) -> bool {
        self.in_monitor(processor) && reason == exit::VMCALL && registers.rax == Call::Drain as u64
    }

    /// Whether the guest is in its own view.
    pub(crate) fn in_own_view(&self) -> bool {
        vmcs::read(vmcs::EPT_POINTER) == self.guest.pointer()
    }

    /// Whether it is in the monitor's.
    pub(crate) fn in_monitor(&self, processor: &Processor) -> bool {
        let own = self.views.as_ref().and_then(|v| v.own(processor.number()));
        own.is_some_and(|own| vmcs::read(vmcs::EPT_POINTER) == own.sim.pointer())
    }

    /// The guest left out of another view than its own. Whatever it was, it goes on in its own, with nothing armed: at the
    /// hook, as if the handler had returned, or out of the gate, which nobody but an attacker leaves unless for a machine
    /// check, with an invalid opcode.
    pub(crate) fn recover(&mut self, registers: &mut Registers, processor: &Processor) -> Outcome {
        let in_monitor = self.in_monitor(processor);
        let event = machine_check();
        self.leave_view(registers, processor);
        let Some(views) = &self.views else {
            return Outcome::Exception(INVALID_OPCODE);
        };
        if !in_monitor && event.is_none() {
            return Outcome::Exception(INVALID_OPCODE);
        }
        vmcs::write(vmcs::GUEST_RFLAGS, 2);
        vmcs::write(vmcs::GUEST_RIP, views.address + gate::RETURNING as u64);
        vmcs::write(vmcs::ENTRY_EVENT, event.unwrap_or(0));
        Outcome::Again
    }

    /// Puts the guest back into its own view, with its own stack, tables and IDT, and nothing armed.
    fn leave_view(&mut self, registers: &mut Registers, processor: &Processor) {
        let in_monitor = self.in_monitor(processor);
        let Some(views) = &self.views else { return };
        let number = processor.number();
        views.disarm(&mut self.pool, number);
        vmcs::write(vmcs::EPT_POINTER, self.guest.pointer());
        interruptibility(!NMIS_BLOCKED);
        if vmcs::read(vmcs::GUEST_CR3) & !0xfff == views.cr3 {
            // The gate keeps the guest's in R11. An attacker may have another value there, but not one that cannot be.
            vmcs::write(vmcs::GUEST_CR3, registers.r11 & physical_mask());
        }
        let stack = views.header.base + views.header.text + views.header.data;
        let own = stack - views.header.data..=stack;
        if in_monitor {
            let state = |offset| views.state(&mut self.pool, number, offset).copied();
            kept::restore(registers, &views.header, vmcs::read(vmcs::GUEST_RSP), state);
            if let Some(kept) = views.state(&mut self.pool, number, offset_of!(State, kept)) {
                *kept = 0;
            }
        }
        if in_monitor
            && own.contains(&vmcs::read(vmcs::GUEST_RSP))
            && let Some(kept) = views.state(&mut self.pool, number, offset_of!(State, stack))
        {
            vmcs::write(vmcs::GUEST_RSP, core::mem::replace(kept, stack));
        }
        if in_monitor && vmcs::read(vmcs::GUEST_IDTR_LIMIT) == 0 {
            let mut words = [0u64; 2];
            for (n, word) in words.iter_mut().enumerate() {
                *word = views
                    .state(&mut self.pool, number, offset_of!(State, idtr) + n * 8)
                    .map_or(0, |w| *w);
            }
            let [low, high] = words;
            vmcs::write(vmcs::GUEST_IDTR_LIMIT, low & 0xffff);
            vmcs::write(vmcs::GUEST_IDTR_BASE, low >> 16 | high << 48);
        }
    }

    /// An INIT: from another processor, or for the first one, from a keyboard controller that is told to reset the machine.
    fn init(&mut self, registers: &mut Registers, processor: &Processor) -> Outcome {
        if processor.number() == 0 {
            self.say_last();
            machine::reset();
        }
        self.leave_view(registers, processor);
        registers.clear();
        vmcs::write(vmcs::ENTRY_EVENT, 0);
        processor.nmis.store(0, Ordering::Relaxed);
        processor.waiting.store(true, Ordering::SeqCst);
        guest::after_init();
        Outcome::Again
    }

    /// A SIPI, for which the processor has waited. After the lockdown it waits on: in real mode, what is pinned is not so.
    fn sipi(&mut self, processor: &Processor) -> Outcome {
        machine::unblock_nmis();
        if self.locked {
            guest::after_init();
        } else {
            guest::after_sipi(vmcs::read(vmcs::QUALIFICATION) & 0xff);
            processor.waiting.store(false, Ordering::SeqCst);
            self.watch_apic(processor);
        }
        Outcome::Again
    }

    /// Has the guest get an NMI that came for it, as soon as it takes it. In the gate and in the monitor none does: there the
    /// timer has it leave again when that may be over.
    fn deliver_nmi(&self, processor: &Processor) {
        const BLOCKING: u64 = SHADOW | NMIS_BLOCKED;
        let controls = vmcs::read(vmcs::PRIMARY_CONTROLS);
        let mut window = false;
        if processor.nmis.load(Ordering::Relaxed) != 0 && !processor.waiting.load(Ordering::Relaxed) {
            if !self.in_own_view() {
                timer::soon();
            } else if vmcs::read(vmcs::GUEST_INTERRUPTIBILITY) & BLOCKING != 0
                || vmcs::read(vmcs::ENTRY_EVENT) & VALID != 0
            {
                window = true;
            } else {
                processor.nmis.store(0, Ordering::Relaxed);
                vmcs::write(vmcs::ENTRY_EVENT, NMI);
            }
        }
        let wanted = if window {
            controls | u64::from(NMI_WINDOW)
        } else {
            controls & !u64::from(NMI_WINDOW)
        };
        if wanted != controls {
            vmcs::write(vmcs::PRIMARY_CONTROLS, wanted);
        }
    }
}

/// The machine check for which the guest left.
fn machine_check() -> Option<u64> {
    let event = vmcs::read(vmcs::EXIT_EVENT);
    let left_for_it = vmcs::read(vmcs::EXIT_REASON) as u16 == exit::EXCEPTION_OR_NMI && event & VALID != 0;
    let is_one = event & (KIND | 0xff) == HARDWARE_EXCEPTION | MACHINE_CHECK;
    (left_for_it && is_one).then_some(VALID | HARDWARE_EXCEPTION | MACHINE_CHECK)
}

/// The guest says where its kernel is entered by a system call, before the lockdown.
fn entry(hypervisor: &mut Hypervisor, value: u64) -> Outcome {
    let sign = value >> 47;
    if sign != 0 && sign != 0x1_ffff {
        return Outcome::Exception(PROTECTION);
    }
    // SAFETY: a canonical address, and the guest's own: the hypervisor makes no system calls.
    unsafe { machine::wrmsr(msr::LSTAR, value) };
    hypervisor.entry_known(value);
    Outcome::Done
}

/// Bits that a physical address has.
fn physical_mask() -> u64 {
    let bits = __cpuid_count(0x8000_0008, 0).eax & 0xff;
    (1u64 << bits.clamp(32, 52)) - 1
}

fn exception() -> Outcome {
    let event = vmcs::read(vmcs::EXIT_EVENT);
    match event & 0xff {
        DEBUG => {
            // As the processor would have left it: the conditions met, B0 to B3, BD, BS.
            let met = vmcs::read(vmcs::QUALIFICATION) & 0x600f;
            // SAFETY: bits that the processor itself sets.
            unsafe { machine::set_dr6(machine::dr6() & !0xf | met) };
            Outcome::Exception(DEBUG)
        }
        MACHINE_CHECK => Outcome::Exception(MACHINE_CHECK),
        vector => stop(format_args!("an exception {vector} which was not asked for")),
    }
}

fn cpuid(registers: &mut Registers) -> Outcome {
    let (leaf, part) = (registers.rax as u32, registers.rcx as u32);
    let mut result = __cpuid_count(leaf, part);
    let cr4 = vmcs::read(vmcs::GUEST_CR4);
    let set = |word: &mut u32, bit: u32, on: bool| *word = *word & !(1 << bit) | u32::from(on) << bit;
    match leaf {
        1 => {
            // No VMX, no branch trace store; there is a hypervisor; what mirrors CR4 mirrors the guest's.
            set(&mut result.ecx, 5, false);
            set(&mut result.ecx, 2, false);
            set(&mut result.edx, 21, false);
            set(&mut result.ecx, 31, true);
            set(&mut result.ecx, 27, cr4 & CR4_OSXSAVE != 0);
        }
        7 if part == 0 => {
            // No SGX, no processor trace, no shadow stacks, no UMWAIT, no indirect-branch tracking, no
            // protection keys of supervisor pages.
            set(&mut result.ecx, 31, false);
            set(&mut result.ebx, 2, false);
            set(&mut result.ebx, 25, false);
            set(&mut result.ecx, 7, false);
            set(&mut result.ecx, 5, false);
            set(&mut result.edx, 20, false);
            set(&mut result.ecx, 4, cr4 & CR4_PKE != 0);
        }
        SIGNATURE_LEAF => {
            let [b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3] = SIGNATURE;
            result.eax = SIGNATURE_LEAF;
            result.ebx = u32::from_le_bytes([b0, b1, b2, b3]);
            result.ecx = u32::from_le_bytes([c0, c1, c2, c3]);
            result.edx = u32::from_le_bytes([d0, d1, d2, d3]);
        }
        _ => {}
    }
    registers.rax = result.eax.into();
    registers.rbx = result.ebx.into();
    registers.rcx = result.ecx.into();
    registers.rdx = result.edx.into();
    Outcome::Done
}

/// What a processor does after a triple fault.
fn shutdown(hypervisor: &mut Hypervisor) -> ! {
    hypervisor.say_last();
    let rip = vmcs::read(vmcs::GUEST_RIP);
    let _ = writeln!(
        Console,
        "vmsight-hypervisor: triple fault of the guest at {rip:#x}: the machine is reset"
    );
    machine::reset()
}

/// The guest touched memory that it does not have, or not in this way.
fn violation(hypervisor: &mut Hypervisor, registers: &Registers, processor: &Processor) -> Outcome {
    let gpa = vmcs::read(vmcs::GUEST_PHYSICAL);
    if hypervisor.is_apic_store(gpa) {
        return hypervisor.apic_store(registers, processor, gpa);
    }
    let ours = Hypervisor::own().contains(&gpa);
    if hypervisor.begin_step(gpa, processor) {
        return Outcome::Again;
    }
    if ours || hypervisor.guest.translate(&mut hypervisor.pool, gpa).is_some() {
        // While an exception is being delivered, it is one fault too many: else the guest would never stop faulting here.
        let vectoring = vmcs::read(vmcs::VECTORING_EVENT);
        return match vectoring & (VALID | KIND) == VALID | HARDWARE_EXCEPTION {
            false => Outcome::Exception(PROTECTION),
            true if vectoring & 0xff == DOUBLE_FAULT => shutdown(hypervisor),
            true => Outcome::Exception(DOUBLE_FAULT),
        };
    }
    // A device above all RAM.
    let mapped = hypervisor.guest.map_large(
        &mut hypervisor.pool,
        gpa,
        Permissions::ALL,
        MemoryType::Uncacheable,
    );
    match mapped {
        Ok(()) if gpa < physical_mask() => Outcome::Again,
        _ => stop(format_args!("no page tables left for the device at {gpa:#x}")),
    }
}

/// A write to CR0 or CR4 that changes a bit which is kept.
fn control_register(registers: &mut Registers) -> Outcome {
    let qualification = vmcs::read(vmcs::QUALIFICATION);
    let number = (qualification >> 8 & 15) as u8;
    let value = registers
        .get(number)
        .unwrap_or_else(|| vmcs::read(vmcs::GUEST_RSP));
    let is_write_of_cr0 = qualification & 0x3f == 0;
    let (mask, shadow) = (vmcs::read(vmcs::CR0_MASK), vmcs::read(vmcs::CR0_SHADOW));
    // CR0.NE, which VMX operation wants set: the guest sees what it wrote. Nothing else that is kept may change.
    const NE: u64 = 1 << 5;
    let only_ne = (value ^ shadow) & mask == NE;
    let same_mode = (value ^ vmcs::read(vmcs::GUEST_CR0)) & 0x8000_0001 == 0;
    if !is_write_of_cr0 || !only_ne || !same_mode || value >> 32 != 0 {
        return Outcome::Exception(PROTECTION);
    }
    vmcs::write(vmcs::CR0_SHADOW, value);
    vmcs::write(vmcs::GUEST_CR0, value | NE);
    Outcome::Done
}

fn xsetbv(registers: &Registers) -> Outcome {
    let value = registers.rdx << 32 | registers.rax & 0xffff_ffff;
    let leaf = __cpuid_count(0xd, 0);
    let known = u64::from(leaf.edx) << 32 | u64::from(leaf.eax);
    let parts = |bits: u64| value & bits == 0 || value & bits == bits;
    // SDM vol. 1, 13.3: x87 always; AVX with SSE; MPX's two, AVX-512's three and AMX's two each together, AVX-512 with AVX.
    let valid = value & !known == 0
        && value & 1 != 0
        && (value & 4 == 0 || value & 2 != 0)
        && parts(3 << 3)
        && parts(7 << 5)
        && (value & 7 << 5 == 0 || value & 4 != 0)
        && parts(3 << 17);
    if registers.rcx as u32 != 0 || !valid {
        return Outcome::Exception(PROTECTION);
    }
    // SAFETY: checked above; OSXSAVE is a bit of the hypervisor's own CR4, which every exit loads anew.
    unsafe {
        let cr4 = machine::cr4();
        machine::set_cr4(cr4 | CR4_OSXSAVE);
        machine::xsetbv(value);
        machine::set_cr4(cr4);
    }
    Outcome::Done
}

/// The privilege level of the guest's code.
pub(crate) fn privilege() -> u64 {
    vmcs::read(vmcs::GUEST_SS_ACCESS) >> 5 & 3
}

/// Whether the guest is in long mode.
pub(crate) fn long_mode() -> bool {
    vmcs::read(vmcs::GUEST_EFER) & EFER_LMA != 0
}
