//! What a handler gets.

/// The hooked function's registers, as the monitor's entry code pushes them on its own stack. RAX, R10 and R11 hold
/// nothing at the head of a function of the System V ABI and are not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Frame {
    /// Sixth argument.
    pub r9: u64,
    /// Fifth argument.
    pub r8: u64,
    /// Third argument.
    pub rdx: u64,
    /// Second argument.
    pub rsi: u64,
    /// First argument.
    pub rdi: u64,
    /// The address to which the hook's call of the stub returns: a registered one, or the handler is not called.
    pub site: u64,
    /// The guest's CR3.
    pub cr3: u64,
}

/// What a handler decides about the hooked function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on.
    Continue,
    /// It returns this at once: a negative error number. The monitor puts [`crate::State::refuse`] where the guest's stack
    /// has the site, and the value into [`Frame::site`], which becomes R10: the way of what goes on is no longer for it.
    Refuse(i64),
}
