//! A kernel whose hooks the hypervisor puts in by itself, and what that kernel can try against them. The test that boots it
//! brings the policy along, which has these addresses.

use core::arch::asm;
use core::ptr::addr_of_mut;

use vmsight_sim_abi::{Call, FENTRY_NOP};

use crate::start::{attempt, user_call, user_cpuid, wrmsr};
use crate::tables::{Page, at, map};
use crate::{Trial, call};

const LSTAR: u32 = 0xc000_0082;
const EPT_VIOLATION: u64 = 48;
/// How an attempt ends: without an exception, or with one.
const RETURNS: u64 = 0;
const PROTECTION: u64 = 1 + 13;
const PAGE_FAULT: u64 = 1 + 14;

/// The kernel's text: one page, and one of data after it.
const TEXT: u64 = 0xffff_ffff_8124_0000;
const ENTRY: u64 = TEXT + 0x200;
/// The hooked function: the NOP, and a return.
const HOOK: u64 = TEXT + 0x100;
/// Bytes of the text that nothing is about.
const FREE: u64 = TEXT + 0x800;
const END: u64 = TEXT + 0x1000;

static mut PAGES: [Page; 2] = [const { Page([0; 512]) }; 2];

/// Writes `size` bytes at an address: 1, 8, or by REP MOVSB any number of what lies at `from`.
#[derive(Clone, Copy)]
struct Store {
    to: u64,
    size: u64,
    value: u64,
}

unsafe extern "C" fn store(what: u64) {
    // SAFETY: the address of one.
    let Store { to, size, value } = unsafe { *(what as *const Store) };
    // SAFETY: an attack; the places are the trial's own.
    unsafe {
        match size {
            1 => asm!("mov [{}], {}", in(reg) to, in(reg_byte) value as u8, options(nostack)),
            8 => asm!("mov [{}], {}", in(reg) to, in(reg) value, options(nostack)),
            _ => {
                asm!("rep movsb", inout("rcx") size => _, inout("rsi") value => _, inout("rdi") to => _, options(nostack))
            }
        }
    }
}

unsafe extern "C" fn exchange(to: u64) {
    // SAFETY: as above.
    unsafe { asm!("xchg [{}], {:r}", in(reg) to, inout(reg) 0u64 => _, options(nostack)) };
}

unsafe extern "C" fn push(to: u64) {
    // SAFETY: as above; the stack is back before it is used.
    unsafe {
        asm!("mov {old}, rsp", "mov rsp, {to}", "push 0", "mov rsp, {old}", old = out(reg) _, to = in(reg) to);
    }
}

unsafe extern "C" fn hooked(function: u64) {
    // SAFETY: a function that returns.
    unsafe { asm!("call {}", in(reg) function, clobber_abi("C")) };
}

unsafe extern "C" fn user(code: u64) {
    // SAFETY: ends in an exception.
    unsafe { user_call(code) };
}

fn read<const N: usize>(address: u64) -> [u8; N] {
    // SAFETY: in the two pages.
    unsafe { (address as *const [u8; N]).read_volatile() }
}

impl Trial {
    /// Handled calls and exits over ten calls of the hooked function.
    fn calls(&mut self, name: &str) {
        let (handled, exits) = (call(Call::Handled, 0), exits());
        // SAFETY: a function that returns.
        let ended = unsafe { (0..10).map(|_| attempt(hooked, HOOK)).sum::<u64>() };
        let (handled, exits) = (call(Call::Handled, 0) - handled, self::exits() - exits);
        let good = ended == RETURNS && handled == 10 && exits == 0;
        self.check(name, good, format_args!("{handled} handled, {exits} exits"));
    }

    /// A write that must end as said, leave the hook as it is, and change `FREE` and what follows to `after`.
    fn write(
        &mut self,
        name: &str,
        write: unsafe extern "C" fn(u64),
        argument: u64,
        end: u64,
        after: Option<(u64, u64)>,
    ) {
        let (before, exits) = (read::<5>(HOOK), exits());
        // SAFETY: an attack; whatever comes of it is what is asked.
        let ended = unsafe { attempt(write, argument) };
        let exits = self::exits() - exits;
        let taken = after.is_none_or(|(at, value)| u64::from_le_bytes(read(at)) == value);
        let good = ended == end && exits > 0 && read::<5>(HOOK) == before && taken;
        self.check(
            name,
            good,
            format_args!("exit {EPT_VIOLATION}: {exits}; end {ended}; taken: {taken}"),
        );
    }
}

/// Exits for the guest's writes.
fn exits() -> u64 {
    call(Call::Exits, EPT_VIOLATION)
}

pub(crate) fn all(trial: &mut Trial) {
    let pages = at(addr_of_mut!(PAGES));
    let _text = map(TEXT, pages);
    let data = map(END, pages + 4096);
    // SAFETY: the trial's own pages.
    unsafe {
        (pages as *mut u8).write_bytes(0xcc, 8192);
        ((pages + (HOOK - TEXT)) as *mut [u8; 5]).write_volatile(FENTRY_NOP);
        ((pages + (HOOK - TEXT) + 5) as *mut u8).write_volatile(0xc3);
    }
    // What tells the hypervisor where the kernel is, and then that it is ready.
    wrmsr(LSTAR, ENTRY);
    // SAFETY: comes back by an exception.
    let ended = unsafe { attempt(user, at(&raw const user_cpuid)) };
    let bytes: [u8; 5] = read(HOOK);
    trial.check(
        "hooks that come by themselves",
        ended == PROTECTION && bytes[0] == 0xe8,
        format_args!("end {ended}; {bytes:x?}"),
    );
    trial.calls("calls of a function that was hooked");
    let mut store_at = |name, to, size, value, end, after| {
        let store_what = Store { to, size, value };
        trial.write(name, store, at(&raw const store_what), end, after);
    };
    let fill = 0xcccc_cccc_cccc_cccc;
    store_at(
        "a byte beside a hook",
        FREE,
        1,
        0x90,
        RETURNS,
        Some((FREE, fill & !0xff | 0x90)),
    );
    store_at("a byte of a hook", HOOK, 1, 0x90, RETURNS, None);
    store_at("the last byte of a hook", HOOK + 4, 1, 0x90, RETURNS, None);
    // Of these eight, the first three bytes are the hook's last, and all but the return are taken.
    let over = u64::from_le_bytes([0x90, 0x90, 0x90, 0xc3, 0x90, 0x90, 0x90, 0x90]);
    let [low, middle, high, ..] = [2, 3, 4].map(|n| u64::from(read::<1>(HOOK + n)[0]));
    let after = over & !0xff_ffff | low | middle << 8 | high << 16;
    store_at(
        "eight bytes, three of them a hook's",
        HOOK + 2,
        8,
        over,
        RETURNS,
        Some((HOOK + 2, after)),
    );
    let bytes = [0x90u8; 64];
    let from = at(&raw const bytes);
    store_at(
        "bytes by REP MOVSB up to a hook's end",
        HOOK - 16,
        21,
        from,
        RETURNS,
        Some((HOOK - 8, 0x9090_9090_9090_9090)),
    );
    store_at(
        "across the end of the page",
        END - 4,
        8,
        0x1122_3344_5566_7788,
        RETURNS,
        Some((END - 4, 0x1122_3344_5566_7788)),
    );
    drop(data);
    let before = u64::from_le_bytes(read(END - 8));
    store_at(
        "across the end, to where nothing is",
        END - 4,
        8,
        0,
        PAGE_FAULT,
        Some((END - 8, before)),
    );
    trial.write("an exchange", exchange, FREE, PROTECTION, None);
    trial.write("a push onto a hook", push, HOOK + 8, PROTECTION, None);
    trial.calls("calls after all this");
}
