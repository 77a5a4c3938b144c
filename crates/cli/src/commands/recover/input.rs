//! `vmsight recover input`: keys that were pressed.

use anyhow::{Context, Result};
use clap::Args;
use vmsight_analysis::recover::input::{KeyEvent, key_events};

use super::show;
use crate::{Outcome, args::Global, output::Row, session::Session};

/// Keys that were pressed, as far as they still are in the buffers of programs that read keyboards.
#[derive(Args, Debug)]
#[command(after_help = "\
Every program that has a keyboard or a mouse open by evdev (X, Wayland's compositors, who logs keys) has a ring of its own in
the kernel, with the last 64 events or more. `waiting` is what it has not read yet; all else it has read and is left over.
A key is a place on the keyboard: which letter is on it, the layout says, which the input layer does not know.

What cannot be seen: keys that only went to a console, for which see `vmsight recover tty`; events in whose place others
came; keys of keyboards that nobody has open. A guest that has no such module has nobody who reads keyboards: that is
said, and the exit code is 1. Linux before 5.11 keeps no types of its modules.")]
pub(crate) struct Cmd {
    /// What to look into
    target: String,
    /// Only this device: event0
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    /// Only what its program has not read yet
    #[arg(long)]
    waiting: bool,
}

const COLUMNS: &[&str] = &["time", "device", "pids", "waiting", "action", "key"];

impl Row for KeyEvent {
    const COLUMNS: &'static [&'static str] = &[
        "device",
        "device_name",
        "time",
        "key",
        "action",
        "waiting",
        "pids",
        "address",
        "problems",
    ];
}

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let mut listing = key_events(session.kernel()?).context("reading the input devices")?;
        listing.rows.retain(|row| {
            self.device.as_ref().is_none_or(|device| *device == row.device) && (row.waiting || !self.waiting)
        });
        show(&session, COLUMNS, listing)
    }
}
