//! What an attacker who has the guest's kernel can try. Each must leave the monitor as it was, and be seen to have been
//! stopped by what is said to stop it: the exit's reason is part of the finding.

mod context;
mod gate;
mod kept;
mod memory;

use core::ptr::addr_of_mut;

pub(crate) use gate::{control, past_the_arming, prepare_past_the_arming};

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

/// How often a handler was called.
pub(crate) fn handled() -> u64 {
    call(Call::Handled, 0)
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
        let before = self::handled();
        let exits = call(Call::Exits, reason);
        // SAFETY: an attack; whatever comes of it is what is asked.
        let ended = unsafe { attempt(attack, argument) };
        let exits = call(Call::Exits, reason) - exits;
        let calls = self::handled() - before;
        let good = ended == end && exits > 0 && calls == handled;
        self.check(
            name,
            good,
            format_args!("exit {reason}: {exits}; end {ended}; handler called {calls} times"),
        );
    }

    /// A call through the gate that must come back, without a single exit of the kinds that stop attacks.
    fn survives(&mut self, name: &str, handled: u64, what: unsafe extern "C" fn(u64), argument: u64) {
        const STOPPING: [u64; 4] = [EXCEPTION, TRIPLE_FAULT, EPT_VIOLATION, VMFUNC];
        let before = self::handled();
        let exits = STOPPING.map(|reason| call(Call::Exits, reason));
        // SAFETY: as above.
        let ended = unsafe { attempt(what, argument) };
        let calls = self::handled() - before;
        let same = exits == STOPPING.map(|reason| call(Call::Exits, reason));
        let good = ended == RETURNS && same && calls == handled;
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
    let before = [
        "IDT at the list, before the lockdown",
        "IDT in guest memory as the monitor sees it, before the lockdown",
        "GDT in guest memory as the monitor sees it, before the lockdown",
        "TR: task state segment in guest memory as the monitor sees it, before the lockdown",
        "TR: task state segment at the monitor's state, before the lockdown",
        "TR: all stacks at the monitor's, an exception in the monitor, before the lockdown",
    ];
    context::descriptors(trial, before);
    call(Call::Lockdown, 0);
    memory::memory(trial);
    gate::functions(trial);
    gate::page_ends(trial, site);
    gate::every_offset(trial, site);
    gate::page_tables(trial);
    context::debugging(trial, site);
    context::ended_handler(trial);
    context::context(trial, site);
    let after = [
        "IDT at the list",
        "IDT in guest memory as the monitor sees it",
        "GDT in guest memory as the monitor sees it",
        "TR: task state segment in guest memory as the monitor sees it",
        "TR: task state segment at the monitor's state",
        "TR: all stacks at the monitor's, an exception in the monitor",
    ];
    context::descriptors(trial, after);
    memory::pointers(trial);
    kept::privileges(trial);
    kept::pinned(trial);
    kept::calls(trial);
    context::timer(trial);
    trial.survives("a hook after all this", 1, hook, 0);
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
