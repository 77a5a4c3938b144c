//! Lists, pointers, sizes and names that lie.

use std::sync::atomic::{AtomicBool, Ordering};

use vmsight_arch::{Gpa, Gva};
use vmsight_linux::structures::list::walk;
use vmsight_linux::{ProcessFields, process_tree};

use crate::synthetic::{DIRECT_MAP, Guest, offset};
use crate::{fields, list, tasks, three};

#[test]
fn processes_that_are_read_together_stay_apart() {
    // More than are read in one go, and than one thread makes rows of: some of them broken, each in its own way.
    let mut guest = Guest::new(64);
    let init = guest.init;
    let nowhere = 0xdead_0000_0000_0000;
    for pid in 1..=300 {
        let task = guest.process(pid, &format!("p{pid}"), init);
        let argv = format!("/bin/p{pid}\0--of\0{pid}\0");
        let (mm, _) = guest.user_memory(task, argv.as_bytes(), b"A=1\0");
        match pid % 10 {
            1 => guest.set(task, "task_struct", "signal", nowhere),
            2 => guest.set(task, "task_struct", "mm", nowhere),
            3 => guest.set(task, "task_struct", "mm", 0),
            4 => guest.set(task, "task_struct", "real_cred", nowhere),
            5 => guest.set(mm, "mm_struct", "pgd", nowhere),
            6 => guest.set(mm, "mm_struct", "arg_start", 0x1000),
            _ => {}
        }
    }
    let live = guest.live().0;
    // Memory that is not mapped but asked for is read in batches. Nobody looks at what flickers.
    let unused = guest.space(8, 8);
    let asked_for = guest.flickering(unused, 0);
    for kernel in [guest.kernel(), live, asked_for] {
        let listing = list(&kernel);
        assert_eq!(listing.rows.len(), 300);
        for row in &listing.rows {
            let pid = row.pid;
            assert_eq!(row.name, format!("p{pid}"));
            // Over the border of two groups.
            if (20..50).contains(&pid) {
                let alone = kernel.process(pid, fields()).unwrap();
                assert_eq!(
                    serde_json::to_value(row).unwrap(),
                    serde_json::to_value(&alone).unwrap()
                );
            }
            let cmdline =
                Some(format!("/bin/p{pid} --of {pid}")).filter(|_| !matches!(pid % 10, 2 | 3 | 5 | 6));
            assert_eq!(
                row.cmdline.as_deref(),
                cmdline.as_deref(),
                "{pid}: {:?}",
                row.problems
            );
            let field = |name| row.problems.iter().any(|problem| problem.field == name);
            assert_eq!(field("threads"), pid % 10 == 1, "{pid}: {:?}", row.problems);
            assert_eq!(field("uid"), pid % 10 == 4, "{pid}: {:?}", row.problems);
            assert_eq!(
                field("cmdline"),
                matches!(pid % 10, 2 | 5 | 6),
                "{pid}: {:?}",
                row.problems
            );
        }
    }
}

#[test]
fn an_honest_guest_is_listed_whole() {
    let (mut guest, [a, ..]) = three();
    guest.user_memory(a, b"/sbin/init\0--flag\0", b"HOME=/\0TERM=linux\0");
    let listing = list(&guest.kernel());
    assert!(listing.warnings.is_empty(), "{:?}", listing.warnings);
    let pids: Vec<_> = listing
        .rows
        .iter()
        .map(|r| (r.pid, r.ppid, r.name.as_str()))
        .collect();
    assert_eq!(
        pids,
        [(1, Some(0), "init"), (20, Some(1), "b"), (30, Some(20), "c")]
    );
    let init = &listing.rows[0];
    assert_eq!(init.cmdline.as_deref(), Some("/sbin/init --flag"));
    assert_eq!(init.argv.as_ref().unwrap().len(), 2);
    assert_eq!(
        init.details().environ.as_ref().unwrap(),
        &["HOME=/", "TERM=linux"]
    );
    assert_eq!(
        (init.uid, init.details().sid, init.details().pgrp, init.threads),
        (Some(0), Some(1), Some(1), Some(1))
    );
    assert!(
        listing
            .rows
            .iter()
            .all(|r| r.state == 'S' && r.details().user_ns == Some(0xeffffffd))
    );
}

#[test]
fn a_cyclic_task_list_shows_every_task_once_and_says_so() {
    let (mut guest, [_, b, c]) = three();
    guest.put(tasks(c), tasks(b));
    let listing = list(&guest.kernel());
    assert_eq!(
        listing.rows.iter().map(|r| r.pid).collect::<Vec<_>>(),
        [1, 20, 30]
    );
    assert!(
        listing.warnings.iter().any(|w| w.contains("cycle")),
        "{:?}",
        listing.warnings
    );
}

#[test]
fn a_long_list_is_what_its_forward_links_say_wherever_the_others_lead() {
    // So long that a second thread goes through it from the end.
    const MANY: i32 = 1500;
    let mut guest = Guest::new(64);
    let init = guest.init;
    let all: Vec<u64> = (1..=MANY).map(|pid| guest.process(pid, "p", init)).collect();
    let (head, middle, last) = (tasks(init), tasks(all[700]), tasks(all[1499]));
    for (at, lie) in [
        (head, 0xdead_0000_0000_0000),
        (head, 0),
        (head, middle),
        (last, last),
        (last, 0xdead_0000_0000_0000),
        (middle, last),
    ] {
        let truth = guest.get(at + 8);
        guest.put(at + 8, lie);
        let listing = list(&guest.kernel());
        guest.put(at + 8, truth);
        assert!(listing.rows.iter().map(|row| row.pid).eq(1..=MANY));
        assert!(listing.rows.iter().all(|row| row.problems.is_empty()));
        // The head's own backward link is nobody's business.
        let told = listing
            .warnings
            .iter()
            .any(|w| w.contains("the backward links of 1 tasks"));
        assert_eq!(told, at != head, "{:?}", listing.warnings);
    }
}

#[test]
fn a_list_from_both_ends_is_the_list_from_its_beginning() {
    const MANY: usize = 3000;
    let mut guest = Guest::new(96);
    let init = guest.init;
    let all: Vec<u64> = (1..=MANY)
        .map(|pid| guest.process(pid as i32, "p", init))
        .collect();
    let at = |index: usize| tasks(all[index]);
    let mut lies = vec![(at(0), at(1))];
    // Forward links that leave some out, that lead back, nowhere and out of the list, where either thread comes first or both meet.
    for from in [10, 600, 1500, 1756, 2400, MANY - 2] {
        let to = [
            at(from + 1),
            at(from / 2),
            at(MANY - 1),
            at(from),
            0,
            0xdead_0000_0000_0000,
            tasks(init),
        ];
        lies.extend(to.map(|to| (at(from), to)));
    }
    for (place, lie) in lies {
        let truth = guest.get(place);
        guest.put(place, lie);
        let kernel = guest.kernel();
        let expected = walk(kernel.space(), Gva(tasks(init)), MANY);
        let is_sound = expected.walk.end.is_complete() && expected.uneven == 0;
        let expected: Vec<u64> = expected.walk.items.iter().map(|item| item.0).collect();
        for _ in 0..5 {
            let listing = kernel.processes(ProcessFields::empty()).unwrap();
            let found = listing.rows.iter().map(|row| tasks(row.task.0));
            assert!(found.eq(expected.iter().copied()), "{place:#x} -> {lie:#x}");
            assert_eq!(listing.warnings.is_empty(), is_sound, "{:?}", listing.warnings);
        }
        guest.put(place, truth);
    }
}

#[test]
fn a_task_that_points_at_itself_ends_the_list() {
    let (mut guest, [a, ..]) = three();
    guest.put(tasks(a), tasks(a));
    guest.put(tasks(a) + 8, tasks(a));
    let listing = list(&guest.kernel());
    assert_eq!(listing.rows.iter().map(|r| r.pid).collect::<Vec<_>>(), [1]);
    assert!(listing.warnings.iter().any(|w| w.contains("cycle")));
}

#[test]
fn a_list_into_nowhere_is_cut_with_its_address() {
    for target in [
        0,
        0xdead_0000_0000_0100,
        u64::MAX - 3,
        0x7fff_0000,
        DIRECT_MAP + (1 << 29),
    ] {
        let (mut guest, [_, b, _]) = three();
        guest.put(tasks(b), target);
        let listing = list(&guest.kernel());
        assert_eq!(
            listing.rows.iter().map(|r| r.pid).collect::<Vec<_>>(),
            [1, 20],
            "{target:#x}"
        );
        assert!(
            listing.warnings.iter().any(|w| w.contains("cut")),
            "{target:#x}: {:?}",
            listing.warnings
        );
    }
}

#[test]
fn a_task_with_broken_pointers_costs_its_own_fields_only() {
    for bad in [0, 1, 0xdead_0000_0000_0100, u64::MAX, 1 << 63] {
        let (mut guest, [_, b, _]) = three();
        for member in [
            "signal",
            "real_cred",
            "mm",
            "real_parent",
            "nsproxy",
            "thread_pid",
            "cgroups",
            "fs",
        ] {
            guest.set(b, "task_struct", member, bad);
        }
        let listing = list(&guest.kernel());
        assert_eq!(listing.rows.len(), 3);
        let broken = &listing.rows[1];
        assert_eq!((broken.pid, broken.name.as_str()), (20, "b"));
        assert!(
            broken.problems.iter().any(|p| p.field == "uid"),
            "{bad:#x}: {:?}",
            broken.problems
        );
        assert!(broken.uid.is_none() && broken.threads.is_none());
        assert!(listing.rows[0].problems.is_empty() && listing.rows[2].uid == Some(0));
    }
}

#[test]
fn impossible_sizes_are_capped_and_said() {
    let (mut guest, [a, b, c]) = three();
    for (task, end) in [(a, 1u64 << 63), (b, u64::MAX), (c, 0)] {
        let (mm, _) = guest.user_memory(task, b"arg\0", b"ENV=1\0");
        guest.set(mm, "mm_struct", "arg_end", end);
        guest.set(mm, "mm_struct", "total_vm", u64::MAX);
        guest.set(mm, "mm_struct", "env_start", u64::MAX);
        guest.set(mm, "mm_struct", "env_end", u64::MAX - 1);
        let signal = guest.get(task + offset("task_struct", "signal"));
        guest.set(signal, "signal_struct", "utime", u64::MAX);
        let groups =
            guest.get(guest.get(task + offset("task_struct", "real_cred")) + offset("cred", "group_info"));
        guest.set(groups, "group_info", "ngroups", 0x7fff_ffff);
    }
    let listing = list(&guest.kernel());
    for row in listing.rows.iter().take(2) {
        assert!(
            row.problems
                .iter()
                .any(|p| p.field == "cmdline" && p.reason.contains("cut")),
            "{:?}",
            row.problems
        );
        assert!(row.cmdline.as_ref().unwrap().starts_with("arg"));
        assert_eq!(row.details().vm_size_kb, Some(u64::MAX));
    }
    assert_eq!(
        listing.rows[2].argv.as_deref(),
        Some(&[][..]),
        "an end before the start is empty"
    );
    assert!(
        listing
            .rows
            .iter()
            .all(|r| r.details().groups.as_ref().is_none_or(|g| g.len() <= 65536))
    );
}

#[test]
fn paged_out_arguments_are_shown_as_such() {
    let (mut guest, [a, b, _]) = three();
    let (_, entry) = guest.user_memory(a, b"secret\0", b"");
    // A swap entry: present bit clear, the rest says where on the swap device the page is.
    guest.put(entry, 0x1234_5000 | 1 << 9);
    let (_, entry) = guest.user_memory(b, b"never\0", b"");
    guest.put(entry, 0);
    let listing = list(&guest.kernel());
    let reason = |row: usize| {
        &listing.rows[row]
            .problems
            .iter()
            .find(|p| p.field == "cmdline")
            .unwrap()
            .reason
    };
    assert_eq!(reason(0), "paged out");
    assert_ne!(reason(1), "paged out");
    assert!(listing.rows[0].cmdline.is_none() && listing.rows[1].cmdline.is_none());
}

#[test]
fn names_full_of_escapes_stay_data() {
    let mut guest = Guest::new(4);
    let init = guest.init;
    guest.process(1, "\u{1b}[2J\r\n\u{7}x\u{1b}]0;y", init);
    let task = guest.process(2, "", init);
    guest.put_bytes(task + offset("task_struct", "comm"), &[0xff; 16]);
    let listing = list(&guest.kernel());
    assert_eq!(listing.rows[0].name, "\u{1b}[2J\r\n\u{7}x\u{1b}]0;y");
    assert_eq!(listing.rows[1].name, "\\xff".repeat(16));
    let json = serde_json::to_string(&listing.rows).unwrap();
    assert!(
        !json.contains('\u{1b}') && json.contains("\\u001b"),
        "JSON escapes control characters"
    );
}

#[test]
fn page_tables_that_loop_end() {
    let (mut guest, [a, ..]) = three();
    let (mm, _) = guest.user_memory(a, b"x\0", b"");
    // The top table's first entry points at the top table itself.
    let top = guest.get(mm + offset("mm_struct", "pgd"));
    guest.put(top, (top & 0x3fff_ffff) | 7);
    guest.set(mm, "mm_struct", "arg_end", 1 << 47);
    let listing = list(&guest.kernel());
    assert_eq!(listing.rows.len(), 3);
    assert!(listing.rows[0].problems.iter().any(|p| p.field == "cmdline"));
}

#[test]
fn threads_in_a_circle_are_cut() {
    let (mut guest, [a, ..]) = three();
    let node = a + offset("task_struct", "thread_node");
    guest.put(node, node);
    let kernel = guest.kernel();
    let listing = kernel.threads(None).unwrap();
    assert_eq!(
        listing.rows.iter().map(|r| r.tid).collect::<Vec<_>>(),
        [1, 20, 30]
    );
    assert!(
        listing.warnings.iter().any(|w| w.contains("cycle")),
        "{:?}",
        listing.warnings
    );
    let row = &list(&kernel).rows[0];
    assert!(
        row.problems
            .iter()
            .any(|p| p.field == "utime_ticks" && p.reason.contains("cycle"))
    );
}

#[test]
fn parents_in_a_circle_make_a_finite_tree() {
    let (mut guest, [a, b, c]) = three();
    guest.set(a, "task_struct", "real_parent", c);
    guest.set(b, "task_struct", "real_parent", b);
    let listing = list(&guest.kernel());
    let tree = process_tree(&listing.rows);
    assert_eq!(tree.len(), 3);
    assert!(tree.iter().any(|n| n.orphan));
}

#[test]
fn a_list_rewritten_while_read_ends_with_whole_rows() {
    let mut guest = Guest::new(32);
    let init = guest.init;
    let all: Vec<u64> = (1..1500).map(|pid| guest.process(pid, "busy", init)).collect();
    let (kernel, memory) = guest.live();
    let stop = AtomicBool::new(false);
    // A failed assertion must stop the writer too, or the test would never end.
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    std::thread::scope(|scope| {
        let _stop = Stop(&stop);
        scope.spawn(|| {
            // Unlinks and relinks tasks, and for moments ties the list into knots.
            let physical = |at: u64| Gpa(at & 0x3fff_ffff);
            let mut random = 0x9e37_79b9_7f4a_7c15u64;
            while !stop.load(Ordering::Relaxed) {
                random = random
                    .wrapping_mul(6364136223846793005)
                    .wrapping_add(1442695040888963407);
                let task = all[(random >> 33) as usize % all.len()];
                let other = all[(random >> 13) as usize % all.len()];
                let at = physical(tasks(task));
                let original = memory.read_u64(at).unwrap();
                memory.write(at, &tasks(other).to_le_bytes()).unwrap();
                memory.write(at, &0xdead_0000_0000_0100u64.to_le_bytes()).unwrap();
                memory.write(at, &original.to_le_bytes()).unwrap();
            }
        });
        for _ in 0..30 {
            let listing = list(&kernel);
            let mut pids: Vec<_> = listing.rows.iter().map(|r| r.pid).collect();
            let shown = pids.len();
            pids.sort_unstable();
            pids.dedup();
            assert_eq!(pids.len(), shown, "no process comes twice");
            assert!(
                shown == 1499 || !listing.warnings.is_empty(),
                "{shown} processes and no warning"
            );
            assert!(listing.rows.iter().all(|r| r.name == "busy"));
        }
    });
    // At rest it is whole again.
    let listing = list(&kernel);
    assert_eq!((listing.rows.len(), listing.warnings.len()), (1499, 0));
}

#[test]
fn a_missing_member_is_named_with_the_release() {
    let guest = Guest::new(4);
    let error = guest.kernel().cgroups().unwrap_err().to_string();
    assert!(
        error.contains("css_set") && error.contains("6.1.0-synthetic"),
        "{error}"
    );
}
