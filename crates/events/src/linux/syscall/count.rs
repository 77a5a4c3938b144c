//! System calls counted where they are made: by the filters of their hooks, in the VMM with an agent there. The guest
//! is never held, and no event is told.

use vmsight_hooks::{Buckets, Condition, Delivery, Filter, Hook};
use vmsight_linux::syscall::{Abi, SyscallTable};

use super::{Phase, SyscallTrace, number_of};
use crate::linux::TraceError;
use crate::{Armed, Monitor};

/// Counts system calls by number, from when it is made until it is dropped.
#[derive(Debug)]
pub struct SyscallCounter {
    x64: SyscallTable,
    ia32: Option<SyscallTable>,
    hooks: Armed<Abi>,
}

/// How often one was called.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SyscallCount {
    /// By which way in.
    pub abi: Abi,
    /// Its name, or `syscall_` and its number where the kernel has none by that.
    pub name: String,
    /// How often it was begun.
    pub calls: u64,
}

/// What was counted.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct SyscallCounts {
    /// Each call that was made, by way in and number.
    pub calls: Vec<SyscallCount>,
    /// Calls by so many different numbers that these were not kept apart: a program tries out numbers.
    pub others: u64,
    /// Calls whose number could not be read.
    pub unknown: u64,
    /// Of all that were counted: whether they were wanted could not be read, their process in most cases.
    pub undecided: u64,
}

impl SyscallTrace {
    /// Counts the calls that this would follow, instead of following them.
    ///
    /// # Errors
    /// Where the backend cannot hook execution, or what is wanted does not fit into a filter: more processes or calls
    /// than it has room for, or children, who are found out by following.
    pub fn count(&self, monitor: &Monitor) -> Result<SyscallCounter, TraceError> {
        let mut hooks = Armed::default();
        for site in &self.sites {
            let conditions: Vec<Condition> = self.condition(*site, Phase::Entry).collect();
            let filter = match conditions.is_empty() {
                true => Filter::none(),
                false => Filter::only(&Condition::All(conditions))?,
            };
            let filter = filter.counting(&number_of(*site), Buckets::Each)?;
            let hook = Hook::execute(site.entry)
                .delivered(Delivery::Counted)
                .filtered(filter);
            hooks.arm(monitor, &hook, site.abi)?;
        }
        Ok(SyscallCounter {
            x64: self.x64.clone(),
            ia32: self.ia32.clone(),
            hooks,
        })
    }
}

impl SyscallCounter {
    /// What was counted until now.
    ///
    /// # Errors
    /// Where the VM could not be reached.
    pub fn counted(&self) -> Result<SyscallCounts, TraceError> {
        let mut all = SyscallCounts::default();
        for (guard, abi) in self.hooks.guards() {
            let tallied = guard.tally()?;
            all.others = all.others.saturating_add(tallied.others);
            all.unknown = all.unknown.saturating_add(tallied.unknown);
            all.undecided = all.undecided.saturating_add(guard.counts()?.undecided);
            for bucket in tallied.buckets {
                let name = self.name(*abi, bucket.key as u32);
                // 32-bit calls have several ways in.
                match all.calls.iter_mut().find(|c| c.abi == *abi && c.name == name) {
                    Some(call) => call.calls = call.calls.saturating_add(bucket.count),
                    None => all.calls.push(SyscallCount {
                        abi: *abi,
                        name,
                        calls: bucket.count,
                    }),
                }
            }
        }
        Ok(all)
    }

    fn name(&self, abi: Abi, number: u32) -> String {
        let table = match abi {
            Abi::X64 => Some(&self.x64),
            Abi::Ia32 => self.ia32.as_ref(),
        };
        match table.and_then(|t| t.get(number)) {
            Some(call) => call.name.clone(),
            None => format!("syscall_{number}"),
        }
    }
}
