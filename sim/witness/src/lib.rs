//! The first program of a Linux guest, which counts what it does, for monitors to be held against. It is all of the guest's
//! user mode: each system call that is made there is made here, and counted before it is made.
//!
//! What is here is what the program and who starts it agree on. The program says, a line each and after `witness: `:
//!
//! | line | what it says |
//! |---|---|
//! | `created PARENT CHILD NAME` | process PARENT, called NAME, made CHILD |
//! | `thread PARENT CHILD NAME` | and a thread |
//! | `on PROCESSOR PID` | process PID stays on a processor, as do its children, while another works on the other |
//! | `executed PID PATH` | process PID has become the program at PATH |
//! | `result WHAT VALUE` | what a step came to: an errno is negative |
//! | `calls NUMBER TIMES` | that many system calls of this number, in all processes |
//! | `round WAY PART INSTRUCTIONS CALLS PROCESSES PROGRAMS` | what a part of the workload took, `none` without hooks or `hooked`, and what was done in it |
//! | `done` | there is nothing more |
#![no_std]

use core::ffi::CStr;

/// Where it lies in the guest: as its first program.
pub const INIT: &CStr = c"/init";
/// The same program, which children execute.
pub const PROGRAM: &CStr = c"/program";
/// And once more: root's and setuid.
pub const SETUID: &CStr = c"/setuid";
/// A module that is loaded, by its file, taken out, and loaded from memory.
pub const MODULE: &CStr = c"/module.ko";
/// A module of which the policy does not know.
pub const UNKNOWN_MODULE: &CStr = c"/unknown.ko";
/// And the same in a file of its own for each processor: since Linux 6.5, loads of one file at the same time are one load.
pub const UNKNOWN_ON: [&CStr; 2] = [c"/unknown-0.ko", c"/unknown-1.ko"];
/// What it calls itself.
pub const NAME: &CStr = c"witness";
/// The system call that is made with arguments of its own, to be told: `personality(TOLD_ARGUMENT)`, which asks.
pub const TOLD: usize = 135;
/// See there.
pub const TOLD_ARGUMENT: u64 = 0xffff_ffff;
/// The system call that is expected to be refused: `mkdir`.
pub const REFUSED: usize = 83;
/// The argument with which it does another thing: a fixed workload of two parts, `files` and `processes`, [`ROUNDS`] times in a
/// kernel without hooks, and as often after it has shown the hypervisor that the kernel is up. It has the hypervisor say how
/// things are before and after each part.
pub const WORKLOAD: &CStr = c"workload";
/// See there.
pub const ROUNDS: usize = 15;
