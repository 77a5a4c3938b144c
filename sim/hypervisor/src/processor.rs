//! What each processor has of its own, and how all but the first come to be under the hypervisor.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use vmsight_sim_hypervisor::PROCESSORS;
use vmsight_sim_hypervisor::ept::Table;
use vmsight_sim_hypervisor::vmx::Controls;

use crate::boot::{address, symbols};
use crate::guest::{Error, Hypervisor};
use crate::{apic, guest, host, stop, vmcs};

const STACK: usize = 0x1_0000;
/// For NMIs, which come at any instruction of the hypervisor.
const NMI_STACK: usize = 0x2000;

/// One processor.
#[repr(C)]
pub(crate) struct Processor {
    /// Its own address, for the entries of exits and NMIs.
    this: AtomicU64,
    /// Its number, 0 for the one that the firmware started.
    number: AtomicU32,
    /// What the others send interrupts to.
    pub(crate) apic: AtomicU32,
    /// It has a guest, or is about to.
    pub(crate) online: AtomicBool,
    /// Its guest waits for a SIPI. No NMI reaches it then.
    pub(crate) waiting: AtomicBool,
    /// It does nothing until it may go on.
    pub(crate) parked: AtomicBool,
    /// NMIs on their way to it that are not the guest's.
    pub(crate) ours: AtomicU32,
    /// NMIs for its guest that could not be delivered yet.
    pub(crate) nmis: AtomicU32,
    /// Which version of the guest's settings its VMCS has.
    pub(crate) settings: AtomicU64,
    /// Bits are pinned in its VMCS.
    pub(crate) pinned: AtomicBool,
    /// For how many cycles, about, the timer has found it in the same call of the monitor; 0: it has not.
    pub(crate) running: AtomicU64,
    /// How many calls there had been by then.
    pub(crate) handling: AtomicU64,
    memory: UnsafeCell<Memory>,
}

/// Memory that the processor itself uses, each at its place.
#[repr(C, align(4096))]
pub(crate) struct Memory {
    pub(crate) vmxon: Table,
    pub(crate) vmcs: Table,
    pub(crate) gdt: [u64; 5],
    pub(crate) tss: [u32; 26],
    stack: [u128; STACK / 16],
    nmi_stack: [u128; NMI_STACK / 16],
}

// SAFETY: the memory is used by its own processor alone, and by raw pointers; all else is atomic.
unsafe impl Sync for Processor {}

static ALL: [Processor; PROCESSORS] = [const {
    Processor {
        this: AtomicU64::new(0),
        number: AtomicU32::new(0),
        apic: AtomicU32::new(0),
        online: AtomicBool::new(false),
        waiting: AtomicBool::new(false),
        parked: AtomicBool::new(false),
        ours: AtomicU32::new(0),
        nmis: AtomicU32::new(0),
        settings: AtomicU64::new(0),
        pinned: AtomicBool::new(false),
        running: AtomicU64::new(0),
        handling: AtomicU64::new(0),
        memory: UnsafeCell::new(Memory {
            vmxon: Table::EMPTY,
            vmcs: Table::EMPTY,
            gdt: [0; 5],
            tss: [0; 26],
            stack: [0; STACK / 16],
            nmi_stack: [0; NMI_STACK / 16],
        }),
    }
}; PROCESSORS];

impl Processor {
    /// Those that are online.
    pub(crate) fn all() -> impl Iterator<Item = &'static Self> {
        ALL.iter().filter(|p| p.online.load(Ordering::SeqCst))
    }

    /// The next that is not used yet, for the processor with this APIC number.
    pub(crate) fn claim(apic: u32) -> Option<&'static Self> {
        let (number, free) = ALL
            .iter()
            .enumerate()
            .find(|(_, p)| p.this.load(Ordering::Relaxed) == 0)?;
        free.this
            .store(core::ptr::from_ref(free) as u64, Ordering::Relaxed);
        free.number.store(number as u32, Ordering::Relaxed);
        free.apic.store(apic, Ordering::Relaxed);
        Some(free)
    }

    pub(crate) fn number(&self) -> usize {
        self.number.load(Ordering::Relaxed) as usize
    }

    pub(crate) fn memory(&self) -> *mut Memory {
        self.memory.get()
    }

    /// Where exits begin to push.
    pub(crate) fn stack(&self) -> u64 {
        // SAFETY: an address inside of what there is.
        unsafe { (&raw const (*self.memory()).stack).add(1) as u64 }
    }

    /// The same for NMIs.
    pub(crate) fn nmi_stack(&self) -> u64 {
        // SAFETY: as above.
        unsafe { (&raw const (*self.memory()).nmi_stack).add(1) as u64 }
    }
}

/// Starts the processors with these APIC numbers: each waits in its guest for the guest's own SIPI then.
///
/// # Safety
/// `page` must be RAM of the first megabyte that nobody else uses; the hypervisor's own account must be complete.
pub(crate) unsafe fn start_others(page: u64, apics: impl Iterator<Item = u32>) -> Result<(), Error> {
    let begin = address(&symbols::startup);
    let length = address(&symbols::startup_end) - begin;
    // SAFETY: the caller's promise; the code is shorter than a page.
    unsafe { core::ptr::copy_nonoverlapping(begin as *const u8, page as *mut u8, length as usize) };
    for number in apics {
        let processor = Processor::claim(number).ok_or(Error::NoStart(number))?;
        // SAFETY: words of the boot code, which it reads when it is started.
        let (first, stack) = unsafe { (&symbols::starting, &symbols::starting_stack) };
        first.store(core::ptr::from_ref(processor) as u64, Ordering::SeqCst);
        stack.store(processor.stack(), Ordering::SeqCst);
        // INIT, 10 ms, and SIPI, twice (SDM vol. 3, 9.4.4). The first does for every processor of this century.
        apic::send(number, apic::INIT);
        apic::wait(10_000);
        let online = || processor.online.load(Ordering::SeqCst);
        for _ in 0..2 {
            // One too many would start its guest.
            if !online() {
                apic::send(number, apic::STARTUP | (page >> 12) as u32);
            }
            for _ in 0..1000 {
                if !online() {
                    apic::wait(100);
                }
            }
        }
        if !online() {
            return Err(Error::NoStart(number));
        }
    }
    Ok(())
}

/// Where the boot code of another processor goes on, on its own stack.
#[unsafe(no_mangle)]
extern "C" fn start_processor(processor: &'static Processor) -> ! {
    let controls: Controls = match host::able() {
        Ok(controls) => controls,
        Err(missing) => stop(format_args!("{}", Error::Processor(missing))),
    };
    // SAFETY: once for each processor, and the first one waits meanwhile.
    let Some(hypervisor) = (unsafe {
        host::enter_vmx(processor);
        Hypervisor::get()
    }) else {
        stop(format_args!("a processor before there is a guest"))
    };
    guest::first_state(&controls, hypervisor, guest::Begin::Waiting);
    processor.waiting.store(true, Ordering::SeqCst);
    processor.online.store(true, Ordering::SeqCst);
    // SAFETY: the VMCS is complete.
    unsafe { symbols::enter_guest(0) };
    let error = Error::Entry(vmcs::read(vmcs::INSTRUCTION_ERROR));
    stop(format_args!("{error}"))
}
