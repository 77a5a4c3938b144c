//! What is done about an event.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A register that a verdict can change.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Register {
    /// A general-purpose register by the number of its encoding, 0 (RAX) to 15 (R15).
    Gpr(u8),
    /// The instruction pointer.
    Rip,
    /// Flags.
    Rflags,
}

impl Register {
    /// RAX: results.
    pub const RAX: Self = Self::Gpr(0);
    /// The stack pointer.
    pub const RSP: Self = Self::Gpr(4);
    /// The second argument of a C function.
    pub const RSI: Self = Self::Gpr(6);
    /// The first argument of a C function.
    pub const RDI: Self = Self::Gpr(7);

    /// The register called `name`: `rax`, `r15`, `rip`, `rflags`.
    pub fn by_name(name: &str) -> Option<Self> {
        match name {
            "rip" => Some(Self::Rip),
            "rflags" => Some(Self::Rflags),
            _ => {
                let number = vmsight_arch::registers::GPR_NAMES
                    .iter()
                    .position(|n| *n == name)?;
                Some(Self::Gpr(u8::try_from(number).ok()?))
            }
        }
    }
}

impl fmt::Display for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::Gpr(n) => vmsight_arch::registers::GPR_NAMES.get(usize::from(*n)).copied(),
            Self::Rip => Some("rip"),
            Self::Rflags => Some("rflags"),
        };
        f.write_str(name.unwrap_or("?"))
    }
}

/// An exception to be injected.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Exception {
    /// Its vector, 0 to 31.
    pub vector: u8,
    /// The error code, for those that have one (SDM vol. 3A table 6-1).
    pub error_code: Option<u32>,
    /// The address that goes into CR2, for a page fault.
    pub cr2: Option<u64>,
}

impl Exception {
    /// #GP(0): what a processor answers to an instruction that is not allowed.
    pub const GENERAL_PROTECTION: Self = Self {
        vector: 13,
        error_code: Some(0),
        cr2: None,
    };
}

/// What is done about an event: exactly one for each that is held, applied once.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Verdict {
    /// It happens.
    #[default]
    Continue,
    /// The instruction is passed over: nothing of what it does happens, the guest goes on behind it.
    Skip,
    /// It does not happen, in the way the processor would refuse it: a write to memory is dropped, an MSR access is #GP.
    Deny,
    /// The function that is about to begin returns at once, with this in RAX: only at a function's first instruction.
    Return(
        /// The result.
        u64,
    ),
    /// It happens with these registers changed.
    SetRegisters(
        /// Which registers get what.
        Vec<(Register, u64)>,
    ),
    /// It happens with other data: what is written, or what a read gives.
    SetData(
        /// The data, little-endian.
        u64,
    ),
    /// An exception is raised instead.
    Inject(
        /// Which.
        Exception,
    ),
    /// The VM is paused before it happens, until it is resumed by its owner.
    Pause,
    /// It happens, and an event follows after so many instructions of this vCPU.
    Step(
        /// At least 1.
        u64,
    ),
    /// It happens, and the hook is taken out.
    Remove,
}

/// A verdict without what it carries: what a backend can or cannot do.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum VerdictKind {
    /// [`Verdict::Continue`].
    Continue,
    /// [`Verdict::Skip`].
    Skip,
    /// [`Verdict::Deny`].
    Deny,
    /// [`Verdict::Return`].
    Return,
    /// [`Verdict::SetRegisters`].
    SetRegisters,
    /// [`Verdict::SetData`].
    SetData,
    /// [`Verdict::Inject`].
    Inject,
    /// [`Verdict::Pause`].
    Pause,
    /// [`Verdict::Step`].
    Step,
    /// [`Verdict::Remove`].
    Remove,
}

impl VerdictKind {
    /// Its name in the field's words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Continue => "continue",
            Self::Skip => "skip",
            Self::Deny => "deny",
            Self::Return => "return",
            Self::SetRegisters => "registers",
            Self::SetData => "data",
            Self::Inject => "inject",
            Self::Pause => "pause",
            Self::Step => "step",
            Self::Remove => "remove",
        }
    }
}

impl fmt::Display for VerdictKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Verdict {
    /// What kind of verdict this is.
    pub const fn kind(&self) -> VerdictKind {
        match self {
            Self::Continue => VerdictKind::Continue,
            Self::Skip => VerdictKind::Skip,
            Self::Deny => VerdictKind::Deny,
            Self::Return(_) => VerdictKind::Return,
            Self::SetRegisters(_) => VerdictKind::SetRegisters,
            Self::SetData(_) => VerdictKind::SetData,
            Self::Inject(_) => VerdictKind::Inject,
            Self::Pause => VerdictKind::Pause,
            Self::Step(_) => VerdictKind::Step,
            Self::Remove => VerdictKind::Remove,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_have_the_names_of_their_encoding() {
        for (name, register) in [
            ("rax", Register::RAX),
            ("rsp", Register::RSP),
            ("rsi", Register::RSI),
            ("rdi", Register::RDI),
            ("r15", Register::Gpr(15)),
            ("rip", Register::Rip),
        ] {
            assert_eq!(Register::by_name(name), Some(register));
            assert_eq!(register.to_string(), name);
        }
        assert_eq!(Register::by_name("cr3"), None);
        assert_eq!(Register::Gpr(16).to_string(), "?");
    }
}
