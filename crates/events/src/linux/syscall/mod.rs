//! System calls: each one with its arguments, its result, and who made it.
//!
//! Two hooks for each way into the kernel: on the CALL in the entry code that begins the work, and on the instruction after
//! it. Both are in the kernel's own text, run with its page tables and GS base, and have the caller's registers on the stack.

mod arguments;
mod count;
mod names;
mod record;
mod sockaddr;
mod value;

pub use arguments::Argument;
pub use count::{SyscallCount, SyscallCounter, SyscallCounts};
pub use record::SyscallRecord;
pub use value::Value;

use rustc_hash::{FxHashMap, FxHashSet};
use vmsight_arch::{Dtb, Gva, Registers};
use vmsight_hooks::{Condition, Delivery, Hook, HookId, Register};
use vmsight_linux::syscall::{Abi, Syscall, SyscallTable};
use vmsight_linux::{CurrentReader, Kernel};

use super::TraceError;
use super::filter;
use super::site::{SyscallSite, syscall_sites};
use super::whose::Whose;
use crate::{Armed, Monitor, Occurrence};

/// `struct pt_regs`: its size and where what is read of it lies (arch/x86/include/asm/ptrace.h; user ABI, never changed).
mod pt_regs {
    pub(super) const SIZE: usize = 168;
    pub(super) const BP: usize = 32;
    pub(super) const BX: usize = 40;
    pub(super) const R10: usize = 56;
    pub(super) const R9: usize = 64;
    pub(super) const R8: usize = 72;
    pub(super) const AX: usize = 80;
    pub(super) const CX: usize = 88;
    pub(super) const DX: usize = 96;
    pub(super) const SI: usize = 104;
    pub(super) const DI: usize = 112;
    pub(super) const ORIG_AX: usize = 120;
}

/// Calls under way that are remembered: more threads than that are in none at once. Those that never return (the thread
/// was killed in them) are forgotten when this is reached.
const MAX_PENDING: usize = 1 << 16;

/// Follows system calls.
#[derive(Debug)]
pub struct SyscallTrace {
    kernel: Kernel,
    current: CurrentReader,
    x64: SyscallTable,
    ia32: Option<SyscallTable>,
    sites: Vec<SyscallSite>,
    /// Names of calls to be told of; all where `None`.
    wanted: Option<FxHashSet<String>>,
    whose: Whose,
    pending: FxHashMap<Gva, SyscallRecord>,
    hooks: Armed<(SyscallSite, Phase)>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Entry,
    Exit,
}

impl SyscallTrace {
    /// What follows the calls named, or all where none is named. Nothing is armed yet.
    ///
    /// # Errors
    /// If the kernel has no such call, or the places to hook cannot be found.
    pub fn new(kernel: &Kernel, names: &[String]) -> Result<Self, TraceError> {
        let x64 = kernel.syscalls(Abi::X64)?;
        let ia32 = kernel.syscalls(Abi::Ia32).ok();
        for name in names {
            let known = x64.named(name).is_some() || ia32.as_ref().is_some_and(|t| t.named(name).is_some());
            if !known {
                return Err(TraceError::NoSyscall {
                    name: name.clone(),
                    suggestion: alike(name, &x64),
                });
            }
        }
        Ok(Self {
            current: kernel.current()?,
            sites: syscall_sites(kernel)?,
            kernel: kernel.clone(),
            x64,
            ia32,
            wanted: (!names.is_empty()).then(|| names.iter().cloned().collect()),
            whose: Whose::default(),
            pending: FxHashMap::default(),
            hooks: Armed::default(),
        })
    }

    /// Only of these processes; with `follow` also of those that they start from now on.
    #[must_use]
    pub fn of(mut self, pids: impl IntoIterator<Item = i32>, follow: bool) -> Self {
        self.whose = Whose::only(pids, follow);
        self
    }

    /// Arms the hooks. They are taken out when this is dropped.
    ///
    /// # Errors
    /// Where the backend cannot hook execution.
    pub fn arm(&mut self, monitor: &Monitor, delivery: Delivery) -> Result<(), TraceError> {
        // Exits first: a call that is seen to begin is seen to end.
        for phase in [Phase::Exit, Phase::Entry] {
            for site in &self.sites {
                let at = match phase {
                    Phase::Entry => site.entry,
                    Phase::Exit => site.exit,
                };
                let filter = filter::all(self.condition(*site, phase));
                let hook = Hook::execute(at).delivered(delivery).filtered(filter);
                self.hooks.arm(monitor, &hook, (*site, phase))?;
            }
        }
        Ok(())
    }

    /// What can be judged before an event is told. Of a return the number is not: what restarts a call changes it
    /// (arch/x86/kernel/signal.c).
    fn condition(&self, site: SyscallSite, phase: Phase) -> impl Iterator<Item = Condition> {
        let table = match site.abi {
            Abi::X64 => Some(&self.x64),
            Abi::Ia32 => self.ia32.as_ref(),
        };
        let wanted = self.wanted.as_ref().filter(|_| phase == Phase::Entry).zip(table);
        let numbers = wanted.map(|(names, table)| {
            let numbers = table.iter().filter(|call| names.contains(&call.name));
            number_of(site).is_one_of(numbers.map(|call| u64::from(call.number)))
        });
        numbers.into_iter().chain(self.whose.condition(&self.current))
    }

    /// Whether an event is of one of these hooks.
    pub fn owns(&self, id: HookId) -> bool {
        self.hooks.get(id).is_some()
    }

    /// Takes an event in. What comes out is a call that has returned, or one that never will (`exit`).
    ///
    /// # Errors
    /// If the guest's memory does not hold what it must at these places.
    pub fn take(&mut self, occurrence: &Occurrence) -> Result<Option<SyscallRecord>, TraceError> {
        let Some((site, phase)) = self.hooks.get(occurrence.event().hook).copied() else {
            return Ok(None);
        };
        let registers = occurrence.registers()?;
        let task = self
            .current
            .task(registers.gs.base)
            .map_err(TraceError::read("the current task", Gva(registers.gs.base)))?;
        match phase {
            Phase::Entry => self.enter(occurrence, site, &registers, task),
            Phase::Exit => self.leave(occurrence, &registers, task),
        }
    }

    fn enter(
        &mut self,
        occurrence: &Occurrence,
        site: SyscallSite,
        registers: &Registers,
        task: Gva,
    ) -> Result<Option<SyscallRecord>, TraceError> {
        let saved = self.saved(registers)?;
        let number = word(&saved, number_at(site)) as u32;
        let table = match site.abi {
            Abi::X64 => Some(&self.x64),
            Abi::Ia32 => self.ia32.as_ref(),
        };
        let unknown;
        let call = match table.and_then(|t| t.get(number)) {
            Some(call) => call,
            None => {
                unknown = Syscall {
                    number,
                    name: format!("syscall_{number}"),
                    parameters: None,
                    handler: Gva(0),
                };
                &unknown
            }
        };
        if self
            .wanted
            .as_ref()
            .is_some_and(|wanted| !wanted.contains(&call.name))
        {
            return Ok(None);
        }
        let current = self
            .current
            .describe(task)
            .map_err(TraceError::read("the current task", task))?;
        if !self.whose.concerns(&self.current, &current) {
            return Ok(None);
        }
        let places = match site.abi {
            Abi::X64 => [
                pt_regs::DI,
                pt_regs::SI,
                pt_regs::DX,
                pt_regs::R10,
                pt_regs::R8,
                pt_regs::R9,
            ],
            Abi::Ia32 => [
                pt_regs::BX,
                pt_regs::CX,
                pt_regs::DX,
                pt_regs::SI,
                pt_regs::DI,
                pt_regs::BP,
            ],
        };
        let raw = places.map(|place| match site.abi {
            Abi::X64 => word(&saved, place),
            Abi::Ia32 => word(&saved, place) & 0xffff_ffff,
        });
        let user = self.kernel.space().with_dtb(Dtb::from_cr3(registers.cr3));
        let event = occurrence.event();
        let record = SyscallRecord {
            sequence: event.sequence,
            time: event.time,
            vcpu: event.vcpu,
            current,
            abi: site.abi,
            number,
            name: call.name.clone(),
            arguments: arguments::decode(call, &raw, &user),
            result: None,
            duration: None,
        };
        if matches!(call.name.as_str(), "exit" | "exit_group") {
            self.pending.remove(&task);
            return Ok(Some(record));
        }
        if self.pending.len() >= MAX_PENDING {
            tracing::warn!(
                "{} system calls that never returned are forgotten",
                self.pending.len()
            );
            self.pending.clear();
        }
        self.pending.insert(task, record);
        Ok(None)
    }

    fn leave(
        &mut self,
        occurrence: &Occurrence,
        registers: &Registers,
        task: Gva,
    ) -> Result<Option<SyscallRecord>, TraceError> {
        let Some(mut record) = self.pending.remove(&task) else {
            return Ok(None); // begun before the hooks were, or not wanted
        };
        let saved = self.saved(registers)?;
        let result = word(&saved, pt_regs::AX);
        record.result = Some(match record.abi {
            Abi::X64 => result as i64,
            Abi::Ia32 => i64::from(result as u32 as i32),
        });
        record.duration = occurrence.event().time.duration_since(record.time).ok(); // `None` where the host's clock was set back meanwhile
        Ok(Some(record))
    }

    /// The caller's registers, as the entry code has saved them.
    fn saved(&self, registers: &Registers) -> Result<[u8; pt_regs::SIZE], TraceError> {
        let at = Gva(registers.rsp());
        let mut bytes = [0; pt_regs::SIZE];
        self.kernel
            .space()
            .read(at, &mut bytes)
            .map_err(TraceError::read("the caller's registers", at))?;
        Ok(bytes)
    }
}

/// Where among the saved registers the number is of the call that is about to be made.
const fn number_at(site: SyscallSite) -> usize {
    match site.is_in_ax {
        true => pt_regs::AX,
        false => pt_regs::ORIG_AX,
    }
}

/// The same for a filter.
fn number_of(site: SyscallSite) -> vmsight_hooks::Value {
    vmsight_hooks::Value::from(Register::RSP)
        .plus(number_at(site) as u64)
        .load(4)
}

fn word(bytes: &[u8; pt_regs::SIZE], at: usize) -> u64 {
    let eight = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
    u64::from_le_bytes(eight.unwrap_or_default())
}

/// The call whose name begins alike, for a message.
fn alike(name: &str, table: &SyscallTable) -> Option<String> {
    let common = |other: &str| {
        name.bytes()
            .zip(other.bytes())
            .take_while(|(a, b)| a == b)
            .count()
    };
    let best = table
        .iter()
        .max_by_key(|c| (common(&c.name), usize::MAX - c.name.len()))?;
    (common(&best.name) >= 3).then(|| best.name.clone())
}
