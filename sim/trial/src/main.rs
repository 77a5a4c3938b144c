//! The trial's program. Each line it says is `trial: NAME: ok …` or `trial: NAME: FAILED …`, the last one is
//! `trial: N passed, N failed`.
#![no_std]
#![no_main]

mod attacks;
mod clock;
mod cost;
mod hooked;
mod processors;
mod serial;
mod start;
mod tables;

use core::fmt::Write;
use core::panic::PanicInfo;

use serial::{Console, power_off};
use start::vmcall;
use vmsight_sim_abi::{Call, Handler, SIGNATURE, SIGNATURE_LEAF, Status};

/// What was found so far.
pub(crate) struct Trial {
    passed: u32,
    failed: u32,
    /// [`Call::MonitorHash`] as it was at the last finding, from when on it must stay as it is.
    hash: Option<u64>,
}

impl Trial {
    /// From now on no finding is as it must be that changes the hash over what the monitor consists of.
    fn keep_hash(&mut self) {
        self.hash = Some(call(Call::MonitorHash, 0));
    }

    /// One finding: what it is about, whether it is as it must be, and the facts.
    pub(crate) fn check(&mut self, name: &str, good: bool, facts: core::fmt::Arguments<'_>) {
        let now = self.hash.map(|_| call(Call::MonitorHash, 0));
        let same = now == self.hash;
        let hash = match now {
            None => "",
            Some(_) if same => "; hash unchanged",
            Some(_) => "; hash CHANGED",
        };
        self.hash = now;
        let good = good && same;
        let word = if good { "ok" } else { "FAILED" };
        *(if good { &mut self.passed } else { &mut self.failed }) += 1;
        let _ = writeln!(Console, "trial: {name}: {word} {facts}{hash}");
    }
}

/// A call that must succeed.
pub(crate) fn call(call: Call, argument: u64) -> u64 {
    let (status, value) = vmcall(call as u64, argument);
    assert_eq!(status, Status::Done as u64, "{call:?}");
    value
}

/// # Safety
/// Called once, by the entry code, with the address of the zero page.
#[unsafe(no_mangle)]
unsafe extern "C" fn start(zero_page: u64) -> ! {
    // SAFETY: the boot protocol has the command line's address there, and ends the line with a zero.
    let line = unsafe {
        let line = ((zero_page + 0x228) as *const u32).read() as usize as *const [u8; 12];
        line.read()
    };
    let control = [line[0], line[1]];
    tables::initialise();
    if control == *b"RB" {
        reboot();
    }
    let mut trial = Trial {
        passed: 0,
        failed: 0,
        hash: None,
    };
    let leaf = core::arch::x86_64::__cpuid(SIGNATURE_LEAF);
    let mut signature = [0; 12];
    for (to, from) in signature.chunks_exact_mut(4).zip([leaf.ebx, leaf.ecx, leaf.edx]) {
        to.copy_from_slice(&from.to_le_bytes());
    }
    trial.check(
        "hypervisor",
        signature == SIGNATURE,
        format_args!("says who it is"),
    );
    if control == *b"HK" {
        hooked::all(&mut trial);
        finish(&trial)
    }
    let two = control == *b"2P";
    if two {
        processors::come(&mut trial);
    }
    call(Call::LoadMonitor, tables::STUB);
    let site = tables::at(&raw const start::hook_site);
    call(Call::RegisterHook, site);
    call(Call::RegisterHook, tables::at(&raw const start::flags_site));
    let copying = (tables::at(&raw const start::copy_site), Handler::Copy as u64);
    let (status, _) = start::vmcall_with(Call::RegisterHook as u64, copying.0, copying.1);
    let looking = (tables::at(&raw const start::kept_site), Handler::Process as u64);
    start::vmcall_with(Call::RegisterHook as u64, looking.0, looking.1);
    trial.check(
        "register",
        status == Status::Done as u64,
        format_args!("a hook with a handler"),
    );
    // A hypervisor without the view of the gate: does the attack that it is to stop succeed?
    if let b"A1" | b"A3" | b"A5" = &control {
        let reached = attacks::control(&control, site);
        let name = core::str::from_utf8(&control).unwrap_or_default();
        let _ = writeln!(Console, "trial: {name}: reached the monitor {reached} times");
        power_off()
    }
    if two {
        call(Call::Lockdown, 0);
        trial.keep_hash();
        processors::all(&mut trial);
    } else {
        cost::measure(&mut trial, site, line.starts_with(b"CO hardware"));
    }
    if !two && control != *b"CO" {
        trial.keep_hash();
        attacks::all(&mut trial, site);
    }
    call(Call::Report, 0);
    finish(&trial)
}

fn finish(trial: &Trial) -> ! {
    let Trial { passed, failed, .. } = trial;
    let _ = writeln!(Console, "trial: {passed} passed, {failed} failed");
    power_off()
}

/// Resets the machine twice, first as a keyboard controller does it, then by a triple fault; the third time it is enough.
/// How often it was reset is in a byte of the clock's memory that nobody uses.
fn reboot() -> ! {
    use start::{inb, outb};
    const TIMES: u8 = 0x7f;
    outb(0x70, TIMES);
    let times = inb(0x71);
    let _ = writeln!(Console, "trial: reset {times} times");
    outb(0x70, TIMES);
    outb(0x71, times.wrapping_add(1));
    match times {
        0 => outb(0x64, 0xfe),
        1 => {
            tables::load_idt(0, 0);
            // SAFETY: with no IDT, this is a triple fault.
            unsafe { core::arch::asm!("ud2", options(nostack)) };
        }
        _ => power_off(),
    }
    loop {
        core::hint::spin_loop();
    }
}

/// An exception that no attack was to end in.
#[unsafe(no_mangle)]
extern "C" fn unexpected(frame: &[u64; 4]) -> ! {
    let [vector, code, rip, _] = frame;
    let _ = writeln!(
        Console,
        "trial: exception {vector} at {rip:#x}, error code {code:#x}: FAILED"
    );
    power_off()
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let _ = writeln!(Console, "trial: {info}: FAILED");
    power_off()
}
