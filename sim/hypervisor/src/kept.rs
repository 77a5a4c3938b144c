//! The guest's registers where a call of the monitor ends on the way: what of them the monitor's entry code has kept.

use core::mem::offset_of;

use vmsight_sim_abi::{Header, KEPT_ALL, KEPT_GENERAL, State};

use crate::boot::Registers;

/// What the entry code pushes before the arguments: R11 and R10, which nobody needs any more.
const BEFORE: u64 = 16;

/// Puts them back. `state` reads a word at a distance from the begin of the monitor's state; its stack is above that.
pub(crate) fn restore(
    registers: &mut Registers,
    header: &Header,
    rsp: u64,
    mut state: impl FnMut(usize) -> Option<u64>,
) {
    let top = header.base + header.text + header.data;
    // In the order in which they are pushed. What is pushed already, or not popped yet, is on the stack; the others are as
    // they were.
    let pushed = [
        &mut registers.rdi,
        &mut registers.rsi,
        &mut registers.rdx,
        &mut registers.r8,
        &mut registers.r9,
    ];
    for (n, register) in (1..).zip(pushed) {
        let at = top - BEFORE - n * 8;
        let value = (header.state..=at)
            .contains(&rsp)
            .then(|| state((at - header.state) as usize));
        if let Some(Some(value)) = value {
            *register = value;
        }
    }
    let kept = state(offset_of!(State, kept)).unwrap_or(0);
    if kept != KEPT_GENERAL && kept != KEPT_ALL {
        return;
    }
    let general = [
        &mut registers.rbx,
        &mut registers.rbp,
        &mut registers.r12,
        &mut registers.r13,
        &mut registers.r14,
        &mut registers.r15,
    ];
    for (n, register) in general.into_iter().enumerate() {
        if let Some(value) = state(offset_of!(State, general) + n * 8) {
            *register = value;
        }
    }
    if kept == KEPT_ALL {
        for (n, word) in registers.vectors.iter_mut().enumerate() {
            *word = state(offset_of!(State, vectors) + n * 8).unwrap_or(*word);
        }
    }
}
