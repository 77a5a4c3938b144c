//! `vmsight list`: the virtual machines of this host.

use anyhow::{Context, Result};
use clap::Args;
use serde_json::{Map, Value};

use crate::{
    Outcome,
    args::Global,
    commands::translate::human_size,
    output::{Format, PROBLEMS, Sheet, to_map},
};

/// The virtual machines of this host, and how each can be reached.
#[derive(Args, Debug)]
#[command(after_help = "\
Found from /proc alone: nothing is connected to and nothing changes. ACCESS says how the guest's memory can be
reached: shared (mapped), process (through the VMM process; needs CAP_SYS_PTRACE or the same user) or denied.
What may not be seen, such as processes of other users, is shown as such; as root everything is.
Exit code 1 if there is no VM.")]
pub(crate) struct Cmd {}

/// What a table shows.
const TABLE: &[&str] = &[
    "name",
    "pid",
    "vmm",
    "machine",
    "accelerator",
    "vcpus",
    "memory",
    "access",
    "control",
];

/// What is known of a VM. `memory` is `memory_bytes` for people; `shared_memory` are the files of its shared memory and
/// `shared_memory_bytes` how much of each is mapped.
const COLUMNS: &[&str] = &[
    "vmm",
    "pid",
    "name",
    "uuid",
    "machine",
    "accelerator",
    "memory_bytes",
    "memory",
    "vcpus",
    "managed_by",
    "access",
    "shared_memory",
    "shared_memory_bytes",
    "process_memory",
    "control",
    "uid",
    "started",
    "exe",
    PROBLEMS,
];

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let found = vmsight_target::list().context("listing the processes of this host")?;
        let mut sheet = Sheet::with_keys(COLUMNS, TABLE);
        for vm in &found {
            sheet.rows.push(flat(to_map(vm)?));
        }
        let style = global.style();
        style.print(&sheet)?;
        if found.is_empty() && global.output == Format::Table {
            style.warn("no virtual machine runs on this host, as far as may be seen");
        }
        Ok(if found.is_empty() {
            Outcome::Nothing
        } else {
            Outcome::Fine
        })
    }
}

/// A VM as a flat row: its pieces of shared memory become a list of files and a list of sizes.
fn flat(mut row: Map<String, Value>) -> Map<String, Value> {
    let pieces = row.get("shared_memory").and_then(Value::as_array);
    let each = |key: &str| pieces.map(|p| p.iter().map(|m| m[key].clone()).collect::<Vec<_>>());
    let (files, bytes) = (each("path"), each("bytes"));
    let access = if pieces.is_some_and(|p| !p.is_empty()) {
        "shared"
    } else if row.get("process_memory") == Some(&Value::Bool(true)) {
        "process"
    } else {
        "denied"
    };
    let memory = row.get("memory_bytes").and_then(Value::as_u64).map(human_size);
    row.insert("shared_memory".into(), files.into());
    row.insert("shared_memory_bytes".into(), bytes.into());
    row.insert("memory".into(), memory.into());
    row.insert("access".into(), access.into());
    row
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn row(shared: Value, process: bool) -> Map<String, Value> {
        let vm =
            json!({"pid": 1, "memory_bytes": 1 << 30, "shared_memory": shared, "process_memory": process});
        flat(vm.as_object().cloned().unwrap())
    }

    #[test]
    fn rows_are_flat() {
        let pieces = json!([{"path": "/memfd:ram", "bytes": 4096}, {"path": "/memfd:rom", "bytes": 8192}]);
        let row = row(pieces, true);
        assert_eq!(row["shared_memory"], json!(["/memfd:ram", "/memfd:rom"]));
        assert_eq!(row["shared_memory_bytes"], json!([4096, 8192]));
        assert_eq!(
            (&row["access"], &row["memory"]),
            (&json!("shared"), &json!("1 GiB"))
        );
        assert!(row.keys().all(|k| COLUMNS.contains(&k.as_str())));
        assert!(TABLE.iter().all(|k| COLUMNS.contains(k)));
    }

    #[test]
    fn how_memory_can_be_reached() {
        assert_eq!(row(json!([]), true)["access"], "process");
        assert_eq!(row(json!([]), true)["shared_memory"], json!([]));
        assert_eq!(row(Value::Null, false)["access"], "denied");
        assert_eq!(row(Value::Null, false)["shared_memory_bytes"], Value::Null);
    }
}
