//! Processes, threads, maps, environment, control groups.

use anyhow::{Context, Result};
use clap::Args;
use serde_json::{Map, Value};
use vmsight_linux::{Listing, Process, ProcessFields, process_tree};

use super::{found, print};
use crate::{
    Outcome,
    args::Global,
    output::{Format, Sheet},
    session::Session,
};

/// Processes.
#[derive(Args, Debug)]
#[command(after_help = "\
The kernel's task list is what is walked: a process that a rootkit has taken off it is not shown. Command line and
environment are read from the process's own memory, which it can change. <paged out> means that the guest has it in
swap, not that it is empty. JSON has every field unless --columns names some; only what is shown is read.")]
pub(crate) struct Ps {
    /// What to look into
    target: String,
    /// Only these processes
    #[arg(short, long, value_name = "PID,…", value_delimiter = ',')]
    pid: Vec<i32>,
    /// Leave kernel threads out
    #[arg(short = 'u', long)]
    user: bool,
}

const PS: &[&str] = &[
    "pid",
    "ppid",
    "uid",
    "state",
    "threads",
    "start_time",
    "name",
    "cmdline",
];

impl Ps {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let mut listing = session
            .kernel()?
            .processes(fields(global, PS))
            .context("listing processes")?;
        listing.rows.retain(|p| {
            (self.pid.is_empty() || self.pid.contains(&p.pid)) && !(self.user && p.kernel_thread)
        });
        let any = self.pid.is_empty() || !listing.rows.is_empty();
        // As ps does it: a process without a command line shows its name in brackets, in tables alone.
        if global.output == Format::Table {
            for row in &mut listing.rows {
                if row.cmdline.as_ref().is_none_or(String::is_empty) && !has_problem(row, "cmdline") {
                    row.cmdline = Some(format!("[{}]", row.name));
                }
            }
        }
        Ok(found(any, print(global, PS, listing)?))
    }
}

fn has_problem(row: &Process, field: &str) -> bool {
    row.problems.iter().any(|p| p.field == field)
}

/// What must be read for the columns that will be shown.
fn fields(global: &Global, table: &[&str]) -> ProcessFields {
    let names: Vec<&str> = match (&global.columns, global.output) {
        (Some(columns), _) => columns.iter().map(String::as_str).collect(),
        (None, Format::Table) => table.to_vec(),
        (None, _) => return ProcessFields::all(),
    };
    names
        .iter()
        .fold(ProcessFields::empty(), |all, name| all | field_of(name))
}

fn field_of(column: &str) -> ProcessFields {
    match column {
        "all" => ProcessFields::all(),
        "uid" | "euid" | "suid" | "fsuid" | "gid" | "egid" | "sgid" | "fsgid" | "groups" | "user_ns" => {
            ProcessFields::CREDENTIALS | ProcessFields::NAMESPACES
        }
        c if c.starts_with("cap_") => ProcessFields::CREDENTIALS,
        "seccomp" | "seccomp_filters" | "no_new_privs" => ProcessFields::SECCOMP,
        "start_time" | "start_ticks" => ProcessFields::START,
        "utime_ticks" | "stime_ticks" => ProcessFields::TIMES,
        "nice" | "priority" | "rt_priority" | "policy" | "cpu" => ProcessFields::SCHED,
        "threads" | "sid" | "pgrp" | "tty" | "oom_score_adj" => ProcessFields::SIGNAL,
        "ns_pid" | "ns_pids" => ProcessFields::NAMESPACES,
        c if c.ends_with("_ns") => ProcessFields::NAMESPACES,
        "cgroup" | "cgroups" | "container" | "container_runtime" => ProcessFields::CGROUP,
        c if c.starts_with("vm_") => ProcessFields::MEMORY,
        "cmdline" | "argv" => ProcessFields::CMDLINE,
        "environ" => ProcessFields::ENVIRON,
        "exe" => ProcessFields::EXE,
        "cwd" | "root" => ProcessFields::CWD,
        _ => ProcessFields::empty(),
    }
}

/// Processes as a tree.
#[derive(Args, Debug)]
#[command(
    after_help = "A process whose parents lead nowhere or in a circle is shown as a root of its own, marked with ?."
)]
pub(crate) struct Pstree {
    /// What to look into
    target: String,
    /// Leave kernel threads out
    #[arg(short = 'u', long)]
    user: bool,
}

const TREE: &[&str] = &["tree", "uid", "start_time", "cmdline"];

impl Pstree {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let mut listing = session
            .kernel()?
            .processes(fields(global, TREE))
            .context("listing processes")?;
        listing.rows.retain(|p| !(self.user && p.kernel_thread));
        let mut sheet = Sheet {
            columns: TREE,
            warnings: listing.warnings,
            ..Sheet::default()
        };
        for node in process_tree(&listing.rows) {
            let Some(process) = listing.rows.get(node.row) else {
                continue;
            };
            let Value::Object(fields) = serde_json::to_value(process)? else {
                continue;
            };
            let mut row = Map::new();
            row.insert("depth".into(), node.depth.into());
            row.insert("orphan".into(), node.orphan.into());
            let branch = branch(&node.more_siblings, node.depth);
            let mark = if node.orphan { "?" } else { "" };
            row.insert(
                "tree".into(),
                format!("{branch}{mark}{} {}", process.pid, process.name).into(),
            );
            row.extend(fields);
            sheet.rows.push(row);
        }
        global.style().print(&sheet)?;
        Ok(Outcome::Fine)
    }
}

/// The lines before a process: `│  ├─ `.
fn branch(more: &[bool], depth: usize) -> String {
    let mut text = String::new();
    // A guest can nest without end; nobody reads more than this.
    const SHOWN: usize = 64;
    let levels = more.get(more.len().saturating_sub(depth)..).unwrap_or(more);
    for (i, more) in levels.iter().take(SHOWN).enumerate() {
        let last = i + 1 == levels.len();
        text.push_str(match (last, more) {
            (true, true) => "├─ ",
            (true, false) => "└─ ",
            (false, true) => "│  ",
            (false, false) => "   ",
        });
    }
    if levels.len() > SHOWN {
        text.push_str("… ");
    }
    text
}

/// Threads.
#[derive(Args, Debug)]
pub(crate) struct Threads {
    /// What to look into
    target: String,
    /// Only threads of this process
    #[arg(short, long)]
    pid: Option<i32>,
}

impl Threads {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let listing = session.kernel()?.threads(self.pid).context("listing threads")?;
        print(
            global,
            &[
                "tid",
                "pid",
                "state",
                "cpu",
                "policy",
                "nice",
                "start_time",
                "name",
            ],
            listing,
        )
    }
}

/// Memory maps.
#[derive(Args, Debug)]
#[command(after_help = "As /proc/PID/maps shows them. Kernel threads have none.")]
pub(crate) struct Maps {
    /// What to look into
    target: String,
    /// Only these processes [default: all]
    #[arg(short, long, value_name = "PID,…", value_delimiter = ',')]
    pid: Vec<i32>,
}

impl Maps {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let kernel = session.kernel()?;
        let mut all = Listing::default();
        for pid in pids(kernel, &self.pid, &mut all)? {
            match kernel.maps(pid) {
                Ok(listing) => {
                    all.rows.extend(listing.rows);
                    listing.warnings.into_iter().for_each(|w| all.warn(w));
                }
                Err(error) if self.pid.is_empty() => all.warn(format!("maps of process {pid}: {error}")),
                Err(error) => {
                    return Err(error).with_context(|| format!("reading the maps of process {pid}"));
                }
            }
        }
        print(
            global,
            &[
                "pid", "start", "end", "perms", "offset", "device", "inode", "path",
            ],
            all,
        )
    }
}

/// The processes asked for, or all that have user memory.
fn pids<T>(kernel: &vmsight_linux::Kernel, asked: &[i32], into: &mut Listing<T>) -> Result<Vec<i32>> {
    if !asked.is_empty() {
        return Ok(asked.to_vec());
    }
    let listing = kernel
        .processes(ProcessFields::empty())
        .context("listing processes")?;
    listing.warnings.into_iter().for_each(|w| into.warn(w));
    Ok(listing
        .rows
        .iter()
        .filter(|p| p.mm.is_some())
        .map(|p| p.pid)
        .collect())
}

/// Environment of processes.
#[derive(Args, Debug)]
#[command(after_help = "\
What the process was started with, as it stands in its own memory now: a process can change it, and what it sets
with setenv(3) later lies elsewhere. -o json has one object a variable.")]
pub(crate) struct Env {
    /// What to look into
    target: String,
    /// Only these processes [default: all]
    #[arg(short, long, value_name = "PID,…", value_delimiter = ',')]
    pid: Vec<i32>,
    /// Only variables of this name
    #[arg(value_name = "NAME")]
    names: Vec<String>,
}

impl Env {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let listing = session
            .kernel()?
            .processes(ProcessFields::ENVIRON)
            .context("listing processes")?;
        let mut sheet = Sheet {
            columns: &["pid", "name", "variable", "value"],
            ..Sheet::default()
        };
        sheet.warnings = listing.warnings;
        let mut seen = Vec::new();
        for process in listing
            .rows
            .iter()
            .filter(|p| self.pid.is_empty() || self.pid.contains(&p.pid))
        {
            seen.push(process.pid);
            let row = |variable: Value, value: Value| {
                let mut row = Map::new();
                row.insert("pid".into(), process.pid.into());
                row.insert("name".into(), process.name.as_str().into());
                row.insert("variable".into(), variable);
                row.insert("value".into(), value);
                row
            };
            if let Some(problem) = process.problems.iter().find(|p| p.field == "environ") {
                let mut marked = row(Value::Null, Value::Null);
                marked.insert(
                    "problems".into(),
                    vec![format!("value: {}", problem.reason)].into(),
                );
                sheet.rows.push(marked);
            }
            for entry in process.environ.iter().flatten() {
                let (name, value) = entry.split_once('=').unwrap_or((entry, ""));
                if self.names.is_empty() || self.names.iter().any(|n| n == name) {
                    sheet.rows.push(row(name.into(), value.into()));
                }
            }
        }
        for pid in self.pid.iter().filter(|p| !seen.contains(p)) {
            sheet.warnings.push(format!("the guest has no process {pid}"));
        }
        global.style().print(&sheet)?;
        Ok(found(!sheet.rows.is_empty(), Outcome::Fine))
    }
}

/// Control groups.
#[derive(Args, Debug)]
pub(crate) struct Cgroups {
    /// What to look into
    target: String,
}

impl Cgroups {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let listing = session.kernel()?.cgroups().context("listing control groups")?;
        print(
            global,
            &[
                "hierarchy",
                "controllers",
                "tasks",
                "container_runtime",
                "container",
                "path",
            ],
            listing,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_tree() {
        assert_eq!(branch(&[], 0), "");
        assert_eq!(branch(&[false, true], 2), "   ├─ ");
        assert_eq!(branch(&[true, false], 2), "│  └─ ");
        assert!(branch(&vec![true; 100_000], 100_000).len() < 1000);
    }

    #[test]
    fn every_column_of_the_table_is_read() {
        for column in PS {
            if !["pid", "ppid", "state", "name"].contains(column) {
                assert!(!field_of(column).is_empty(), "{column}");
            }
        }
    }
}
