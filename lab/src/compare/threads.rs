//! Threads.

use std::collections::{BTreeMap, BTreeSet};

use vmsight_linux::{Kernel, Thread};

use super::processes::policy;
use super::times::{self, Used};
use super::{Differences, spelt};
use crate::truth::Truth;

/// Compares `Kernel::threads` with `/proc/PID/task`. That a thread runs at this moment nobody inside could say of another moment, and
/// the addresses of kernel stacks are shown nowhere.
pub fn threads(kernel: &Kernel, truth: &Truth) -> anyhow::Result<Differences> {
    let mut out = Differences::default();
    let listing = kernel.threads(None)?;
    out.complaints("threads", &listing.warnings);
    let mut by_pid: BTreeMap<i32, Vec<&Thread>> = BTreeMap::new();
    for row in &listing.rows {
        by_pid.entry(row.pid).or_default().push(row);
        out.complaints(&format!("thread {}", row.tid), &row.problems);
    }
    let passed = times::passed(kernel, truth);
    for said in truth.processes.iter().filter(|p| !p.is_transient()) {
        let rows = by_pid
            .get(&i32::try_from(said.pid)?)
            .map_or(&[][..], Vec::as_slice);
        let at = |field: &str| format!("{field} of the threads of {} ({})", said.pid, said.task_comm());
        let seen: BTreeSet<u32> = rows.iter().map(|r| r.tid as u32).collect();
        out.same(
            at("tid"),
            seen,
            said.threads.iter().map(|t| t.tid).collect::<BTreeSet<_>>(),
        );
        for thread in &said.threads {
            let Some(row) = rows.iter().find(|r| r.tid as u32 == thread.tid) else {
                continue;
            };
            if !said.kthread {
                out.same(at("name"), row.name.clone(), spelt(&thread.comm));
                out.same(at("state"), row.state, thread.state);
            }
            let at = |field: &str| format!("{field} of thread {} of {}", thread.tid, said.pid);
            out.same(at("kernel_thread"), row.kernel_thread, said.kthread);
            out.same(at("start_ticks"), row.start_ticks, thread.start_ticks);
            times::start(
                &at,
                row.start_time.as_deref(),
                thread.start_ticks,
                truth,
                &mut out,
            );
            out.same(at("nice"), i64::from(row.nice), thread.nice);
            out.same(at("priority"), i64::from(row.priority), thread.priority);
            out.same(at("policy"), Some(row.policy), policy(thread.policy));
            let seen = Used {
                user: row.utime_ticks,
                system: row.stime_ticks,
            };
            let account = Used {
                user: thread.utime_ticks,
                system: thread.stime_ticks,
            };
            let may_run = times::may_run(said);
            times::used(&at, seen, account, may_run.then_some(passed), &mut out);
            if !may_run {
                out.same(at("cpu"), row.cpu, Some(thread.cpu));
            }
        }
    }
    Ok(out)
}
