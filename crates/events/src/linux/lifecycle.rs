//! Processes that start, execute a program and exit; modules that are loaded and unloaded.

use std::fmt;
use std::time::SystemTime;

use vmsight_arch::{Gva, Registers};
use vmsight_hooks::{Delivery, Hook, HookId};
use vmsight_linux::text::{guest_array_text, guest_text};
use vmsight_linux::{Current, CurrentReader, Kernel};

use super::TraceError;
use super::filter;
use super::site::function;
use super::whose::Whose;
use crate::{Armed, Monitor, Occurrence};

/// PATH_MAX.
const MAX_PATH: usize = 4096;
/// Arguments that are shown of a program.
const MAX_ARGUMENTS: u64 = 64;
/// Bytes that are read of all of them.
const MAX_ARGUMENT_BYTES: usize = 8192;
/// `MODULE_NAME_LEN`.
const MAX_MODULE_NAME: usize = 56;

/// What happens to processes and modules.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Lifecycle {
    /// A process or thread was made and is about to run for the first time: `wake_up_new_task`.
    Start,
    /// A process is about to become another program, past all checks: `begin_new_exec` (`flush_old_exec` before 5.8).
    Exec,
    /// A thread ends: `do_exit`.
    Exit,
    /// A module was loaded and is about to be initialised: `do_init_module`.
    ModuleLoad,
    /// A module is taken out, or failed to load: `free_module`.
    ModuleUnload,
}

impl Lifecycle {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Start,
        Self::Exec,
        Self::Exit,
        Self::ModuleLoad,
        Self::ModuleUnload,
    ];

    /// Its name in output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Exec => "exec",
            Self::Exit => "exit",
            Self::ModuleLoad => "module-load",
            Self::ModuleUnload => "module-unload",
        }
    }

    const fn functions(self) -> &'static [&'static str] {
        match self {
            Self::Start => &["wake_up_new_task"],
            Self::Exec => &["begin_new_exec", "flush_old_exec"],
            Self::Exit => &["do_exit"],
            Self::ModuleLoad => &["do_init_module"],
            Self::ModuleUnload => &["free_module"],
        }
    }
}

/// One such thing that was seen.
#[derive(Clone, Debug)]
pub struct LifecycleRecord {
    /// The event's number.
    pub sequence: u64,
    /// When.
    pub time: SystemTime,
    /// On which vCPU.
    pub vcpu: u32,
    /// What.
    pub what: Lifecycle,
    /// Who did it.
    pub current: Current,
    /// Of a start: the new task.
    pub child: Option<Current>,
    /// Of an exec: the path of the program as it was given; of modules: the name.
    pub subject: Option<String>,
    /// Of an exec: the arguments.
    pub arguments: Option<Vec<String>>,
    /// Of an exit: the code as wait(2) gives it, the signal in the low seven bits, the exit status in bits 8 to 15.
    pub code: Option<u32>,
}

impl fmt::Display for LifecycleRecord {
    /// `exec /bin/sh ["sh", "-c", "…"]`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.what.name())?;
        if let Some(subject) = &self.subject {
            write!(f, " {}", subject.escape_debug())?;
        }
        if let Some(arguments) = &self.arguments {
            write!(f, " {arguments:?}")?;
        }
        if let Some(child) = &self.child {
            let kind = if child.pid == child.tid {
                "process"
            } else {
                "thread"
            };
            write!(f, " {kind} {} {}", child.tid, child.name.escape_debug())?;
        }
        match self.code {
            Some(code) if code & 0x7f != 0 => write!(f, " signal {}", code & 0x7f),
            Some(code) => write!(f, " status {}", code >> 8 & 0xff),
            None => Ok(()),
        }
    }
}

/// Follows processes and modules.
#[derive(Debug)]
pub struct LifecycleTrace {
    kernel: Kernel,
    current: CurrentReader,
    whose: Whose,
    hooks: Armed<Lifecycle>,
}

impl LifecycleTrace {
    /// Nothing is armed yet.
    ///
    /// # Errors
    /// If the current task cannot be found in this kernel.
    pub fn new(kernel: &Kernel) -> Result<Self, TraceError> {
        Ok(Self {
            kernel: kernel.clone(),
            current: kernel.current()?,
            whose: Whose::default(),
            hooks: Armed::default(),
        })
    }

    /// Only of these processes; with `follow` also of those that they start from now on.
    #[must_use]
    pub fn of(mut self, pids: impl IntoIterator<Item = i32>, follow: bool) -> Self {
        self.whose = Whose::only(pids, follow);
        self
    }

    /// Arms one hook; it is taken out when this is dropped.
    ///
    /// # Errors
    /// If the kernel has no such function, or the backend cannot hook execution.
    pub fn arm(&mut self, monitor: &Monitor, what: Lifecycle, delivery: Delivery) -> Result<(), TraceError> {
        let at = function(&self.kernel, what.functions())?;
        let filter = filter::all(self.whose.condition(&self.current));
        let hook = Hook::execute(at).delivered(delivery).filtered(filter);
        Ok(self.hooks.arm(monitor, &hook, what)?)
    }

    /// Whether an event is of one of these hooks.
    pub fn owns(&self, id: HookId) -> bool {
        self.hooks.get(id).is_some()
    }

    /// Takes an event in.
    ///
    /// # Errors
    /// If it cannot be said who did it. What else cannot be read is left out of the record.
    pub fn take(&mut self, occurrence: &Occurrence) -> Result<Option<LifecycleRecord>, TraceError> {
        let event = occurrence.event();
        let Some(what) = self.hooks.get(event.hook).copied() else {
            return Ok(None);
        };
        let registers = occurrence.registers()?;
        let task = self
            .current
            .task(registers.gs.base)
            .map_err(TraceError::read("the current task", Gva(registers.gs.base)))?;
        let current = self
            .current
            .describe(task)
            .map_err(TraceError::read("the current task", task))?;
        if !self.whose.concerns(&self.current, &current) {
            return Ok(None);
        }
        let mut record = LifecycleRecord {
            sequence: event.sequence,
            time: event.time,
            vcpu: event.vcpu,
            what,
            current,
            child: None,
            subject: None,
            arguments: None,
            code: None,
        };
        self.fill(&mut record, &registers);
        Ok(Some(record))
    }

    fn fill(&self, record: &mut LifecycleRecord, registers: &Registers) {
        let first = Gva(registers.rdi());
        match record.what {
            Lifecycle::Start => record.child = self.current.describe(first).ok(),
            Lifecycle::Exit => record.code = Some(registers.rdi() as u32),
            Lifecycle::Exec => {
                record.subject = self.program(first);
                record.arguments = self.arguments(first);
            }
            Lifecycle::ModuleLoad | Lifecycle::ModuleUnload => record.subject = self.module_name(first),
        }
    }

    /// The path in a `struct linux_binprm`.
    fn program(&self, bprm: Gva) -> Option<String> {
        let space = self.kernel.space();
        let at = space
            .read_u64(self.member(bprm, "linux_binprm", "filename")?)
            .ok()?;
        Some(guest_text(&space.read_cstr(Gva(at), MAX_PATH).ok()?))
    }

    /// The arguments on the stack that a `struct linux_binprm` prepares: the strings begin at `p`.
    fn arguments(&self, bprm: Gva) -> Option<Vec<String>> {
        let space = self.kernel.space();
        let count = space.read_u32(self.member(bprm, "linux_binprm", "argc")?).ok()?;
        let mut at = space.read_u64(self.member(bprm, "linux_binprm", "p")?).ok()?;
        let mm = space.read_u64(self.member(bprm, "linux_binprm", "mm")?).ok()?;
        let pgd = space.read_u64(self.member(Gva(mm), "mm_struct", "pgd")?).ok()?;
        let root = space.translate(Gva(pgd)).ok()?.gpa;
        let user = space.with_dtb(vmsight_arch::Dtb(root.page_start().0));
        let mut arguments = Vec::new();
        let mut left = MAX_ARGUMENT_BYTES;
        for _ in 0..u64::from(count).min(MAX_ARGUMENTS) {
            let bytes = user.read_cstr(Gva(at), left).ok()?;
            at = at.wrapping_add(bytes.len() as u64 + 1);
            left = left.saturating_sub(bytes.len() + 1);
            arguments.push(guest_text(&bytes));
            if left == 0 {
                break;
            }
        }
        Some(arguments)
    }

    fn module_name(&self, module: Gva) -> Option<String> {
        let at = self.member(module, "module", "name")?;
        let mut name = [0; MAX_MODULE_NAME];
        self.kernel.space().read(at, &mut name).ok()?;
        Some(guest_array_text(&name))
    }

    fn member(&self, base: Gva, structure: &str, member: &str) -> Option<Gva> {
        Some(base.wrapping_add(self.kernel.offset(structure, member).ok()?))
    }
}
