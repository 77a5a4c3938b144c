//! What a stub says when the machine stops (gdb manual, appendix E.3 "Stop Reply Packets").

use super::packet::from_hex;

/// Most pairs taken from one reply.
const MAX_PAIRS: usize = 64;

/// Why the machine stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Cause {
    /// A breakpoint, or the end of a step.
    Trap,
    /// A watchpoint.
    Watch {
        /// What kind it is.
        kind: WatchKind,
        /// Where it begins; not where in it the access was.
        address: u64,
    },
    /// Somebody paused it: we, or its owner.
    Paused,
    /// Another signal: QEMU gives 3 for a shutdown, 6 for an internal error, 14 for the watchdog, 23 for I/O errors.
    Signal(
        /// Its number in gdb's own counting.
        u8,
    ),
}

/// What kind of watchpoint it was that stopped the machine.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum WatchKind {
    /// One for writes.
    Write,
    /// One for reads.
    Read,
    /// One for both.
    Access,
}

/// A stop reply, its thread still by name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct StopReply {
    pub(super) thread: Option<String>,
    pub(super) cause: Cause,
}

/// Reads a stop reply; `None` where it is none.
pub(super) fn parse(data: &[u8]) -> Option<StopReply> {
    let (kind, rest) = data.split_first()?;
    if !matches!(kind, b'T' | b'S') {
        return None;
    }
    let signal = *from_hex(rest.get(..2)?)?.first()?;
    let (mut thread, mut watch) = (None, None);
    let pairs = std::str::from_utf8(rest.get(2..)?).ok()?;
    for pair in pairs.split(';').take(MAX_PAIRS) {
        let Some((key, value)) = pair.split_once(':') else {
            continue;
        };
        let kind = match key {
            "thread" => {
                let is_id = |b: u8| b.is_ascii_alphanumeric() || b == b'.';
                thread = Some(value.to_owned()).filter(|id| !id.is_empty() && id.bytes().all(is_id));
                continue;
            }
            "watch" => WatchKind::Write,
            "rwatch" => WatchKind::Read,
            "awatch" => WatchKind::Access,
            _ => continue,
        };
        let address = u64::from_str_radix(value, 16).ok()?;
        watch = Some(Cause::Watch { kind, address });
    }
    let cause = match (watch, signal) {
        (Some(watch), _) => watch,
        (None, 5) => Cause::Trap,
        (None, 2) => Cause::Paused,
        (None, other) => Cause::Signal(other),
    };
    Some(StopReply { thread, cause })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(thread: &str, cause: Cause) -> Option<StopReply> {
        Some(StopReply {
            thread: Some(thread.to_owned()),
            cause,
        })
    }

    #[test]
    fn what_qemu_says() {
        assert_eq!(parse(b"T05thread:01;"), reply("01", Cause::Trap));
        assert_eq!(parse(b"T02thread:p01.02;"), reply("p01.02", Cause::Paused));
        assert_eq!(parse(b"T03thread:01;"), reply("01", Cause::Signal(3)));
        for (key, kind) in [
            ("watch", WatchKind::Write),
            ("rwatch", WatchKind::Read),
            ("awatch", WatchKind::Access),
        ] {
            let text = format!("T05thread:0a;{key}:ffffffff81000000;");
            let address = 0xffff_ffff_8100_0000;
            assert_eq!(
                parse(text.as_bytes()),
                reply("0a", Cause::Watch { kind, address })
            );
        }
    }

    #[test]
    fn nonsense_is_no_stop() {
        for text in [
            &b""[..],
            b"T",
            b"T0",
            b"Tzz",
            b"OK",
            b"E22",
            b"T05watch:xyz;",
            b"T05thread:\xff;",
        ] {
            assert_eq!(parse(text), None, "{}", text.escape_ascii());
        }
        let bare = parse(b"S05").unwrap();
        assert_eq!((bare.thread, bare.cause), (None, Cause::Trap));
        assert_eq!(parse(b"T05thread:;").unwrap().thread, None);
        assert_eq!(parse(b"T05thread:0;1:2;;:;").unwrap().cause, Cause::Trap);
    }
}
