//! Hooks on places and registers, as the command line names them.

use std::str::FromStr;
use std::time::SystemTime;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};
use vmsight_arch::registers::msr;
use vmsight_arch::{Gva, Registers};
use vmsight_events::linux::{self, ControlTrace};
use vmsight_events::{Armed, Monitor, Occurrence};
use vmsight_hooks::{Access, ControlRegister, Delivery, Detail, Feature, Hook, HookKind, Range};
use vmsight_linux::{Current, CurrentReader, Kernel};

use super::Cmd;
use crate::place::{Place, number, size};
use crate::session::Session;

/// Bytes that `--write PLACE` watches.
const LENGTH: u64 = 8;
/// The registers that carry a C function's arguments.
const ARGUMENTS: [&str; 6] = ["rdi", "rsi", "rdx", "rcx", "r8", "r9"];
/// Kernel addresses are in the upper half.
const KERNEL_HALF: u64 = 1 << 63;

impl Cmd {
    /// The plain hooks asked for, each with what it is called in the output.
    pub(super) fn plain(&self, session: &Session) -> Result<Vec<(HookKind, String)>> {
        let mut all = Vec::new();
        for text in &self.hook {
            let place = place(text)?;
            let at = session.gva(&place, None)?;
            all.push((HookKind::Execute { at }, place.to_string()));
        }
        let accesses = [
            (&self.write, Access::WRITE),
            (&self.access, Access::READ | Access::WRITE),
        ];
        for (list, access) in accesses {
            for text in list {
                let (range, name) = range(session, text)?;
                all.push((HookKind::Memory { range, access }, name));
            }
        }
        for text in &self.msr {
            let index = msr_number(text)?;
            let access = Access::WRITE;
            all.push((HookKind::Msr { index, access }, text.to_uppercase()));
        }
        Ok(all)
    }
}

/// The control registers that `--cr` names.
pub(super) fn control_registers(numbers: &[u8]) -> Result<Vec<ControlRegister>> {
    let all = numbers.iter().map(|n| match n {
        0 => Ok(ControlRegister::Cr0),
        3 => Ok(ControlRegister::Cr3),
        4 => Ok(ControlRegister::Cr4),
        _ => bail!("CR{n} cannot be traced; what can: 0, 3, 4"),
    });
    all.collect()
}

/// Whether a backend hooks control registers themselves.
pub(super) fn hooks_control(monitor: &Monitor) -> bool {
    let table = monitor.capabilities();
    table.iter().any(|c| c.feature == Feature::ControlWrite)
}

/// The hook on writes of a control register, and what it is called.
pub(super) fn control_hook(register: ControlRegister) -> (HookKind, String) {
    let access = Access::WRITE;
    (
        HookKind::ControlRegister { register, access },
        register.to_string(),
    )
}

/// A place as elsewhere; `sym:` before a symbol is allowed.
fn place(text: &str) -> Result<Place> {
    Ok(Place::from_str(text.strip_prefix("sym:").unwrap_or(text))?)
}

fn range(session: &Session, text: &str) -> Result<(Range, String)> {
    let (head, len) = match text.rsplit_once(',') {
        Some((head, len)) => (head, size(len).map_err(anyhow::Error::msg)?),
        None => (text, LENGTH),
    };
    let place = place(head)?;
    let range = match place.physical {
        true => Range::Physical {
            start: session.gpa(&place)?,
            len,
        },
        false => Range::Virtual {
            start: session.gva(&place, None)?,
            len,
        },
    };
    Ok((range, place.to_string()))
}

fn msr_number(text: &str) -> Result<u32> {
    let named = msr::NAMES
        .iter()
        .find(|(_, name)| name.eq_ignore_ascii_case(text))
        .map(|(number, _)| *number);
    let numbered = || number(text).and_then(|n| u32::try_from(n).ok());
    named.or_else(numbered).with_context(|| {
        let names: Vec<_> = msr::NAMES.iter().map(|(_, name)| *name).collect();
        format!("no MSR {text:?}: give its number, or one of {}", names.join(", "))
    })
}

/// A plain event that was seen.
pub(super) struct PlainRecord {
    pub(super) event: &'static str,
    pub(super) time: SystemTime,
    pub(super) vcpu: u32,
    pub(super) subject: String,
    pub(super) current: Option<Current>,
    pub(super) text: String,
    pub(super) values: Map<String, Value>,
}

/// Follows plain hooks.
pub(super) struct PlainTrace {
    current: Option<CurrentReader>,
    pids: Vec<i32>,
    /// Whether they are asked for in the guest.
    inside: bool,
    hooks: Armed<String>,
    control: Option<ControlTrace>,
}

impl PlainTrace {
    pub(super) fn new(kernel: &Kernel, pids: &[i32], inside: bool) -> Self {
        Self {
            // Only for who did it: without it, events are shown all the same.
            current: kernel.current().ok(),
            pids: pids.to_vec(),
            inside,
            hooks: Armed::default(),
            control: None,
        }
    }

    pub(super) fn arm(
        &mut self,
        kernel: &Kernel,
        monitor: &Monitor,
        kind: HookKind,
        name: String,
        delivery: Delivery,
    ) -> Result<()> {
        let hook = self.hook(kernel, kind)?.delivered(delivery);
        let named = name.clone();
        self.hooks
            .arm(monitor, &hook, name)
            .with_context(|| format!("hooking {named}"))
    }

    /// The hook, with the processes that are wanted where it can ask for them itself. Where it cannot they are looked at here.
    fn hook(&self, kernel: &Kernel, kind: HookKind) -> Result<Hook> {
        let hook = Hook::new(kind);
        let HookKind::Execute { at } = kind else {
            return Ok(hook);
        };
        let filter = self
            .current
            .as_ref()
            .and_then(|reader| linux::calls_of(kernel, reader, at, &self.pids));
        Ok(match (filter, self.inside) {
            (Some(filter), true) => {
                let inside = linux::inside(kernel, at)?;
                Hook::execute(inside.at).filtered(filter).inside(inside.room)
            }
            (Some(filter), false) => hook.filtered(filter),
            (None, true) => bail!("whose call of {at} it is cannot be asked inside the guest"),
            (None, false) => hook,
        })
    }

    /// Follows writes of control registers: by the backend where it can, else by the kernel's instructions for it.
    pub(super) fn arm_control(
        &mut self,
        kernel: &Kernel,
        monitor: &Monitor,
        registers: Vec<ControlRegister>,
        delivery: Delivery,
    ) -> Result<()> {
        if hooks_control(monitor) {
            for register in registers {
                let (kind, name) = control_hook(register);
                self.arm(kernel, monitor, kind, name, delivery)?;
            }
            return Ok(());
        }
        let trace = ControlTrace::arm(kernel, monitor, registers, delivery)
            .context("hooking the instructions that write control registers")?;
        tracing::info!("{} instructions that write them are hooked", trace.sites());
        self.control = Some(trace);
        Ok(())
    }

    pub(super) fn take(&self, session: &Session, occurrence: &Occurrence) -> Result<Option<PlainRecord>> {
        let event = occurrence.event();
        // A backend that sees the register itself tells what it will hold; where the instructions were hooked, they do.
        let (name, detail) = match self.hooks.get(event.hook) {
            Some(name) => (name.clone(), event.detail),
            None => match self
                .control
                .as_ref()
                .map(|c| c.take(occurrence))
                .transpose()?
                .flatten()
            {
                Some(record) => (
                    record.site.register.to_string(),
                    Detail::ControlRegister {
                        register: record.site.register,
                        access: Access::WRITE,
                        old: Some(record.old),
                        new: Some(record.new),
                    },
                ),
                None => return Ok(None),
            },
        };
        let registers = occurrence.registers()?;
        let current = self.who(&registers);
        if !self.pids.is_empty() && !current.as_ref().is_some_and(|c| self.pids.contains(&c.pid)) {
            return Ok(None);
        }
        let at = Gva(registers.rip);
        let place = session.name_of(at).unwrap_or_else(|| format!("{at:#x}"));
        let mut values = Map::new();
        let mut hex = |key: &str, value: Option<u64>| {
            values.insert(
                key.into(),
                value.map_or(Value::Null, |v| format!("{v:#x}").into()),
            );
        };
        hex("rip", Some(at.0));
        let (kind, text) = match detail {
            Detail::Execute { .. } => {
                let mut text = format!("{name}(");
                for (i, register) in ARGUMENTS.into_iter().enumerate() {
                    let value = registers.by_name(register).unwrap_or_default();
                    hex(register, Some(value));
                    text.push_str(if i > 0 { ", " } else { "" });
                    text.push_str(&format!("{value:#x}"));
                }
                text.push(')');
                ("execute", text)
            }
            Detail::Memory {
                gva,
                gpa,
                access,
                old,
                new,
                ..
            } => {
                let address = gva.map(|a| a.0).or(gpa.map(|a| a.0)).unwrap_or_default();
                hex("address", Some(address));
                hex("old", old);
                hex("new", new);
                let where_ = gva
                    .and_then(|a| session.name_of(a))
                    .unwrap_or_else(|| format!("{address:#x}"));
                let kind = if access.contains(Access::WRITE) {
                    "write"
                } else {
                    "read"
                };
                (kind, format!("{where_}{} by {place}", change(old, new)))
            }
            Detail::Msr { index, old, new, .. } => {
                hex("msr", Some(u64::from(index)));
                hex("old", old);
                hex("new", new);
                ("msr", format!("{name}{} by {place}", change(old, new)))
            }
            Detail::ControlRegister { old, new, .. } => {
                hex("old", old);
                hex("new", new);
                ("cr", format!("{name}{} by {place}", change(old, new)))
            }
            _ => ("event", format!("{name} at {place}")),
        };
        Ok(Some(PlainRecord {
            event: kind,
            time: event.time,
            vcpu: event.vcpu,
            subject: name,
            current,
            text,
            values,
        }))
    }

    /// Who runs: in kernel mode GS leads to it, in user mode the base that SWAPGS will bring in.
    fn who(&self, registers: &Registers) -> Option<Current> {
        let reader = self.current.as_ref()?;
        let base = match registers.cpl() {
            0 if registers.gs.base >= KERNEL_HALF => registers.gs.base,
            _ => registers.kernel_gs_base?,
        };
        reader.describe(reader.task(base).ok()?).ok()
    }
}

/// ` 0x1 -> 0x2`, as far as it is known.
fn change(old: Option<u64>, new: Option<u64>) -> String {
    match (old, new) {
        (Some(old), Some(new)) => format!(" {old:#x} -> {new:#x}"),
        (None, Some(new)) => format!(" = {new:#x}"),
        (Some(old), None) => format!(" (was {old:#x})"),
        (None, None) => String::new(),
    }
}
