//! What alice typed, what she saw, and what nobody has read.

use vmsight_analysis::recover::tty::{TerminalText, terminals};

use crate::support::{Forgery, subject};

const TYPED: &[&str] = &[
    "echo first-command-of-alice\n",
    "ls /srv/data\n",
    "export TOKEN=s3cr3t-t0ken\n",
    "echo history-complete-$((4+5))\n",
];

fn one<'r>(rows: &'r [TerminalText], tty: &str, buffer: &str, waiting: bool) -> &'r TerminalText {
    let mut found = rows
        .iter()
        .filter(|row| row.tty == tty && row.buffer == buffer && row.waiting == waiting);
    let row = found
        .next()
        .unwrap_or_else(|| panic!("no {tty} {buffer} {waiting}: {rows:#?}"));
    assert!(
        found.next().is_none(),
        "{tty} {buffer} {waiting} is there twice: {rows:#?}"
    );
    row
}

#[test]
fn what_was_typed_is_left_over_and_what_nobody_read_waits() {
    let subject = subject();
    let truth = subject.guest.truth();
    let shell = truth.processes.iter().find(|p| p.task_comm() == "bash").unwrap();
    let holder = truth.named("terminal").unwrap();
    for (how, kernel) in subject.both() {
        let listing = terminals(&kernel).unwrap();
        assert_eq!(listing.warnings, [""; 0], "{how}");
        let rows = &listing.rows;
        assert!(rows.iter().all(|row| row.problems.is_empty()), "{how}: {rows:#?}");
        let typed = one(rows, "pts/0", "line", false);
        assert_eq!(typed.text, TYPED.concat(), "{how}");
        assert_eq!(
            (typed.what, &typed.pids),
            ("input", &vec![i32::try_from(shell.pid).unwrap()])
        );
        let seen = one(rows, "ptm0", "line", false);
        assert_eq!(
            (seen.what, &seen.pids),
            ("output", &vec![i32::try_from(holder.pid).unwrap()])
        );
        assert!(
            seen.text.contains("first-command-of-alice\r\n"),
            "{how}: {seen:?}"
        );
        assert!(seen.text.contains("history-complete-9"), "{how}: {seen:?}");
        let waiting = one(rows, "pts/1", "line", true);
        assert_eq!(
            waiting.text, "typed and never read\nnot yet \x1b[31mcomplete",
            "{how}"
        );
        assert!(waiting.canonical && waiting.echo, "{how}: {waiting:?}");
        assert_eq!(waiting.length, waiting.text.len());
    }
}

#[test]
fn flip_buffers_without_end_cost_a_row() {
    let subject = subject();
    let forged = Forgery::of(&subject);
    let rows = terminals(&forged.kernel).unwrap().rows;
    let tty = one(&rows, "pts/1", "line", true).address;
    let port = forged.pointer(forged.member("tty_struct", "port", tty));
    let head = forged.pointer(forged.member("tty_port", "buf.head", port));
    forged.put(forged.member("tty_buffer", "next", head), &head.0.to_le_bytes());
    let line = forged.pointer(forged.member("tty_struct", "disc_data", tty));
    forged.put(
        forged.member("n_tty_data", "read_head", line),
        &u64::MAX.to_le_bytes(),
    );
    let forged = terminals(&forged.forged()).unwrap().rows;
    let own: Vec<_> = forged.iter().filter(|row| row.tty == "pts/1").collect();
    assert!(own.iter().any(|row| !row.problems.is_empty()), "{own:#?}");
    assert!(own.iter().all(|row| row.length <= 64 << 10));
    assert_eq!(one(&forged, "pts/0", "line", false).text, TYPED.concat());
}
