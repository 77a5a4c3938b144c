//! From a saved context to the bottom of the stack, as the kernel itself goes (arch/x86/kernel/unwind_orc.c).

use vmsight_memory::AddressSpace;

use super::code::Code;
use super::hooked::Hooked;
use super::orc::{Base, Entry, Kind};
use super::{How, Task};

/// Frames of one task: its stack holds no more that mean anything.
pub(super) const MAX_FRAMES: usize = 512;

/// Where the members of `pt_regs` lie that unwinding needs.
#[derive(Clone, Copy, Debug)]
pub(super) struct PtRegs {
    pub(super) size: u64,
    pub(super) ip: u64,
    pub(super) cs: u64,
    pub(super) sp: u64,
    pub(super) bp: u64,
    pub(super) ax: u64,
    pub(super) dx: u64,
    pub(super) di: u64,
    pub(super) r10: u64,
    pub(super) r13: u64,
}

/// The part of a task's stack that is in use, as it was at one moment.
#[derive(Debug, Default)]
pub(super) struct Stack {
    pub(super) base: u64,
    pub(super) bytes: Vec<u8>,
}

impl Stack {
    fn word(&self, at: u64) -> Option<u64> {
        let from = usize::try_from(at.checked_sub(self.base)?).ok()?;
        let bytes = self.bytes.get(from..)?.first_chunk::<8>()?;
        Some(u64::from_le_bytes(*bytes))
    }

    /// The address past its last byte.
    pub(super) fn top(&self) -> u64 {
        self.base.wrapping_add(self.bytes.len() as u64)
    }
}

/// A frame as it was found.
#[derive(Debug)]
pub(super) struct Frame {
    pub(super) address: u64,
    /// Where on the stack that stood.
    pub(super) slot: u64,
    pub(super) how: How,
    /// Whether it is the address of an instruction, not of one behind a call.
    pub(super) exact: bool,
    pub(super) problem: Option<String>,
}

/// What unwinds the stacks of one kernel.
pub(super) struct Unwinder<'k> {
    pub(super) space: &'k AddressSpace,
    pub(super) code: Code<'k>,
    pub(super) hooked: Hooked,
    pub(super) regs: PtRegs,
    /// Words between the top of a stack and the registers that entering the kernel saved: none, or with FRED two.
    pub(super) paddings: &'static [u64],
}

/// Where unwinding is.
#[derive(Clone, Copy, Debug)]
pub(super) struct State {
    pub(super) ip: u64,
    pub(super) sp: u64,
    pub(super) bp: u64,
    /// Whether `ip` is that of an instruction.
    pub(super) exact: bool,
    /// The registers that were saved last, and whether all of them were.
    regs: Option<(u64, bool)>,
    /// Whole ones below those of which only a part was saved.
    before: Option<u64>,
    /// Whether nobody knows where `ip` leads back to.
    lost: bool,
}

impl State {
    pub(super) fn new(ip: u64, sp: u64, bp: u64, exact: bool) -> Self {
        Self {
            ip,
            sp,
            bp,
            exact,
            regs: None,
            before: None,
            lost: false,
        }
    }
}

/// What comes after a frame.
enum Step {
    /// The next one.
    Frame(Frame),
    /// Nothing: this was the last.
    Bottom,
    /// Nobody knows, and why.
    Lost(String),
}

impl Unwinder<'_> {
    /// The frames of `stack`, the innermost first, beginning with what `state` says, which was found at `slot`.
    pub(super) fn frames(&self, task: &Task, stack: &Stack, mut state: State, slot: u64) -> Vec<Frame> {
        let mut frames = vec![Frame {
            address: state.ip,
            slot,
            how: How::Saved,
            exact: state.exact,
            problem: None,
        }];
        loop {
            if frames.len() >= MAX_FRAMES {
                mark(&mut frames, format!("cut after {MAX_FRAMES} frames"));
                return frames;
            }
            match self.step(task, stack, &mut state) {
                Step::Frame(frame) => frames.push(frame),
                Step::Bottom => return frames,
                Step::Lost(reason) => {
                    mark(&mut frames, format!("what called it is guessed: {reason}"));
                    self.guess(stack, state.sp, &mut frames);
                    return frames;
                }
            }
        }
    }

    fn step(&self, task: &Task, stack: &Stack, state: &mut State) -> Step {
        if state.lost {
            return Step::Lost("where tracing leads back to is not known".to_owned());
        }
        let at = if state.exact {
            state.ip
        } else {
            state.ip.wrapping_sub(1)
        };
        let (entry, known) = match self.code.entry(at) {
            Some(entry) => (entry, true),
            // What the kernel made while it ran has no entry, but it keeps frame pointers.
            None => (Entry::FRAME_POINTER, false),
        };
        let before = *state;
        let lost = |state: &mut State, reason: &str| {
            *state = before;
            Step::Lost(reason.to_owned())
        };
        match entry.kind {
            Kind::Undefined => return lost(state, "no table unwinds this code"),
            Kind::End => return self.end(stack, state.sp),
            Kind::Call | Kind::Registers | Kind::Partial => {}
        }
        let Some(sp) = self.frame_end(stack, state, &entry) else {
            return lost(state, "the frame does not lie on the stack");
        };
        let frame = match entry.kind {
            Kind::Call => {
                let slot = sp.wrapping_sub(8);
                let Some(address) = stack.word(slot) else {
                    return lost(state, "the frame does not lie on the stack");
                };
                (state.ip, state.sp, state.regs, state.before) = (address, sp, None, None);
                Frame {
                    address,
                    slot,
                    how: if known { How::Orc } else { How::FramePointer },
                    exact: false,
                    problem: None,
                }
            }
            _ => {
                let whole = entry.kind == Kind::Registers;
                let base = if whole { sp } else { sp.wrapping_sub(self.regs.ip) };
                let word = |offset: u64| stack.word(base.wrapping_add(offset));
                let (Some(ip), Some(cs), Some(sp)) =
                    (word(self.regs.ip), word(self.regs.cs), word(self.regs.sp))
                else {
                    return lost(state, "the saved registers do not lie on the stack");
                };
                if cs & 3 == 3 {
                    return self.end(stack, base);
                }
                state.before = match (whole, state.regs) {
                    (false, Some((regs, true))) => Some(regs),
                    (false, _) => state.before,
                    (true, _) => None,
                };
                (state.ip, state.sp, state.regs) = (ip, sp, Some((base, whole)));
                Frame {
                    address: ip,
                    slot: base.wrapping_add(self.regs.ip),
                    how: How::Interrupted,
                    exact: entry.signal,
                    problem: None,
                }
            }
        };
        let bp = match entry.bp {
            Base::Undefined => Some(self.saved(stack, state, self.regs.bp).unwrap_or(state.bp)),
            Base::PreviousSp => stack.word(offset(sp, entry.bp_offset)),
            Base::Bp => stack.word(offset(state.bp, entry.bp_offset)),
            _ => None,
        };
        let Some(bp) = bp else {
            return lost(state, "the frame pointer was not saved on the stack");
        };
        state.bp = bp;
        state.exact = frame.exact;
        // Tables that lie could lead round and round.
        if state.sp <= before.sp {
            return lost(state, "the frame before does not lie above this one");
        }
        if !known && (self.code.owner(state.ip).is_none() || !self.code.is_behind_call(state.ip)) {
            return lost(state, "no table unwinds this code");
        }
        self.unhooked(task, state, frame)
    }

    /// A frame whose return address tracing has put its own in the place of is told as such, and gone on from where it leads.
    fn unhooked(&self, task: &Task, state: &mut State, mut frame: Frame) -> Step {
        if frame.how != How::Orc || !self.hooked.is_trampoline(frame.address) {
            return Step::Frame(frame);
        }
        frame.how = How::Traced;
        match self.hooked.original(self.space, task, frame.slot) {
            Some(address) => (frame.address, state.ip) = (address, address),
            None => (frame.exact, state.lost) = (true, true),
        }
        Step::Frame(frame)
    }

    /// Where the frame ends: behind the return address, or where registers were saved.
    fn frame_end(&self, stack: &Stack, state: &State, entry: &Entry) -> Option<u64> {
        let saved = |offset| self.saved(stack, state, offset);
        match entry.sp {
            Base::Sp => Some(offset(state.sp, entry.sp_offset)),
            Base::Bp => Some(offset(state.bp, entry.sp_offset)),
            Base::SpIndirect => stack.word(state.sp).map(|sp| offset(sp, entry.sp_offset)),
            Base::BpIndirect => stack.word(offset(state.bp, entry.sp_offset)),
            Base::R10 => saved(self.regs.r10),
            Base::R13 => saved(self.regs.r13),
            Base::Di => saved(self.regs.di),
            Base::Dx => saved(self.regs.dx),
            Base::Ax => saved(self.regs.ax),
            Base::Undefined | Base::PreviousSp | Base::Unknown => None,
        }
    }

    /// A register, where all were saved.
    fn saved(&self, stack: &Stack, state: &State, offset: u64) -> Option<u64> {
        let regs = match state.regs {
            Some((regs, true)) => Some(regs),
            _ => state.before,
        };
        stack.word(regs?.wrapping_add(offset))
    }

    /// The end: what entering the kernel saved, which begins at `regs`, has its place at the top of the stack. A thread of the
    /// kernel's has the room for it.
    fn end(&self, stack: &Stack, regs: u64) -> Step {
        let rest = stack.top().wrapping_sub(regs).wrapping_sub(self.regs.size);
        match self.paddings.contains(&rest) {
            true => Step::Bottom,
            false => Step::Lost("the stack ends before its top".to_owned()),
        }
    }

    /// Whatever above `sp` can be a return address.
    fn guess(&self, stack: &Stack, sp: u64, frames: &mut Vec<Frame>) {
        let from = sp.max(stack.base).next_multiple_of(8);
        for slot in (from..stack.top()).step_by(8) {
            let Some(address) = stack.word(slot) else { break };
            if !self.code.is_behind_call(address) {
                continue;
            }
            if frames.len() >= MAX_FRAMES {
                return mark(frames, format!("cut after {MAX_FRAMES} frames"));
            }
            frames.push(Frame {
                address,
                slot,
                how: How::Guess,
                exact: false,
                problem: None,
            });
        }
    }
}

fn mark(frames: &mut [Frame], problem: String) {
    if let Some(last) = frames.last_mut() {
        last.problem = Some(problem);
    }
}

fn offset(base: u64, by: i16) -> u64 {
    base.wrapping_add(i64::from(by) as u64)
}
