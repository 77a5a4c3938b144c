//! `vmsight list`: the virtual machines of this host.

use anyhow::{Context, Result};
use clap::Args;
use serde_json::{Map, Value};

use crate::{
    Outcome,
    args::Global,
    commands::translate::human_size,
    output::{Format, Sheet, View},
};

/// The virtual machines of this host, and how each can be reached.
#[derive(Args, Debug)]
#[command(after_help = "\
Found from /proc alone: nothing is connected to and nothing changes. ACCESS says how the guest's memory can be
reached: shared (mapped), process (through the VMM process; needs CAP_SYS_PTRACE or the same user) or denied.
What may not be seen, such as processes of other users, is shown as such; as root everything is.
Exit code 1 if there is no VM.")]
pub(crate) struct Cmd {}

const VIEW: View = View {
    columns: &[
        "name",
        "pid",
        "vmm",
        "machine",
        "accelerator",
        "vcpus",
        "memory",
        "access",
        "control",
    ],
};

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let found = vmsight_target::list().context("listing the processes of this host")?;
        let mut sheet = Sheet::new(VIEW, &found, Vec::new())?;
        if global.output == Format::Table {
            sheet.rows.iter_mut().for_each(for_people);
        }
        global.style().print(&sheet)?;
        if found.is_empty() && global.output == Format::Table {
            eprintln!("vmsight: no virtual machine runs on this host, as far as may be seen");
        }
        Ok(if found.is_empty() {
            Outcome::Nothing
        } else {
            Outcome::Fine
        })
    }
}

/// What a table shows in one word each.
fn for_people(row: &mut Map<String, Value>) {
    let memory = row
        .get("memory_bytes")
        .and_then(Value::as_u64)
        .map_or(Value::Null, |b| human_size(b).into());
    let shared = row
        .get("shared_memory")
        .and_then(Value::as_array)
        .is_some_and(|s| !s.is_empty());
    let process = row.get("process_memory") == Some(&Value::Bool(true));
    row.insert("memory".into(), memory);
    row.insert(
        "access".into(),
        if shared {
            "shared"
        } else if process {
            "process"
        } else {
            "denied"
        }
        .into(),
    );
}
