//! Processes, threads, maps, environment, control groups.

use anyhow::{Context, Result};
use clap::Args;
use serde_json::{Map, Value};
use vmsight_linux::{Kernel, Listing, Process, ProcessFields, Thread, TreeNode, process_tree};

use super::{all_there, found, no_process, print};
use crate::{
    Outcome,
    args::Global,
    output::{Fields, Format, PROBLEMS, Record, Row, Sheet, Sink},
    session::Session,
};

/// Processes.
#[derive(Args, Debug)]
#[command(after_help = "\
The kernel's task list is what is walked: a process that a rootkit has taken off it is not shown. Command line and
environment are read from the process's own memory, which it can change: `kind` tells threads of the kernel from
processes that call themselves like one. <paged out> means that the guest has it in
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

/// The column that says in a word whose thread or process it is: `kernel` or `user`.
pub(super) const KIND: &str = "kind";

pub(super) const PS: &[&str] = &[
    "pid",
    "ppid",
    "uid",
    KIND,
    "state",
    "threads",
    "start_time",
    "name",
    "cmdline",
];

impl Ps {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let mut listing = asked_for(session.kernel()?, &self.pid, fields(global, PS))?;
        listing.rows.retain(|p| !(self.user && p.kernel_thread));
        let all = all_there(
            &self.pid,
            |pid| listing.rows.iter().any(|p| p.pid == pid),
            |pid| match self.user {
                true => format!("the guest has no process {pid} in user space"),
                false => no_process(pid),
            },
            &mut listing.warnings,
        );
        // As ps does it: a process without a command line shows its name in brackets, in tables alone.
        if global.output == Format::Table {
            for row in &mut listing.rows {
                if row.cmdline.as_ref().is_none_or(|text| text.is_empty()) && !has_problem(row, "cmdline") {
                    row.cmdline = Some(format!("[{}]", row.name).into());
                }
            }
        }
        session.print(&with_kind(PS, &listing.rows, listing.warnings))?;
        session.let_go(listing.rows);
        Ok(found(all))
    }
}

/// What is the kernel's or a user's.
trait Task: Row {
    fn is_of_kernel(&self) -> bool;

    /// What its [`KIND`] says.
    fn kind(&self) -> &'static str {
        if self.is_of_kernel() { "kernel" } else { "user" }
    }
}

impl Task for Process {
    fn is_of_kernel(&self) -> bool {
        self.kernel_thread
    }
}

impl Task for Thread {
    fn is_of_kernel(&self) -> bool {
        self.kernel_thread
    }
}

/// A process or thread, with its kind behind all else.
struct WithKind<'a, T>(&'a T);

impl<T: Task> Record for WithKind<'_, T> {
    fn fields<S: Sink>(&self, to: &mut Fields<'_, S>) -> serde_json::Result<()> {
        self.0.fields(to)?;
        to.field(KIND, self.0.kind())
    }
}

/// A sheet of processes or threads, with their kind.
fn with_kind<'a, T: Task>(
    columns: &'static [&'static str],
    rows: &'a [T],
    warnings: Vec<String>,
) -> Sheet<WithKind<'a, T>> {
    Sheet {
        keys: [T::COLUMNS, &[KIND]].concat(),
        columns,
        rows: rows.iter().map(WithKind).collect(),
        warnings,
    }
}

/// All processes, or those with these pids. Nothing of the others is read: what they claim to hold takes no time and no room.
fn asked_for(kernel: &Kernel, pids: &[i32], fields: ProcessFields) -> Result<Listing<Process>> {
    let listing = match pids {
        [] => kernel.processes(fields),
        pids => kernel.processes_of(pids, fields),
    };
    listing.context("listing processes")
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
        "uid" | "euid" | "suid" | "fsuid" | "gid" | "egid" | "sgid" | "fsgid" => ProcessFields::IDS,
        "groups" => ProcessFields::GROUPS,
        "user_ns" => ProcessFields::USER_NS,
        c if c.starts_with("cap_") => ProcessFields::CAPABILITIES,
        "seccomp" | "seccomp_filters" | "no_new_privs" => ProcessFields::SECCOMP,
        "start_time" | "start_ticks" => ProcessFields::START,
        "utime_ticks" | "stime_ticks" => ProcessFields::TIMES,
        "nice" | "priority" | "rt_priority" | "policy" | "cpu" => ProcessFields::SCHED,
        "threads" => ProcessFields::THREADS,
        "sid" | "pgrp" | "tty" => ProcessFields::SESSION,
        "oom_score_adj" => ProcessFields::OOM,
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

const TREE: &[&str] = &["tree", "uid", KIND, "start_time", "cmdline"];

impl Pstree {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let mut listing = session
            .kernel()?
            .processes(fields(global, TREE))
            .context("listing processes")?;
        listing.rows.retain(|p| !(self.user && p.kernel_thread));
        let keys = [&["depth", "orphan", "tree"], Process::COLUMNS, &[KIND]].concat();
        let nodes = process_tree(&listing.rows);
        let place = |node: TreeNode| {
            let process = listing.rows.get(node.row)?;
            Some(Placed { node, process })
        };
        let sheet = Sheet {
            keys,
            columns: TREE,
            rows: nodes.into_iter().filter_map(place).collect(),
            warnings: listing.warnings,
        };
        session.print(&sheet)?;
        Ok(Outcome::Fine)
    }
}

/// A process at its place in the tree, which comes before all else.
struct Placed<'a> {
    node: TreeNode,
    process: &'a Process,
}

impl Record for Placed<'_> {
    fn fields<S: Sink>(&self, to: &mut Fields<'_, S>) -> serde_json::Result<()> {
        let (node, process) = (&self.node, self.process);
        to.field("depth", &node.depth)?;
        to.field("orphan", &node.orphan)?;
        let branch = branch(&node.more_siblings, node.depth);
        let mark = if node.orphan { "?" } else { "" };
        to.field("tree", &format!("{branch}{mark}{} {}", process.pid, process.name))?;
        WithKind(process).fields(to)
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
        let any = self.pid.is_none() || !listing.rows.is_empty();
        session.print(&with_kind(THREADS, &listing.rows, listing.warnings))?;
        session.let_go(listing.rows);
        Ok(found(any))
    }
}

pub(super) const THREADS: &[&str] = &[
    "tid",
    "pid",
    KIND,
    "state",
    "cpu",
    "policy",
    "nice",
    "start_time",
    "name",
];

/// Memory maps.
#[derive(Args, Debug)]
#[command(
    after_help = "As /proc/PID/maps shows them. Kernel threads have none: asked for one, the exit code is 1."
)]
pub(crate) struct Maps {
    /// What to look into
    target: String,
    /// Only these processes [default: all]
    #[arg(short, long, value_name = "PID,…", value_delimiter = ',')]
    pid: Vec<i32>,
}

pub(super) const MAPS: &[&str] = &[
    "pid", "start", "end", "perms", "offset", "device", "inode", "path",
];

impl Maps {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let kernel = session.kernel()?;
        let mut all = Listing::default();
        let mut complete = true;
        if self.pid.is_empty() {
            let processes = kernel.all_maps().context("listing memory maps")?;
            processes.warnings.into_iter().for_each(|w| all.warn(w));
            for process in processes.rows {
                all.rows.extend(process.maps.rows);
                process.maps.warnings.into_iter().for_each(|w| all.warn(w));
            }
        } else {
            let processes = asked_for(kernel, &self.pid, ProcessFields::empty())?;
            processes.warnings.into_iter().for_each(|w| all.warn(w));
            let row = |pid: i32| processes.rows.iter().find(|p| p.pid == pid);
            let with_memory = |pid: i32| row(pid).is_some_and(|p| p.mm.is_some());
            let missing = |pid: i32| match row(pid) {
                None => no_process(pid),
                Some(p) if p.kernel_thread => {
                    format!("process {pid} is a kernel thread: it has no memory of its own")
                }
                Some(_) => format!("process {pid} has no memory: it has ended"),
            };
            complete = all_there(&self.pid, with_memory, missing, &mut all.warnings);
            for &pid in self.pid.iter().filter(|pid| with_memory(**pid)) {
                let listing = kernel
                    .maps(pid)
                    .with_context(|| format!("reading the maps of process {pid}"))?;
                all.rows.extend(listing.rows);
                listing.warnings.into_iter().for_each(|w| all.warn(w));
            }
        }
        print(&session, MAPS, all)?;
        Ok(found(complete))
    }
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
        let listing = asked_for(session.kernel()?, &self.pid, ProcessFields::ENVIRON)?;
        let keys = ["pid", "name", "variable", "value", PROBLEMS];
        let mut sheet = Sheet::with_keys(&keys, &["pid", "name", "variable", "value"]);
        sheet.warnings = listing.warnings;
        let mut seen = Vec::new();
        for process in &listing.rows {
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
                marked.insert(PROBLEMS.into(), vec![format!("value: {}", problem.reason)].into());
                sheet.rows.push(marked);
            }
            for entry in process.details().environ.iter().flatten() {
                let (name, value) = entry.split_once('=').unwrap_or((entry, ""));
                if self.names.is_empty() || self.names.iter().any(|n| n == name) {
                    sheet.rows.push(row(name.into(), value.into()));
                }
            }
        }
        let all = all_there(
            &self.pid,
            |pid| seen.contains(&pid),
            no_process,
            &mut sheet.warnings,
        );
        let narrowed = !self.pid.is_empty() || !self.names.is_empty();
        let any = !sheet.rows.is_empty() || !narrowed;
        if all && !any {
            sheet.warnings.push("no such variables were found".to_owned());
        }
        session.print(&sheet)?;
        Ok(found(all && any))
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
        print(&session, CGROUPS, listing)?;
        Ok(Outcome::Fine)
    }
}

pub(super) const CGROUPS: &[&str] = &[
    "hierarchy",
    "controllers",
    "tasks",
    "container_runtime",
    "container",
    "path",
];

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

    /// A process may call itself what it likes: whose thread it is, is another column.
    #[test]
    fn a_process_named_like_a_kernel_thread_is_still_a_process() {
        #[derive(serde::Serialize)]
        struct Named {
            cmdline: &'static str,
            kernel_thread: bool,
        }
        impl Row for Named {
            const COLUMNS: &'static [&'static str] = &["cmdline", "kernel_thread"];
        }
        impl Task for Named {
            fn is_of_kernel(&self) -> bool {
                self.kernel_thread
            }
        }
        let rows = [true, false].map(|kernel_thread| Named {
            cmdline: "[kworker/0:1]",
            kernel_thread,
        });
        let shown = with_kind(PS, &rows, Vec::new()).maps();
        assert_eq!(shown[0]["cmdline"], shown[1]["cmdline"]);
        assert_eq!(
            (&shown[0][KIND], &shown[1][KIND]),
            (&"kernel".into(), &"user".into())
        );
        assert!(PS.contains(&KIND) && THREADS.contains(&KIND) && TREE.contains(&KIND));
    }

    #[test]
    fn every_column_of_the_table_is_read() {
        for column in PS {
            if !["pid", "ppid", "state", "name", KIND].contains(column) {
                assert!(!field_of(column).is_empty(), "{column}");
            }
        }
    }
}
