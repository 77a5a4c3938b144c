//! Kernel stacks.

use anyhow::{Context as _, Result};
use clap::Args;
use vmsight_analysis::{Context, Owner};

use super::{all_there, found, no_process, print};
use crate::{Outcome, args::Global, session::Session};

/// Kernel stacks of threads.
#[derive(Args, Debug)]
#[command(after_help = "\
A row for each frame, the innermost first, as /proc/PID/stack has them, with the scheduler's own functions. `how` says how a frame
is known: `saved` and `orc` by the context that the thread was switched away with and the kernel's own tables; `interrupted` by
the registers that an exception or interrupt saved; `traced` where tracing has put a return address of its own in the place of the function's.
`frame-pointer` and `guess` are not sure: there is no table for that code, and what lies on the stack may be left over. A thread on a
CPU has no frames (`running`), one that has ended no stack (`ended`). An address in nobody's code is a problem of its row: so looks
code that was hidden.")]
pub(crate) struct Stacks {
    /// What to look into
    target: String,
    /// Only threads of these processes
    #[arg(short, long, value_name = "PID,…", value_delimiter = ',')]
    pid: Vec<i32>,
    /// Only these threads
    #[arg(short, long, value_name = "TID,…", value_delimiter = ',')]
    tid: Vec<i32>,
}

pub(super) const STACKS: &[&str] = &["pid", "tid", "name", "state", "depth", "how", "symbol", "module"];

impl Stacks {
    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = Session::open(global, &self.target)?;
        let kernel = session.kernel()?;
        let mut threads = kernel.threads(None).context("listing threads")?;
        if !self.pid.is_empty() || !self.tid.is_empty() {
            let wanted = |pid, tid| self.pid.contains(&pid) || self.tid.contains(&tid);
            threads.rows.retain(|thread| wanted(thread.pid, thread.tid));
        }
        // Whose else the code is, is looked up when there is any.
        let context = Context::new(kernel.clone());
        let generated = |at| match context.owner(at) {
            Owner::Generated(what) => Some(what.to_string()),
            _ => None,
        };
        let mut stacks = kernel
            .stacks(&threads.rows, &generated)
            .context("reading kernel stacks")?;
        threads.warnings.into_iter().for_each(|w| stacks.warn(w));
        let (processes, tids) = (
            |pid| threads.rows.iter().any(|thread| thread.pid == pid),
            |tid| threads.rows.iter().any(|thread| thread.tid == tid),
        );
        let no_thread = |tid| format!("the guest has no thread {tid}");
        let all = all_there(&self.pid, processes, no_process, &mut stacks.warnings)
            & all_there(&self.tid, tids, no_thread, &mut stacks.warnings);
        print(&session, STACKS, stacks)?;
        Ok(found(all))
    }
}
