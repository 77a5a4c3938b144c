//! zsh.

use vmsight_analysis::recover::history::{HistoryEntry, history};
use vmsight_lab::Guest;
use vmsight_linux::{Kernel, Listing};

use crate::support::{SUBJECT, shell};

/// What is typed into it. The first letter of the third one's last word is one that zsh writes in a way of its own.
const TYPED: [&str; 4] = [
    "print the first line",
    "export TOKEN=zs3cr3t",
    "print \u{dc}ber-\u{e3}",
    "sleep 1; print all is said",
];

pub(crate) fn make(guest: &Guest) -> i32 {
    let typed: String = TYPED
        .iter()
        .map(|line| format!("echo '{line}' >to-zsh\n"))
        .collect();
    let output = shell(
        guest,
        &format!(
            "mkfifo to-zsh
             : >from-zsh
             sleep 100000 >to-zsh 2>/dev/null &
             zsh -fi <to-zsh >from-zsh 2>&1 &
             echo $!
             {typed}
             until grep -q 'all is said' from-zsh; do sleep 0.1; done
             echo 'print told' >to-zsh
             until grep -q told from-zsh; do sleep 0.1; done"
        ),
    );
    output.trim().parse().unwrap()
}

pub(crate) fn found(kernel: &Kernel) -> Listing<HistoryEntry> {
    history(kernel, None).unwrap_or_else(|e| panic!("{e}"))
}

#[test]
fn what_was_typed_into_zsh_comes_back_with_its_times() {
    for (how, listing) in &SUBJECT.history {
        assert_eq!(listing.warnings, [""; 0], "{how}");
        let rows: Vec<_> = listing
            .rows
            .iter()
            .map(|row| {
                (
                    row.pid,
                    row.name.as_str(),
                    row.form,
                    row.number,
                    row.command.as_str(),
                )
            })
            .collect();
        let typed = TYPED.into_iter().chain(["print told"]).zip(1..);
        let expected: Vec<_> = typed
            .map(|(line, number)| (SUBJECT.zsh, "zsh", "zsh", Some(number), line))
            .collect();
        assert_eq!(rows, expected, "{how}");
        let mut last = None;
        for row in &listing.rows[..TYPED.len()] {
            assert!(row.time.is_some() && row.time >= last, "{how}: {row:?}");
            assert!(row.ended >= row.time, "{how}: {row:?}");
            last.clone_from(&row.time);
        }
        // It slept for a second.
        let slept = &listing.rows[TYPED.len() - 1];
        assert!(slept.ended > slept.time, "{how}: {slept:?}");
    }
}
