//! Threads of processes that are seen, and that are not.

use std::collections::BTreeSet;

use rustc_hash::FxHashSet;
use vmsight_arch::Gva;
use vmsight_linux::LinuxError;

use super::cross_view::CrossView;
use super::processes::{PID, PIDS, Reader};
use crate::{Check, Context, Evidence, Finding, Findings, Severity, Technique};

/// See [`Check`].
pub(crate) const THREADS: Check = Check {
    name: "hidden-threads",
    summary: "Every thread is in its process's list of threads, and has its pid",
    compares: "the lists of threads of all processes (/proc/PID/task, ps -T) with the table of pids, the tasks of control groups, and \
               what stands in the run queues of the CPUs",
    why: "A thread that is taken out of its process's list runs on, under the name of a process that nobody suspects.",
    techniques: &[Technique::ROOTKIT, Technique::HIDE_ARTIFACTS],
    blind_spots: &[
        "A thread that is in neither list, and that does not run or wait for a CPU at the moment.",
        "Whole processes that are hidden: see the check hidden-processes.",
    ],
    run,
};

/// Threads that are told of.
const MAX_TOLD: usize = 1 << 10;

fn run(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let reader = Reader::new(context)?;
    let (by_pid, _) = reader.by_pid(findings, PID)?;
    let mut leaders: BTreeSet<Gva> = reader.listed(findings).into_iter().collect();
    leaders.extend(reader.children(findings));
    leaders.extend(
        by_pid
            .iter()
            .filter_map(|&task| reader.pointer(task, reader.leader)),
    );
    let listed: Vec<Gva> = leaders
        .iter()
        .flat_map(|&leader| reader.threads(leader))
        .collect();
    let mut views = CrossView::default();
    views.whole("in its process's list of threads", listed);
    views.whole(PIDS, by_pid);
    // The idle tasks of CPUs, whose pid is 0, are in no list.
    let numbered = |tasks: Vec<Gva>| -> FxHashSet<Gva> {
        let tasks = tasks.into_iter();
        tasks
            .filter(|&task| reader.pid(task).is_some_and(|pid| pid != 0))
            .collect()
    };
    if let Some(found) = findings.or_note("the tasks of control groups", reader.in_cgroups()) {
        views.part("in a control group", numbered(found));
    }
    if let Some(found) = findings.or_note("the run queues", reader.in_run_queues()) {
        views.part("running or waiting for a CPU", numbered(found));
    }
    findings.looked_at(views.len());
    let missing: Vec<Gva> = views.missing().take(MAX_TOLD).collect();
    for task in missing {
        if let Err(error) = report(&reader, context, findings, &views, task) {
            findings.note(format!("the task at {task}: {error}"));
        }
    }
    Ok(())
}

fn report(
    reader: &Reader<'_>,
    context: &Context,
    findings: &mut Findings,
    views: &CrossView,
    task: Gva,
) -> Result<(), LinuxError> {
    let object = context.object("task_struct", task)?;
    let leader = object.pointer("group_leader")?;
    // One that ends is taken out of one after the other; a process without its pid is another check's.
    if object.number("exit_state")? != 0 || leader == task {
        return Ok(());
    }
    let (Some((tid, name)), Some((pid, of))) =
        (reader.describe(findings, task), reader.describe(findings, leader))
    else {
        return Ok(());
    };
    let lacking = views.lacking(task);
    let explanation = format!("the thread exists, and yet is not {}", lacking.join(", not "));
    let subject = format!("thread {tid} ({name}) of process {pid} ({of})");
    let mut finding = Finding::new(Severity::Critical, subject, explanation).at(task);
    for answer in views.evidence(task) {
        finding = finding.with(answer);
    }
    findings.report(finding.with(Evidence::value("process", leader)));
    Ok(())
}
