//! The line to the host: the second serial port.

use core::fmt;

use vmsight_sim_hypervisor::command::{Command, Commands};
use vmsight_sim_hypervisor::ports;

use crate::machine::{inb, outb};

const DATA: u16 = ports::CHANNEL.start;
const STATUS: u16 = DATA + 5;
const SCRATCH: u16 = DATA + 7;
/// A port that is stuck is one that is not there: it must not hold the guest up at each exit.
const PATIENCE: u32 = 1_000_000;
/// Of the status: a byte has come; there is room; nothing is left to send.
const RECEIVED: u8 = 1;
const EMPTY: u8 = 0x20;
const SENT: u8 = 0x40;
/// Bytes that the port takes at once.
const FIFO: u8 = 16;
/// Bytes that are read at one exit, so that a host that sends and sends does not stop the guest.
const AT_ONCE: usize = 64;

/// The port, which is the guest's no longer.
#[derive(Debug)]
pub(crate) struct Channel {
    present: bool,
    room: u8,
    commands: Commands,
}

impl Channel {
    /// No port.
    pub(crate) const NONE: Self = Self {
        present: false,
        room: 0,
        commands: Commands::NONE,
    };

    /// 115200 baud, 8 bits, no parity, FIFOs on. Where there is no port nothing is said.
    pub(crate) fn open() -> Self {
        for (offset, value) in [
            (1, 0),
            (3, 0x80),
            (0, 1),
            (1, 0),
            (3, 3),
            (2, 7),
            (4, 3),
            (7, 0x5a),
        ] {
            // SAFETY: the second serial port's registers; where there is none, nothing happens.
            unsafe { outb(DATA + offset, value) };
        }
        Self {
            // SAFETY: a register of the port that holds what was written, and nothing else.
            present: unsafe { inb(SCRATCH) } == 0x5a,
            ..Self::NONE
        }
    }

    /// What the host has ordered since the last time, at most one thing.
    pub(crate) fn command(&mut self) -> Option<Command> {
        if !self.present {
            return None;
        }
        for _ in 0..AT_ONCE {
            // SAFETY: reading the status and what has come.
            let byte = unsafe {
                if inb(STATUS) & RECEIVED == 0 {
                    return None;
                }
                inb(DATA)
            };
            let command = self.commands.push(byte);
            if command.is_some() {
                return command;
            }
        }
        None
    }

    /// Waits until all has been sent.
    pub(crate) fn flush(&mut self) {
        // SAFETY: reading the status.
        let sent = |_| unsafe { inb(STATUS) } & SENT != 0;
        self.present = self.present && (0..PATIENCE).any(sent);
    }

    fn send(&mut self, byte: u8) {
        if self.room == 0 {
            // SAFETY: reading the status.
            self.present = (0..PATIENCE).any(|_| unsafe { inb(STATUS) } & EMPTY != 0);
            self.room = FIFO;
        }
        if self.present {
            self.room -= 1;
            // SAFETY: the port is ours.
            unsafe { outb(DATA, byte) };
        }
    }
}

impl fmt::Write for Channel {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if self.present {
            text.bytes().for_each(|byte| self.send(byte));
        }
        Ok(())
    }
}
