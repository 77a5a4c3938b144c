//! The screen of a machine in Bochs: a terminal that nobody looks at. Bochs has no display that needs none, and the other one
//! of Debian's that needs no window serves the screen to the whole network.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::process::Command;

use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

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

/// Gives a command a new pseudo-terminal for its standard input and output. What it writes there is dropped, until all who
/// have it have ended.
///
/// # Errors
/// [`Error::Io`]
pub(crate) fn attach(command: &mut Command) -> Result<(), Error> {
    let (ours, theirs) = open().map_err(|errno| io("open", "a pseudo-terminal")(errno.into()))?;
    let again = theirs.try_clone().map_err(io("use", "a pseudo-terminal"))?;
    // All that Bochs asks of it; Debian has its description wherever it has a shell.
    command.env("TERM", "linux").stdin(again).stdout(theirs);
    std::thread::spawn(move || {
        let mut screen = File::from(ours);
        let mut bytes = [0; 4096];
        // At the end this is an error, as it is for pseudo-terminals.
        while let Ok(1..) = screen.read(&mut bytes) {}
    });
    Ok(())
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
