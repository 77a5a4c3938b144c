//! Whether a place that the kernel patches is as the kernel would leave it.
//!
//! Each table of a module's file says of its places what the kernel does there; anything else there is a difference like any other.

use iced_x86::{FlowControl, Instruction, Mnemonic, OpKind};
use vmsight_arch::Gva;

use crate::baseline::{Site, SiteKind};
use crate::checks::sites;
use crate::text::Region;
use crate::{Context, Owner, code};

/// What the kernel's thunks for calls through a register are called, before the register's name (arch/x86/lib/retpoline.S).
const THUNK: &str = "__x86_indirect_thunk_";
/// And all of them, those of other mitigations among them.
const THUNKS: &str = "__x86_indirect_";
/// How thunks for returns end.
const RETURN_THUNK: &str = "return_thunk";
/// How far before a function a call may lead that is counted: where the counting is (arch/x86/kernel/callthunks.c).
const COUNTING: u64 = 32;
/// A call or jump of 32 bits, and what takes its place.
const BRANCH: usize = 5;
/// What stands at a function's begin that is not traced (arch/x86/include/asm/nops.h).
pub(super) const UNTRACED: [u8; BRANCH] = [0x0f, 0x1f, 0x44, 0, 0];

/// Other instructions for those at a place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Replacement {
    pub(super) at: u64,
    pub(super) length: usize,
}

/// How many bytes there are as the kernel may have made them, `None` if they are not. `then` and `now` begin at the place and go on
/// behind it. Not for alternatives.
pub(super) fn accepted(context: &Context, site: &Site, then: &[u8], now: &[u8]) -> Option<usize> {
    let at = site.at;
    let old = one(then, at)?;
    let (length, is_so) = match site.kind {
        SiteKind::Lock => (1, matches!(now.first(), Some(0xf0 | 0x3e))),
        SiteKind::Endbr => {
            let new = one(now, at)?;
            let known = matches!(new.mnemonic(), Mnemonic::Nop | Mnemonic::Endbr64);
            (4, new.len() == 4 && known)
        }
        SiteKind::Return => (BRANCH, returns(context, now.get(..BRANCH)?, at)),
        SiteKind::Indirect => (old.len(), is_indirect(context, &old, now.get(..old.len())?, at)),
        SiteKind::Call => {
            let new = one(now, at)?;
            let distance = code::branch(&old)?.0.wrapping_sub(code::branch(&new)?.0);
            let same = new.code() == old.code() && new.len() == old.len();
            (old.len(), same && distance <= COUNTING)
        }
        SiteKind::Paravirtual(length) => {
            let all = instructions(now.get(..length)?, at)?;
            // What calls were made of is the kernel's own, or no call.
            let own = |i: &Instruction| match code::branch(i) {
                Some(to) => context.owner(to) == Owner::Kernel,
                None => !matches!(i.mnemonic(), Mnemonic::Int3 | Mnemonic::Ret),
            };
            (length, all.iter().all(own))
        }
        SiteKind::Key(to) => {
            let new = one(now, at)?;
            let jumps =
                new.flow_control() == FlowControl::UnconditionalBranch && code::branch(&new) == Some(Gva(to));
            let length = new.len();
            let fits = length == old.len() && matches!(length, 2 | BRANCH);
            (length, fits && (jumps || new.mnemonic() == Mnemonic::Nop))
        }
        SiteKind::StaticCall => static_call(context, &old, now, at)?,
        SiteKind::Trampoline => {
            let begin = if old.mnemonic() == Mnemonic::Endbr64 {
                old.len()
            } else {
                0
            };
            let at = at.wrapping_add(begin as u64);
            let (length, is_so) = static_call(context, &one(then.get(begin..)?, at)?, now.get(begin..)?, at)?;
            (begin + length, is_so && then.get(..begin) == now.get(..begin))
        }
        SiteKind::Traced => (BRANCH, may_be_traced(context, at, now)),
        SiteKind::Alternative { .. } => return None,
    };
    is_so.then_some(length)
}

/// Whether `length` bytes are the instructions that were there or those that some processors get in their place, but for what fills
/// them up. The others lie in the same code, where they are held against the file themselves.
pub(super) fn is_alternative(
    context: &Context,
    region: &Region,
    (at, length): (u64, usize),
    then: &[u8],
    now: &[u8],
    others: &[Replacement],
) -> bool {
    let (Some(then), Some(now)) = (then.get(..length), now.get(..length)) else {
        return false;
    };
    let Some(now) = meaning(now, at) else { return false };
    let old = meaning(then, at);
    if old.as_ref().is_some_and(|old| are_same(old, &now, |to| to)) {
        return true;
    }
    // A call through a pointer that never changes is made one that leads where it points (6.8).
    if let (Some([old, ..]), [new]) = (old.as_deref(), now.as_slice())
        && old.flow_control() == FlowControl::IndirectCall
        && new.flow_control() == FlowControl::Call
        && code::branch(new).is_some_and(|to| context.owner(to) == Owner::Kernel)
    {
        return true;
    }
    others.iter().any(|other| {
        let end = other.at.saturating_add(other.length as u64);
        let bytes = region.slice(other.at, end);
        if bytes.len() != other.length {
            return false;
        }
        // What leads to a place in the other code leads to the same in the copy of it.
        let moved = |to: u64| match (other.at..=end).contains(&to) {
            true => to.wrapping_sub(other.at).wrapping_add(at),
            false => to,
        };
        meaning(bytes, other.at).is_some_and(|other| are_same(&other, &now, moved))
    })
}

fn one(bytes: &[u8], at: u64) -> Option<Instruction> {
    let first = code::instructions(bytes, Gva(at)).next()?;
    (!first.is_invalid()).then_some(first)
}

/// All instructions of bytes that hold nothing else.
fn instructions(bytes: &[u8], at: u64) -> Option<Vec<Instruction>> {
    let all: Vec<Instruction> = code::instructions(bytes, Gva(at)).collect();
    (!all.iter().any(Instruction::is_invalid)).then_some(all)
}

/// All instructions that do something. What fills a place up is NOPs, or a jump over them; or behind a jump what is never reached.
fn meaning(bytes: &[u8], at: u64) -> Option<Vec<Instruction>> {
    let end = at.wrapping_add(bytes.len() as u64);
    let mut skip_to = at;
    let mut has_left = false;
    let mut meaning = Vec::new();
    for instruction in instructions(bytes, at)? {
        if instruction.ip() < skip_to
            || instruction.mnemonic() == Mnemonic::Nop
            || (has_left && instruction.mnemonic() == Mnemonic::Int3)
        {
            continue;
        }
        has_left = matches!(
            instruction.flow_control(),
            FlowControl::UnconditionalBranch | FlowControl::Return
        );
        let next = instruction.next_ip();
        let jump = code::branch(&instruction)
            .filter(|_| instruction.flow_control() == FlowControl::UnconditionalBranch);
        if let Some(to) = jump.filter(|to| (next..=end).contains(&to.0)) {
            let between = |at: u64| at.wrapping_sub(end.wrapping_sub(bytes.len() as u64)) as usize;
            let over = bytes.get(between(next)..between(to.0))?;
            if over.iter().all(|byte| matches!(byte, 0x90 | 0xcc)) {
                skip_to = to.0;
                continue;
            }
        }
        meaning.push(instruction);
    }
    Some(meaning)
}

fn are_same(old: &[Instruction], new: &[Instruction], moved: impl Fn(u64) -> u64) -> bool {
    let same = |(old, new): (&Instruction, &Instruction)| match (code::branch(old), code::branch(new)) {
        (Some(before), Some(to)) => old.mnemonic() == new.mnemonic() && moved(before.0) == to.0,
        (None, None) => old == new,
        _ => false,
    };
    old.len() == new.len() && old.iter().zip(new).all(same)
}

/// A return, or a jump to the kernel's code that returns.
fn returns(context: &Context, now: &[u8], at: u64) -> bool {
    let Some(all) = instructions(now, at) else {
        return false;
    };
    let Some((first, rest)) = all.split_first() else {
        return false;
    };
    let is_return = match code::branch(first) {
        Some(to) => {
            first.flow_control() == FlowControl::UnconditionalBranch
                && context.symbols_at(to).any(|name| name.ends_with(RETURN_THUNK))
        }
        None => first.mnemonic() == Mnemonic::Ret,
    };
    is_return && rest.iter().all(fills)
}

fn fills(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Nop | Mnemonic::Int3)
}

/// A call or jump through the register that the old one's thunk is for.
fn is_indirect(context: &Context, old: &Instruction, now: &[u8], at: u64) -> bool {
    let register = code::branch(old).and_then(|to| {
        let mut names = context.symbols_at(to);
        names.find_map(|name| name.strip_prefix(THUNK).map(str::to_owned))
    });
    let Some(register) = register else { return false };
    let Some(all) = instructions(now, at) else {
        return false;
    };
    let end = at.wrapping_add(now.len() as u64);
    let through = |i: &Instruction| {
        i.op0_kind() == OpKind::Register && format!("{:?}", i.op0_register()).eq_ignore_ascii_case(&register)
    };
    let mut leads_on = false;
    let fits = all.iter().all(|i| match i.flow_control() {
        FlowControl::IndirectCall | FlowControl::IndirectBranch => {
            leads_on = true;
            through(i)
        }
        FlowControl::ConditionalBranch if code::branch(i) == Some(Gva(end)) => true,
        FlowControl::Call | FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch => {
            leads_on = true;
            code::branch(i).is_some_and(|to| {
                let mut names = context.symbols_at(to);
                names.any(|name| name.starts_with(THUNKS) && name.ends_with(&format!("_{register}")))
                    || thunk(context, to).is_some_and(|i| through(&i))
            })
        }
        _ => fills(i) || i.mnemonic() == Mnemonic::Lfence,
    });
    fits && leads_on
}

/// The jump that a thunk consists of which the kernel made while it ran (`X86_FEATURE_INDIRECT_THUNK_ITS`).
fn thunk(context: &Context, at: Gva) -> Option<Instruction> {
    let bytes = code::read(context, at, 4).ok()?;
    let first = one(&bytes, at.0)?;
    (first.flow_control() == FlowControl::IndirectBranch).then_some(first)
}

/// A call to code that the kernel knows, or what takes its place where that does nothing or returns 0; how long it is.
fn static_call(context: &Context, old: &Instruction, now: &[u8], at: u64) -> Option<(usize, bool)> {
    // A conditional jump is longer.
    let length = old.len().clamp(BRANCH, BRANCH + 1);
    let all = instructions(now.get(..length)?, at)?;
    let (first, rest) = all.split_first()?;
    let is_so = match code::branch(first) {
        Some(to) => context.owner(to).is_code(),
        None => match first.mnemonic() {
            // A warning traps (7.0, `__WARN_trap`).
            Mnemonic::Nop | Mnemonic::Ret | Mnemonic::Ud1 => true,
            // Return 0, in as many bytes as a call.
            Mnemonic::Xor => {
                first.op0_register() == first.op1_register() && first.op1_kind() == OpKind::Register
            }
            _ => false,
        },
    };
    Some((length, is_so && rest.iter().all(fills)))
}

/// Whether a place for function tracing has nothing, or a call of what traces.
pub(super) fn may_be_traced(context: &Context, at: u64, now: &[u8]) -> bool {
    let Some(new) = one(now, at) else { return false };
    let traced = code::branch(&new).is_some_and(|to| match new.flow_control() {
        FlowControl::Call => is_tracing(context, to),
        FlowControl::UnconditionalBranch => sites::is_dispatch(context, Gva(at), to),
        _ => false,
    });
    new.len() == BRANCH && (traced || new.mnemonic() == Mnemonic::Nop)
}

fn is_tracing(context: &Context, to: Gva) -> bool {
    match context.owner(to) {
        Owner::Generated(_) => true,
        Owner::Kernel => context.symbols_at(to).any(|name| name.starts_with("ftrace_")),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn same(old: &[u8], new: &[u8], new_at: u64) -> bool {
        let (old, new) = (meaning(old, 0x1000), meaning(new, new_at));
        are_same(&old.unwrap(), &new.unwrap(), |to| to)
    }

    #[test]
    fn what_fills_up_means_nothing() {
        // call; NOPs, or a jump over what stops who comes there.
        let nops = [0xe8, 0, 1, 0, 0, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90];
        let long = [0xe8, 0, 1, 0, 0, 0x66, 0x0f, 0x1f, 0x44, 0, 0];
        let over = [0xe8, 0, 1, 0, 0, 0xeb, 0x04, 0xcc, 0xcc, 0xcc, 0xcc];
        assert!(same(&nops, &long, 0x1000) && same(&nops, &over, 0x1000));
        // A jump over something that runs, and a call elsewhere.
        let mut something = over;
        something[8] = 0xc3;
        assert!(!same(&nops, &something, 0x1000));
        let mut elsewhere = nops;
        elsewhere[1] = 1;
        assert!(!same(&nops, &elsewhere, 0x1000));
        // The same call from a byte further on leads elsewhere.
        assert!(!same(&nops, &nops, 0x1001));
        assert!(same(&[0xeb, 0x20], &[0xe9, 0x1d, 0, 0, 0], 0x1000));
        assert!(same(
            &[0xe9, 0x1d, 0, 0, 0],
            &[0xeb, 0x20, 0xcc, 0xcc, 0xcc],
            0x1000
        ));
        assert!(!same(&[0x31, 0xc0, 0x90], &[0x31, 0xc0, 0xcc], 0x1000));
        assert!(!same(&[0x31, 0xc0], &[0x31, 0xc9], 0x1000));
        assert!(meaning(&[0x06], 0x1000).is_none());
    }
}
