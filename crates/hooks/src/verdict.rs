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
    /// It happens, and an event follows after so many instructions of this vCPU. On an event of
    /// [`crate::HookKind::StepUntil`] it goes on so, until its condition holds or so many were executed.
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

impl VerdictKind {
    /// How strict it is, against others on the same event. What keeps the event from happening comes before what
    /// changes it, and that before what only looks at it.
    const fn strictness(self) -> u8 {
        match self {
            Self::Continue | Self::Remove | Self::Pause => 0,
            Self::Step => 1,
            Self::SetRegisters => 2,
            Self::SetData => 3,
            Self::Skip => 4,
            Self::Return => 5,
            Self::Inject => 6,
            Self::Deny => 7,
        }
    }
}

/// What is done about an event on which several hooks, of one monitor or of several, gave a verdict.
///
/// The strictest is applied, whole, and no other one: deny, inject, return, skip, data, registers, step, continue,
/// in this order. Of two of a kind the one of the hook that was armed first is applied. "Pause" and "remove" do not
/// compete: the VM is paused if one verdict says so, and the strictest of the others is applied when it is resumed;
/// hooks whose verdict is "remove" are out, and the event goes on as the others say.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Decision<T> {
    /// What is applied: never "pause" or "remove".
    pub verdict: Verdict,
    /// Whose it is, where it is somebody's.
    pub by: Option<T>,
    /// Whether the VM is paused first.
    pub pause: bool,
    /// Whose hooks are taken out.
    pub removed: Vec<T>,
    /// Whose verdicts are not applied, for a stricter one's sake.
    pub overruled: Vec<(VerdictKind, T)>,
}

impl<T> Default for Decision<T> {
    fn default() -> Self {
        Self {
            verdict: Verdict::Continue,
            by: None,
            pause: false,
            removed: Vec::new(),
            overruled: Vec::new(),
        }
    }
}

impl<T> Decision<T> {
    /// Takes one more verdict in: in the order in which the hooks were armed.
    pub fn add(&mut self, verdict: Verdict, by: T) {
        match verdict {
            Verdict::Continue => {}
            Verdict::Pause => self.pause = true,
            Verdict::Remove => self.removed.push(by),
            stricter if stricter.kind().strictness() > self.verdict.kind().strictness() => {
                let old = std::mem::replace(&mut self.verdict, stricter);
                if let Some(whose) = self.by.replace(by) {
                    self.overruled.push((old.kind(), whose));
                }
            }
            other => self.overruled.push((other.kind(), by)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decided(verdicts: &[Verdict]) -> Decision<usize> {
        let mut decision = Decision::default();
        for (i, verdict) in verdicts.iter().enumerate() {
            decision.add(verdict.clone(), i);
        }
        decision
    }

    #[test]
    fn the_strictest_verdict_is_applied_whoever_gives_it() {
        let from_mild = [
            Verdict::Continue,
            Verdict::Step(1),
            Verdict::SetRegisters(vec![]),
            Verdict::SetData(1),
            Verdict::Skip,
            Verdict::Return(1),
            Verdict::Inject(Exception::GENERAL_PROTECTION),
            Verdict::Deny,
        ];
        for (i, mild) in from_mild.iter().enumerate() {
            for strict in from_mild.iter().skip(i + 1) {
                for pair in [[mild.clone(), strict.clone()], [strict.clone(), mild.clone()]] {
                    let decision = decided(&pair);
                    assert_eq!(&decision.verdict, strict, "{pair:?}");
                    let overruled: Vec<_> = decision.overruled.iter().map(|(kind, _)| *kind).collect();
                    let expected: Vec<_> = (i > 0).then(|| mild.kind()).into_iter().collect();
                    assert_eq!(overruled, expected, "{pair:?}");
                }
            }
        }
        let nothing = decided(&[Verdict::Continue, Verdict::Continue]);
        assert_eq!(nothing, Decision::default());
    }

    #[test]
    fn of_two_of_a_kind_the_first_counts_and_pauses_and_removals_do_not_compete() {
        let decision = decided(&[
            Verdict::SetData(1),
            Verdict::Pause,
            Verdict::Remove,
            Verdict::SetData(2),
        ]);
        let expected = Decision {
            verdict: Verdict::SetData(1),
            by: Some(0),
            pause: true,
            removed: vec![2],
            overruled: vec![(VerdictKind::SetData, 3)],
        };
        assert_eq!(decision, expected);
        let denied = decided(&[Verdict::Pause, Verdict::Deny]);
        assert!(
            denied.pause && denied.verdict == Verdict::Deny,
            "denied when it is resumed"
        );
    }

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
