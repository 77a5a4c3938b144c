//! What the timeline says happened when, held against what the guest says.

use std::collections::BTreeMap;

use vmsight_analysis::timeline::{Event, Kind, parse_moment, timeline};
use vmsight_lab::truth::logins::FIRST;

use crate::support::subject;

/// Milliseconds since 1970.
fn millis(event: &Event) -> i64 {
    parse_moment(&event.time).unwrap_or_else(|| panic!("{event:?}")) / 1_000_000
}

#[test]
fn everything_with_a_time_is_there_in_order_and_at_its_time() {
    let subject = subject();
    let truth = subject.guest.truth();
    let boot = truth.system.boot_time as i64 * 1000;
    let now = (truth.system.now as i64 + 1) * 1000;
    for (how, kernel) in subject.both() {
        let listing = timeline(&kernel, &Kind::ALL);
        assert_eq!(listing.warnings, [""; 0], "{how}");
        let events = listing.rows;
        assert!(events.is_sorted_by_key(|event| &event.time), "{how}");
        let of = |kind: Kind| events.iter().filter(move |event| event.kind == kind);

        let booted = of(Kind::System).find(|event| event.action == "booted").unwrap();
        assert!((millis(booted) - boot).abs() <= 1000, "{how}: {booted:?}");
        let looked = of(Kind::System)
            .find(|event| event.action == "looked at")
            .unwrap();
        assert!(millis(looked) >= now - 2000, "{how}: {looked:?}");

        // Processes: in ticks since a boot of whole seconds, which is the same clock rounded.
        let started: BTreeMap<i32, &Event> = of(Kind::Process)
            .filter_map(|event| Some((event.pid?, event)))
            .collect();
        let lasting = truth.processes.iter().filter(|process| !process.is_transient());
        for process in lasting {
            let event = started[&i32::try_from(process.pid).unwrap()];
            let said = boot + process.start_ticks as i64 * 10;
            assert!((millis(event) - said).abs() <= 2000, "{how}: {event:?}");
        }

        // The log's own numbers, from boot on.
        let boot = millis(booted);
        let logged: Vec<(i64, &str)> = of(Kind::Log)
            .filter_map(|event| Some((millis(event) - boot, event.subject.as_deref()?)))
            .collect();
        assert!(logged.len() > 100, "{how}");
        for record in truth.kmsg.iter().take(100) {
            let at = record.time_us as i64 / 1000;
            let here = |(time, text): &(i64, &str)| (time - at).abs() <= 2 && record.text == *text;
            assert!(logged.iter().any(here), "{how}: {record:?}");
        }

        for path in [
            "/srv/data/plain.txt",
            "/etc/hostname",
            "/tmp/deleted secret.bin (deleted)",
        ] {
            let is_it = |event: &&Event| event.subject.as_deref() == Some(path);
            let changed = of(Kind::File)
                .filter(is_it)
                .find(|event| event.action.contains("changed"));
            let changed = changed.unwrap_or_else(|| panic!("{how}: no {path}"));
            assert!((boot..=now).contains(&millis(changed)), "{how}: {changed:?}");
        }

        let logins: Vec<&Event> = of(Kind::Login).collect();
        let login = |action: &str, name: Option<&str>, subject: &str, pid: i32| {
            let is_it = |event: &&&Event| {
                event.action == action
                    && event.name.as_deref() == name
                    && event.subject.as_deref() == Some(subject)
            };
            let found: Vec<i64> = logins.iter().filter(is_it).map(|event| millis(event)).collect();
            assert!(logins.iter().filter(is_it).all(|event| event.pid == Some(pid)));
            found
        };
        let at = |minute: i64| (i64::from(FIRST) + 60 * minute) * 1000 + 125;
        // In utmp and in wtmp.
        let alice = login("logged in", Some("alice"), "pts/0 from 192.0.2.7", 4321);
        assert_eq!(alice, [at(1), at(1)], "{how}");
        assert_eq!(
            login("booted", Some("reboot"), "~ from 6.0.0", 4321),
            [at(0)],
            "{how}"
        );
        for number in 0..20 {
            let bob = login("logged in", Some("bob"), &format!("tty{number}"), 4321);
            assert_eq!(bob, [at(2)], "{how}");
        }
        assert_eq!(login("logged out", None, "pts/0", 4321), [at(3)], "{how}");
        let failed = login(
            "failed to log in",
            Some("mallory"),
            "ssh:notty from 203.0.113.5",
            4321,
        );
        assert_eq!(failed, [at(4)], "{how}");
        let session = login("logged in", Some("alice"), "sshd from 192.0.2.9", 4711);
        assert_eq!(session, [at(6) + 375], "{how}");
        assert_eq!(logins.len(), 26, "{how}");

        let typed: Vec<&str> = of(Kind::History)
            .filter_map(|event| event.subject.as_deref())
            .collect();
        assert_eq!(typed.len(), 4, "{how}: {typed:?}");
        assert!(typed.contains(&"export TOKEN=s3cr3t-t0ken"));
        let shell = started
            .values()
            .find(|event| event.name.as_deref() == Some("bash"));
        let shell = millis(shell.unwrap());
        // bash writes whole seconds.
        assert!(
            of(Kind::History).all(|event| millis(event) >= shell - 1000),
            "{how}"
        );

        if how == "dumped" {
            assert!(of(Kind::Ended).any(|event| event.name.as_deref() == Some("collector")));
        }
        let some = timeline(&kernel, &[Kind::History]).rows;
        assert_eq!(some.len(), 4, "{how}");
    }
}
