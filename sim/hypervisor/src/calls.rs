//! Calls of the guest by VMCALL.

use core::arch::asm;
use core::fmt::Write;
use core::mem::offset_of;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use sha2::{Digest, Sha256};
use vmsight_arch::paging::{self, PagingMode};
use vmsight_arch::registers::control::{CR0_PE, CR0_PG, CR0_WP, CR4_LA57, CR4_PAE, CR4_SMAP, CR4_SMEP};
use vmsight_arch::{Dtb, Gva};
use vmsight_sim_abi::{Call, Frame, Handler, Part, State, Status, VERSION};
use vmsight_sim_hypervisor::ept::{Exhausted, MemoryType, Permissions};
use vmsight_sim_hypervisor::views::{Refused, Views};
use vmsight_sim_hypervisor::{PAGE, PROCESSORS, exit, gate};

use crate::boot::Registers;
use crate::exits::{self, Outcome};
use crate::guest::{GuestTables, Hypervisor};
use crate::processor::Processor;
use crate::serial::Console;
use crate::{msrs, timer, vmcs};

/// Bits that stay as they are from the lockdown on.
const CR0_PINNED: u64 = CR0_PE | CR0_PG | CR0_WP;
const CR4_PINNED: u64 = CR4_PAE | CR4_LA57 | CR4_SMEP | CR4_SMAP;
/// VM function 0: EPTP switching.
const EPTP_SWITCHING: u64 = 1;

/// The list of EPT pointers of each processor; 0 while there is no monitor.
static LISTS: [AtomicU64; PROCESSORS] = [const { AtomicU64::new(0) }; PROCESSORS];
/// Bits are to be pinned.
static PIN: AtomicBool = AtomicBool::new(false);

/// A call's answer: a value, or why there is none.
type Answer = Result<u64, Status>;

impl From<Exhausted> for StatusOf {
    fn from(_: Exhausted) -> Self {
        Self(Status::Memory)
    }
}

/// A status as an error that others turn into.
struct StatusOf(Status);

impl From<Status> for StatusOf {
    fn from(status: Status) -> Self {
        Self(status)
    }
}

pub(crate) fn handle(
    hypervisor: &mut Hypervisor,
    registers: &mut Registers,
    processor: &Processor,
) -> Outcome {
    if let Some(outcome) = hypervisor.hook_left(registers) {
        return outcome;
    }
    let call = Call::from_number(registers.rax);
    let anybody = match call {
        Some(Call::Version) => true,
        Some(Call::Report) => !hypervisor.locked,
        _ => false,
    };
    if exits::privilege() != 0 && !anybody {
        return Outcome::Exception(exits::INVALID_OPCODE);
    }
    let answer = match call {
        Some(call) => hypervisor
            .call(processor, call, registers.rdi, registers.rsi)
            .map_err(|StatusOf(status)| status),
        None => Err(Status::Unknown),
    };
    (registers.rax, registers.rdx) = match answer {
        Ok(value) => (Status::Done as u64, value),
        Err(status) => (status as u64, 0),
    };
    Outcome::Done
}

impl Hypervisor {
    fn call(
        &mut self,
        processor: &Processor,
        call: Call,
        argument: u64,
        second: u64,
    ) -> Result<u64, StatusOf> {
        let changes = matches!(
            call,
            Call::LoadMonitor | Call::RegisterHook | Call::Protect | Call::Lockdown
        );
        if changes && self.locked {
            return Err(Status::Locked.into());
        }
        match call {
            Call::Version => Ok(VERSION),
            Call::Exits => {
                let count = usize::try_from(argument).ok().and_then(|n| self.counts.get(n));
                Ok(*count.ok_or(Status::Argument)?)
            }
            Call::Report => {
                self.report();
                Ok(0)
            }
            Call::LoadMonitor => self.load(processor, argument),
            Call::RegisterHook => self.register(argument, second),
            Call::Protect => self.protect(processor, argument),
            Call::Lockdown => {
                self.alone(processor, Self::lock);
                self.watch_apic(processor);
                Ok(0)
            }
            Call::Invoke => self.invoke(processor, argument),
            Call::MonitorHash => self.hash(argument).map_err(Into::into),
            Call::Handled => {
                let views = self.views.as_ref().ok_or(Status::Monitor)?;
                Ok(views
                    .sum(&mut self.pool, offset_of!(State, handled))
                    .ok_or(Status::Monitor)?)
            }
            Call::MonitorPage => {
                let views = self.views.as_ref().ok_or(Status::Monitor)?;
                let part = Part::from_number(second).ok_or(Status::Argument)?;
                let page = usize::try_from(argument).ok().and_then(|n| views.page(part, n));
                Ok(page.ok_or(Status::Argument)?)
            }
            // Not the guest's to call.
            Call::Drain => Err(Status::Unknown.into()),
            Call::Ended => Ok(self.ended),
        }
    }

    fn report(&self) {
        let _ = writeln!(Console, "vmsight-hypervisor: exits by reason");
        for (reason, &count) in (0..).zip(&self.counts) {
            if count != 0 {
                let _ = writeln!(
                    Console,
                    "vmsight-hypervisor: exits {reason:>3} {:<22} {count:>10}",
                    exit::name(reason)
                );
            }
        }
    }

    fn load(&mut self, processor: &Processor, stub: u64) -> Result<u64, StatusOf> {
        if self.views.is_some() || self.image.is_empty() {
            return Err(Status::Monitor.into());
        }
        if !exits::long_mode() || five_levels() {
            return Err(Status::Argument.into());
        }
        let first = guest_page(stub).ok_or(Status::Argument)?;
        let second = stub
            .checked_add(PAGE)
            .and_then(guest_page)
            .ok_or(Status::Argument)?;
        if first == second || first.max(second) >= self.ram_end {
            return Err(Status::Argument.into());
        }
        self.make_views(stub)?;
        self.alone(processor, |hypervisor| {
            // SAFETY: both are RAM of the guest, identity-mapped, which the guest offers; nothing of ours refers to them.
            unsafe {
                gate::stub(
                    &mut *(first as *mut gate::Page),
                    &mut *(second as *mut gate::Page),
                );
            }
            [first, second].into_iter().try_for_each(|page| {
                hypervisor.guest.map(
                    &mut hypervisor.pool,
                    page,
                    page,
                    Permissions::READ_EXECUTE,
                    MemoryType::WriteBack,
                )
            })
        })?;
        Ok(0)
    }

    /// Makes the monitor's views, with the stub at this guest-virtual address. Its pages are the caller's to fill and to
    /// protect, with all other processors stopped: from then on they have the views.
    pub(crate) fn make_views(&mut self, stub: u64) -> Result<(), Status> {
        let views = Views::new(
            &mut self.pool,
            self.image,
            self.guest,
            self.ram_end,
            Hypervisor::own(),
            stub,
            Processor::all().count(),
        )
        .map_err(|refused| match refused {
            Refused::Image => Status::Monitor,
            Refused::Stub => Status::Argument,
            Refused::Memory => Status::Memory,
        })?;
        for (list, number) in LISTS.iter().zip(0..) {
            list.store(views.own(number).map_or(0, |own| own.list), Ordering::Relaxed);
        }
        self.views = Some(views);
        Ok(())
    }

    fn register(&mut self, site: u64, handler: u64) -> Result<u64, StatusOf> {
        let views = self.views.as_ref().ok_or(Status::Monitor)?;
        let handler = Handler::from_number(handler).ok_or(Status::Argument)?;
        if site == 0 {
            return Err(Status::Argument.into());
        }
        match views.register(&mut self.pool, site, handler)? {
            true => Ok(0),
            false => Err(Status::Collision.into()),
        }
    }

    fn protect(&mut self, processor: &Processor, gpa: u64) -> Result<u64, StatusOf> {
        let present = self.guest.translate(&mut self.pool, gpa);
        if !gpa.is_multiple_of(PAGE) || present.is_none() || gpa >= self.ram_end {
            return Err(Status::Argument.into());
        }
        self.alone(processor, |hypervisor| {
            hypervisor.guest.map(
                &mut hypervisor.pool,
                gpa,
                gpa,
                Permissions::READ_EXECUTE,
                MemoryType::WriteBack,
            )
        })?;
        Ok(0)
    }

    pub(crate) fn lock(&mut self) {
        self.locked = true;
        msrs::lock(self.msr_bitmap);
        PIN.store(true, Ordering::Relaxed);
    }

    /// The monitor's handler, called out here: the checker's question, then what the handler does.
    fn invoke(&mut self, processor: &Processor, site: u64) -> Result<u64, StatusOf> {
        let views = self.views.as_ref().ok_or(Status::Monitor)?;
        views.handler(&mut self.pool, site).ok_or(Status::Argument)?;
        let number = processor.number();
        let frame = Frame {
            site,
            ..Frame::default()
        };
        let handled = views
            .state(&mut self.pool, number, offset_of!(State, handled))
            .ok_or(Status::Monitor)?;
        vmsight_sim_monitor::null(&frame, handled);
        Ok(0)
    }

    fn hash(&mut self, part: u64) -> Answer {
        let views = self.views.as_ref().ok_or(Status::Monitor)?;
        let mut digest = Sha256::new();
        for page in views.fixed() {
            for word in self.pool.page(page).ok_or(Status::Monitor)? {
                digest.update(word.to_le_bytes());
            }
        }
        let digest: [u8; 32] = digest.finalize().into();
        let quarter = usize::try_from(part)
            .ok()
            .and_then(|n| digest.chunks_exact(8).nth(n));
        let bytes: [u8; 8] = quarter.and_then(|q| q.try_into().ok()).ok_or(Status::Argument)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

/// Whether the guest's page tables have five levels.
pub(crate) fn five_levels() -> bool {
    vmcs::read(vmcs::GUEST_CR4) & CR4_LA57 != 0
}

/// The guest-physical address of a page of RAM that the guest has at a virtual address.
fn guest_page(address: u64) -> Option<u64> {
    let cr3 = Dtb(vmcs::read(vmcs::GUEST_CR3));
    let found = paging::walk(PagingMode::X86Level4, &GuestTables, cr3, Gva(address)).ok()?;
    let page = found.gpa.0 & !(PAGE - 1);
    let reachable = (PAGE..1 << 32).contains(&page) && !Hypervisor::own().contains(&page);
    reachable.then_some(page)
}

/// Has the processor's own VMCS say what the calls have changed for all, and forgets its translations.
pub(crate) fn settle(processor: &Processor) {
    let list = LISTS
        .get(processor.number())
        .map_or(0, |l| l.load(Ordering::Relaxed));
    if list != 0 {
        vmcs::write(vmcs::EPTP_LIST, list);
        vmcs::write(vmcs::VM_FUNCTIONS, EPTP_SWITCHING);
        // Neither may be delivered in a view that is not the guest's.
        vmcs::write(
            vmcs::EXCEPTION_BITMAP,
            1 << exits::DEBUG | 1 << exits::MACHINE_CHECK,
        );
        timer::start(timer::PERIOD);
    }
    if PIN.load(Ordering::Relaxed) && !processor.pinned.swap(true, Ordering::Relaxed) {
        for (mask, shadow, real, pinned) in [
            (vmcs::CR0_MASK, vmcs::CR0_SHADOW, vmcs::GUEST_CR0, CR0_PINNED),
            (vmcs::CR4_MASK, vmcs::CR4_SHADOW, vmcs::GUEST_CR4, CR4_PINNED),
        ] {
            // The shadow is what the guest reads of the bits in the mask: as they are.
            vmcs::write(shadow, vmcs::read(shadow) & !pinned | vmcs::read(real) & pinned);
            vmcs::write(mask, vmcs::read(mask) | pinned);
        }
    }
    invalidate();
}

/// Forgets all translations of this processor through extended page tables.
pub(crate) fn invalidate() {
    let descriptor = [0u64; 2];
    // SAFETY: type 2, all contexts, which the processor has: translations are made anew.
    unsafe { asm!("invept {}, [{}]", in(reg) 2u64, in(reg) &descriptor, options(nostack)) };
}
