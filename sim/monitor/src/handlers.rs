//! The handlers.

use vmsight_sim_abi::{Frame, Handler, Verdict, Watch};

use crate::{Context, Memory, calls, credentials, modules, processes};

/// The null handler: it counts.
#[inline]
pub fn null(_frame: &Frame, handled: &mut u64) -> Verdict {
    *handled = handled.wrapping_add(1);
    Verdict::Continue
}

/// Counts, and copies the word at the hooked function's first argument to its second. What cannot be read or written is
/// left.
pub fn copy<M: Memory>(context: &mut Context<'_, M>) -> Verdict {
    let (from, to) = (context.frame.rdi, context.frame.rsi);
    if let Some(word) = context.read(from) {
        context.write(to, word);
    }
    Verdict::Continue
}

/// The part of a handler that looks at registers alone, and that is all there is to most system calls: whether there is
/// more to do, by [`look`].
#[inline]
pub fn count(frame: &Frame, handler: Handler, watch: &mut Watch, handled: &mut u64) -> bool {
    *handled = handled.wrapping_add(1);
    match handler {
        Handler::Call | Handler::CompatCall | Handler::X32Call => calls::count(frame, handler, watch),
        _ => true,
    }
}

/// The rest of it.
pub fn look<M: Memory>(context: &mut Context<'_, M>, handler: Handler, watch: &mut Watch) -> Verdict {
    match handler {
        Handler::Null => Verdict::Continue,
        Handler::Copy => copy(context),
        Handler::Call => calls::ruled(context, watch),
        Handler::CompatCall | Handler::X32Call => calls::other(context, handler, watch),
        Handler::Process => processes::created(context, watch),
        Handler::Exec => processes::executed(context, watch),
        Handler::ModuleFile => modules::file(context, watch),
        Handler::ModuleData => modules::data(context, watch),
        Handler::Credentials => credentials::committed(context, watch),
    }
}

/// A handler whole, as the hypervisor calls it after an exit.
pub fn handle<M: Memory>(
    context: &mut Context<'_, M>,
    handler: Handler,
    watch: &mut Watch,
    handled: &mut u64,
) -> Verdict {
    if count(context.frame, handler, watch, handled) {
        return look(context, handler, watch);
    }
    Verdict::Continue
}

/// What becomes of a hooked function that is not to go on: the policy has the last word.
pub(crate) fn refuse(watch: &Watch, handler: Handler, value: Option<i64>) -> Verdict {
    match watch.policy.hook(handler) {
        Some(hook) if hook.may_refuse == 1 => Verdict::Refuse(value.unwrap_or(hook.refusal)),
        _ => Verdict::Continue,
    }
}

/// The error number of a verdict, for the event.
pub(crate) fn errno(verdict: Verdict) -> u32 {
    match verdict {
        Verdict::Continue => 0,
        Verdict::Refuse(value) => value.unsigned_abs() as u32,
    }
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
