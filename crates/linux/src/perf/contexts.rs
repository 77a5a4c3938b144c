//! Where perf events hang: a context for each CPU, and one for each task that is watched.

use std::sync::Arc;

use vmsight_arch::Gva;

use crate::layout::{Field, Place, layout};
use crate::structures::{Walk, list};
use crate::warnings::Warnings;
use crate::{Kernel, LinuxError};

/// Sources of events; a large machine has some hundred.
const MAX_SOURCES: usize = 1 << 14;
/// Kinds of contexts that a task can have (perf_nr_task_contexts): two up to 6.1, one since.
const MAX_KINDS: u64 = 4;

layout! {
    struct SourceLayout = "pmu" {
        entry: Place = "entry",
        contexts: Option<Field<Gva>> = "pmu_cpu_context",          // up to 6.1
    }
}

layout! {
    struct CpuContextLayout = "perf_cpu_context" {
        context: Place = "ctx",
    }
}

layout! {
    struct ContextLayout = "perf_event_context" {
        events: Place = "event_list",
    }
}

layout! {
    struct EventEntryLayout = "perf_event" {
        entry: Place = "event_entry",
    }
}

layout! {
    struct WatchedLayout = "task_struct" {
        contexts: Place = "perf_event_ctxp",
    }
}

/// Whose events a context has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Watched {
    /// Those of everybody on this CPU.
    Cpu(u32),
    /// Those of one thread.
    Thread {
        /// The process.
        pid: i32,
        /// Which of its threads.
        tid: i32,
        /// The thread's name.
        name: String,
    },
}

/// A `struct perf_event_context`.
#[derive(Clone, Debug)]
pub struct PerfContext {
    /// Whose.
    pub watched: Watched,
    /// Where it lies.
    pub address: Gva,
}

/// All contexts, and what is missing of them.
#[derive(Clone, Debug)]
pub struct PerfContexts {
    /// Each once.
    pub rows: Vec<PerfContext>,
    /// What may be missing and why.
    pub warnings: Vec<String>,
}

impl Kernel {
    /// The registered sources of perf events, `struct pmu`.
    ///
    /// # Errors
    /// If the kernel's symbols or types lack what is needed.
    pub fn perf_sources(&self) -> Result<Walk<Gva>, LinuxError> {
        let layout: Arc<SourceLayout> = self.layout()?;
        let walk = list::walk(self.space(), self.symbol("pmus")?, MAX_SOURCES).walk;
        Ok(Walk {
            items: walk
                .items
                .iter()
                .map(|&node| layout.entry.container(node))
                .collect(),
            end: walk.end,
        })
    }

    /// The contexts of perf events of all CPUs and threads.
    ///
    /// # Errors
    /// If the kernel's symbols or types lack what is needed, or threads cannot be listed.
    pub fn perf_contexts(&self) -> Result<PerfContexts, LinuxError> {
        let source: Arc<SourceLayout> = self.layout()?;
        let of_cpu: Arc<CpuContextLayout> = self.layout()?;
        let watched: Arc<WatchedLayout> = self.layout()?;
        let mut warnings = Warnings::default();
        let mut rows: Vec<PerfContext> = Vec::new();
        let mut of_cpus = |base: Gva| -> Result<(), LinuxError> {
            for (cpu, at) in self.per_cpu()?.copies(base) {
                rows.push(PerfContext {
                    watched: Watched::Cpu(cpu),
                    address: of_cpu.context.at(at),
                });
            }
            Ok(())
        };
        // Up to 6.1 each source has its contexts, and several share some; since then there is one for each CPU.
        let mut bases = Vec::new();
        if let Some(field) = &source.contexts {
            let sources = self.perf_sources()?;
            warnings.extend(sources.end.warning("list of sources of perf events"));
            for at in sources.items {
                match field.read(self.space(), at) {
                    Ok(base) if base.is_null() || bases.contains(&base) => {}
                    Ok(base) => bases.push(base),
                    Err(error) => warnings.add(format!("the source of perf events at {at}: {error}")),
                }
            }
        }
        for base in bases {
            of_cpus(base)?;
        }
        if let Ok(base) = self.per_cpu_symbol("perf_cpu_context") {
            of_cpus(base)?;
        }
        let many = (watched.contexts.size() / 8).clamp(1, MAX_KINDS);
        let threads = self.threads(None)?;
        warnings.extend(threads.warnings);
        for thread in threads.rows {
            for index in 0..many {
                let at = watched.contexts.at(thread.task).wrapping_add(index * 8);
                // A thread may have ended meanwhile.
                let Some(address) = self.pointer(at).ok().filter(|at| !at.is_null()) else {
                    continue;
                };
                rows.push(PerfContext {
                    watched: Watched::Thread {
                        pid: thread.pid,
                        tid: thread.tid,
                        name: thread.name.clone().into(),
                    },
                    address,
                });
            }
        }
        rows.sort_by_key(|row| row.address);
        rows.dedup_by_key(|row| row.address);
        Ok(PerfContexts {
            rows,
            warnings: warnings.into_vec(),
        })
    }

    /// The `struct perf_event`s of a context, at most `limit`.
    ///
    /// # Errors
    /// If the kernel's types lack what is needed.
    pub fn perf_events_of(&self, context: Gva, limit: usize) -> Result<Walk<Gva>, LinuxError> {
        let layout: Arc<ContextLayout> = self.layout()?;
        let event: Arc<EventEntryLayout> = self.layout()?;
        let walk = list::walk(self.space(), layout.events.at(context), limit).walk;
        Ok(Walk {
            items: walk
                .items
                .iter()
                .map(|&node| event.entry.container(node))
                .collect(),
            end: walk.end,
        })
    }
}
