//! The handlers.

use vmsight_sim_abi::{Frame, Verdict};

use crate::{Context, Memory};

/// The null handler: it counts.
#[inline]
pub fn null(_frame: &Frame, handled: &mut u64) -> Verdict {
    *handled = handled.wrapping_add(1);
    Verdict::Continue
}

/// Counts, and copies the word at the hooked function's first argument to its second. What cannot be read or written is
/// left.
pub fn copy<M: Memory>(context: &mut Context<'_, M>, handled: &mut u64) -> Verdict {
    *handled = handled.wrapping_add(1);
    let (from, to) = (context.frame.rdi, context.frame.rsi);
    if let Some(word) = context.read(from) {
        context.write(to, word);
    }
    Verdict::Continue
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_null_handler_counts() {
        let mut handled = u64::MAX;
        assert_eq!(null(&Frame::default(), &mut handled), Verdict::Continue);
        assert_eq!(handled, 0);
    }
}
