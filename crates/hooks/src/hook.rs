//! What a monitor asks to be told of.

use std::fmt;
use std::time::Duration;

use bitflags::bitflags;
use serde::{Deserialize, Serialize};
use vmsight_arch::{Dtb, Gpa, Gva};

use crate::capability::Feature;
use crate::filter::{Condition, Filter, FilterError};

/// Most bytes that one memory hook covers: 1 GiB.
pub const MAX_RANGE: u64 = 1 << 30;

bitflags! {
    /// Kinds of access.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
    #[serde(transparent)]
    pub struct Access: u8 {
        /// Data is read.
        const READ = 1;
        /// Data is written.
        const WRITE = 2;
        /// An instruction is fetched.
        const EXECUTE = 4;
    }
}

impl fmt::Display for Access {
    /// `r`, `rw`, `x` ….
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (access, letter) in [(Self::READ, "r"), (Self::WRITE, "w"), (Self::EXECUTE, "x")] {
            if self.contains(access) {
                f.write_str(letter)?;
            }
        }
        Ok(())
    }
}

/// A stretch of memory, `len` bytes from `start` on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Range {
    /// Of guest-physical memory: whoever accesses it, by whatever mapping.
    Physical {
        /// The first byte.
        start: Gpa,
        /// Bytes.
        len: u64,
    },
    /// Of virtual addresses: an access by another mapping of the same memory is not seen.
    Virtual {
        /// The first byte.
        start: Gva,
        /// Bytes.
        len: u64,
    },
}

impl Range {
    /// The number of its bytes.
    pub const fn len(&self) -> u64 {
        match self {
            Self::Physical { len, .. } | Self::Virtual { len, .. } => *len,
        }
    }

    /// Whether it has no byte.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its first address, as a number.
    pub const fn first(&self) -> u64 {
        match self {
            Self::Physical { start, .. } => start.0,
            Self::Virtual { start, .. } => start.0,
        }
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let space = match self {
            Self::Physical { .. } => "physical",
            Self::Virtual { .. } => "virtual",
        };
        write!(f, "{space} {:#x}, {} bytes", self.first(), self.len())
    }
}

/// A register that controls the processor.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ControlRegister {
    /// Protection, paging, WP.
    Cr0,
    /// The root of the page tables.
    Cr3,
    /// SMEP, SMAP, PAE, ….
    Cr4,
    /// The task priority.
    Cr8,
    /// Which extended states are enabled (XSETBV).
    Xcr0,
    /// Addresses of hardware breakpoints 0 to 3.
    Dr(
        /// 0 to 3.
        u8,
    ),
    /// The state of hardware breakpoints.
    Dr6,
    /// Which hardware breakpoints are on.
    Dr7,
}

impl fmt::Display for ControlRegister {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cr0 => f.write_str("cr0"),
            Self::Cr3 => f.write_str("cr3"),
            Self::Cr4 => f.write_str("cr4"),
            Self::Cr8 => f.write_str("cr8"),
            Self::Xcr0 => f.write_str("xcr0"),
            Self::Dr(n) => write!(f, "dr{n}"),
            Self::Dr6 => f.write_str("dr6"),
            Self::Dr7 => f.write_str("dr7"),
        }
    }
}

/// Interrupt vectors: 0 to 31 are exceptions (SDM vol. 3A table 6-1), the others interrupts.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Vectors {
    /// The first one.
    pub first: u8,
    /// The last one, included.
    pub last: u8,
}

/// What happens.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum HookKind {
    /// The instruction at `at` is about to be executed. Kernel addresses are hooked in every address space.
    Execute {
        /// Where the instruction begins.
        at: Gva,
    },
    /// Memory is accessed.
    Memory {
        /// Which memory.
        range: Range,
        /// How.
        access: Access,
    },
    /// A control or debug register is written (or read, where the backend can).
    ControlRegister {
        /// Which.
        register: ControlRegister,
        /// How: [`Access::READ`], [`Access::WRITE`].
        access: Access,
    },
    /// A model-specific register is written (or read).
    Msr {
        /// Its number.
        index: u32,
        /// How: [`Access::READ`], [`Access::WRITE`].
        access: Access,
    },
    /// An exception or interrupt is delivered to the guest.
    Interrupt {
        /// Which.
        vectors: Vectors,
    },
    /// A vCPU executes `count` instructions, with one event after the last.
    Step {
        /// Which vCPU.
        vcpu: u32,
        /// How many instructions, at least 1.
        count: u64,
    },
    /// A vCPU executes instructions until the condition of the hook's filter holds, or is unknown, at most `most`, with one
    /// event when it is over. The condition is asked after each instruction, with the registers with which the next one
    /// begins; each is an occurrence to the hook's counts.
    StepUntil {
        /// Which vCPU.
        vcpu: u32,
        /// How many instructions at most, at least 1.
        most: u64,
    },
    /// An I/O port is accessed by IN, OUT, INS or OUTS.
    Port {
        /// The first port.
        first: u16,
        /// The last one, included.
        last: u16,
        /// How: [`Access::READ`], [`Access::WRITE`].
        access: Access,
    },
    /// CPUID is executed.
    Cpuid,
    /// VMCALL or VMMCALL is executed.
    Hypercall,
    /// LGDT, LIDT, LLDT or LTR is executed.
    DescriptorTable,
}

impl HookKind {
    /// What a backend must be able to do for this.
    pub fn features(&self) -> Vec<Feature> {
        let by_access = |access: &Access, features: [(Access, Feature); 3]| {
            let wanted = features.into_iter().filter(|(a, _)| access.contains(*a));
            wanted.map(|(_, feature)| feature).collect()
        };
        match self {
            Self::Execute { .. } => vec![Feature::Execute],
            Self::Memory { range, access } => {
                let features = match range {
                    Range::Physical { .. } => [
                        Feature::PhysicalRead,
                        Feature::PhysicalWrite,
                        Feature::PhysicalExecute,
                    ],
                    Range::Virtual { .. } => [
                        Feature::VirtualRead,
                        Feature::VirtualWrite,
                        Feature::VirtualExecute,
                    ],
                };
                let [read, write, execute] = features;
                by_access(
                    access,
                    [
                        (Access::READ, read),
                        (Access::WRITE, write),
                        (Access::EXECUTE, execute),
                    ],
                )
            }
            Self::ControlRegister { register, access } => {
                let write = match register {
                    ControlRegister::Cr0 | ControlRegister::Cr3 | ControlRegister::Cr4 => {
                        Feature::ControlWrite
                    }
                    ControlRegister::Cr8 => Feature::Cr8Write,
                    ControlRegister::Xcr0 => Feature::Xcr0Write,
                    ControlRegister::Dr(_) | ControlRegister::Dr6 | ControlRegister::Dr7 => {
                        Feature::DebugWrite
                    }
                };
                by_access(
                    access,
                    [
                        (Access::READ, Feature::ControlRead),
                        (Access::WRITE, write),
                        (Access::EXECUTE, write),
                    ],
                )
            }
            Self::Msr { access, .. } => by_access(
                access,
                [
                    (Access::READ, Feature::MsrRead),
                    (Access::WRITE, Feature::MsrWrite),
                    (Access::EXECUTE, Feature::MsrWrite),
                ],
            ),
            Self::Interrupt { .. } => vec![Feature::Interrupt],
            Self::Step { .. } => vec![Feature::Step],
            Self::StepUntil { .. } => vec![Feature::StepUntil],
            Self::Port { .. } => vec![Feature::Port],
            Self::Cpuid => vec![Feature::Cpuid],
            Self::Hypercall => vec![Feature::Hypercall],
            Self::DescriptorTable => vec![Feature::DescriptorTable],
        }
    }

    /// Whether it makes sense at all, whoever is to arm it.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn validate(&self) -> Result<(), HookError> {
        let readable = Access::READ | Access::WRITE;
        let (access, allowed) = match self {
            Self::Memory { range, access } => {
                if range.is_empty() || range.len() > MAX_RANGE {
                    return Err(HookError::Length { len: range.len() });
                }
                if range.first().checked_add(range.len() - 1).is_none() {
                    return Err(HookError::Wraps {
                        first: range.first(),
                        len: range.len(),
                    });
                }
                (*access, Access::all())
            }
            Self::ControlRegister { register, access } => {
                if matches!(register, ControlRegister::Dr(4..)) {
                    return Err(HookError::NoSuchRegister {
                        register: register.to_string(),
                    });
                }
                (*access, readable)
            }
            Self::Msr { access, .. } => (*access, readable),
            Self::Port { first, last, access } => {
                if first > last {
                    return Err(HookError::Order);
                }
                (*access, readable)
            }
            Self::Interrupt { vectors } if vectors.first > vectors.last => return Err(HookError::Order),
            Self::Step { count: 0, .. } | Self::StepUntil { most: 0, .. } => return Err(HookError::NoSteps),
            _ => return Ok(()),
        };
        if access.is_empty() || !allowed.contains(access) {
            return Err(HookError::Access { access });
        }
        Ok(())
    }
}

impl fmt::Display for HookKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Execute { at } => write!(f, "execution of {at}"),
            Self::Memory { range, access } => write!(f, "access ({access}) to memory ({range})"),
            Self::ControlRegister { register, access } => write!(f, "access ({access}) to {register}"),
            Self::Msr { index, access } => match vmsight_arch::registers::msr::name(*index) {
                Some(name) => write!(f, "access ({access}) to MSR {name}"),
                None => write!(f, "access ({access}) to MSR {index:#x}"),
            },
            Self::Interrupt { vectors } if vectors.first == vectors.last => {
                write!(f, "vector {}", vectors.first)
            }
            Self::Interrupt { vectors } => write!(f, "vectors {} to {}", vectors.first, vectors.last),
            Self::Step { vcpu, count } => write!(f, "{count} steps of vCPU {vcpu}"),
            Self::StepUntil { vcpu, most } => {
                write!(f, "steps of vCPU {vcpu} until a condition, {most} at most")
            }
            Self::Port { first, last, access } => {
                write!(f, "access ({access}) to ports {first:#x} to {last:#x}")
            }
            Self::Cpuid => f.write_str("CPUID"),
            Self::Hypercall => f.write_str("hypercalls"),
            Self::DescriptorTable => f.write_str("descriptor-table loads"),
        }
    }
}

/// In whose context.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Anybody's.
    #[default]
    All,
    /// Only while these page tables are in CR3. A kernel with page-table isolation has two roots for each process, side by
    /// side; both count (Linux, arch/x86/entry/calling.h: the user's root is the kernel's with bit 12 set).
    Dtb(Dtb),
}

impl Scope {
    /// Whether a vCPU with this CR3 is meant.
    pub const fn covers(self, cr3: u64) -> bool {
        const USER_ROOT: u64 = 1 << 12;
        match self {
            Self::All => true,
            Self::Dtb(dtb) => (Dtb::from_cr3(cr3).0 & !USER_ROOT) == (dtb.0 & !USER_ROOT),
        }
    }
}

/// What is done with an event for which the monitor gave no verdict in time.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Expiry {
    /// The guest goes on as if the hook were not there, and the hook is taken out.
    #[default]
    Open,
    /// The VM is paused and stays so until its owner resumes it.
    Closed,
}

/// What is done with an event for which the ring has no room.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Overflow {
    /// The vCPU waits for room, at most a second. After that the event is lost, and counted, and the hook is taken out, as one
    /// whose deadline has passed; what it has told of before can still be read.
    #[default]
    Block,
    /// The event is lost, and counted.
    Drop,
}

/// How events come to the monitor.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Delivery {
    /// The vCPU waits for the verdict, at most this long.
    Held {
        /// The longest wait.
        deadline: Duration,
        /// What comes after it, and after the monitor's end.
        expiry: Expiry,
    },
    /// The vCPU goes on at once: the event is only told.
    Told {
        /// What is done where the ring is full.
        overflow: Overflow,
    },
    /// Nothing is told: occurrences are counted where they happen.
    Counted,
}

impl Default for Delivery {
    fn default() -> Self {
        Self::Held {
            deadline: Duration::from_secs(1),
            expiry: Expiry::Open,
        }
    }
}

/// What a monitor asks to be told of.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Hook {
    /// What happens.
    pub kind: HookKind,
    /// In whose context.
    #[serde(default)]
    pub scope: Scope,
    /// How it is told.
    #[serde(default)]
    pub delivery: Delivery,
    /// Which of its occurrences are.
    #[serde(default, skip_serializing_if = "Filter::is_none")]
    pub filter: Filter,
    /// Where in the guest's address space its filter may be put before the exit: see [`Self::inside`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inside: Option<Gva>,
}

impl Hook {
    /// A hook whose events are held, in every context.
    pub const fn new(kind: HookKind) -> Self {
        Self {
            kind,
            scope: Scope::All,
            delivery: Delivery::Held {
                deadline: Duration::from_secs(1),
                expiry: Expiry::Open,
            },
            filter: Filter::none(),
            inside: None,
        }
    }

    /// A hook on the execution of the instruction at `at`.
    pub const fn execute(at: Gva) -> Self {
        Self::new(HookKind::Execute { at })
    }

    /// At most so many steps of a vCPU, until a condition holds or is unknown.
    ///
    /// # Errors
    /// As [`Condition::compile`].
    pub fn step_until(vcpu: u32, condition: &Condition, most: u64) -> Result<Self, FilterError> {
        let hook = Self::new(HookKind::StepUntil { vcpu, most });
        Ok(hook.filtered(Filter::only(condition)?))
    }

    /// A hook on writes to virtual memory.
    pub const fn write(start: Gva, len: u64) -> Self {
        Self::new(HookKind::Memory {
            range: Range::Virtual { start, len },
            access: Access::WRITE,
        })
    }

    /// The same in another scope.
    #[must_use]
    pub const fn within(mut self, scope: Scope) -> Self {
        self.scope = scope;
        self
    }

    /// The same with another delivery.
    #[must_use]
    pub const fn delivered(mut self, delivery: Delivery) -> Self {
        self.delivery = delivery;
        self
    }

    /// The same, with only some of its events.
    #[must_use]
    pub fn filtered(mut self, filter: Filter) -> Self {
        self.filter = filter;
        self
    }

    /// The same, with its scope and its filter's condition judged in the guest, before there is an exit: what is not wanted costs some
    /// instructions. For the execution of a NOP, a call or a jump of 5 bytes or more.
    ///
    /// `room` is an address in reach of 2 GiB, a multiple of 2 MiB, from which on the guest has nothing mapped, nor will have: its entry
    /// in the table above the last must be 0, and those above it be shared by all address spaces in which the instruction is
    /// executed. All hooks of a VM have the same. It stays mapped until the machine is reset, and so does the code, as a thread may have
    /// been interrupted in it; the instruction is put back when the hook is taken out.
    ///
    /// A guest that is saved (a snapshot, a migration) while a thread of it is in that code can go on from there only in the same process.
    ///
    /// Who asks for this knows the instruction: the stack pointer is one that may be written to, and where the filter looks at the
    /// kernel's per-CPU data ([`Field::PerCpu`](crate::Field::PerCpu)), GS is the kernel's, and a word there that is followed points at memory.
    #[must_use]
    pub const fn inside(mut self, room: Gva) -> Self {
        self.inside = Some(room);
        self
    }

    /// What a backend must be able to do for this.
    pub fn features(&self) -> Vec<Feature> {
        let inside = self.inside.map(|_| Feature::Inside);
        self.kind.features().into_iter().chain(inside).collect()
    }

    /// Whether it makes sense at all, whoever is to arm it.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn validate(&self) -> Result<(), HookError> {
        self.kind.validate()?;
        self.filter.validate()?;
        let judged = self.filter.has_condition() || self.scope != Scope::All;
        if self.inside.is_some() && !(judged && matches!(self.kind, HookKind::Execute { .. })) {
            return Err(HookError::NothingInside);
        }
        // An event above the rate happens. Who holds events wants to decide on each.
        if self.filter.rate().is_some() && !matches!(self.delivery, Delivery::Told { .. }) {
            return Err(HookError::RateOfNothingTold);
        }
        let until = matches!(self.kind, HookKind::StepUntil { .. });
        if until && (!self.filter.has_condition() || self.filter.rate().is_some()) {
            return Err(HookError::NoEnd);
        }
        Ok(())
    }
}

/// A hook that is armed. Unique as long as the connection to the backend lasts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HookId(pub u32);

impl fmt::Display for HookId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hook {}", self.0)
    }
}

/// A hook that makes no sense.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum HookError {
    /// No bytes, or too many.
    #[error("a memory hook covers 1 byte to 1 GiB, not {len} bytes")]
    Length {
        /// Bytes asked for.
        len: u64,
    },
    /// The range passes the end of the address space.
    #[error("{len} bytes from {first:#x} on pass the end of the address space")]
    Wraps {
        /// The first address.
        first: u64,
        /// Bytes.
        len: u64,
    },
    /// No such kind of access here.
    #[error("access {access:?} cannot be hooked there")]
    Access {
        /// What was asked for.
        access: Access,
    },
    /// The first is behind the last.
    #[error("the first is behind the last")]
    Order,
    /// A place for a filter that is none, or of what is no execution.
    #[error("inside the guest, only the filter of an execution can be judged, and there must be one")]
    NothingInside,
    /// A step hook without steps.
    #[error("a step hook takes at least one step")]
    NoSteps,
    /// Steps until nothing, or until something that may come too often to be told.
    #[error("steps until a condition take a filter with a condition, and without a rate")]
    NoEnd,
    /// No such register.
    #[error("there is no register {register}")]
    NoSuchRegister {
        /// Its name.
        register: String,
    },
    /// A limit of events where events are held, or not told at all.
    #[error("a rate is only for events that are told, not held or counted")]
    RateOfNothingTold,
    /// The filter cannot be.
    #[error(transparent)]
    Filter(#[from] FilterError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hooks_that_make_no_sense_are_refused() {
        let memory = |start, len, access| HookKind::Memory {
            range: Range::Virtual {
                start: Gva(start),
                len,
            },
            access,
        };
        assert_eq!(
            memory(0, 0, Access::WRITE).validate(),
            Err(HookError::Length { len: 0 })
        );
        assert!(memory(0, MAX_RANGE + 1, Access::WRITE).validate().is_err());
        assert_eq!(memory(u64::MAX, 1, Access::WRITE).validate(), Ok(()));
        assert!(memory(u64::MAX, 2, Access::WRITE).validate().is_err());
        assert!(memory(0, 8, Access::empty()).validate().is_err());
        let msr = |access| HookKind::Msr { index: 0x10, access };
        assert!(msr(Access::EXECUTE).validate().is_err());
        assert_eq!(msr(Access::READ).validate(), Ok(()));
        let step = |count| HookKind::Step { vcpu: 0, count };
        assert_eq!(step(0).validate(), Err(HookError::NoSteps));
        assert_eq!(step(1).validate(), Ok(()));
        let until = |most| Hook::new(HookKind::StepUntil { vcpu: 0, most });
        assert_eq!(until(1).validate(), Err(HookError::NoEnd));
        let outside = !Condition::rip_within(Gva(0x1000), 16);
        let hook = Hook::step_until(0, &outside, 1).unwrap();
        assert_eq!(hook.validate(), Ok(()));
        let limited = hook.filter.clone().at_most(1, Duration::from_secs(1));
        let told = Delivery::Told {
            overflow: Overflow::Drop,
        };
        let hook = hook.filtered(limited).delivered(told);
        assert_eq!(hook.validate(), Err(HookError::NoEnd));
        assert_eq!(
            Hook::step_until(0, &outside, 0).unwrap().validate(),
            Err(HookError::NoSteps)
        );
        let dr = |n| HookKind::ControlRegister {
            register: ControlRegister::Dr(n),
            access: Access::WRITE,
        };
        assert_eq!(dr(3).validate(), Ok(()));
        assert!(dr(4).validate().is_err());
    }

    #[test]
    fn each_access_needs_its_own_feature() {
        let range = Range::Physical {
            start: Gpa(0x1000),
            len: 8,
        };
        let kind = |access| HookKind::Memory { range, access }.features();
        assert_eq!(kind(Access::WRITE), [Feature::PhysicalWrite]);
        assert_eq!(
            kind(Access::READ | Access::EXECUTE),
            [Feature::PhysicalRead, Feature::PhysicalExecute]
        );
    }

    #[test]
    fn both_roots_of_a_process_are_in_its_scope() {
        let scope = Scope::Dtb(Dtb(0x1234_4000));
        assert!(scope.covers(0x1234_4000 | 5));
        assert!(scope.covers(0x8000_0000_1234_5000 | 0x805));
        assert!(!scope.covers(0x1234_6000));
        assert!(Scope::All.covers(0));
    }

    #[test]
    fn a_hook_survives_its_json() {
        let hook = Hook::write(Gva(0xffff_ffff_8100_0000), 4096)
            .within(Scope::Dtb(Dtb(0x4000)))
            .delivered(Delivery::Told {
                overflow: Overflow::Drop,
            });
        let text = serde_json::to_string(&hook).unwrap();
        assert_eq!(serde_json::from_str::<Hook>(&text).unwrap(), hook);
    }
}
