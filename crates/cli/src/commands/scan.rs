//! `vmsight scan`: YARA rules over a guest's memory.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde::Serialize;
use vmsight_analysis::frames::{Frames, Holder, Owner};
use vmsight_analysis::yara::{self, Limits, Match, Rules, Source};
use vmsight_arch::Gva;
use vmsight_linux::ProcessFields;
use vmsight_linux::listing::address;

use crate::{
    Outcome,
    args::Global,
    output::{Progress, Row, Sheet},
    session::Session,
};

/// YARA rules over physical memory, the kernel's, or that of processes.
#[derive(Args, Debug)]
#[command(after_help = "\
A guest's memory is no file. Of physical memory each 4 MiB are judged alone, as a file of that length; each shows 64 KiB of
the next, and what is no longer is found across their border. Pages of zeros at either end are left out unless a rule
matches zeros. What goes on in a page that is no neighbour in physical memory is seen with --pid and --processes only: there
all that a process has in memory is judged together, by virtual address, as YARA does with a process. --kernel shows what
lies in pages that the kernel uses; its image, modules and vmalloc area are judged by virtual address.

Owner, pid and place are of whoever has the page; `shared_with` names other processes that have it too. The modules
console, cuckoo and magic are not there, and `include` is not followed: give several files, or a directory, of which
all .yar and .yara files are taken. What is in swap or was never loaded is not seen.

Exit codes: 0 no rule matches; 1 one does; 2 error.")]
pub(crate) struct Cmd {
    /// What to look into
    target: String,
    /// Files with rules, or directories of them
    #[arg(short, long, value_name = "RULES", required = true, num_args = 1..)]
    yara: Vec<PathBuf>,
    /// Only memory of these processes, by virtual address
    #[arg(long, value_name = "PID,…", value_delimiter = ',', conflicts_with_all = ["processes", "kernel", "physical"])]
    pid: Vec<i32>,
    /// The memory of all processes, by virtual address
    #[arg(long, conflicts_with_all = ["kernel", "physical"])]
    processes: bool,
    /// Only memory that the kernel uses
    #[arg(long, conflicts_with = "physical")]
    kernel: bool,
    /// Physical memory without owners: needs no kernel
    #[arg(long)]
    physical: bool,
    /// Most matches of one pattern in one piece of memory, or one process
    #[arg(long, value_name = "N", default_value_t = Limits::default().per_pattern)]
    max_matches: u32,
    /// Most matches in all
    #[arg(long, value_name = "N", default_value_t = Limits::default().in_all)]
    limit: usize,
}

/// The longest file of rules that is read.
const MAX_FILE: u64 = 64 << 20;
/// Files and directories that are looked at for rules.
const MAX_FILES: usize = 100_000;

#[derive(Serialize)]
struct MatchRow {
    rule: String,
    pattern: Option<String>,
    owner: &'static str,
    pid: Option<i32>,
    name: Option<String>,
    place: Option<String>,
    #[serde(serialize_with = "address::hex_opt")]
    gpa: Option<u64>,
    #[serde(serialize_with = "address::gva_opt")]
    gva: Option<Gva>,
    shared_with: Vec<i32>,
    length: u64,
    /// Printable ASCII as it is, all else as a dot.
    context: String,
    before: String,
    matched: String,
    after: String,
    tags: Vec<String>,
    meta: Vec<String>,
    rules_file: String,
}

impl Row for MatchRow {
    const COLUMNS: &'static [&'static str] = &[
        "rule",
        "pattern",
        "owner",
        "pid",
        "name",
        "place",
        "gpa",
        "gva",
        "shared_with",
        "length",
        "context",
        "before",
        "matched",
        "after",
        "tags",
        "meta",
        "rules_file",
    ];
}

const COLUMNS: &[&str] = &[
    "rule", "pattern", "owner", "pid", "name", "place", "gpa", "gva", "context",
];

impl Cmd {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let rules = self.rules()?;
        let style = global.style();
        rules.warnings.iter().for_each(|w| style.warn(w));
        let session = match self.physical {
            true => Session::without_kernel(global, &self.target)?,
            false => Session::open(global, &self.target)
                .context("telling whose memory it is needs the kernel; --physical scans without")?,
        };
        let mut warnings = Vec::new();
        let rows = if self.processes || !self.pid.is_empty() {
            self.of_processes(global, &session, &rules, &mut warnings)?
        } else {
            self.of_memory(global, &session, &rules, &mut warnings)?
        };
        session.print(&Sheet::new(COLUMNS, &rows, warnings))?;
        let any = !rows.is_empty();
        session.let_go(rows);
        Ok(if any { Outcome::Found } else { Outcome::Fine })
    }

    fn limits(&self) -> Limits {
        Limits {
            per_pattern: self.max_matches,
            in_all: self.limit,
            ..Limits::default()
        }
    }

    fn rules(&self) -> Result<Rules> {
        let mut files = Vec::new();
        for path in &self.yara {
            let told = path.is_dir();
            let before = files.len();
            gather(path, &mut files)?;
            let found = files.len() > before;
            ensure!(found || !told, "no .yar or .yara file lies in {}", path.display());
        }
        let mut sources = Vec::new();
        for path in files {
            let name = path.display().to_string();
            let length = fs::metadata(&path)
                .with_context(|| format!("reading {name}"))?
                .len();
            ensure!(
                length <= MAX_FILE,
                "{name} has {length} bytes; no file of rules has"
            );
            let text = fs::read(&path).with_context(|| format!("reading {name}"))?;
            // Comments are in all encodings there are.
            sources.push((name, String::from_utf8_lossy(&text).into_owned()));
        }
        let rules = Rules::compile(sources.iter().map(|(origin, text)| Source { origin, text }));
        let rules = rules.context("compiling the rules")?;
        ensure!(
            !rules.is_empty(),
            "there is no rule in what was given with --yara"
        );
        Ok(rules)
    }

    fn of_processes(
        &self,
        global: &Global,
        session: &Session,
        rules: &Rules,
        warnings: &mut Vec<String>,
    ) -> Result<Vec<MatchRow>> {
        let kernel = session.kernel()?;
        let fields = ProcessFields::empty();
        let processes = match self.processes {
            true => kernel.processes(fields)?,
            false => kernel.processes_of(&self.pid, fields)?,
        };
        warnings.extend(processes.warnings);
        let mut processes = processes.rows;
        if let Some(missing) = self
            .pid
            .iter()
            .find(|pid| !processes.iter().any(|p| p.pid == **pid))
        {
            bail!("the guest has no process {missing}");
        }
        processes.retain(|process| !(self.processes && process.kernel_thread));
        let pids: Vec<i32> = processes.iter().map(|process| process.pid).collect();
        let progress = Progress::spinner(global.quiet, "scanning processes");
        let (found, notes) = yara::processes(kernel, &pids, rules, self.limits());
        drop(progress);
        let mut rows = Vec::new();
        for (process, (pid, found)) in processes.iter().zip(found) {
            let found = match found {
                Ok(found) => found,
                // One that has ended meanwhile is no reason to leave the others out.
                Err(error) if self.processes => {
                    warnings.push(format!("process {pid}: {error}"));
                    continue;
                }
                // As a text: what is not there ends with 1 elsewhere, and here that is a match.
                Err(error) => bail!("scanning process {pid}: {error}"),
            };
            warnings.extend(
                found
                    .notes
                    .into_iter()
                    .map(|note| format!("process {pid}: {note}")),
            );
            if found.matches.is_empty() {
                continue;
            }
            let maps = kernel.maps(pid).map(|maps| maps.rows).unwrap_or_default();
            let space = kernel.process_space(pid).ok().flatten();
            for one in found.matches {
                let gva = Gva(one.address);
                let map = maps.iter().find(|m| m.start <= gva && gva < m.end);
                let holder = Holder {
                    owner: Owner::Process,
                    pid: Some(pid),
                    name: Some(process.name.clone().into()),
                    gva: Some(gva),
                    place: map.map(|m| m.path.clone().unwrap_or_else(|| "anonymous memory".to_owned())),
                };
                let gpa = space.as_ref().and_then(|space| space.translate(gva).ok());
                rows.push(row(one, &[holder], gpa.map(|at| at.gpa.0)));
            }
        }
        warnings.extend(notes);
        Ok(rows)
    }

    fn of_memory(
        &self,
        global: &Global,
        session: &Session,
        rules: &Rules,
        warnings: &mut Vec<String>,
    ) -> Result<Vec<MatchRow>> {
        let progress = Progress::bytes(global.quiet, "scanning memory", session.memory().size());
        let stop = AtomicBool::new(false);
        let advance = |bytes| progress.advance(bytes);
        let found = yara::physical(session.memory(), rules, self.limits(), &stop, &advance);
        drop(progress);
        warnings.extend(found.notes);
        if self.physical {
            let rows = found.matches.into_iter();
            return Ok(rows
                .map(|one| {
                    let gpa = one.address;
                    row(one, &[], Some(gpa))
                })
                .collect());
        }
        let kernel = session.kernel()?;
        let frames = Frames::find(kernel, found.matches.iter().map(Match::gpa));
        warnings.extend(frames.notes.iter().cloned());
        let mut rows = Vec::new();
        for one in found.matches {
            let gpa = one.gpa();
            let mut holders = frames.of(gpa).to_vec();
            // What the kernel has elsewhere than in its map of all memory is looked at there.
            let leads_here = |gva| {
                kernel
                    .space()
                    .translate(gva)
                    .is_ok_and(|to| to.gpa.gfn() == gpa.gfn())
            };
            let elsewhere = |h: &Holder| h.in_area() && h.gva.is_some_and(leads_here);
            if self.kernel && !holders.iter().any(|h| h.owner == Owner::Kernel && !elsewhere(h)) {
                continue;
            }
            for holder in &mut holders {
                let gva = holder.gva.map(|gva| gva.wrapping_add(gpa.page_offset() as u64));
                holder.gva = gva;
            }
            rows.push(row(one, &holders, Some(gpa.0)));
        }
        if self.kernel {
            let found = yara::kernel_areas(kernel, rules, self.limits());
            warnings.extend(found.notes);
            for one in found.matches {
                let holder = Holder::of_kernel_area(kernel, Gva(one.address));
                let gpa = kernel.space().translate(Gva(one.address)).ok();
                rows.push(row(one, &[holder], gpa.map(|at| at.gpa.0)));
            }
        }
        Ok(rows)
    }
}

/// The files with rules at or below a path, sorted.
fn gather(path: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let mut left = MAX_FILES;
    let mut waiting = vec![path.to_owned()];
    let before = files.len();
    while let Some(path) = waiting.pop() {
        left = left
            .checked_sub(1)
            .with_context(|| format!("more than {MAX_FILES} files lie below {}", path.display()))?;
        let told = || format!("reading {}", path.display());
        if !fs::metadata(&path).with_context(told)?.is_dir() {
            files.push(path);
            continue;
        }
        for entry in fs::read_dir(&path).with_context(told)? {
            let entry = entry.with_context(told)?;
            let is_rules = entry
                .path()
                .extension()
                .is_some_and(|e| e == "yar" || e == "yara");
            // A link to a directory may lead back: none is followed.
            if entry.file_type().with_context(told)?.is_dir() || is_rules {
                waiting.push(entry.path());
            }
        }
    }
    if let Some(own) = files.get_mut(before..) {
        own.sort();
    }
    Ok(())
}

fn row(one: Match, holders: &[Holder], gpa: Option<u64>) -> MatchRow {
    let holder = holders.first();
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let parts = [&one.before, &one.matched, &one.after];
    MatchRow {
        context: parts.into_iter().flatten().map(|byte| shown(*byte)).collect(),
        before: hex(&one.before),
        matched: hex(&one.matched),
        after: hex(&one.after),
        owner: holder.map_or(Owner::Unknown, |h| h.owner).name(),
        pid: holder.and_then(|h| h.pid),
        name: holder.and_then(|h| h.name.clone()),
        place: holder.and_then(|h| h.place.clone()),
        gva: holder.and_then(|h| h.gva),
        gpa,
        shared_with: Holder::shared_with(holders),
        length: one.length,
        rule: one.rule.name.clone(),
        pattern: one.pattern,
        tags: one.rule.tags.clone(),
        meta: one
            .rule
            .meta
            .iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect(),
        rules_file: one.rule.origin.clone(),
    }
}

fn shown(byte: u8) -> char {
    match byte {
        0x20..0x7f => char::from(byte),
        _ => '.',
    }
}
