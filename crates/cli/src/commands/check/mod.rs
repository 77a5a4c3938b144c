//! `vmsight check`: whether a guest's kernel is what it claims to be.

pub(crate) mod baseline;
mod sarif;

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use serde_json::{Map, Value};
use vmsight_analysis::{Check, Context, Finding, Known, Outcome as Checked, checks, run};

use crate::{
    Outcome,
    args::Global,
    output::{Format, Progress, Sheet, escape, to_map},
    session::Session,
};

/// Check the integrity of a guest's kernel: tampering, hooks, what it hides.
#[derive(Args, Debug)]
#[command(after_help = "\
Exit codes: 0 clean; 1 findings; 2 error, also where a check could not be made. What is of severity info does not count.
What could not be looked at is said on standard error, and in SARIF as a notification. In a running guest what is found
is read anew twice, and what is not there each time is no finding.

With --watch a running guest is checked again and again. The kernel's code is kept to compare with: only where it has changed is it
decoded again. What is found is looked at twice more, with a pause, unless the check before had found it too. All else is looked at
as the first time.")]
pub(crate) struct Cmd {
    /// What to look into
    #[arg(required_unless_present_any = ["list", "explain"])]
    target: Option<String>,
    /// The checks to make, by name [default: all]
    #[arg(value_name = "CHECK")]
    checks: Vec<String>,
    /// Hold the code of the kernel and its modules against a trusted copy: one that `vmsight baseline create` made, or what its
    /// distribution ships: the linux-image package (.deb), a folder of modules (/lib/modules/RELEASE), single modules (.ko, also
    /// packed by xz, zstd or gzip), vmlinuz, vmlinux. May be given several times
    #[arg(long, value_name = "PATH")]
    golden: Vec<PathBuf>,
    /// List the checks with what they find and what they cannot see
    #[arg(long, conflicts_with_all = ["target", "explain"])]
    list: bool,
    /// Say of one check what it compares, why, and what it cannot see
    #[arg(long, value_name = "CHECK", conflicts_with = "target")]
    explain: Option<String>,
    /// What was found right by the looks before, with --watch
    #[arg(skip)]
    known: Known,
    /// What --golden gave, with --watch
    #[arg(skip)]
    trusted: baseline::Golden,
}

const COLUMNS: &[&str] = &["severity", "check", "subject", "module", "explanation"];
const KEYS: &[&str] = &[
    "check",
    "severity",
    "subject",
    "explanation",
    "address",
    "module",
    "evidence",
    "certainty",
];
const LIST_KEYS: &[&str] = &["name", "summary", "techniques", "compares", "why", "blind_spots"];
const LIST_COLUMNS: &[&str] = &["name", "techniques", "summary", "blind_spots"];

impl Cmd {
    /// Whether it prints SARIF where that is asked for.
    pub(crate) fn has_sarif(&self) -> bool {
        !self.list && self.explain.is_none()
    }

    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        if let Some(name) = &self.explain {
            return explain(global, one(name)?);
        }
        let Some(target) = self.target.as_deref().filter(|_| !self.list) else {
            return list(global);
        };
        let mut wanted: Vec<&Check> = match self.checks.is_empty() {
            true => checks::ALL.to_vec(),
            false => self.checks.iter().map(|name| one(name)).collect::<Result<_>>()?,
        };
        wanted.retain(|check| check.name != checks::GOLDEN.name);
        match self.golden.is_empty() {
            false => wanted.push(&checks::GOLDEN),
            true if wanted.is_empty() => bail!("the check golden needs a trusted copy: --golden PATH"),
            true => {}
        }
        let sources = self.trusted.open(&self.golden)?;
        let session = Session::open(global, target)?;
        let registers = session.registers(None).map_err(|e| e.to_string());
        let mut context = Context::new(session.kernel()?.clone()).with_registers(registers);
        if global.pause {
            context = context.paused();
        }
        if global.watch.is_some() {
            context = context.with_known(self.known.clone());
        }
        if !self.golden.is_empty() {
            let trusted = self.trusted.of(&context, &self.golden, sources)?;
            context = context.with_trusted(trusted);
        }
        let progress = Progress::spinner(global.quiet, "checking");
        let outcomes = run(&context, &wanted, &|_| {});
        drop(progress);
        for outcome in &outcomes {
            let (check, looked_at, took) = (outcome.check, outcome.looked_at, outcome.took_ms);
            tracing::info!("{check}: looked at {looked_at} things in {took:.1} ms");
        }
        let unchanged = self.known.unchanged_functions();
        if unchanged > 0 {
            tracing::info!(
                "text: {unchanged} of the kernel's functions were as the look before had found them right"
            );
        }
        self.show(&session, &wanted, &outcomes)?;
        Ok(verdict(&outcomes))
    }

    fn show(&self, session: &Session, wanted: &[&Check], outcomes: &[Checked]) -> Result<()> {
        let style = session.style();
        let notes = || {
            outcomes
                .iter()
                .flat_map(|o| o.notes.iter().map(move |note| format!("{}: {note}", o.check)))
        };
        if style.format == Format::Sarif {
            let mut out = style.out()?;
            sarif::write(&mut out, session.name(), wanted, outcomes)?;
            out.flush()?;
            drop(out);
            notes().for_each(|note| style.warn(&note));
            return session.finish(false);
        }
        let found: Vec<&Finding> = outcomes.iter().flat_map(|o| &o.findings).collect();
        let for_people = style.format == Format::Table && style.columns.is_none();
        if !(for_people && found.is_empty()) {
            let sheet = Sheet {
                rows: found.iter().map(to_map).collect::<Result<_>>()?,
                ..Sheet::with_keys(KEYS, COLUMNS)
            };
            session.print(&sheet)?;
        }
        if for_people {
            let mut out = style.out_again();
            found.iter().try_for_each(|finding| details(&mut out, finding))?;
            out.flush()?;
        }
        notes().for_each(|note| style.warn(&note));
        if for_people {
            let looked: u64 = outcomes.iter().map(|o| o.looked_at).sum();
            style.note(&format!(
                "{} checks looked at {looked} things; {} findings",
                outcomes.len(),
                found.len()
            ));
        }
        session.finish(false)
    }
}

/// Clean only where every check could be made.
fn verdict(outcomes: &[Checked]) -> Outcome {
    if outcomes
        .iter()
        .flat_map(|o| &o.findings)
        .any(Finding::is_suspicious)
    {
        Outcome::Found
    } else if outcomes.iter().any(|o| o.failed) {
        Outcome::Failed
    } else {
        Outcome::Fine
    }
}

/// What shows a finding, below the table.
fn details(out: &mut dyn Write, finding: &Finding) -> std::io::Result<()> {
    write!(out, "\n{}: {}", finding.check, escape(&finding.subject))?;
    if let Some(at) = finding.address {
        write!(out, " at {at}")?;
    }
    writeln!(out, " ({})", finding.certainty)?;
    for evidence in &finding.evidence {
        writeln!(out, "  {}", escape(&evidence.to_string()))?;
    }
    Ok(())
}

fn one(name: &str) -> Result<&'static Check> {
    match checks::named(name) {
        Some(check) => Ok(check),
        None => {
            let names: Vec<&str> = checks::known().map(|c| c.name).collect();
            bail!("there is no check {name:?}; there are: {}", names.join(", "))
        }
    }
}

fn techniques(check: &Check) -> Vec<String> {
    let one = |t: &vmsight_analysis::Technique| format!("{} {}", t.id, t.name);
    check.techniques.iter().map(one).collect()
}

fn list(global: &Global) -> Result<Outcome> {
    let row = |check: &&Check| {
        let ids: Vec<&str> = check.techniques.iter().map(|t| t.id).collect();
        let mut row = Map::new();
        row.insert("name".into(), check.name.into());
        row.insert("summary".into(), check.summary.into());
        row.insert("techniques".into(), ids.into());
        row.insert("compares".into(), check.compares.into());
        row.insert("why".into(), check.why.into());
        row.insert("blind_spots".into(), check.blind_spots.to_vec().into());
        row
    };
    let sheet: Sheet<Map<String, Value>> = Sheet {
        rows: checks::known().map(|check| row(&check)).collect(),
        ..Sheet::with_keys(LIST_KEYS, LIST_COLUMNS)
    };
    global.style().print(&sheet)?;
    Ok(Outcome::Fine)
}

fn explain(global: &Global, check: &Check) -> Result<Outcome> {
    let mut out = global.style().out()?;
    writeln!(out, "{}: {}\n", check.name, check.summary)?;
    writeln!(out, "Compares: {}\n", check.compares)?;
    writeln!(out, "Why: {}\n", check.why)?;
    writeln!(
        out,
        "Techniques (MITRE ATT&CK): {}\n",
        techniques(check).join(", ")
    )?;
    writeln!(out, "Cannot see:")?;
    for spot in check.blind_spots {
        writeln!(out, "  - {spot}")?;
    }
    out.flush()?;
    Ok(Outcome::Fine)
}

#[cfg(test)]
mod tests {
    use vmsight_analysis::Severity;

    use super::*;

    fn outcome(severity: Severity, failed: bool) -> Checked {
        Checked {
            check: "taint",
            findings: vec![Finding::new(severity, "kernel", "is marked")],
            looked_at: 1,
            notes: Vec::new(),
            failed,
            took_ms: 0.0,
        }
    }

    #[test]
    fn what_is_only_worth_knowing_leaves_a_guest_clean() {
        let is = |severity, failed| verdict(&[outcome(severity, failed)]);
        assert!(matches!(is(Severity::Info, false), Outcome::Fine));
        assert!(matches!(is(Severity::Info, true), Outcome::Failed));
        assert!(matches!(is(Severity::Low, false), Outcome::Found));
    }
}
