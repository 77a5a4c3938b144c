//! The rows: a frame, and how it is known.

use std::sync::Arc;

use serde::Serialize;
use vmsight_arch::Gva;

use crate::listing::{Problem, address};

/// How a frame is known.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum How {
    /// The thread was switched away there.
    Saved,
    /// By the kernel's or the module's ORC table.
    Orc,
    /// By the same, of a function that is traced: its return address leads into tracing. This is where that leads back to, where
    /// the kernel's notes say so, else the trampoline.
    Traced,
    /// An exception or an interrupt came there.
    Interrupted,
    /// By the frame pointer of code that has no table: as the kernel does it, and not sure.
    FramePointer,
    /// A guess: it lies on the stack, in known code and behind a CALL. It may be left over from an earlier call.
    Guess,
    /// No frame: the thread is on a CPU, and what its stack holds changes.
    Running,
    /// No frame: the thread has ended, and has no stack any more.
    Ended,
    /// No frame: what leads to it cannot be read or believed.
    #[default]
    Unknown,
}

impl How {
    /// Whether the frame is what it is by the kernel's own account, and no guess.
    pub fn is_sure(self) -> bool {
        matches!(self, How::Saved | How::Orc | How::Traced | How::Interrupted)
    }
}

/// A frame on a thread's kernel stack; of a thread without frames the one row that says why.
#[derive(Clone, Debug, Serialize)]
pub struct StackFrame {
    /// The process.
    pub pid: i32,
    /// The thread, by its id in the root namespace.
    pub tid: i32,
    /// Its name.
    pub name: Arc<str>,
    /// The letter that ps shows.
    pub state: char,
    /// Whether it is a thread of the kernel's.
    pub kernel_thread: bool,
    /// How often it was switched away from so far, of its own will or not. The same number later is the same sleep.
    pub switches: Option<u64>,
    /// 0 is the innermost: what it called last.
    pub depth: u32,
    /// Where it goes on when what it called returns.
    #[serde(serialize_with = "address::gva_opt")]
    pub address: Option<Gva>,
    /// The same as `function+offset/size`, as the kernel spells it.
    pub symbol: Option<Arc<str>>,
    /// The module that the function is of.
    pub module: Option<Arc<str>>,
    /// How the frame is known.
    pub how: How,
    /// Where on the stack the address stands.
    #[serde(serialize_with = "address::gva_opt")]
    pub slot: Option<Gva>,
    /// Its `task_struct`.
    #[serde(serialize_with = "address::gva")]
    pub task: Gva,
    /// What is not as it should be: an address in nobody's code, a stack that does not end where stacks end.
    pub problems: Vec<Problem>,
}
