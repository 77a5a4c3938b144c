//! What the trial says, on the first serial port, which the hypervisor has set up.

use core::fmt;

use crate::start::{inb, outb};

const PORT: u16 = 0x3f8;

/// The port.
pub(crate) struct Console;

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            for _ in 0..100_000 {
                if inb(PORT + 5) & 0x20 != 0 {
                    break;
                }
            }
            outb(PORT, byte);
        }
        Ok(())
    }
}

/// Ends the run: Bochs stops when this is written to its port.
pub(crate) fn power_off() -> ! {
    // What was said last is to be sent first.
    while inb(PORT + 5) & 0x40 == 0 {}
    for byte in *b"Shutdown" {
        outb(0x8900, byte);
    }
    loop {
        core::hint::spin_loop();
    }
}
