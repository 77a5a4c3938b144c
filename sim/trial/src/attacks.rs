//! What an attacker who has the guest's kernel can try. Each must leave the monitor as it was, and be seen to have been
//! stopped by what is said to stop it: the exit's reason is part of the finding.

use core::ptr::addr_of_mut;

use vmsight_sim_abi::{Call, Part, Status};

use crate::cost::ENTRY;
use crate::start::*;
use crate::tables::{self, GATE, Page, STUB, at, map, map_low};
use crate::{Trial, call};

/// Exit reasons.
const EXCEPTION: u64 = 0;
const TRIPLE_FAULT: u64 = 2;
const CONTROL_REGISTER: u64 = 28;
const RDMSR: u64 = 31;
const WRMSR: u64 = 32;
const EPT_VIOLATION: u64 = 48;
const VMFUNC: u64 = 59;
/// How an attempt ends: without an exception, or with one.
const RETURNS: u64 = 0;
const INVALID_OPCODE: u64 = 1 + 6;
const PROTECTION: u64 = 1 + 13;

/// Where the guest goes on after the monitor, in the gate's page.
const RETURNING: usize = 0x89;
/// The list of EPT pointers, in the gate's address space: the last entry of the table that nothing else uses.
const LIST: u64 = GATE & !(511 << 12) | 509 << 12;
/// The monitor's own addresses: its image, and the guest's memory.
const MONITOR: u64 = 0x1000_0000;
const MONITOR_ENTRY: u64 = MONITOR + 0x38;
const WINDOW: u64 = 1 << 46;
const CR4_PCIDE: u64 = 1 << 17;

/// Index of the gate's page in the last table.
const GATE_AT: usize = (GATE >> 12 & 511) as usize;

/// Code of the attacker's, at two pages in a row.
static mut CODE: [Page; 2] = [const { Page([0; 512]) }; 2];
/// Page tables of the attacker's.
static mut FORGED: [Page; 4] = [const { Page([0; 512]) }; 4];
/// A page with a hook in it.
static mut HOOKED: Page = Page([0; 512]);

/// What must not change, and what an attack may cost.
#[derive(Clone, Copy)]
pub(crate) struct State {
    pub(crate) handled: u64,
    pub(crate) hash: u64,
}

pub(crate) fn state() -> State {
    State {
        handled: call(Call::Handled, 0),
        hash: call(Call::MonitorHash, 0),
    }
}

impl Trial {
    /// An attack that must end as said after at least one exit of `reason`, with the handler called `handled` times.
    fn attack(
        &mut self,
        name: &str,
        reason: u64,
        end: u64,
        handled: u64,
        attack: unsafe extern "C" fn(u64),
        argument: u64,
    ) {
        let before = state();
        let exits = call(Call::Exits, reason);
        // SAFETY: an attack; whatever comes of it is what is asked.
        let ended = unsafe { attempt(attack, argument) };
        let exits = call(Call::Exits, reason) - exits;
        let after = state();
        let calls = after.handled - before.handled;
        let good = ended == end && exits > 0 && calls == handled && after.hash == before.hash;
        self.check(
            name,
            good,
            format_args!("exit {reason}: {exits}; end {ended}; handler called {calls} times"),
        );
    }

    /// A call through the gate that must come back, without a single exit of the kinds that stop attacks.
    fn survives(&mut self, name: &str, handled: u64, what: unsafe extern "C" fn(u64), argument: u64) {
        const STOPPING: [u64; 4] = [EXCEPTION, TRIPLE_FAULT, EPT_VIOLATION, VMFUNC];
        let before = state();
        let exits = STOPPING.map(|reason| call(Call::Exits, reason));
        // SAFETY: as above.
        let ended = unsafe { attempt(what, argument) };
        let after = state();
        let same = exits == STOPPING.map(|reason| call(Call::Exits, reason));
        let calls = after.handled - before.handled;
        let good = ended == RETURNS && same && calls == handled && after.hash == before.hash;
        self.check(
            name,
            good,
            format_args!("end {ended}; handler called {calls} times; stopped: {}", !same),
        );
    }
}

/// The attacker's two pages, as bytes.
fn code() -> &'static mut [u8; 8192] {
    // SAFETY: one processor, and no caller keeps it across a call of another.
    unsafe { &mut *addr_of_mut!(CODE).cast() }
}

/// Fills the attacker's pages: INT3, but for a way back where the monitor returns to.
fn prepare() {
    let code = code();
    code.fill(0xcc);
    let back = at(&raw const jump_back).to_le_bytes();
    let jump = [0xff, 0x25, 0, 0, 0, 0];
    code[4096 + RETURNING..][..6].copy_from_slice(&jump);
    code[4096 + RETURNING + 6..][..8].copy_from_slice(&back);
}

fn put(offset: usize, bytes: &[u8]) {
    code()[offset..offset + bytes.len()].copy_from_slice(bytes);
}

/// Registers for a jump: all of them `value` but those that VMFUNC and the return need.
fn registers(to: u64, value: u64, site: u64) -> Jump {
    [
        to,
        value,
        1,
        value,
        value,
        value,
        value,
        value,
        value,
        site,
        cr3(),
        value,
        2,
        0,
    ]
}

unsafe extern "C" fn read(address: u64) {
    // SAFETY: an attack.
    unsafe { (address as *const u64).read_volatile() };
}

pub(crate) unsafe extern "C" fn write(address: u64) {
    // SAFETY: an attack.
    unsafe { (address as *mut u64).write_volatile(0xcccc_cccc_cccc_cccc) };
}

unsafe extern "C" fn execute(address: u64) {
    // SAFETY: an attack.
    unsafe { core::mem::transmute::<u64, extern "C" fn()>(address)() };
}

pub(crate) unsafe extern "C" fn function_and_index(both: u64) {
    vmfunc((both >> 32) as u32, both as u32);
}

unsafe extern "C" fn jump(registers: u64) {
    // SAFETY: an attack.
    unsafe { jump_with(registers) };
}

pub(crate) unsafe extern "C" fn hook(_: u64) {
    // SAFETY: the stub is there.
    unsafe { hook_call(ENTRY) };
}

unsafe extern "C" fn stranger(_: u64) {
    // SAFETY: the stub is there.
    unsafe { stranger_call(ENTRY) };
}

unsafe extern "C" fn user(address: u64) {
    // SAFETY: ends in an exception.
    unsafe { user_call(address) };
}

unsafe extern "C" fn write_msr(number_and_value: u64) {
    // SAFETY: the address of a pair.
    let (number, value) = unsafe { *(number_and_value as *const (u32, u64)) };
    wrmsr(number, value);
}

unsafe extern "C" fn read_msr(number: u64) {
    rdmsr(number as u32);
}

/// All attacks.
pub(crate) fn all(trial: &mut Trial, site: u64) {
    let hooked = at(addr_of_mut!(HOOKED));
    call(Call::Protect, hooked);
    trial.attack(
        "write to a protected hook",
        EPT_VIOLATION,
        PROTECTION,
        0,
        write,
        hooked,
    );
    trial.attack("write to the stub", EPT_VIOLATION, PROTECTION, 0, write, ENTRY);
    call(Call::Lockdown, 0);
    memory(trial);
    functions(trial);
    page_ends(trial, site);
    every_offset(trial, site);
    page_tables(trial);
    debugging(trial, site);
    context(trial, site);
    pointers(trial);
    privileges(trial);
    pinned(trial);
    calls(trial);
    timer(trial);
    trial.survives("a hook after all this", 1, hook, 0);
}

/// The monitor's pages, as they are and by another name.
fn memory(trial: &mut Trial) {
    let before = state();
    let exits = call(Call::Exits, EPT_VIOLATION);
    let (mut tried, mut stopped) = (0, 0);
    let parts = [Part::Fixed, Part::Text, Part::Lists, Part::Data];
    for physical in parts.into_iter().flat_map(monitor_pages) {
        let _alias = map(STUB - 0x1000, physical);
        for address in [physical, STUB - 0x1000] {
            for way in [read, write, execute] {
                tried += 1;
                // SAFETY: an attack.
                stopped += u64::from(unsafe { attempt(way, address) } == PROTECTION);
            }
        }
    }
    let exits = call(Call::Exits, EPT_VIOLATION) - exits;
    let good = tried >= 60 && stopped == tried && exits == tried && state().hash == before.hash;
    trial.check(
        "read, write, execute each page of the monitor, also by an alias",
        good,
        format_args!("{stopped} of {tried} stopped; exit {EPT_VIOLATION}: {exits}"),
    );
}

/// VMFUNC from anywhere.
fn functions(trial: &mut Trial) {
    let mut vmfunc = |name, reason, function: u64, index: u64| {
        trial.attack(
            name,
            reason,
            INVALID_OPCODE,
            0,
            function_and_index,
            function << 32 | index,
        );
    };
    vmfunc("VMFUNC into the gate from elsewhere", TRIPLE_FAULT, 0, 1);
    vmfunc("A4: VMFUNC into the unarmed monitor", VMFUNC, 0, 2);
    vmfunc("VMFUNC with an empty entry of the list", VMFUNC, 0, 3);
    vmfunc("VMFUNC with index 512", VMFUNC, 0, 512);
    vmfunc("VMFUNC with the greatest index", VMFUNC, 0, 0xffff_ffff);
    vmfunc("VMFUNC of a function that there is not", VMFUNC, 1, 1);
}

/// Physical addresses of the pages of a part of the monitor.
pub(crate) fn monitor_pages(part: Part) -> impl Iterator<Item = u64> {
    (0..).map_while(move |n| {
        let (status, page) = vmcall_with(Call::MonitorPage as u64, n, part as u64);
        (status == Status::Done as u64).then_some(page)
    })
}

/// The monitor's stack, at the end of its data; on a machine of one processor.
fn monitor_stack() -> u64 {
    let pages = monitor_pages(Part::Text).chain(monitor_pages(Part::Data));
    MONITOR + 0x1000 * pages.count() as u64 - 8
}

/// The first of them.
fn monitor_page(part: Part) -> u64 {
    monitor_pages(part).next().unwrap_or(0)
}

/// A1 with all that the monitor's code needs mapped by the attacker: VMFUNC at the end of a page, the monitor's text next,
/// whose first instruction is a jump to its entry.
unsafe extern "C" fn forged_address_space(site: u64) {
    let own = at(addr_of_mut!(CODE));
    prepare();
    // mov rsp, r12; vmfunc, at the end of the first page.
    put(4096 - 6, &[0x4c, 0x89, 0xe4, 0x0f, 0x01, 0xd4]);
    map_low(MONITOR - 0x1000, own);
    let image = monitor_pages(Part::Text).chain(monitor_pages(Part::Data));
    for (page, address) in image.zip((MONITOR..).step_by(0x1000)) {
        map_low(address, page);
    }
    // Where the hypervisor lets the guest go on in the stub: flags, RCX, and the way back.
    let stack = [2, 0, at(&raw const jump_back)];
    let mut jumping = registers(MONITOR - 6, 0, site);
    jumping[11] = at(&raw const stack);
    // SAFETY: an attack.
    unsafe { jump_with(at(&raw const jumping)) };
}

/// A3: the attacker's page at the monitor's address, VMFUNC before the monitor's entry.
unsafe extern "C" fn own_page_at_the_monitor(site: u64) {
    prepare();
    put(0x35, &[0x0f, 0x01, 0xd4]);
    map_low(MONITOR, at(addr_of_mut!(CODE)));
    let jumping = registers(MONITOR_ENTRY - 3, 0, site);
    // SAFETY: an attack.
    unsafe { jump_with(at(&raw const jumping)) };
}

/// How often the handler is called by an attack.
pub(crate) fn control(name: &[u8; 2], site: u64) -> u64 {
    let handled = call(Call::Handled, 0);
    let attack = if name == b"A1" {
        forged_address_space
    } else {
        own_page_at_the_monitor
    };
    // SAFETY: an attack.
    unsafe { attempt(attack, site) };
    call(Call::Handled, 0) - handled
}

/// Where the gate goes on after the store that arms.
const ARMED: usize = 10;

/// Has a page of the attacker's, in page tables of his, at the gate's address: it ends in VMFUNC right before that. The
/// address of the page tables.
pub(crate) fn prepare_past_the_arming() -> u64 {
    prepare();
    put(4096 + ARMED - 3, &[0x0f, 0x01, 0xd4]);
    let forged = forge();
    // SAFETY: tables that nobody uses yet.
    unsafe { (*addr_of_mut!(FORGED))[3].0[GATE_AT] = (at(addr_of_mut!(CODE)) + 0x1000) | 3 };
    forged
}

/// Lands in the gate after the store that arms.
pub(crate) unsafe extern "C" fn past_the_arming(forged: u64) {
    let jumping = registers(GATE + ARMED as u64 - 3, WINDOW, 0);
    // SAFETY: an attack, under tables that differ from the real ones in the gate's page alone.
    unsafe {
        set_cr3(forged);
        jump_with(at(&jumping));
    }
}

/// Copies of the trial's own page tables on the way to the gate's page: the address of the first.
fn forge() -> u64 {
    // SAFETY: copies, in which only the last level is to differ.
    unsafe {
        let tables = &*addr_of_mut!(tables::TABLES);
        let forged = &mut *addr_of_mut!(FORGED);
        for (to, from) in forged.iter_mut().zip([0, 6, 7, 8]) {
            to.0 = tables[from].0;
        }
        let base = at(forged.as_ptr());
        forged[0].0[511] = (base + 0x1000) | 3;
        forged[1].0[510] = (base + 0x2000) | 3;
        forged[2].0[9] = (base + 0x3000) | 3;
        base
    }
}

/// VMFUNC as the last instruction of a page before one of the attacker's choice.
fn page_ends(trial: &mut Trial, site: u64) {
    let text = monitor_page(Part::Text);
    let own = at(addr_of_mut!(CODE));
    for (name, page, index, reason) in [
        (
            "A1: VMFUNC at the end of a page, the monitor's own page next",
            STUB - 0x3000,
            1,
            TRIPLE_FAULT,
        ),
        ("A1 into the unarmed monitor", STUB - 0x3000, 2, VMFUNC),
        (
            "A1 onto the gate's page tables",
            GATE & !(511 << 12) | 8 << 12,
            1,
            EPT_VIOLATION,
        ),
        ("A1 onto the list", LIST - 0x1000, 1, EPT_VIOLATION),
    ] {
        prepare();
        put(4096 - 3, &[0x0f, 0x01, 0xd4]);
        let _first = map(page, own);
        let _second = map(page + 0x1000, text);
        let mut jumping = registers(page + 0xffd, WINDOW, site);
        jumping[2] = index;
        trial.attack(name, reason, INVALID_OPCODE, 0, jump, at(&jumping));
    }
    trial.attack(
        "A1 with the monitor's whole address space forged",
        TRIPLE_FAULT,
        INVALID_OPCODE,
        0,
        forged_address_space,
        site,
    );
    prepare();
    put(0x35, &[0x0f, 0x01, 0xd4]);
    map_low(MONITOR, own);
    for (name, index, reason) in [
        (
            "A3: the attacker's page at the monitor's address",
            1,
            TRIPLE_FAULT,
        ),
        ("A3 into the unarmed monitor", 2, VMFUNC),
    ] {
        let mut jumping = registers(MONITOR_ENTRY - 3, WINDOW, site);
        jumping[2] = index;
        trial.attack(name, reason, INVALID_OPCODE, 0, jump, at(&jumping));
    }
}

/// The attacker's own page at the gate's address, so that VMFUNC lands on any of its bytes.
fn every_offset(trial: &mut Trial, site: u64) {
    let own = at(addr_of_mut!(CODE));
    let _first = map(STUB, own);
    let _second = map(GATE, own + 0x1000);
    // Who lands on the gate's load of CR3 loads what VMFUNC wanted in RCX, 1: page 0 must be tables then, for the guest to
    // go on. In the gate it makes no difference.
    tables::copy_to_page_zero();
    let real = cr3();
    for (name, value) in [
        ("landing on each byte of the gate, registers zero", 0),
        (
            "landing on each byte of the gate, registers at the list",
            LIST + 16,
        ),
        (
            "landing on each byte of the gate, registers at guest memory",
            WINDOW,
        ),
        ("landing on each byte of the gate, registers all ones", u64::MAX),
    ] {
        let before = state();
        let (mut reached, mut last) = (0, usize::MAX);
        for offset in 0..4096usize {
            prepare();
            put(4096 + offset - 3, &[0x0f, 0x01, 0xd4]);
            let mut jumping = registers(GATE + offset as u64 - 3, value, site);
            // One byte into the load of CR3 from R11 is one from RBX: nonsense there would be the guest's own end.
            jumping[1] = real;
            let handled = call(Call::Handled, 0);
            // SAFETY: an attack.
            unsafe {
                attempt(jump, at(&jumping));
                set_cr3(real);
            }
            if call(Call::Handled, 0) != handled {
                reached += 1;
                last = offset;
            }
        }
        let after = state();
        let good =
            reached == 1 && last == 0 && after.handled - before.handled == 1 && after.hash == before.hash;
        trial.check(
            name,
            good,
            format_args!("{reached} of 4096 reach the monitor, the last is {last:#x}"),
        );
    }
}

/// CR3 of the attacker's.
fn page_tables(trial: &mut Trial) {
    let real = cr3();
    let text = monitor_page(Part::Text);
    let forged = forge();
    unsafe extern "C" fn under(cr3: u64) {
        // SAFETY: tables that map what the real ones do, where it matters.
        unsafe {
            set_cr3(cr3);
            hook_call(ENTRY);
            assert_eq!(self::cr3(), cr3 & !(1 << 63), "CR3 is kept");
        }
    }
    trial.survives("a hook under other page tables", 1, under, forged);
    // SAFETY: back to what it was.
    unsafe { set_cr3(real) };
    // SAFETY: the gate's address becomes the monitor's text: what the monitor's view would run if it used these tables.
    unsafe { (*addr_of_mut!(FORGED))[3].0[GATE_AT] = text | 3 };
    trial.attack(
        "A5: page tables of the attacker's, read-write in the monitor's view",
        EPT_VIOLATION,
        PROTECTION,
        1,
        under,
        forged,
    );
    // SAFETY: as above; CR3 has no PCID when they are turned on and off.
    unsafe {
        set_cr3(real);
        set_cr4(cr4() | CR4_PCIDE);
    }
    trial.survives("a hook with a PCID", 1, under, real | 5);
    trial.survives("a hook with bit 63 of CR3", 1, under, real | 6 | 1 << 63);
    // SAFETY: as above.
    unsafe {
        set_cr3(real);
        set_cr4(cr4() & !CR4_PCIDE);
    }
}

/// Single step and breakpoints on what the gate does.
fn debugging(trial: &mut Trial, site: u64) {
    let own = at(addr_of_mut!(CODE));
    prepare();
    // push TF; popfq; vmfunc, up to the gate.
    put(4096 - 9, &[0x68, 0x02, 0x01, 0, 0, 0x9d, 0x0f, 0x01, 0xd4]);
    {
        let _first = map(STUB, own);
        let _second = map(GATE, own + 0x1000);
        let jumping = registers(GATE - 9, WINDOW, site);
        trial.attack(
            "single step into the gate",
            EXCEPTION,
            INVALID_OPCODE,
            0,
            jump,
            at(&jumping),
        );
    }
    const EXECUTED: u64 = 1;
    const WRITTEN: u64 = 1 | 1 << 16 | 3 << 18;
    for (name, address, condition, end) in [
        ("breakpoint on the gate", GATE, EXECUTED, INVALID_OPCODE),
        ("breakpoint after the arming", LIST + 16, WRITTEN, INVALID_OPCODE),
        (
            "breakpoint on the monitor's entry",
            MONITOR_ENTRY,
            EXECUTED,
            RETURNS,
        ),
    ] {
        // SAFETY: the trial itself executes and writes none of these.
        unsafe {
            set_dr0(address);
            set_dr7(0x400 | condition);
        }
        trial.attack(name, EXCEPTION, end, 0, hook, 0);
        // SAFETY: none.
        unsafe { set_dr7(0x400) };
        trial.attack(
            "the monitor is unarmed then",
            VMFUNC,
            INVALID_OPCODE,
            0,
            function_and_index,
            2,
        );
    }
}

/// Stack, flags, segments and tables of the attacker's choice.
fn context(trial: &mut Trial, site: u64) {
    let own = at(addr_of_mut!(CODE));
    for (name, rsp) in [
        ("stack pointer zero", 0),
        ("stack pointer in the monitor's stack", monitor_stack()),
        ("stack pointer not canonical", 1 << 62),
        ("stack pointer in the list", LIST + 24),
    ] {
        prepare();
        // mov rsp, r12; vmfunc
        put(4096 - 6, &[0x4c, 0x89, 0xe4, 0x0f, 0x01, 0xd4]);
        let _first = map(STUB, own);
        let _second = map(GATE, own + 0x1000);
        let mut jumping = registers(GATE - 6, WINDOW, site);
        jumping[11] = rsp;
        trial.survives(name, 1, jump, at(&jumping));
    }
    unsafe extern "C" fn flagged(flags: u64) {
        // SAFETY: the stub is there.
        let after = unsafe { flags_call(ENTRY, flags) };
        assert_eq!(after & 0x4_7ed5, flags & 0x4_7ed5, "flags are kept");
    }
    // Carry to overflow, direction, nested task, alignment check, I/O privilege.
    for flags in [0x0402, 0x4402, 0x4_0002, 0x4_7cd7] {
        trial.survives("flags", 1, flagged, flags);
    }
    unsafe extern "C" fn with_idt(base: u64) {
        tables::load_idt(base, 0xfff);
        // SAFETY: the stub is there.
        unsafe { hook_call(ENTRY) };
        let now = tables::idt();
        tables::load_idt(tables::own_idt(), 4095);
        assert_eq!(now, (base, 0xfff), "IDTR is kept");
    }
    trial.survives("IDT at the list", 1, with_idt, LIST);
    trial.survives("IDT in guest memory as the monitor sees it", 1, with_idt, WINDOW);
    unsafe extern "C" fn with_gdt(base: u64) {
        tables::load_gdt(Some(base));
        // SAFETY: the stub is there.
        unsafe { hook_call(ENTRY) };
        tables::load_gdt(None);
    }
    trial.survives("GDT in guest memory as the monitor sees it", 1, with_gdt, WINDOW);
    unsafe extern "C" fn with_gs(base: u64) {
        const GS_BASE: u32 = 0xc000_0101;
        wrmsr(GS_BASE, base);
        // SAFETY: the stub is there.
        unsafe { hook_call(ENTRY) };
        wrmsr(GS_BASE, 0);
    }
    trial.survives("GS at the monitor's state", 1, with_gs, MONITOR + 0x1000);
    trial.survives("a call from what is no registered hook", 0, stranger, 0);
}

/// Addresses that lead the monitor astray: into itself, nowhere, or round in a circle.
fn pointers(trial: &mut Trial) {
    let victim = core::cell::UnsafeCell::new(0x5555_5555_5555_5555u64);
    let good = at(victim.get());
    let pages = [Part::Text, Part::Data, Part::Lists].map(monitor_page);
    let [text, state_page, list] = pages;
    let _text = map(STUB - 0x1000, text);
    let _state = map(STUB - 0x2000, state_page);
    let _list = map(STUB - 0x3000, list);
    let _nowhere = map(STUB - 0x4000, 0xf_ffff_f000);
    // Page tables as memory, which lead to themselves.
    let _circle = map(STUB - 0x5000, cr3());
    let before = state();
    let stopping = [EXCEPTION, TRIPLE_FAULT, EPT_VIOLATION].map(|reason| call(Call::Exits, reason));
    let bad = [
        0x7000_0000_0000,
        1 << 63,
        u64::MAX,
        good + 1,
        monitor_stack(),
        LIST,
        WINDOW,
        STUB - 0x1000,
        STUB - 0x2000,
        STUB - 0x3000 + 16,
        STUB - 0x4000,
        GATE & !(511 << 12) | 7 << 12,
    ];
    for address in bad {
        // SAFETY: the handler leaves alone what it must not touch; that is what is asked.
        unsafe {
            copy_call(ENTRY, address, good);
            copy_call(ENTRY, good, address);
        }
    }
    // SAFETY: reads the trial's own tables.
    unsafe { copy_call(ENTRY, STUB - 0x5000, good + 1) };
    let after = state();
    let same = stopping == [EXCEPTION, TRIPLE_FAULT, EPT_VIOLATION].map(|reason| call(Call::Exits, reason));
    // SAFETY: nobody else has it.
    let untouched = unsafe { victim.get().read_volatile() } == 0x5555_5555_5555_5555;
    let handled = after.handled - before.handled;
    let calls = 2 * bad.len() as u64 + 1;
    let whole = pages == [Part::Text, Part::Data, Part::Lists].map(monitor_page);
    trial.check(
        "addresses that lead astray",
        same && untouched && whole && handled == calls && after.hash == before.hash,
        format_args!(
            "handler called {handled} times; nothing copied: {untouched}; stopped: {}",
            !same
        ),
    );
    trial.attack(
        "the monitor is unarmed then",
        VMFUNC,
        INVALID_OPCODE,
        0,
        function_and_index,
        2,
    );
}

/// From user mode.
fn privileges(trial: &mut Trial) {
    let vmfunc = at(&raw const user_vmfunc);
    trial.attack(
        "VMFUNC from code of 32 bits",
        TRIPLE_FAULT,
        INVALID_OPCODE,
        0,
        compat_vmfunc,
        0,
    );
    trial.attack(
        "VMFUNC from user mode",
        TRIPLE_FAULT,
        INVALID_OPCODE,
        0,
        user,
        vmfunc,
    );
    const VMCALL: u64 = 18;
    trial.attack(
        "VMCALL from user mode",
        VMCALL,
        INVALID_OPCODE,
        0,
        user,
        at(&raw const user_vmcall),
    );
}

/// Bits and registers that stay as they are.
fn pinned(trial: &mut Trial) {
    trial.attack(
        "CR0.WP",
        CONTROL_REGISTER,
        PROTECTION,
        0,
        set_cr0,
        cr0() ^ 1 << 16,
    );
    for (name, bit) in [
        ("CR4.PAE", 5),
        ("CR4.LA57", 12),
        ("CR4.VMXE", 13),
        ("CR4.SMEP", 20),
        ("CR4.SMAP", 21),
        ("CR4.CET", 23),
    ] {
        trial.attack(name, CONTROL_REGISTER, PROTECTION, 0, set_cr4, cr4() ^ 1 << bit);
    }
    const EFER: u32 = 0xc000_0080;
    const LSTAR: u32 = 0xc000_0082;
    const APIC_BASE: u32 = 0x1b;
    for (name, number, value) in [
        ("EFER", EFER, rdmsr(EFER) ^ 1 << 11),
        ("LSTAR", LSTAR, 0x1234_5000),
        ("DEBUGCTL: branch trace store", 0x1d9, 0xc0),
        ("DS_AREA", 0x600, MONITOR + 0x1000),
        (
            "APIC over the monitor",
            APIC_BASE,
            monitor_page(Part::Fixed) | rdmsr(APIC_BASE) & 0xfff,
        ),
        ("FEATURE_CONTROL", 0x3a, 5),
    ] {
        let pair = (number, value);
        trial.attack(name, WRMSR, PROTECTION, 0, write_msr, at(&raw const pair));
    }
    trial.attack("VMX capabilities", RDMSR, PROTECTION, 0, read_msr, 0x480);
}

/// Calls of the hypervisor after the lockdown.
fn calls(trial: &mut Trial) {
    let before = state();
    let changes = [
        Call::LoadMonitor,
        Call::RegisterHook,
        Call::Protect,
        Call::Lockdown,
    ];
    let locked = changes
        .iter()
        .filter(|&&c| vmcall(c as u64, STUB) == (Status::Locked as u64, 0))
        .count();
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    for turn in 0..2000 {
        let number = if turn % 2 == 0 {
            Call::Version as u64 + next() % 16
        } else {
            next()
        };
        // A report is long, and an invocation of the hook is what it says.
        if number != Call::Report as u64 && number != Call::Invoke as u64 {
            vmcall(number, next() >> (next() % 64));
        }
    }
    let after = state();
    let good = locked == changes.len() && after.hash == before.hash && after.handled == before.handled;
    trial.check(
        "calls after the lockdown",
        good,
        format_args!("{locked} of {} refused", changes.len()),
    );
}

/// Interrupts all the time.
fn timer(trial: &mut Trial) {
    const TURNS: u64 = 20_000;
    // The interrupt controllers: vectors from 32 on, only the timer's line; the timer: every 200 of its periods.
    for (port, value) in [
        (0x20, 0x11),
        (0x21, 32),
        (0x21, 4),
        (0x21, 1),
        (0x21, 0xfe),
        (0xa1, 0xff),
    ] {
        outb(port, value);
    }
    for (port, value) in [(0x43, 0x34), (0x40, 200), (0x40, 0)] {
        outb(port, value);
    }
    let before = state();
    // SAFETY: the timer's interrupt has a handler.
    unsafe { core::arch::asm!("sti", options(nostack)) };
    for _ in 0..TURNS {
        // SAFETY: the stub is there.
        unsafe { hook_call(ENTRY) };
    }
    // SAFETY: masked again.
    unsafe { core::arch::asm!("cli", options(nostack)) };
    outb(0x21, 0xff);
    // SAFETY: no interrupt changes it any more.
    let ticks = unsafe { (&raw const timer_ticks).read_volatile() };
    let handled = state().handled - before.handled;
    let good = handled == TURNS && ticks > 20;
    trial.check(
        "hooks while the timer interrupts",
        good,
        format_args!("{handled} of {TURNS} handled; {ticks} interrupts"),
    );
}
