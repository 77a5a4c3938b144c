//! The place for one verdict per vCPU: whoever holds a vCPU has its verdict there, and nowhere else.

use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use vmsight_hooks::{Exception, Register, Verdict};

use crate::shared::{Area, VERDICT_WORDS};
use crate::wait::Spin;

/// Registers of [`Verdict::SetRegisters`]: 16, RIP and RFLAGS.
const REGISTERS: usize = 18;

/// Words of a verdict: its kind, two values or a mask, and the registers.
mod at {
    pub(super) const KIND: usize = 0;
    pub(super) const VALUE: usize = 1;
    pub(super) const SECOND: usize = 2;
    pub(super) const THIRD: usize = 3;
    pub(super) const REGISTERS: usize = 4;
}

mod kind {
    pub(super) const CONTINUE: u64 = 1;
    pub(super) const SKIP: u64 = 2;
    pub(super) const DENY: u64 = 3;
    pub(super) const RETURN: u64 = 4;
    pub(super) const SET_REGISTERS: u64 = 5;
    pub(super) const SET_DATA: u64 = 6;
    pub(super) const INJECT: u64 = 7;
    pub(super) const PAUSE: u64 = 8;
    pub(super) const STEP: u64 = 9;
    pub(super) const REMOVE: u64 = 10;
}

/// A verdict in the form in which it crosses.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VerdictWords([u64; VERDICT_WORDS]);

impl VerdictWords {
    /// A verdict; `None` for a kind, or a register, that has no form here.
    pub fn new(verdict: &Verdict) -> Option<Self> {
        let mut words = [0; VERDICT_WORDS];
        let mut set = |index: usize, value| {
            if let Some(word) = words.get_mut(index) {
                *word = value;
            }
        };
        let kind = match verdict {
            Verdict::Continue => kind::CONTINUE,
            Verdict::Skip => kind::SKIP,
            Verdict::Deny => kind::DENY,
            Verdict::Return(value) => {
                set(at::VALUE, *value);
                kind::RETURN
            }
            Verdict::SetRegisters(registers) => {
                let mut mask = 0_u64;
                for (register, value) in registers {
                    let index = match register {
                        Register::Gpr(n @ 0..=15) => usize::from(*n),
                        Register::Rip => 16,
                        Register::Rflags => 17,
                        Register::Gpr(_) => return None,
                    };
                    mask |= 1 << index;
                    set(at::REGISTERS + index, *value);
                }
                set(at::VALUE, mask);
                kind::SET_REGISTERS
            }
            Verdict::SetData(value) => {
                set(at::VALUE, *value);
                kind::SET_DATA
            }
            Verdict::Inject(exception) => {
                let code = exception.error_code.map_or(0, |c| 1 << 32 | u64::from(c));
                let mask = u64::from(exception.cr2.is_some()) << 8;
                set(at::VALUE, u64::from(exception.vector) | mask);
                set(at::SECOND, code);
                set(at::THIRD, exception.cr2.unwrap_or(0));
                kind::INJECT
            }
            Verdict::Pause => kind::PAUSE,
            Verdict::Step(count) => {
                set(at::VALUE, *count);
                kind::STEP
            }
            Verdict::Remove => kind::REMOVE,
            _ => return None,
        };
        set(at::KIND, kind);
        Some(Self(words))
    }

    /// How many words a verdict of a kind has: the others are neither written nor read.
    const fn len_of(kind: u64) -> usize {
        match kind {
            kind::SET_REGISTERS => VERDICT_WORDS,
            _ => at::REGISTERS,
        }
    }

    fn kind(&self) -> u64 {
        self.0.get(at::KIND).copied().unwrap_or(0)
    }

    /// The verdict in it, `None` where it makes no sense.
    pub fn verdict(&self) -> Option<Verdict> {
        let get = |index: usize| self.0.get(index).copied().unwrap_or(0);
        let value = get(at::VALUE);
        Some(match get(at::KIND) {
            kind::CONTINUE => Verdict::Continue,
            kind::SKIP => Verdict::Skip,
            kind::DENY => Verdict::Deny,
            kind::RETURN => Verdict::Return(value),
            kind::SET_REGISTERS => {
                let named = (0..REGISTERS).filter(|i| value >> i & 1 != 0);
                let registers = named.map(|i| {
                    let register = match i {
                        16 => Register::Rip,
                        17 => Register::Rflags,
                        n => Register::Gpr(n as u8),
                    };
                    (register, get(at::REGISTERS + i))
                });
                Verdict::SetRegisters(registers.collect())
            }
            kind::SET_DATA => Verdict::SetData(value),
            kind::INJECT => {
                let code = get(at::SECOND);
                Verdict::Inject(Exception {
                    vector: u8::try_from(value & 0xff).ok().filter(|v| *v < 32)?,
                    error_code: (code >> 32 != 0).then_some(code as u32),
                    cr2: (value >> 8 & 1 != 0).then(|| get(at::THIRD)),
                })
            }
            kind::PAUSE => Verdict::Pause,
            kind::STEP if value > 0 => Verdict::Step(value),
            kind::REMOVE => Verdict::Remove,
            _ => return None,
        })
    }
}

/// What became of the event that is open.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    /// The verdict that came; `None` where it makes no sense.
    Verdict(Option<Verdict>),
    /// None yet.
    NotYet,
}

impl Area<'_> {
    /// The agent: the event with this number waits for its verdict from now on. Said before its record is written.
    pub fn open_event(self, sequence: u64) {
        self.open().store(sequence.wrapping_add(1), Ordering::Release);
    }

    /// The agent: no event waits any more.
    pub fn close_event(self) {
        self.open().store(0, Ordering::Release);
    }

    /// The monitor: whether the event with this number waits for its verdict.
    pub fn is_open(self, sequence: u64) -> bool {
        self.open().load(Ordering::Acquire) == sequence.wrapping_add(1)
    }

    /// The monitor: gives the verdict on the event with this number. One caller at a time, and once for each event.
    pub fn answer(self, sequence: u64, verdict: &VerdictWords) {
        let words = self.verdict().iter().take(VerdictWords::len_of(verdict.kind()));
        for (to, from) in words.zip(verdict.0) {
            to.store(from, Ordering::Relaxed);
        }
        self.answered().store(sequence.wrapping_add(1), Ordering::Release);
        self.ring_verdict();
    }

    /// The agent: the verdict on the event with this number, if it is there.
    pub fn answer_to(self, sequence: u64) -> Answer {
        if self.answered().load(Ordering::Acquire) != sequence.wrapping_add(1) {
            return Answer::NotYet;
        }
        fence(Ordering::Acquire);
        let word = |index: usize| self.verdict().get(index).map_or(0, |w| w.load(Ordering::Relaxed));
        // Read once: whatever becomes of it meanwhile, it is this kind.
        let kind = word(at::KIND);
        let mut words = [0; VERDICT_WORDS];
        for (index, to) in words.iter_mut().enumerate().take(VerdictWords::len_of(kind)) {
            *to = match index {
                at::KIND => kind,
                _ => word(index),
            };
        }
        Answer::Verdict(VerdictWords(words).verdict())
    }

    /// The agent: waits for the verdict, first spinning, then asleep for at most `most`. Returns early for a signal.
    pub fn wait_for_answer(self, sequence: u64, spin: &mut Spin, most: Duration) {
        let ready = || self.answered().load(Ordering::Acquire) == sequence.wrapping_add(1);
        let monitor = || self.read_on().load(Ordering::Relaxed);
        if !spin.until(monitor, ready) {
            self.sleep_for_verdict(ready, most);
        }
    }

    /// The agent: wakes a vCPU that waits for its verdict, so that it looks around.
    pub fn nudge(self) {
        self.ring_verdict();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Shared;

    fn verdicts() -> Vec<Verdict> {
        let all = (0..16).map(|n| (Register::Gpr(n), u64::from(n) << 40));
        let rest = [(Register::Rip, 1), (Register::Rflags, 2)];
        vec![
            Verdict::Continue,
            Verdict::Skip,
            Verdict::Deny,
            Verdict::Return(u64::MAX),
            Verdict::SetRegisters(all.chain(rest).collect()),
            Verdict::SetRegisters(vec![]),
            Verdict::SetData(5),
            Verdict::Inject(Exception::GENERAL_PROTECTION),
            Verdict::Inject(Exception {
                vector: 14,
                error_code: Some(u32::MAX),
                cr2: Some(0),
            }),
            Verdict::Inject(Exception {
                vector: 3,
                error_code: None,
                cr2: None,
            }),
            Verdict::Pause,
            Verdict::Step(1),
            Verdict::Remove,
        ]
    }

    #[test]
    fn every_verdict_survives_the_way() {
        for verdict in verdicts() {
            let words = VerdictWords::new(&verdict).unwrap();
            assert_eq!(words.verdict(), Some(verdict));
        }
        let none = Verdict::SetRegisters(vec![(Register::Gpr(16), 0)]);
        assert_eq!(VerdictWords::new(&none), None);
    }

    #[test]
    fn hostile_verdicts_are_none() {
        for words in [[0; VERDICT_WORDS], [u64::MAX; VERDICT_WORDS], [9; VERDICT_WORDS]] {
            let verdict = VerdictWords(words).verdict();
            assert!(matches!(verdict, None | Some(Verdict::Step(9))), "{verdict:?}");
        }
        let mut words = [0; VERDICT_WORDS];
        words[at::KIND] = kind::INJECT;
        words[at::VALUE] = 32;
        assert_eq!(VerdictWords(words).verdict(), None, "no such exception");
        words[at::KIND] = kind::STEP;
        words[at::VALUE] = 0;
        assert_eq!(VerdictWords(words).verdict(), None, "no steps");
    }

    #[test]
    fn words_that_a_verdict_does_not_have_are_left_alone() {
        let (shared, _file) = Shared::create().unwrap();
        let area = shared.area(0).unwrap();
        let registers = area.verdict().get(at::REGISTERS..).unwrap();
        for word in registers {
            word.store(7, Ordering::Relaxed);
        }
        for verdict in verdicts() {
            let has_registers = matches!(verdict, Verdict::SetRegisters(_));
            area.answer(5, &VerdictWords::new(&verdict).unwrap());
            assert_eq!(area.answer_to(5), Answer::Verdict(Some(verdict)));
            for word in registers {
                let was = word.swap(7, Ordering::Relaxed);
                assert!(has_registers || was == 7);
            }
        }
    }

    #[test]
    fn a_verdict_is_for_its_event_only() {
        let (shared, _file) = Shared::create().unwrap();
        let area = shared.area(0).unwrap();
        assert_eq!(area.answer_to(0), Answer::NotYet, "nothing was said yet");
        area.open_event(0);
        assert!(area.is_open(0) && !area.is_open(1));
        area.answer(0, &VerdictWords::new(&Verdict::Deny).unwrap());
        area.wait_for_answer(0, &mut Spin::default(), Duration::from_secs(3600));
        assert_eq!(area.answer_to(0), Answer::Verdict(Some(Verdict::Deny)));
        area.close_event();
        assert!(!area.is_open(0));
        area.open_event(1);
        assert_eq!(area.answer_to(1), Answer::NotYet, "an old verdict does not count");
    }
}
