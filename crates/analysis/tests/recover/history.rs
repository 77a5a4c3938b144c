//! What alice typed at her terminal.

use vmsight_analysis::recover::history::{hashed_commands, history};

use crate::support::subject;

#[test]
fn what_was_typed_comes_back_in_order_with_times_and_nothing_else_does() {
    let subject = subject();
    let truth = subject.guest.truth();
    let shell = truth.processes.iter().find(|p| p.task_comm() == "bash").unwrap();
    for (how, kernel) in subject.both() {
        let listing = history(&kernel, None).unwrap();
        assert_eq!(listing.warnings, [""; 0], "{how}");
        let typed: Vec<_> = listing
            .rows
            .iter()
            .map(|row| (row.pid, row.number, row.command.as_str()))
            .collect();
        let pid = i32::try_from(shell.pid).unwrap();
        assert_eq!(
            typed,
            [
                (pid, Some(1), "echo first-command-of-alice"),
                (pid, Some(2), "ls /srv/data"),
                (pid, Some(3), "export TOKEN=s3cr3t-t0ken"),
                (pid, Some(4), "echo history-complete-$((4+5))"),
            ],
            "{how}"
        );
        let [first, last] = [truth.system.boot_time, truth.system.now + 1].map(|seconds| {
            vmsight_linux::clock::rfc3339(i64::try_from(seconds).unwrap() * 1_000_000_000).unwrap()
        });
        for row in &listing.rows {
            let time = row.time.as_ref().unwrap();
            assert!((&first..=&last).contains(&time), "{how}: {row:?}");
        }
        assert_eq!(history(&kernel, Some(pid)).unwrap().rows.len(), 4, "{how}");
        assert!(history(&kernel, Some(pid + 100_000)).is_err());
    }
}

#[test]
fn what_was_executed_by_name_is_remembered_with_its_file() {
    let subject = subject();
    let truth = subject.guest.truth();
    let shell = truth.processes.iter().find(|p| p.task_comm() == "bash").unwrap();
    let pid = i32::try_from(shell.pid).unwrap();
    for (how, kernel) in subject.both() {
        let listing = hashed_commands(&kernel, None).unwrap();
        assert_eq!(listing.warnings, [""; 0], "{how}");
        // What else she typed is built into the shell.
        let found: Vec<_> = listing
            .rows
            .iter()
            .map(|row| {
                (
                    row.pid,
                    row.name.as_str(),
                    row.command.as_str(),
                    row.path.as_str(),
                    row.uses,
                )
            })
            .collect();
        assert_eq!(found, [(pid, "bash", "ls", "/bin/ls", 1)], "{how}");
        assert_eq!(
            hashed_commands(&kernel, Some(pid)).unwrap().rows.len(),
            1,
            "{how}"
        );
        assert!(hashed_commands(&kernel, Some(pid + 100_000)).is_err());
    }
}
