//! The guest: its memory, its first state, and the hypervisor's own account of it.

use core::convert::Infallible;
use core::fmt::{self, Write};
use core::ops::Range;
use core::ptr::{addr_of, addr_of_mut};
use core::sync::atomic::Ordering;

use vmsight_arch::registers::control::{CR0_PE, CR0_PG, CR0_WP, CR4_CET, CR4_PAE, EFER_LMA, EFER_LME};
use vmsight_arch::registers::msr;
use vmsight_sim_hypervisor::e820::MemoryMap;
use vmsight_sim_hypervisor::ept::{Ept, Exhausted, MemoryType, Permissions, Pool, Table};
use vmsight_sim_hypervisor::linux::{ENTRY_64, Kernel, NotBootable};
use vmsight_sim_hypervisor::multiboot::Information;
use vmsight_sim_hypervisor::views::Views;
use vmsight_sim_hypervisor::vmx::{CR4_VMXE, Controls, Missing, entry};
use vmsight_sim_hypervisor::{LARGE, PAGE, PROCESSORS, acpi, exit};

use crate::boot::{address, symbols};
use crate::hooks::{Hooks, Options};
use crate::machine::rdmsr;
use crate::processor::{self, Processor};
use crate::serial::Console;
use crate::{apic, host, io, msrs, serial, stop, vmcs};

/// What is in the first megabyte for the kernel until it has its own: zero page, command line, GDT, page tables; and what
/// the other processors start with.
const LOW: Range<u64> = 0x1_0000..0x1_a000;
const ZERO_PAGE: u64 = LOW.start;
const COMMAND_LINE: u64 = LOW.start + PAGE;
const GDT: u64 = LOW.start + 2 * PAGE;
const TABLES: u64 = LOW.start + 3 * PAGE;
const STARTUP: u64 = LOW.end - PAGE;
/// How far the hypervisor's own page tables reach.
const REACH: u64 = 1 << 32;
/// Nothing but the first megabyte's leavings is below.
const ABOVE_LOW: u64 = 1 << 20;
/// The VGA's memory: no RAM whatever the firmware says.
const VGA: Range<u64> = 0xa_0000..0xc_0000;

/// Bits of CR0 and CR4 that the guest does not change: VMX operation needs them, or the gates.
const CR0_KEPT: u64 = 1 << 5;
const CR4_KEPT: u64 = CR4_VMXE | CR4_CET | CR4_PKS;
/// Protection keys of supervisor pages: without the key of ours, the gate could not be used.
const CR4_PKS: u64 = 1 << 24;
/// Activity states.
const WAIT_FOR_SIPI: u64 = 3;

const POOL_PAGES: usize = 1024;
const MONITOR_MOST: usize = 64 * 4096;

/// At a multiple of 2 MiB, by the linker script, so that it has as few large pages as can be.
#[unsafe(link_section = ".bss.pool")]
static mut POOL: [Table; POOL_PAGES] = [Table::EMPTY; POOL_PAGES];
static mut MSR_BITMAP: Table = Table::EMPTY;
static mut IO_BITMAPS: [Table; 2] = [Table::EMPTY; 2];
static mut HOOKS: Hooks = Hooks::NONE;
static mut MONITOR: [u8; MONITOR_MOST] = [0; MONITOR_MOST];
static mut HYPERVISOR: Option<Hypervisor> = None;

/// All that the hypervisor knows of its guest.
pub(crate) struct Hypervisor {
    pub(crate) pool: Pool<'static>,
    pub(crate) guest: Ept,
    pub(crate) ram_end: u64,
    pub(crate) views: Option<Views>,
    /// The monitor's image, as it was booted; empty where there is none.
    pub(crate) image: &'static [u8],
    pub(crate) msr_bitmap: &'static mut Table,
    /// What is hooked in the guest's kernel, if anything.
    pub(crate) hooks: &'static mut Hooks,
    pub(crate) locked: bool,
    /// Stores to the APIC leave: see [`crate::apic`].
    pub(crate) apic_watched: bool,
    /// Calls of the monitor that were ended since they took too long.
    pub(crate) ended: u64,
    pub(crate) counts: [u64; exit::COUNT],
}

impl Hypervisor {
    /// Where the hypervisor itself lies.
    pub(crate) fn own() -> Range<u64> {
        address(&symbols::image_start)..address(&symbols::image_end)
    }

    /// The one there is.
    ///
    /// # Safety
    /// No other reference to it may be alive: called once by who has the [`crate::park::Turn`].
    pub(crate) unsafe fn get() -> Option<&'static mut Self> {
        // SAFETY: the caller's promise.
        unsafe { (*addr_of_mut!(HYPERVISOR)).as_mut() }
    }
}

/// Why there is no guest.
#[derive(Debug)]
pub(crate) enum Error {
    Processor(Missing),
    Processors(u32),
    Later,
    NoStart(u32),
    NoKernel,
    Kernel(NotBootable),
    NoMemory(&'static str),
    Tables,
    CommandLine,
    Entry(u64),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Processor(Missing(what)) => write!(f, "this processor lacks {what}"),
            Self::Processors(count) => {
                write!(
                    f,
                    "this machine has {count} processors: {PROCESSORS} are supported"
                )
            }
            Self::Later => f.write_str(
                "this machine can get processors later: the guest would start them outside of the hypervisor",
            ),
            Self::NoStart(apic) => write!(f, "the processor with APIC number {apic} does not start"),
            Self::NoKernel => f.write_str("there is no module 'kernel'"),
            Self::Kernel(why) => write!(f, "the module 'kernel' cannot be started: {why:?}"),
            Self::NoMemory(what) => write!(f, "there is no memory for {what}"),
            Self::Tables => f.write_str("there are too few pages for the page tables of so much memory"),
            Self::CommandLine => f.write_str("the kernel's command line is longer than 2047 bytes"),
            Self::Entry(error) => write!(f, "entering the guest failed: VM-instruction error {error}"),
        }
    }
}

impl From<Exhausted> for Error {
    fn from(_: Exhausted) -> Self {
        Self::Tables
    }
}

/// Starts the guest. Comes back only with an error.
///
/// # Safety
/// `information` is the loader's, and this is called once.
pub(crate) unsafe fn boot(information: u32) -> Result<Infallible, Error> {
    // SAFETY: the loader's structure begins with its size and is as long as that.
    let bytes = unsafe {
        let size = (information as usize as *const u32).read();
        core::slice::from_raw_parts(information as usize as *const u8, size as usize)
    };
    let information = Information::new(bytes);
    let (controls, machine) = checked(information).inspect_err(|error| {
        let mut line = Line::default();
        let _ = write!(line, "vmsight-hypervisor: {error}");
        serial::show(line.text());
    })?;
    let mut map = information.memory_map();
    let own = Hypervisor::own();
    // What needs more than the map holds cannot be told to the guest.
    if !map.is_ram(&own) || !map.reserve(own.clone()) {
        return Err(Error::NoMemory("the hypervisor"));
    }
    if !map.is_ram(&LOW) {
        return Err(Error::NoMemory("what the kernel starts with"));
    }
    let (mut kernel, mut initrd, mut image, mut policy) = (None, 0..0, 0..0, None);
    let mut line = Line::default();
    let mut avoid = [const { 0..0 }; 8];
    for (module, slot) in information.modules().zip(avoid.iter_mut()) {
        if module.range.start < ABOVE_LOW || module.range.end > REACH {
            return Err(Error::NoMemory("a module"));
        }
        *slot = module.range.clone();
        match module.purpose() {
            ("kernel", rest) => {
                kernel = Some(module.range.clone());
                line.write_str(rest).map_err(|_| Error::CommandLine)?;
            }
            ("initrd", _) => initrd = module.range,
            ("monitor", _) => image = module.range,
            ("policy", rest) => policy = Some((module.range.clone(), Options::parse(rest))),
            _ => {}
        }
    }
    // SAFETY: modules lie where the loader says, which is RAM of nobody else.
    let (kernel, image) = unsafe { (module(kernel.ok_or(Error::NoKernel)?), module(image)) };
    let kernel = Kernel::parse(kernel).map_err(Error::Kernel)?;
    let at = kernel.place(&map, &avoid).ok_or(Error::NoMemory("the kernel"))?;
    if at < ABOVE_LOW || at + kernel.memory > REACH {
        return Err(Error::NoMemory("the kernel below 4 GiB"));
    }
    // SAFETY: `place` found RAM that nothing else is in, and the first megabyte's pages are free. All that was read from the
    // loader's information was copied before.
    unsafe {
        let code = kernel.code();
        core::ptr::copy_nonoverlapping(code.as_ptr(), at as *mut u8, code.len());
        first_megabyte(&kernel, &map, initrd, line.text())?;
    }
    let own_number = apic::own_number();
    let first = Processor::claim(own_number).ok_or(Error::NoStart(own_number))?;
    // SAFETY: once.
    let hypervisor = unsafe {
        host::enter_vmx(first);
        Hypervisor::new(&map, image)?
    };
    if let Some((range, options)) = policy {
        let sleep = information.rsdt().and_then(|at| acpi::sleep_ports(at, firmware));
        // SAFETY: as above; the bitmaps are the processor's alone from the guest's first entry on.
        unsafe {
            io::intercept(&mut *addr_of_mut!(IO_BITMAPS), sleep.unwrap_or_default());
            hypervisor.take_policy(module(range), options);
        }
        msrs::watch_entry(hypervisor.msr_bitmap);
    }
    first_state(&controls, hypervisor, Begin::At(at));
    first.online.store(true, Ordering::SeqCst);
    // SAFETY: the page is RAM, and nobody's until the guest runs.
    unsafe { processor::start_others(STARTUP, machine.apics().filter(|&n| n != own_number))? };
    // SAFETY: the reference from above is not used any more, and no guest runs.
    if let Some(hypervisor) = unsafe { Hypervisor::get() } {
        hypervisor.watch_apic(first);
    }
    let _ = writeln!(
        Console,
        "vmsight-hypervisor: kernel at {at:#x}, own memory {:#x} to {:#x}, processors {}",
        own.start,
        own.end,
        Processor::all().count()
    );
    // SAFETY: the VMCS is complete.
    unsafe { symbols::enter_guest(ZERO_PAGE) };
    Err(Error::Entry(vmcs::read(vmcs::INSTRUCTION_ERROR)))
}

/// The controls for this machine, and its processors, if it is one that can be used.
fn checked(information: Information<'_>) -> Result<(Controls, acpi::Processors), Error> {
    let controls = host::able().map_err(Error::Processor)?;
    // A machine without the tables has one processor as far as the guest can find out.
    let processors = information
        .rsdt()
        .and_then(|rsdt| acpi::processors(rsdt, firmware))
        .unwrap_or_default();
    if processors.enabled as usize > PROCESSORS {
        return Err(Error::Processors(processors.enabled));
    }
    if processors.later > 0 {
        return Err(Error::Later);
    }
    Ok((controls, processors))
}

/// Bytes of physical memory, in which the firmware has its tables.
fn firmware(at: u64, length: usize) -> Option<&'static [u8]> {
    /// No table that is read here is longer.
    const MOST: usize = 1 << 20;
    let end = at.checked_add(length as u64)?;
    // SAFETY: identity-mapped; there is no guest yet that could write there.
    (at != 0 && end <= REACH && length <= MOST)
        .then(|| unsafe { core::slice::from_raw_parts(at as *const u8, length) })
}

/// # Safety
/// The range is that of a module.
unsafe fn module(range: Range<u64>) -> &'static [u8] {
    // SAFETY: the caller's promise.
    unsafe {
        core::slice::from_raw_parts(
            range.start.max(1) as *const u8,
            (range.end - range.start) as usize,
        )
    }
}

/// # Safety
/// [`LOW`] must be free RAM.
unsafe fn first_megabyte(
    kernel: &Kernel<'_>,
    map: &MemoryMap,
    initrd: Range<u64>,
    line: &str,
) -> Result<(), Error> {
    // SAFETY: the caller's promise; all pages are inside LOW.
    unsafe {
        let page = &mut *(ZERO_PAGE as *mut [u8; 4096]);
        kernel
            .zero_page(page, map, initrd, (COMMAND_LINE, line.len()))
            .map_err(Error::Kernel)?;
        core::ptr::copy_nonoverlapping(line.as_ptr(), COMMAND_LINE as *mut u8, line.len());
        (COMMAND_LINE as *mut u8).add(line.len()).write(0);
        // Flat segments: code at 0x10, data at 0x18, as the protocol has it.
        *(GDT as *mut [u64; 4]) = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
        let tables = TABLES as *mut [u64; 512];
        tables.write([0; 512]);
        tables.add(1).write([0; 512]);
        (*tables)[0] = (TABLES + PAGE) | 3;
        for n in 0..4 {
            (*tables.add(1))[n] = (TABLES + (2 + n as u64) * PAGE) | 3;
            for (m, entry) in (*tables.add(2 + n)).iter_mut().enumerate() {
                *entry = ((n * 512 + m) as u64 * LARGE) | 0x83;
            }
        }
    }
    Ok(())
}

impl Hypervisor {
    /// # Safety
    /// Called once.
    unsafe fn new(map: &MemoryMap, image: &[u8]) -> Result<&'static mut Self, Error> {
        // SAFETY: once, so that each static has one reference.
        let (pool, bitmap, kept, hooks, hypervisor) = unsafe {
            let pages = addr_of_mut!(POOL);
            let pool = Pool::new(pages as u64, &mut *pages);
            (
                pool,
                &mut *addr_of_mut!(MSR_BITMAP),
                &mut *addr_of_mut!(MONITOR),
                &mut *addr_of_mut!(HOOKS),
                &mut *addr_of_mut!(HYPERVISOR),
            )
        };
        let mut pool = pool;
        // Copied out of the guest's reach. One that is too long is no monitor, and refused when it is to be loaded.
        let length = if image.len() <= kept.len() { image.len() } else { 0 };
        let kept = kept.get_mut(..length).unwrap_or_default();
        kept.copy_from_slice(image.get(..length).unwrap_or_default());
        let guest = guest_memory(&mut pool, map)?;
        msrs::bitmap(bitmap);
        Ok(hypervisor.insert(Self {
            pool,
            guest,
            ram_end: map.end_of_ram().next_multiple_of(LARGE),
            views: None,
            image: kept,
            msr_bitmap: bitmap,
            hooks,
            locked: false,
            apic_watched: false,
            ended: 0,
            counts: [0; exit::COUNT],
        }))
    }
}

/// All memory below 4 GiB and all RAM above, as it is, less the hypervisor.
fn guest_memory(pool: &mut Pool<'_>, map: &MemoryMap) -> Result<Ept, Exhausted> {
    let ept = Ept::new(pool)?;
    let end = map.end_of_ram().max(REACH);
    for gpa in (0..end).step_by(LARGE as usize) {
        let range = gpa..gpa + LARGE;
        let touches = map.touches_ram(&range);
        if gpa >= REACH && !touches {
            continue;
        }
        if map.is_ram(&range) || !touches {
            let kind = if touches {
                MemoryType::WriteBack
            } else {
                MemoryType::Uncacheable
            };
            ept.map_large(pool, gpa, Permissions::ALL, kind)?;
            continue;
        }
        for page in range.step_by(PAGE as usize) {
            let ram = map.touches_ram(&(page..page + PAGE)) && !VGA.contains(&page);
            let kind = if ram {
                MemoryType::WriteBack
            } else {
                MemoryType::Uncacheable
            };
            ept.map(pool, page, page, Permissions::ALL, kind)?;
        }
    }
    ept.remove(pool, Hypervisor::own())?;
    Ok(ept)
}

/// How a processor's guest begins.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Begin {
    /// As the 64-bit boot protocol wants it, with the kernel at this address.
    At(u64),
    /// As after an INIT: it waits for a SIPI.
    Waiting,
}

/// The guest's first state, and what makes it leave.
pub(crate) fn first_state(controls: &Controls, hypervisor: &Hypervisor, begin: Begin) {
    for (field, value) in [
        (vmcs::PIN_CONTROLS, controls.pin.into()),
        (vmcs::PRIMARY_CONTROLS, controls.primary.into()),
        (vmcs::SECONDARY_CONTROLS, controls.secondary.into()),
        (vmcs::EXIT_CONTROLS, controls.exit.into()),
        (vmcs::ENTRY_CONTROLS, controls.entry.into()),
        (vmcs::EXCEPTION_BITMAP, 0),
        (vmcs::CR3_TARGETS, 0),
        (vmcs::VPID, 1),
        (vmcs::EPT_POINTER, hypervisor.guest.pointer()),
        (vmcs::VM_FUNCTIONS, 0),
        (vmcs::EPTP_LIST, 0),
        (vmcs::IO_BITMAP_LOW, addr_of!(IO_BITMAPS) as u64),
        (vmcs::IO_BITMAP_HIGH, addr_of!(IO_BITMAPS) as u64 + PAGE),
        (vmcs::PREEMPTION_TIMER, u64::from(u32::MAX)),
        (vmcs::MSR_BITMAPS, addr_of!(*hypervisor.msr_bitmap) as u64),
        (vmcs::LINK_POINTER, u64::MAX),
        (vmcs::CR0_MASK, CR0_KEPT),
        (vmcs::CR4_MASK, CR4_KEPT),
        (vmcs::GUEST_PAT, rdmsr(msr::PAT)),
        (vmcs::ENTRY_EVENT, 0),
    ] {
        vmcs::write(field, value);
    }
    if controls.secondary & vmsight_sim_hypervisor::vmx::secondary::XSAVES != 0 {
        vmcs::write(vmcs::XSS_BITMAP, 0);
    }
    match begin {
        Begin::At(kernel) => boot_protocol(kernel),
        Begin::Waiting => after_init(),
    }
}

/// Registers as the 64-bit boot protocol wants them.
fn boot_protocol(at: u64) {
    const CODE: (u64, u64) = (0x10, 0xa09b);
    const DATA: (u64, u64) = (0x18, 0xc093);
    const UNUSABLE: (u64, u64) = (0, 1 << 16);
    const TASK: (u64, u64) = (0, 0x8b);
    // In the order of their fields: ES, CS, SS, DS, FS, GS, LDTR, TR.
    let segments = [DATA, CODE, DATA, DATA, DATA, DATA, UNUSABLE, TASK];
    for (n, (selector, access)) in (0..).step_by(2).zip(segments) {
        segment(n, selector, 0, 0xffff_ffff, access);
    }
    vmcs::write(vmcs::GUEST_ES_LIMIT + 14, 103);
    let (cr0, cr4) = (CR0_PE | CR0_PG | CR0_WP | CR0_KEPT | 1 << 4, CR4_PAE);
    registers([cr0, TABLES, cr4, EFER_LME | EFER_LMA], at + ENTRY_64, LOW.start);
    tables((GDT, 31), (0, 0));
    // What the processor itself keeps up later: the guest is in long mode.
    let controls = vmcs::read(vmcs::ENTRY_CONTROLS);
    vmcs::write(vmcs::ENTRY_CONTROLS, controls | u64::from(entry::GUEST_64));
}

/// Registers as an INIT leaves them (SDM vol. 3, table 11-1), in the state in which it waits for a SIPI.
pub(crate) fn after_init() {
    const DATA: u64 = 0x93;
    const CODE: u64 = 0x9b;
    const LOCAL: u64 = 0x82;
    const TASK: u64 = 0x8b;
    // With NE, which is kept: what sets it along with the mode, as kernels do, changes nothing that is.
    const CR0_AT_INIT: u64 = 0x6000_0010 | CR0_KEPT;
    let accesses = [DATA, CODE, DATA, DATA, DATA, DATA, LOCAL, TASK];
    for (n, access) in (0..).step_by(2).zip(accesses) {
        segment(n, 0, 0, 0xffff, access);
    }
    segment(2, 0xf000, 0xffff_0000, 0xffff, CODE);
    registers([CR0_AT_INIT, 0, 0, 0], 0xfff0, 0);
    tables((0, 0xffff), (0, 0xffff));
    let controls = vmcs::read(vmcs::ENTRY_CONTROLS);
    vmcs::write(vmcs::ENTRY_CONTROLS, controls & !u64::from(entry::GUEST_64));
    vmcs::write(vmcs::GUEST_ACTIVITY, WAIT_FOR_SIPI);
}

/// As a SIPI with this vector has it go on.
pub(crate) fn after_sipi(vector: u64) {
    segment(2, vector << 8, vector << 12, 0xffff, 0x9b);
    vmcs::write(vmcs::GUEST_RIP, 0);
    vmcs::write(vmcs::GUEST_ACTIVITY, 0);
    vmcs::write(vmcs::GUEST_INTERRUPTIBILITY, 0);
}

/// Segment `n`, twice its number in the order of the fields.
fn segment(n: u64, selector: u64, base: u64, limit: u64, access: u64) {
    vmcs::write(vmcs::GUEST_ES + n, selector);
    vmcs::write(vmcs::GUEST_ES_BASE + n, base);
    vmcs::write(vmcs::GUEST_ES_LIMIT + n, limit);
    vmcs::write(vmcs::GUEST_ES_ACCESS + n, access);
}

/// CR0, CR3, CR4 and EFER as the guest has them; RIP and RSP; all else as after an INIT. Of what is kept of the control
/// registers, nothing is pinned.
fn registers([cr0, cr3, cr4, efer]: [u64; 4], rip: u64, rsp: u64) {
    for (field, value) in [
        (vmcs::CR0_SHADOW, cr0),
        (vmcs::GUEST_CR0, cr0 | CR0_KEPT),
        (vmcs::GUEST_CR3, cr3),
        (vmcs::CR4_SHADOW, cr4),
        (vmcs::GUEST_CR4, cr4 | CR4_VMXE),
        (vmcs::GUEST_EFER, efer),
        (vmcs::GUEST_DEBUGCTL, 0),
        (vmcs::GUEST_DR7, 0x400),
        (vmcs::GUEST_RIP, rip),
        (vmcs::GUEST_RSP, rsp),
        (vmcs::GUEST_RFLAGS, 2),
        (vmcs::GUEST_INTERRUPTIBILITY, 0),
        (vmcs::GUEST_ACTIVITY, 0),
    ] {
        vmcs::write(field, value);
    }
}

/// Base and limit of GDT and IDT.
fn tables(gdt: (u64, u64), idt: (u64, u64)) {
    vmcs::write(vmcs::GUEST_GDTR_BASE, gdt.0);
    vmcs::write(vmcs::GUEST_GDTR_LIMIT, gdt.1);
    vmcs::write(vmcs::GUEST_IDTR_BASE, idt.0);
    vmcs::write(vmcs::GUEST_IDTR_LIMIT, idt.1);
}

/// VMRESUME failed: the guest's state is not one that can be.
#[unsafe(no_mangle)]
extern "C" fn resume_failed() -> ! {
    stop(format_args!(
        "going back into the guest failed: VM-instruction error {}",
        vmcs::read(vmcs::INSTRUCTION_ERROR)
    ))
}

/// A line of text, no longer than a kernel takes.
struct Line {
    bytes: [u8; 2047],
    used: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self {
            bytes: [0; 2047],
            used: 0,
        }
    }
}

impl Line {
    fn text(&self) -> &str {
        core::str::from_utf8(self.bytes.get(..self.used).unwrap_or_default()).unwrap_or_default()
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = self.used + text.len();
        self.bytes
            .get_mut(self.used..end)
            .ok_or(fmt::Error)?
            .copy_from_slice(text.as_bytes());
        self.used = end;
        Ok(())
    }
}

/// What a page of the guest's own page tables holds, for a walk through them.
pub(crate) struct GuestTables;

impl vmsight_arch::paging::TableMemory for GuestTables {
    fn entry_u64(&self, gpa: vmsight_arch::Gpa) -> Option<u64> {
        let own = Hypervisor::own();
        if gpa.0 >= REACH - 8 || own.contains(&gpa.0) || !gpa.0.is_multiple_of(8) {
            return None;
        }
        // SAFETY: identity-mapped, not ours; reading a device's register there is what the guest's own walk would do.
        Some(unsafe { (gpa.0.max(1) as *const u64).read_volatile() })
    }

    fn entry_u32(&self, _: vmsight_arch::Gpa) -> Option<u32> {
        None
    }
}
