//! System calls.

use vmsight_sim_abi::{Event, Frame, Handler, Kind, Member, REFUSE_OTHER_CALLS, Verdict, Watch};

use crate::handlers::{errno, refuse};
use crate::{Context, Memory, task};

/// Where the kernel keeps the arguments, in their order.
const ARGUMENTS: [Member; 6] = [
    Member::RegsDi,
    Member::RegsSi,
    Member::RegsDx,
    Member::RegsR10,
    Member::RegsR8,
    Member::RegsR9,
];

/// Counts a call of `x64_sys_call(regs, number)` or of what corresponds to it; whether there is more to do.
pub(crate) fn count(frame: &Frame, handler: Handler, watch: &mut Watch) -> bool {
    let number = frame.rsi as u32 as usize;
    let counts = match handler {
        Handler::Call => &mut watch.calls,
        Handler::CompatCall => &mut watch.compat_calls,
        _ => {
            watch.x32_calls = watch.x32_calls.wrapping_add(1);
            return watch.policy.flags & REFUSE_OTHER_CALLS != 0;
        }
    };
    match counts.get_mut(number) {
        Some(count) => *count = count.wrapping_add(1),
        None => watch.other_calls = watch.other_calls.wrapping_add(1),
    }
    if handler == Handler::CompatCall {
        return watch.policy.flags & REFUSE_OTHER_CALLS != 0;
    }
    let rule = watch.policy.call(number);
    rule.told || rule.errno != 0
}

/// A call that there is a rule for.
pub(crate) fn ruled<M: Memory>(context: &Context<'_, M>, watch: &mut Watch) -> Verdict {
    let number = context.frame.rsi as u32;
    let rule = watch.policy.call(number as usize);
    let verdict = match rule.errno {
        0 => Verdict::Continue,
        errno => refuse(watch, Handler::Call, Some(-i64::from(errno))),
    };
    let mut event = task::event(context, &watch.policy, Kind::Call);
    event.errno = errno(verdict);
    let [first, arguments @ ..] = &mut event.words;
    *first = number.into();
    for (word, member) in arguments.iter_mut().zip(ARGUMENTS) {
        let at = watch.policy.member(member);
        *word = at
            .and_then(|at| context.u64(context.frame.rdi.wrapping_add(at)))
            .unwrap_or(0);
    }
    watch.ring.push(&event);
    verdict
}

/// A call with other numbers, which are refused all together.
pub(crate) fn other<M: Memory>(context: &Context<'_, M>, handler: Handler, watch: &mut Watch) -> Verdict {
    let verdict = refuse(watch, handler, None);
    let event = task::event(context, &watch.policy, Kind::OtherCall);
    let [_, _, rest @ ..] = event.words;
    let [a, b, c, d, e] = rest;
    let x32 = u64::from(handler == Handler::X32Call);
    watch.ring.push(&Event {
        errno: errno(verdict),
        words: [u64::from(context.frame.rsi as u32), x32, a, b, c, d, e],
        ..event
    });
    verdict
}

#[cfg(test)]
mod tests {
    use vmsight_sim_abi::CallRule;

    use super::*;
    use crate::guest::{Guest, guest_at};

    #[test]
    fn calls_are_counted_by_number() {
        let mut guest = Guest::new();
        for number in [39, 39, 0, 511, 512, u64::from(u32::MAX), 1 << 32 | 39] {
            assert_eq!(guest.call(Handler::Call, [0, number, 0, 0]), Verdict::Continue);
        }
        guest.call(Handler::CompatCall, [0, 20, 0, 0]);
        guest.call(Handler::X32Call, [0, 20, 0, 0]);
        let watch = &guest.watch;
        assert_eq!([watch.calls[39], watch.calls[0], watch.calls[511]], [3, 1, 1]);
        assert_eq!((watch.calls.iter().sum::<u64>(), watch.other_calls), (5, 2));
        assert_eq!((watch.compat_calls[20], watch.x32_calls), (1, 1));
        assert_eq!(guest.handled, 9);
        assert!(guest.told().is_empty());
    }

    #[test]
    fn calls_are_told_and_refused_by_rule() {
        let mut guest = Guest::new();
        let rule = CallRule {
            errno: 13,
            told: false,
        };
        assert!(guest.watch.policy.set_call(41, rule));
        assert!(guest.watch.policy.set_call(59, CallRule { errno: 0, told: true }));
        let regs = guest_at(0x3_0000);
        for (n, member) in (1u64..).zip(ARGUMENTS) {
            guest.member(regs, member, &(n * 0x11).to_le_bytes());
        }
        assert_eq!(guest.call(Handler::Call, [regs, 59, 0, 0]), Verdict::Continue);
        // Refused only where the hook may.
        assert_eq!(guest.call(Handler::Call, [regs, 41, 0, 0]), Verdict::Continue);
        guest.may_refuse(Handler::Call, -1);
        assert_eq!(
            guest.call(Handler::Call, [u64::MAX, 41, 0, 0]),
            Verdict::Refuse(-13)
        );
        let [told, not, refused] = guest.told().try_into().unwrap();
        assert_eq!(
            told,
            "0 call pid=57 tgid=56 number=59 arguments=0x11,0x22,0x33,0x44,0x55,0x66"
        );
        assert!(!not.contains("refused"), "{not}");
        assert_eq!(
            refused,
            "2 call pid=57 tgid=56 number=41 arguments=0x0,0x0,0x0,0x0,0x0,0x0 refused=13"
        );
    }

    #[test]
    fn other_ways_to_call_can_be_closed() {
        let mut guest = Guest::new();
        guest.watch.policy.flags = REFUSE_OTHER_CALLS;
        guest.may_refuse(Handler::CompatCall, -38);
        guest.may_refuse(Handler::X32Call, -38);
        assert_eq!(
            guest.call(Handler::CompatCall, [0, 11, 0, 0]),
            Verdict::Refuse(-38)
        );
        assert_eq!(guest.call(Handler::X32Call, [0, 520, 0, 0]), Verdict::Refuse(-38));
        let lines = guest.told();
        assert_eq!(lines[0], "0 other-call pid=57 tgid=56 number=11 x32=0 refused=38");
        assert_eq!(
            lines[1],
            "1 other-call pid=57 tgid=56 number=520 x32=1 refused=38"
        );
    }
}
