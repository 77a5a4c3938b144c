//! A keyboard that two programs have open: one has read what was typed, one has not.

use serde_json::json;
use vmsight_analysis::recover::input::{KeyEvent, key_events};
use vmsight_lab::Guest;
use vmsight_linux::{Kernel, Listing};

use crate::support::{SUBJECT, load, shell};

/// What is typed, as QEMU calls it and as Linux does; true where it is pressed.
const TYPED: [(&str, &str, bool); 8] = [
    ("shift", "KEY_LEFTSHIFT", true),
    ("p", "KEY_P", true),
    ("p", "KEY_P", false),
    ("shift", "KEY_LEFTSHIFT", false),
    ("4", "KEY_4", true),
    ("4", "KEY_4", false),
    ("ret", "KEY_ENTER", true),
    ("ret", "KEY_ENTER", false),
];
/// What comes of each: the scan code, the key, the end of a packet.
const EVENTS: usize = 3;

/// Who reads, and what the one that did got.
pub(crate) struct Made {
    reads: i32,
    waits: i32,
    /// Seconds, microseconds, code and value of each key.
    got: Vec<(i64, i64, u64, u64)>,
}

pub(crate) fn make(guest: &Guest) -> Made {
    load(guest, "evdev");
    let count = TYPED.len() * EVENTS;
    let output = shell(
        guest,
        &format!(
            "until grep -qs 'AT Translated' /sys/class/input/event0/device/name && [ -e /dev/input/event0 ]; do
                 sleep 0.1
             done
             (exec </dev/input/event0 >/dev/null 2>&1; dd bs=24 count={count} of=typed.new; mv typed.new typed
                 exec sleep 100000) &
             echo $!
             (exec </dev/input/event0 >/dev/null 2>&1; : >waits; exec sleep 100000) &
             echo $!
             until [ -e typed.new ] && [ -e waits ]; do sleep 0.1; done"
        ),
    );
    let pids: Vec<i32> = output.lines().map(|pid| pid.parse().unwrap()).collect();
    let mut qmp = guest.qmp().unwrap_or_else(|e| panic!("{e:?}"));
    for (key, _, down) in TYPED {
        let key = json!({ "down": down, "key": { "type": "qcode", "data": key } });
        let events = json!({ "events": [{ "type": "key", "data": key }] });
        qmp.execute("input-send-event", events)
            .unwrap_or_else(|e| panic!("{e:?}"));
    }
    drop(qmp);
    let output = shell(
        guest,
        "until [ -e typed ]; do sleep 0.1; done; hexdump -v -e '24/1 \"%02x\" \"\\n\"' typed",
    );
    let number = |line: &str, from: usize, to: usize| {
        let bytes = (from..to).rev().map(|at| &line[at * 2..at * 2 + 2]);
        u64::from_str_radix(&bytes.collect::<String>(), 16).unwrap()
    };
    let keys = output.lines().filter(|line| number(line, 16, 18) == 1);
    Made {
        reads: pids[0],
        waits: pids[1],
        got: keys
            .map(|line| {
                let time = [(0, 8), (8, 16)].map(|(a, b)| i64::try_from(number(line, a, b)).unwrap());
                (time[0], time[1], number(line, 18, 20), number(line, 20, 24))
            })
            .collect(),
    }
}

pub(crate) fn found(kernel: &Kernel) -> Listing<KeyEvent> {
    key_events(kernel).unwrap_or_else(|e| panic!("{e}"))
}

#[test]
fn what_was_typed_waits_for_one_and_is_left_over_of_the_other() {
    let made = &SUBJECT.keyboard;
    assert_eq!(made.got.len(), TYPED.len());
    for (how, listing) in &SUBJECT.typed {
        assert_eq!(listing.warnings, [""; 0], "{how}");
        for (pid, waiting) in [(made.reads, false), (made.waits, true)] {
            let rows = listing.rows.iter().filter(|row| row.pids == [pid]);
            let rows: Vec<_> = rows
                .map(|row| {
                    assert!(row.problems.is_empty(), "{how}: {row:?}");
                    assert_eq!(
                        (row.device.as_str(), row.device_name.as_str()),
                        ("event0", "AT Translated Set 2 keyboard")
                    );
                    (row.key.as_str(), row.action, row.waiting, row.time.clone())
                })
                .collect();
            let expected = TYPED.iter().zip(&made.got).map(|((_, key, down), got)| {
                let action = if *down { "press" } else { "release" };
                assert_eq!(got.3, u64::from(*down));
                let time = vmsight_linux::clock::rfc3339((got.0 * 1_000_000 + got.1) * 1000);
                (*key, action, waiting, time)
            });
            assert_eq!(rows, expected.collect::<Vec<_>>(), "{how}: {pid}");
        }
        assert_eq!(listing.rows.len(), 2 * TYPED.len(), "{how}");
    }
}
