//! The system calls of a kernel: numbers, names, parameters, handlers.
//!
//! Numbers and handlers are those of the kernel's own tables, and where it has none for an ABI, of the switch that it dispatches
//! by. What the parameters are is what the kernel keeps for its event tracing (`syscalls_metadata`, CONFIG_FTRACE_SYSCALLS):
//! their types and names as in its source. So this needs no list of ours and is right for every build.

mod switch;

pub use switch::Switch;

use rustc_hash::FxHashMap;
use vmsight_arch::Gva;

use crate::layout::{Field, layout};
use crate::{Kernel, LinuxError};

/// More than any table has: x86-64's ends below 600.
const MAX_SYSCALLS: u64 = 1024;
/// Registers that carry arguments.
const MAX_PARAMETERS: i32 = 6;
/// Longest name of a type, parameter or call.
const MAX_TEXT: usize = 128;

layout! {
    /// What the kernel keeps of each call for its event tracing (include/trace/syscall.h).
    struct MetadataLayout = "syscall_metadata" {
        name: Field<Gva> = "name",
        // An int up to 6.12, seven bits of a byte in 7.2.
        nb_args: Field<i32> = "nb_args",
        types: Field<Gva> = "types",
        args: Field<Gva> = "args",
    }
}

/// How a call was made.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Abi {
    /// SYSCALL from 64-bit code.
    X64,
    /// INT 0x80, SYSENTER, or SYSCALL from 32-bit code.
    Ia32,
}

/// A parameter, as in the kernel's source.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Parameter {
    /// Its type: `const char *`, `umode_t`.
    pub declared: String,
    /// Its name.
    pub name: String,
}

/// A system call.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Syscall {
    /// Its number.
    pub number: u32,
    /// Its name for people, as strace and the manual pages have it: `openat`, `stat`.
    pub name: String,
    /// Its parameters; `None` where the kernel does not say.
    pub parameters: Option<Vec<Parameter>>,
    /// The function that the table names, or the switch leads to, now.
    pub handler: Gva,
}

/// A handler and the name of its call, which is empty where that cannot be told.
type Handler = (Gva, String);

/// All of one ABI's.
#[derive(Clone, Debug)]
pub struct SyscallTable {
    /// How they are called.
    pub abi: Abi,
    calls: Vec<Syscall>,
    names: FxHashMap<String, u32>,
}

impl SyscallTable {
    /// The call with this number.
    pub fn get(&self, number: u32) -> Option<&Syscall> {
        self.calls.get(usize::try_from(number).ok()?)
    }

    /// The call with this name.
    pub fn named(&self, name: &str) -> Option<&Syscall> {
        self.get(*self.names.get(name)?)
    }

    /// All of them, by number.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Syscall> {
        self.calls.iter()
    }
}

impl Kernel {
    /// The kernel's system calls.
    ///
    /// # Errors
    /// If neither a table nor a switch can be found and read.
    pub fn syscalls(&self, abi: Abi) -> Result<SyscallTable, LinuxError> {
        // Since the mitigation of branch history injection (6.9, and stable releases of 2024) the kernel dispatches by the
        // switches, and has left of the tables the one that its event tracing reads.
        let (table, switch) = match abi {
            Abi::X64 => ("sys_call_table", "x64_sys_call"),
            Abi::Ia32 => ("ia32_sys_call_table", "ia32_sys_call"),
        };
        let handlers: Vec<Handler> = match (self.find_symbol(&[table]), self.find_symbol(&[switch])) {
            (None, Some(at)) => self.dispatched(&Switch::read(self, at)?),
            _ => self.listed(table)?,
        };
        let metadata = match abi {
            Abi::X64 => self
                .symbol_pointer("syscalls_metadata")
                .ok()
                .filter(|at| !at.is_null()),
            // The array is indexed by the numbers of 64-bit calls.
            Abi::Ia32 => None,
        };
        let mut calls = Vec::new();
        for (number, (handler, name)) in (0u32..).zip(handlers) {
            let entry =
                metadata.and_then(|array| self.pointer(array.wrapping_add(u64::from(number) * 8)).ok());
            let entry = entry.filter(|at| !at.is_null());
            calls.push(Syscall {
                number,
                // A handler that somebody put there tells nothing; the kernel's other list still does.
                name: match name.is_empty() {
                    true => entry.and_then(|at| self.declared_name(at)).unwrap_or(name),
                    false => name,
                },
                parameters: entry.and_then(|at| self.parameters(at)),
                handler,
            });
        }
        let names = calls.iter().rev().map(|c| (c.name.clone(), c.number)).collect();
        Ok(SyscallTable { abi, calls, names })
    }

    /// What a table names, up to what is no handler any more.
    fn listed(&self, symbol: &str) -> Result<Vec<Handler>, LinuxError> {
        let table = self.symbol(symbol)?;
        let mut handlers = Vec::new();
        for number in 0..self.entries_of(table) {
            let at = table.wrapping_add(number * 8);
            let handler = self.pointer(at).map_err(LinuxError::read(symbol, at))?;
            let Some(name) = self.handler_name(handler) else {
                break;
            };
            handlers.push((handler, name));
        }
        Ok(handlers)
    }

    /// Where a switch sends each number, up to the last for which it has a case.
    fn dispatched(&self, switch: &Switch) -> Vec<Handler> {
        let handler = |number| switch.target(number).ok().map(|(handler, _)| handler);
        let other = handler(u32::MAX);
        let mut all: Vec<_> = (0..MAX_SYSCALLS as u32).map(handler).collect();
        while all.last().is_some_and(|last| *last == other) {
            all.pop();
        }
        // One that cannot be followed keeps its place, without a name.
        all.into_iter()
            .map(|at| at.unwrap_or(Gva(0)))
            .map(|at| (at, self.handler_name(at).unwrap_or_default()))
            .collect()
    }

    /// How many entries fit between a table and the next symbol.
    fn entries_of(&self, table: Gva) -> u64 {
        let linked = self.image().link_time(table);
        let next = self.profile().symbols.after(linked);
        next.map_or(MAX_SYSCALLS, |s| s.address.wrapping_sub(linked) / 8)
            .min(MAX_SYSCALLS)
    }

    /// The name of a call by the symbol of its handler; a handler that is none of the kernel's keeps its place, without
    /// a name.
    fn handler_name(&self, handler: Gva) -> Option<String> {
        if handler.is_null() {
            return None;
        }
        if !self.image().contains(handler) {
            return Some(String::new());
        }
        let linked = self.image().link_time(handler);
        let (symbol, offset) = self.profile().symbols.nearest(linked)?;
        if offset != 0 {
            return Some(String::new());
        }
        // Several calls that a kernel lacks share one handler, and several symbols an address.
        let mut at = self.profile().symbols.range(linked..linked.saturating_add(1));
        let name = at.find_map(|s| bare(s.name)).or_else(|| bare(symbol.name))?;
        Some(usual(name).to_owned())
    }

    /// The name in the `struct syscall_metadata` at `metadata`.
    fn declared_name(&self, metadata: Gva) -> Option<String> {
        let layout = self.layout::<MetadataLayout>().ok()?;
        let at = layout.name.read(self.space(), metadata).ok()?;
        let name = self.text(at, MAX_TEXT).ok()?;
        Some(usual(name.strip_prefix("sys_")?).to_owned())
    }

    /// What the `struct syscall_metadata` at `metadata` says of the parameters.
    fn parameters(&self, metadata: Gva) -> Option<Vec<Parameter>> {
        let layout = self.layout::<MetadataLayout>().ok()?;
        let space = self.space();
        let count = layout.nb_args.read(space, metadata).ok()?;
        if !(0..=MAX_PARAMETERS).contains(&count) {
            return None;
        }
        if count == 0 {
            return Some(Vec::new());
        }
        let types = layout.types.read(space, metadata).ok()?;
        let names = layout.args.read(space, metadata).ok()?;
        let text = |array: Gva, i: i32| {
            let at = self.pointer(array.wrapping_add(i as u64 * 8)).ok()?;
            self.text(at, MAX_TEXT).ok()
        };
        (0..count)
            .map(|i| {
                Some(Parameter {
                    declared: text(types, i)?,
                    name: text(names, i)?,
                })
            })
            .collect()
    }
}

/// `openat` of `__x64_sys_openat`.
fn bare(symbol: &str) -> Option<&str> {
    const PREFIXES: [&str; 6] = [
        "__x64_sys_",
        "__ia32_sys_",
        "__ia32_compat_sys_",
        "__x64_compat_sys_",
        "__x32_compat_sys_",
        "sys_",
    ];
    PREFIXES.iter().find_map(|prefix| symbol.strip_prefix(prefix))
}

/// What people call a call that the kernel's source has by another name.
fn usual(name: &str) -> &str {
    match name {
        "newstat" => "stat",
        "newlstat" => "lstat",
        "newfstat" => "fstat",
        "newuname" => "uname",
        "sendfile64" => "sendfile",
        "umount" => "umount2",
        other => other,
    }
}
