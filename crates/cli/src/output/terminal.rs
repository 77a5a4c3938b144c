//! The terminal that standard output is, if it is one.

use std::io;

/// How many columns it has. `None` where it is no terminal, and where it does not say: a serial console reports none.
pub(super) fn width() -> Option<usize> {
    let size = rustix::termios::tcgetwinsize(io::stdout()).ok()?;
    (size.ws_col > 0).then_some(size.ws_col.into())
}
