//! What the time-stamp counter counts, and whether that may be called time.

use core::arch::asm;
use core::fmt;

use crate::cost::counted;
use crate::serial::Console;
use crate::start::{inb, outb, ticks};

/// The counter of the timer at ports 0x40 to 0x43 (hertz), and what a twentieth of a second is of it.
const TIMER: u64 = 1_193_182;
const TWENTIETH: u64 = TIMER / 20;

/// What the time-stamp counter counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Clock {
    /// Instructions: this is an emulator, in which nothing is said about time.
    Instructions,
    /// Time: so often a second.
    Time(u64),
    /// It is not known.
    Unknown,
}

impl Clock {
    /// Finds out. Time is measured only where somebody said that this is hardware, and neither the counter nor the firmware
    /// says otherwise.
    pub(crate) fn find(hardware: bool) -> Self {
        if counts_instructions() {
            if hardware {
                say("this is an emulator, in which instructions are counted and no time is measured");
            }
            return Self::Instructions;
        }
        if !hardware {
            return Self::Unknown;
        }
        if emulated_firmware() {
            say("the firmware is that of a virtual machine, whose time says nothing");
            return Self::Unknown;
        }
        match frequency() {
            Some(hertz) => Self::Time(hertz),
            None => {
                say("the timer does not count, with which the time-stamp counter is compared");
                Self::Unknown
            }
        }
    }

    /// What a count of so many turns is, for each.
    pub(crate) fn each(self, count: u64, turns: u64) -> Each {
        Each(self, count, turns)
    }
}

/// For each of some turns: instructions, or time.
pub(crate) struct Each(Clock, u64, u64);

impl fmt::Display for Each {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let &Self(clock, count, turns) = self;
        match clock {
            Clock::Instructions => write!(f, "{} instructions", count / turns),
            Clock::Time(hertz) => {
                // Some seconds at most, and 10 GHz: no overflow.
                let nanoseconds = u128::from(count) * 1_000_000_000 / u128::from(hertz * turns);
                write!(f, "{}.{:03} microseconds", nanoseconds / 1000, nanoseconds % 1000)
            }
            Clock::Unknown => {
                f.write_str("not measured: the time-stamp counter does not count instructions here")
            }
        }
    }
}

fn say(what: &str) {
    use fmt::Write;
    let _ = writeln!(Console, "trial: {what}");
}

/// Sixteen divisions, each of which waits for the one before. No processor does one in less than some ten cycles, of which
/// the counter counts at least two fifths, with the clock at its highest. An emulator that counts instructions counts one.
fn counts_instructions() -> bool {
    const DIVISIONS: u64 = 16;
    const TURNS: u64 = 1000;
    let divisions = counted(|| {
        // SAFETY: the quotient fits, for the upper half of what is divided is less than the divisor.
        unsafe {
            asm!(
                ".rept 16",
                "mov rdx, rsi",
                "div rcx",
                ".endr",
                inout("rax") u64::MAX => _,
                in("rcx") u64::MAX,
                in("rsi") u64::MAX - 1,
                out("rdx") _,
                options(nomem, nostack)
            )
        };
    });
    // The moves are instructions, too, and those of the loop.
    divisions / TURNS < DIVISIONS * 5 / 2
}

/// Whether the firmware is that of Bochs, which QEMU and what is built on it has, too: its ACPI tables say so.
fn emulated_firmware() -> bool {
    const AREA: core::ops::Range<usize> = 0xe_0000..0x10_0000;
    AREA.step_by(16).any(|at| {
        // SAFETY: read-only memory of a machine with a BIOS, mapped as it is (ACPI 6.5, 5.2.5.1).
        let pointer = unsafe { (at as *const [u8; 15]).read_volatile() };
        pointer.starts_with(b"RSD PTR ") && pointer.get(9..15) == Some(b"BOCHS ")
    })
}

/// How often the time-stamp counter counts in a second, by the timer's third counter.
fn frequency() -> Option<u64> {
    let [low, high] = (TWENTIETH as u16).to_le_bytes();
    // Counting on, the speaker off; count down once.
    outb(0x61, inb(0x61) & !2 | 1);
    outb(0x43, 0xb0);
    outb(0x42, low);
    outb(0x42, high);
    let begin = ticks();
    // Each read takes a microsecond or so.
    for _ in 0..1_000_000 {
        if inb(0x61) & 0x20 != 0 {
            let hertz = (ticks() - begin) * TIMER / TWENTIETH;
            return (hertz > 0).then_some(hertz);
        }
    }
    None
}
