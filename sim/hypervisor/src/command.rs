//! What the host may order over the second serial port, a word and a line's end each.

/// An order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Say how things are.
    Stats,
    /// Put the hooks in again.
    Hook,
    /// Take the hooks out.
    Unhook,
}

/// Longer lines are none of ours.
const MOST: usize = 16;

/// Lines, as they come in byte by byte.
#[derive(Debug)]
pub struct Commands {
    line: [u8; MOST],
    used: usize,
}

impl Commands {
    /// Nothing has come in yet.
    pub const NONE: Self = Self {
        line: [0; MOST],
        used: 0,
    };

    /// Takes a byte; gives what it ends. A line that is no order is left out.
    pub fn push(&mut self, byte: u8) -> Option<Command> {
        if !matches!(byte, b'\r' | b'\n') {
            if let Some(slot) = self.line.get_mut(self.used) {
                *slot = byte;
            }
            self.used = (self.used + 1).min(MOST + 1);
            return None;
        }
        let line = self.line.get(..self.used).unwrap_or_default();
        let command = match line {
            b"stats" => Some(Command::Stats),
            b"hook" => Some(Command::Hook),
            b"unhook" => Some(Command::Unhook),
            _ => None,
        };
        self.used = 0;
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(text: &[u8]) -> std::vec::Vec<Command> {
        let mut commands = Commands::NONE;
        text.iter().filter_map(|&byte| commands.push(byte)).collect()
    }

    #[test]
    fn lines_are_orders() {
        assert_eq!(
            all(b"stats\nunhook\r\nhook\n\nstat"),
            [Command::Stats, Command::Unhook, Command::Hook]
        );
    }

    #[test]
    fn what_is_no_order_is_left_out() {
        assert_eq!(all(b"statsunhookhookstatsunhook\nhooks\n stats\n\xff\n"), []);
        assert_eq!(all(b"0123456789abcdefstats\nstats\n"), [Command::Stats]);
    }
}
