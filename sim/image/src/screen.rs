//! The screen of a machine in Bochs: a terminal at which nobody sits. Bochs has no display that needs none, and the other one
//! of Debian's that needs no window serves the screen to the whole network.
//!
//! Debian's Bochs, which has its debugger on the terminal that it is given, opens a second one for the screen and says which.
//! What is drawn there has to be read: Bochs stops for good when the terminal is full. And it must not be echoed, which would
//! be keys that are pressed.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{OptionalActions, Winsize, tcgetattr, tcsetattr, tcsetwinsize};

use crate::Error;
use crate::error::io;

/// What Bochs has to have for it.
pub(crate) const PLUGIN: &str = "/usr/lib/x86_64-linux-gnu/bochs/plugins/libbx_term_gui.so";

/// As a text screen is, in characters.
const SIZE: Winsize = Winsize {
    ws_row: 25,
    ws_col: 80,
    ws_xpixel: 0,
    ws_ypixel: 0,
};

/// What Bochs says before the name of the terminal that it draws on.
const CONNECTED: &str = "Bochs connected to screen \"";
/// Where such terminals are.
const TERMINALS: &str = "/dev/pts/";
/// How often it is looked whether it has said so.
const PERIOD: Duration = Duration::from_millis(5);
/// Of what was drawn so many bytes are kept: the last, a few screens.
const KEPT: usize = 64 << 10;

/// What was drawn on a screen.
#[derive(Debug, Clone, Default)]
pub(crate) struct Screen {
    drawn: Arc<Mutex<Vec<u8>>>,
    /// Whoever draws has ended.
    is_over: Arc<AtomicBool>,
}

impl Screen {
    /// Gives a command a new pseudo-terminal for its standard input and output, and reads what it writes there until all who
    /// have it have ended.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub(crate) fn attach(command: &mut Command) -> Result<Self, Error> {
        let (ours, theirs) = open().map_err(|errno| io("open", "a pseudo-terminal")(errno.into()))?;
        let again = theirs.try_clone().map_err(io("use", "a pseudo-terminal"))?;
        // All that Bochs asks of it; Debian has its description wherever it has a shell. That which Bochs opens has no size.
        command
            .env("TERM", "linux")
            .env("LINES", SIZE.ws_row.to_string())
            .env("COLUMNS", SIZE.ws_col.to_string())
            .stdin(again)
            .stdout(theirs);
        let screen = Self::default();
        let kept = screen.clone();
        std::thread::spawn(move || {
            kept.read(ours.into());
            kept.is_over.store(true, Ordering::Relaxed);
        });
        Ok(screen)
    }

    /// Reads what is drawn on the terminal that Bochs opens itself, as soon as it says in the file `output` which that is.
    pub(crate) fn follow(&self, output: PathBuf) {
        let screen = self.clone();
        std::thread::spawn(move || {
            let path = loop {
                let said = fs::read(&output).unwrap_or_default();
                if let Some(path) = terminal(&String::from_utf8_lossy(&said)) {
                    break path.to_owned();
                }
                if screen.is_over.load(Ordering::Relaxed) {
                    return;
                }
                std::thread::sleep(PERIOD);
            };
            let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
            if let Ok(terminal) = rustix::fs::open(path, flags, Mode::empty()) {
                if let Ok(mut modes) = tcgetattr(&terminal) {
                    modes.make_raw();
                    // Where this is not possible the screen is read all the same.
                    let _ = tcsetattr(&terminal, OptionalActions::Now, &modes);
                }
                screen.read(terminal.into());
            }
        });
    }

    /// The last of it, as a terminal gets it. Bytes that are no UTF-8 are replaced.
    pub(crate) fn text(&self) -> String {
        let drawn = self.drawn.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&drawn).into_owned()
    }

    /// Reads a terminal to its end, which is an error, as it is for pseudo-terminals.
    fn read(&self, mut terminal: File) {
        let mut bytes = [0; 4096];
        while let Ok(length @ 1..) = terminal.read(&mut bytes) {
            let mut drawn = self.drawn.lock().unwrap_or_else(PoisonError::into_inner);
            drawn.extend_from_slice(bytes.get(..length).unwrap_or_default());
            let over = drawn.len().saturating_sub(KEPT);
            drawn.drain(..over);
        }
    }
}

/// The terminal that Bochs draws on, out of what it says on standard error.
fn terminal(said: &str) -> Option<&str> {
    let (path, _) = said.split_once(CONNECTED)?.1.split_once('"')?;
    path.starts_with(TERMINALS).then_some(path)
}

/// Both ends; neither is anybody's controlling terminal, or goes to another process unasked.
fn open() -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let ours = openpt(flags)?;
    grantpt(&ours)?;
    unlockpt(&ours)?;
    let theirs = ioctl_tiocgptpeer(&ours, flags)?;
    tcsetwinsize(&theirs, SIZE)?;
    Ok((ours, theirs))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_terminal_is_what_bochs_says() {
        let said = "00000000000i[      ] reading configuration\n\nBochs connected to screen \"/dev/pts/7\"\n";
        assert_eq!(terminal(said), Some("/dev/pts/7"));
        assert_eq!(terminal(said.trim_end().trim_end_matches('"')), None);
        assert_eq!(terminal(&said.replace("/dev/pts/", "/tmp/")), None);
        assert_eq!(terminal(""), None);
    }
}
