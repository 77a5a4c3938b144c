//! Denies a guest what it is not allowed to do, and says who tried.

mod memory;
mod rule;

pub use rule::{Rule, RuleError};

use std::collections::BTreeSet;
use std::time::SystemTime;

use nix::errno::Errno;
use vmsight_arch::registers::control::{CR0_WP, CR4_SMAP, CR4_SMEP};
use vmsight_arch::registers::msr;
use vmsight_arch::{Gva, Registers};
use vmsight_hooks::{
    Access, Capability, ControlRegister, Delivery, Detail, Feature, Hook, HookId, HookKind, Verdict,
    VerdictKind,
};
use vmsight_linux::module::ModuleFields;
use vmsight_linux::path::PathResolver;
use vmsight_linux::{Current, CurrentReader, Kernel};

use super::site::function;
use super::{ControlTrace, TraceError};
use crate::{Armed, EventError, Monitor, Occurrence};

/// What loads modules: handlers of system calls, 64-bit and 32-bit.
const LOADERS: [&str; 4] = [
    "__x64_sys_init_module",
    "__x64_sys_finit_module",
    "__ia32_sys_init_module",
    "__ia32_sys_finit_module",
];

/// An attempt at what is denied.
#[derive(Clone, Debug)]
pub struct Incident {
    /// When.
    pub time: SystemTime,
    /// On which vCPU.
    pub vcpu: u32,
    /// What was tried.
    pub rule: Rule,
    /// Who tried; `None` where that could not be read.
    pub current: Option<Current>,
    /// The instruction.
    pub rip: Gva,
    /// What exactly: the path, the address and values.
    pub what: String,
}

/// What an event of the guard's means.
#[derive(Debug)]
pub enum Judgement {
    /// Allowed.
    Allowed,
    /// It is denied by this verdict.
    Denied(Incident, Verdict),
}

/// Holds a guest to rules as long as it lives.
#[derive(Debug)]
pub struct Guard {
    kernel: Kernel,
    current: CurrentReader,
    paths: PathResolver,
    hooks: Armed<Purpose>,
    control: Option<ControlTrace>,
    /// Which control-register rules there are.
    bits: Vec<(ControlRegister, u64, Rule)>,
    delivery: Delivery,
    /// What memory held whose old values the backend does not know.
    copies: Vec<memory::Copy>,
}

/// What a hook is there for.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Purpose {
    Memory(Rule),
    Control,
    Lstar,
    LoadModule,
    /// A module is about to be initialised: its code is searched for instructions that write control registers.
    ModuleCode,
    Exec(BTreeSet<String>),
}

impl Guard {
    /// Arms what the rules need.
    ///
    /// # Errors
    /// If the backend cannot do it: then nothing is armed, for half a guard is none.
    pub fn arm(
        kernel: &Kernel,
        monitor: &Monitor,
        rules: &[Rule],
        delivery: Delivery,
    ) -> Result<Self, TraceError> {
        let prevents = |c: &Capability| {
            let kinds = [VerdictKind::Deny, VerdictKind::Skip, VerdictKind::Return];
            kinds.iter().any(|kind| c.verdicts.contains(kind))
        };
        if !monitor.capabilities().iter().any(prevents) {
            return Err(TraceError::Event(EventError::Limit {
                backend: monitor.backend(),
                what: "anything that is to be denied".to_owned(),
                why: "it sees what happens and cannot prevent it; the gdb-stub backend can".to_owned(),
            }));
        }
        let mut guard = Self {
            current: kernel.current()?,
            paths: PathResolver::new(kernel)?,
            kernel: kernel.clone(),
            hooks: Armed::default(),
            control: None,
            bits: Vec::new(),
            delivery,
            copies: Vec::new(),
        };
        let mut programs = BTreeSet::new();
        for rule in rules {
            match rule {
                Rule::KernelText | Rule::Rodata | Rule::SyscallTable | Rule::Idt => {
                    for kind in memory::hooks(kernel, monitor, rule)? {
                        guard.copies.extend(memory::Copy::of(kernel, &kind));
                        guard.add(monitor, kind, Purpose::Memory(rule.clone()))?;
                    }
                }
                Rule::Cr0Wp => guard.bits.push((ControlRegister::Cr0, CR0_WP, rule.clone())),
                Rule::Cr4Smep => guard.bits.push((ControlRegister::Cr4, CR4_SMEP, rule.clone())),
                Rule::Cr4Smap => guard.bits.push((ControlRegister::Cr4, CR4_SMAP, rule.clone())),
                Rule::Lstar => {
                    let kind = HookKind::Msr {
                        index: msr::LSTAR,
                        access: Access::WRITE,
                    };
                    guard.add(monitor, kind, Purpose::Lstar)?;
                }
                Rule::Modules => {
                    for name in LOADERS {
                        // A kernel without IA32 emulation has two of them.
                        if let Some(at) = kernel.find_symbol(&[name]) {
                            guard.add(monitor, HookKind::Execute { at }, Purpose::LoadModule)?;
                        }
                    }
                }
                Rule::Exec(path) => {
                    programs.insert(path.clone());
                }
            }
        }
        if !programs.is_empty() {
            let at = function(kernel, &["security_bprm_check"])?;
            guard.add(monitor, HookKind::Execute { at }, Purpose::Exec(programs))?;
        }
        guard.arm_control(monitor)?;
        Ok(guard)
    }

    fn add(&mut self, monitor: &Monitor, kind: HookKind, purpose: Purpose) -> Result<(), TraceError> {
        let hook = Hook::new(kind).delivered(self.delivery);
        Ok(self.hooks.arm(monitor, &hook, purpose)?)
    }

    fn arm_control(&mut self, monitor: &Monitor) -> Result<(), TraceError> {
        let registers: Vec<ControlRegister> = self.bits.iter().map(|(r, ..)| *r).collect();
        if registers.is_empty() {
            return Ok(());
        }
        let capabilities = monitor.capabilities();
        if capabilities.iter().any(|c| c.feature == Feature::ControlWrite) {
            let mut done = Vec::new();
            for register in registers {
                if !done.contains(&register) {
                    let access = Access::WRITE;
                    self.add(
                        monitor,
                        HookKind::ControlRegister { register, access },
                        Purpose::Control,
                    )?;
                    done.push(register);
                }
            }
            return Ok(());
        }
        self.control = Some(ControlTrace::arm(
            &self.kernel,
            monitor,
            registers,
            self.delivery,
        )?);
        // What a module brings along is hooked before its first instruction runs.
        let at = function(&self.kernel, &["do_init_module"])?;
        self.add(monitor, HookKind::Execute { at }, Purpose::ModuleCode)
    }

    /// Whether an event is of one of these hooks.
    pub fn owns(&self, id: HookId) -> bool {
        self.hooks.get(id).is_some() || self.control.as_ref().is_some_and(|c| c.owns(id))
    }

    /// What an event means, and what is to be done about it.
    ///
    /// # Errors
    /// If its registers or memory cannot be read. What to do then is for the caller to say.
    pub fn judge(&mut self, monitor: &Monitor, occurrence: &Occurrence) -> Result<Judgement, TraceError> {
        let event = occurrence.event();
        let registers = occurrence.registers()?;
        let purpose = match self.hooks.get(event.hook) {
            Some(purpose) => purpose.clone(),
            None => {
                let record = self.control.as_ref().map(|c| c.take(occurrence)).transpose()?;
                return Ok(match record.flatten() {
                    Some(r) => self.judge_control(
                        occurrence,
                        &registers,
                        r.site.register,
                        r.old,
                        r.new,
                        Verdict::Skip,
                    ),
                    None => Judgement::Allowed,
                });
            }
        };
        Ok(match (purpose, event.detail) {
            (
                Purpose::Memory(rule),
                Detail::Memory {
                    gva,
                    gpa,
                    len,
                    old,
                    new,
                    ..
                },
            ) => {
                if memory::is_own_patching(&self.kernel, &registers) {
                    return Ok(Judgement::Allowed);
                }
                let at = gva.map(|a| a.0).or(gpa.map(|a| a.0)).unwrap_or_default();
                let shown = |v: Option<u64>| v.map_or("?".to_owned(), |v| format!("{v:#x}"));
                let kept = || gva.and_then(|at| self.copies.iter().find_map(|copy| copy.get(at, len)));
                let (old, verdict) = match old {
                    Some(old) => (Some(old), Verdict::Deny),
                    None => kept().map_or((None, Verdict::Deny), |old| (Some(old), Verdict::SetData(old))),
                };
                let what = format!("write to {at:#x}: {} -> {}", shown(old), shown(new));
                self.deny(occurrence, &registers, rule, what, verdict)
            }
            (
                Purpose::Control,
                Detail::ControlRegister {
                    register, old, new, ..
                },
            ) => {
                let (old, new) = (old.unwrap_or_default(), new.unwrap_or_default());
                self.judge_control(occurrence, &registers, register, old, new, Verdict::Deny)
            }
            (Purpose::Lstar, Detail::Msr { old, new, .. }) => {
                if new.is_some() && (new == old || old.is_none() && new == registers.lstar) {
                    return Ok(Judgement::Allowed);
                }
                let what = format!("write of {:#x} to LSTAR", new.unwrap_or_default());
                self.deny(occurrence, &registers, Rule::Lstar, what, Verdict::Deny)
            }
            (Purpose::LoadModule, _) => {
                let verdict = Verdict::Return(errno(Errno::EPERM));
                self.deny(
                    occurrence,
                    &registers,
                    Rule::Modules,
                    "a module".to_owned(),
                    verdict,
                )
            }
            (Purpose::Exec(programs), _) => {
                let path = self.program(&registers)?;
                match programs.iter().find(|pattern| rule::matches(pattern, &path)) {
                    Some(pattern) => {
                        let rule = Rule::Exec(pattern.clone());
                        self.deny(
                            occurrence,
                            &registers,
                            rule,
                            path,
                            Verdict::Return(errno(Errno::EACCES)),
                        )
                    }
                    None => Judgement::Allowed,
                }
            }
            (Purpose::ModuleCode, _) => {
                self.search_module(monitor, Gva(registers.rdi()))?;
                Judgement::Allowed
            }
            _ => Judgement::Allowed,
        })
    }

    fn judge_control(
        &self,
        occurrence: &Occurrence,
        registers: &Registers,
        register: ControlRegister,
        old: u64,
        new: u64,
        verdict: Verdict,
    ) -> Judgement {
        let broken = self
            .bits
            .iter()
            .find(|(r, bit, _)| *r == register && old & bit != 0 && new & bit == 0);
        match broken {
            Some((_, _, rule)) => {
                let what = format!("{register} {old:#x} -> {new:#x}");
                self.deny(occurrence, registers, rule.clone(), what, verdict)
            }
            None => Judgement::Allowed,
        }
    }

    fn deny(
        &self,
        occurrence: &Occurrence,
        registers: &Registers,
        rule: Rule,
        what: String,
        verdict: Verdict,
    ) -> Judgement {
        let event = occurrence.event();
        let task = self.current.task(registers.gs.base);
        let current = task.and_then(|task| self.current.describe(task)).ok();
        let incident = Incident {
            time: event.time,
            vcpu: event.vcpu,
            rule,
            current,
            rip: Gva(registers.rip),
            what,
        };
        Judgement::Denied(incident, verdict)
    }

    /// The path of the file in the `struct linux_binprm` that RDI points to: what is opened, not what it was called by.
    fn program(&self, registers: &Registers) -> Result<String, TraceError> {
        let bprm = Gva(registers.rdi());
        let at = bprm.wrapping_add(self.kernel.offset("linux_binprm", "file")?);
        let read = TraceError::read("the program to be executed", at);
        let file = self.kernel.space().read_u64(at).map_err(read)?;
        let path = self
            .paths
            .file(Gva(file))
            .map_err(TraceError::read("the program's path", Gva(file)))?;
        Ok(path.path)
    }

    fn search_module(&mut self, monitor: &Monitor, module: Gva) -> Result<(), TraceError> {
        let Some(control) = &mut self.control else {
            return Ok(());
        };
        let modules = self.kernel.modules(ModuleFields::default())?;
        for range in modules
            .rows
            .iter()
            .filter(|m| m.address == module)
            .flat_map(|m| &m.ranges)
        {
            if matches!(range.kind.as_str(), "core" | "init" | "text" | "init_text") {
                control.add_code(monitor, range.base, range.size)?;
            }
        }
        Ok(())
    }
}

/// What a function of the kernel returns for an error.
fn errno(error: Errno) -> u64 {
    i64::from(-(error as i32)) as u64
}
