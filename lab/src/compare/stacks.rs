//! Kernel stacks.

use std::collections::BTreeMap;

use anyhow::Result;
use vmsight_linux::stack::How;
use vmsight_linux::{Kernel, StackFrame};

use super::Differences;
use crate::truth::Truth;

/// Frames that the guest's kernel shows of a stack (`MAX_STACK_TRACE_DEPTH`, fs/proc/base.c).
const SHOWN: usize = 64;

/// Compares `Kernel::stacks` with `/proc/PID/task/TID/stack`, frame by frame, of each thread that has slept on since then: how often it
/// was switched away from is in both. No honest stack has a frame that had to be guessed, or one in nobody's code.
pub fn stacks(kernel: &Kernel, truth: &Truth) -> Result<Differences> {
    let mut out = Differences::default();
    let threads = kernel.threads(None)?.rows;
    let listing = kernel.stacks(&threads, &|_| None)?;
    out.complaints("stacks", &listing.warnings);
    let mut by_tid: BTreeMap<i32, Vec<&StackFrame>> = BTreeMap::new();
    for row in &listing.rows {
        let at = format!("frame {} of thread {} ({})", row.depth, row.tid, row.name);
        out.complaints(&at, &row.problems);
        let known = row.how.is_sure() || matches!(row.how, How::Running | How::Ended);
        out.near(at, known, row.how, "a frame that is known");
        by_tid.entry(row.tid).or_default().push(row);
    }
    out.same("threads with stacks", by_tid.len(), threads.len());
    let processes = truth.processes.iter().filter(|p| !p.is_transient());
    for thread in processes.flat_map(|p| &p.threads) {
        let (Some(said), Some(rows)) = (&thread.stack, by_tid.get(&i32::try_from(thread.tid)?)) else {
            continue;
        };
        let first = rows.first();
        let sleeps = first.is_some_and(|row| row.switches == Some(said.switches) && row.how != How::Running);
        if !sleeps {
            continue;
        }
        let frames = rows.iter().filter(|row| !is_of_scheduler(kernel, row));
        let seen: Vec<String> = frames.filter_map(|row| spelt(row)).take(SHOWN).collect();
        let at = format!("stack of thread {}", thread.tid);
        out.same(format_args!("depth of the {at}"), seen.len(), said.frames.len());
        for (number, (seen, said)) in seen.iter().zip(&said.frames).enumerate() {
            out.same(format_args!("frame {number} of the {at}"), seen, said);
        }
    }
    Ok(out)
}

/// A line of `stack`.
fn spelt(row: &StackFrame) -> Option<String> {
    let symbol = row.symbol.as_deref()?;
    Some(match &row.module {
        Some(module) => format!("{symbol} [{module}]"),
        None => symbol.to_owned(),
    })
}

/// What the kernel leaves out: `in_sched_functions`, kernel/sched/core.c.
fn is_of_scheduler(kernel: &Kernel, row: &StackFrame) -> bool {
    [
        ("__sched_text_start", "__sched_text_end"),
        ("__lock_text_start", "__lock_text_end"),
    ]
    .iter()
    .any(|(from, to)| {
        let (from, to) = (kernel.find_symbol(&[from]), kernel.find_symbol(&[to]));
        row.address
            .is_some_and(|at| from.is_some_and(|from| from <= at) && to.is_some_and(|to| at < to))
    })
}
