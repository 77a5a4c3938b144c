//! What the hypervisor says: on the first serial port and on the text screen.

use core::fmt;

use crate::machine::{inb, outb};

const PORT: u16 = 0x3f8;
const SCREEN: *mut u16 = 0xb_8000 as *mut u16;
const COLUMNS: usize = 80;
const ROWS: usize = 25;

/// 115200 baud, 8 bits, no parity.
pub(crate) fn initialise() {
    for (offset, value) in [(1, 0), (3, 0x80), (0, 1), (1, 0), (3, 3), (2, 7), (4, 3)] {
        // SAFETY: the first serial port's registers; where there is none, nothing happens.
        unsafe { outb(PORT + offset, value) };
    }
}

/// Writes to both. The guest may write to either at the same time: lines can mix, nothing else.
pub(crate) struct Console;

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                send(b'\r');
            }
            send(byte);
        }
        Ok(())
    }
}

fn send(byte: u8) {
    // Where there is no port the status is all ones, and where it is stuck the wait ends.
    for _ in 0..100_000 {
        // SAFETY: reading the line status takes error flags away from the guest, which has no use for them.
        if unsafe { inb(PORT + 5) } & 0x20 != 0 {
            break;
        }
    }
    // SAFETY: as above.
    unsafe { outb(PORT, byte) };
}

/// Shows the reason for which there is no guest on the screen, which until then is the loader's.
pub(crate) fn show(lines: &str) {
    for (row, line) in lines.lines().take(ROWS).enumerate() {
        for (column, byte) in line.bytes().take(COLUMNS).enumerate() {
            // SAFETY: inside the text screen's memory of 80 by 25.
            unsafe {
                SCREEN
                    .add(row * COLUMNS + column)
                    .write_volatile(0x0f00 | u16::from(byte))
            };
        }
    }
}
