//! `vmsight report`: a guest on one page, for people who were not there.

mod page;

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use serde::Serialize;
use serde_json::{Map, Value, json};
use vmsight_analysis::timeline::{Event, Kind, timeline};
use vmsight_analysis::{Check, Context, Finding, Outcome as Checked, checks, run};
use vmsight_linux::module::ModuleFields;
use vmsight_linux::socket::SocketFilter;
use vmsight_linux::{Kernel, LinuxError, Listing, ProcessFields, process_tree};

use crate::{
    Outcome,
    args::Global,
    output::{Format, Progress, Row, to_map},
    session::Session,
};
use page::{Page, Table};

/// A report on a guest: one HTML page.
#[derive(Args, Debug)]
#[command(after_help = "\
What the guest is, what all checks found with their evidence, processes, modules, sockets, the timeline, and what could not be
read, on a page that needs nothing else: no other file, no network, no JavaScript (with it tables can be sorted and
searched). Everything that the guest wrote is text on it; a Content-Security-Policy forbids all that is not the page's own.
It is as confidential as the guest: command lines, and what was typed into shells, stand in it.

Exit codes: 0 written, whatever it says; 2 error.")]
pub(crate) struct Cmd {
    /// What to look into
    target: String,
    /// The page to write [default: standard output]
    file: Option<PathBuf>,
    /// Most events of the timeline, the latest
    #[arg(long, value_name = "N", default_value_t = 5000)]
    events: usize,
}

const FINDINGS: &[&str] = &[
    "severity",
    "check",
    "subject",
    "module",
    "address",
    "explanation",
    "certainty",
];
const CHECKS: &[&str] = &[
    "check",
    "result",
    "looked_at",
    "findings",
    "techniques",
    "summary",
];
const PROCESSES: &[&str] = &[
    "pid",
    "ppid",
    "name",
    "state",
    "uid",
    "euid",
    "start_time",
    "exe",
    "cmdline",
];
const MODULES: &[&str] = &[
    "name", "size", "refcount", "state", "used_by", "taints", "version", "base",
];
const SOCKETS: &[&str] = &[
    "protocol",
    "state",
    "local_address",
    "local_port",
    "remote_address",
    "remote_port",
    "uid",
    "namespace",
    "owners",
];
const SUMMARY: &[&str] = &[
    "hostname",
    "release",
    "banner",
    "build_id",
    "boot_time",
    "time",
    "uptime_s",
    "clocksource",
    "cpus_online",
    "memory_total_kb",
    "cmdline",
    "lsm",
    "taint",
    "paging",
    "kaslr_offset",
    "evidence",
];
/// Checks of the settings that harden a kernel, rather than of its integrity.
const HARDENING: &[&str] = &[
    "processor",
    "kernel-settings",
    "security-modules",
    "taint",
    "kernel-helpers",
];

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        ensure!(
            matches!(global.output, Format::Table | Format::Html),
            "a report is an HTML page: -o html"
        );
        ensure!(
            global.columns.is_none(),
            "--columns does not apply: a report is no table"
        );
        let session = Session::open(global, &self.target)?;
        let progress = Progress::spinner(global.quiet, "looking at everything");
        let page = self.page(global, &session)?;
        drop(progress);
        session.resume();
        match &self.file {
            Some(path) => write(path, &page).with_context(|| format!("writing {}", path.display()))?,
            None => {
                let mut out = session.style().out()?;
                out.write_all(page.as_bytes())?;
                out.flush()?;
            }
        }
        session.finish(false)?;
        Ok(Outcome::Fine)
    }

    fn page(&self, global: &Global, session: &Session) -> Result<String> {
        let kernel = session.kernel()?;
        let mut unread = Unread::default();
        let outcomes = examine(global, session)?;
        let mut page = Page::new(&format!("vmsight: {}", session.name()));

        let info = to_map(&kernel.info())?;
        unread.of("info", strings(info.get("problems")));
        page.summary(&summary(session, &info, &outcomes));
        page.table(&findings(&outcomes, &mut unread)?);
        page.table(&of_checks("hardening", "Hardening", &outcomes, true));
        page.table(&of_checks("checks", "Checks", &outcomes, false));
        page.table(&processes(kernel, &mut unread)?);
        let modules = kernel.modules(ModuleFields::default());
        page.table(&listed("modules", "Modules", MODULES, modules, &mut unread)?);
        let sockets = kernel.sockets(SocketFilter::INET);
        page.table(&listed(
            "sockets",
            "Internet sockets",
            SOCKETS,
            sockets,
            &mut unread,
        )?);
        page.table(&self.timeline(kernel, &mut unread)?);
        page.table(&unread.table());
        Ok(page.end())
    }

    fn timeline(&self, kernel: &Kernel, unread: &mut Unread) -> Result<Table> {
        let mut listing = timeline(kernel, &Kind::ALL);
        let earlier = listing.rows.len().saturating_sub(self.events);
        listing.rows.drain(..earlier);
        let mut table = listed("timeline", "Timeline", Event::COLUMNS, Ok(listing), unread)?;
        if earlier > 0 {
            table.note = format!("{earlier} earlier events are left out; vmsight timeline has them.");
        }
        Ok(table)
    }
}

/// All checks, but the one that needs a baseline.
fn examine(global: &Global, session: &Session) -> Result<Vec<Checked>> {
    let registers = session.registers(None).map_err(|e| e.to_string());
    let mut context = Context::new(session.kernel()?.clone()).with_registers(registers);
    if global.pause {
        context = context.paused();
    }
    Ok(run(&context, checks::ALL, &|_| {}))
}

fn summary(session: &Session, info: &Map<String, Value>, outcomes: &[Checked]) -> Vec<(String, Value)> {
    let found = || outcomes.iter().flat_map(|outcome| &outcome.findings);
    let suspicious = found().filter(|finding| finding.is_suspicious()).count();
    let verdict = match suspicious {
        0 if outcomes.iter().any(|outcome| outcome.failed) => {
            "nothing suspicious found, and not everything could be checked".to_owned()
        }
        0 => "nothing suspicious found".to_owned(),
        some => format!("{some} suspicious findings"),
    };
    let mut rows = vec![
        ("verdict".to_owned(), verdict.into()),
        ("target".to_owned(), session.name().into()),
    ];
    let known = SUMMARY.iter().filter_map(|key| {
        let value = info
            .get(*key)
            .filter(|value| !(value.is_null() || *value == ""))?;
        Some((key.replace('_', " "), value.clone()))
    });
    rows.extend(known);
    rows
}

fn findings(outcomes: &[Checked], unread: &mut Unread) -> Result<Table> {
    let mut table = Table::new("findings", "Findings", FINDINGS);
    let mut found: Vec<&Finding> = outcomes.iter().flat_map(|outcome| &outcome.findings).collect();
    found.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    for finding in found {
        table.add(&to_map(finding)?);
        let evidence = finding.evidence.iter().map(ToString::to_string);
        table.below(evidence.collect());
    }
    for outcome in outcomes {
        unread.of(outcome.check, outcome.notes.clone());
    }
    Ok(table)
}

fn of_checks(id: &'static str, title: &'static str, outcomes: &[Checked], hardening: bool) -> Table {
    let mut table = Table::new(id, title, CHECKS);
    for outcome in outcomes
        .iter()
        .filter(|o| HARDENING.contains(&o.check) == hardening)
    {
        let check: Option<&Check> = checks::named(outcome.check);
        let suspicious = outcome.findings.iter().filter(|f| f.is_suspicious()).count();
        let result = match (outcome.failed, suspicious) {
            (true, _) => "not checked",
            (false, 0) => "clean",
            (false, _) => "findings",
        };
        let techniques = check.map(|check| check.techniques.iter().map(|t| t.id).collect::<Vec<_>>());
        let row = json!({
            "check": outcome.check,
            "result": result,
            "looked_at": outcome.looked_at,
            "findings": suspicious,
            "techniques": techniques,
            "summary": check.map(|check| check.summary),
        });
        if let Value::Object(row) = row {
            table.add(&row);
        }
    }
    table
}

fn processes(kernel: &Kernel, unread: &mut Unread) -> Result<Table> {
    let mut table = Table::new("processes", "Processes", PROCESSES);
    let fields = ProcessFields::default() | ProcessFields::EXE;
    let listing = match kernel.processes(fields) {
        Ok(listing) => listing,
        Err(error) => {
            unread.of("processes", vec![error.to_string()]);
            return Ok(table);
        }
    };
    unread.of("processes", listing.warnings);
    for node in process_tree(&listing.rows) {
        let Some(process) = listing.rows.get(node.row) else {
            continue;
        };
        let mut row = to_map(process)?;
        unread.of("processes", problems(process.pid, &row));
        if let Some(Value::String(name)) = row.get_mut("name") {
            // The indentation is the tree; what is deeper than can be shown is shown at the edge.
            name.insert_str(0, &"\u{2003}".repeat(node.depth.min(24)));
        }
        table.add(&row);
    }
    Ok(table)
}

fn listed<T: Serialize>(
    id: &'static str,
    title: &'static str,
    columns: &'static [&'static str],
    listing: Result<Listing<T>, LinuxError>,
    unread: &mut Unread,
) -> Result<Table> {
    let mut table = Table::new(id, title, columns);
    match listing {
        Ok(listing) => {
            unread.of(id, listing.warnings);
            for row in &listing.rows {
                let row = to_map(row)?;
                let name = row.get("name").or(row.get("inode")).cloned().unwrap_or_default();
                unread.of(id, problems(name, &row));
                table.add(&row);
            }
        }
        Err(error) => unread.of(id, vec![error.to_string()]),
    }
    Ok(table)
}

/// What a row says is wrong with it, with which row it is.
fn problems(which: impl Into<Value>, row: &Map<String, Value>) -> Vec<String> {
    let which = match which.into() {
        Value::String(text) => text,
        other => other.to_string(),
    };
    let problems = strings(row.get("problems")).into_iter();
    problems.map(|problem| format!("{which}: {problem}")).collect()
}

fn strings(value: Option<&Value>) -> Vec<String> {
    let all = value.and_then(Value::as_array).into_iter().flatten();
    all.filter_map(|text| text.as_str().map(str::to_owned)).collect()
}

/// What could not be read.
#[derive(Default)]
struct Unread(Vec<(&'static str, String)>);

impl Unread {
    fn of(&mut self, what: &'static str, notes: Vec<String>) {
        self.0.extend(notes.into_iter().map(|note| (what, note)));
    }

    fn table(&self) -> Table {
        let mut table = Table::new("unread", "What could not be read", &["of", "what"]);
        for (of, what) in &self.0 {
            let row = [("of", Value::from(*of)), ("what", Value::from(what.as_str()))];
            table.add(
                &row.into_iter()
                    .map(|(key, value)| (key.to_owned(), value))
                    .collect(),
            );
        }
        table
    }
}

/// For its owner's eyes only, as temporary files are; whole, or not at all.
fn write(path: &Path, page: &str) -> std::io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let mut file = tempfile::NamedTempFile::new_in(folder.unwrap_or_else(|| Path::new(".")))?;
    file.write_all(page.as_bytes())?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_hardening_are_checks_that_there_are() {
        assert!(HARDENING.iter().all(|name| checks::named(name).is_some()));
    }
}
