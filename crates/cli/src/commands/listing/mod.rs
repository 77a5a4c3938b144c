//! The listings: what is in the guest, a row per object.

mod files;
mod network;
mod processes;

pub(crate) use files::{Lsmod, Lsof, Mounts};
pub(crate) use network::{Ifaces, Net, Unix};
pub(crate) use processes::{Cgroups, Env, Maps, Ps, Pstree, Threads};

use anyhow::Result;
use serde::Serialize;
use vmsight_linux::Listing;

use crate::{
    Outcome,
    args::Global,
    output::{Sheet, View},
};

/// Prints a listing with a view's columns.
fn print<T: Serialize>(
    global: &Global,
    columns: &'static [&'static str],
    listing: Listing<T>,
) -> Result<Outcome> {
    let sheet = Sheet::new(View { columns }, &listing.rows, listing.warnings)?;
    global.style().print(&sheet)?;
    Ok(Outcome::Fine)
}

/// Where one object was asked for by name and is not there, exit code 1.
fn found(any: bool, outcome: Outcome) -> Outcome {
    if any { outcome } else { Outcome::Nothing }
}
