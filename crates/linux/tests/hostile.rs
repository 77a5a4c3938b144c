//! Guests that lie: every listing ends in bounded time, with a marked row or a warning, and never with a panic.

#![allow(clippy::unwrap_used)]

mod synthetic;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use synthetic::{DIRECT_MAP, Guest, offset};
use vmsight_arch::Gpa;
use vmsight_linux::{Kernel, Listing, Process, ProcessFields, process_tree};

/// What is asked for where not everything is: cgroups and the clock need structures that the synthetic guest does not have.
fn fields() -> ProcessFields {
    ProcessFields::all() - ProcessFields::CGROUP - ProcessFields::START
}

fn list(kernel: &Kernel) -> Listing<Process> {
    let start = Instant::now();
    let listing = kernel.processes(fields()).unwrap();
    assert!(
        start.elapsed() < Duration::from_secs(20),
        "took {:?}",
        start.elapsed()
    );
    listing
}

fn tasks(task: u64) -> u64 {
    task + offset("task_struct", "tasks")
}

fn three() -> (Guest, [u64; 3]) {
    let mut guest = Guest::new(4);
    let init = guest.init;
    let a = guest.process(1, "init", init);
    let b = guest.process(20, "b", a);
    let c = guest.process(30, "c", b);
    (guest, [a, b, c])
}

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
            assert_eq!(row.cmdline, cmdline, "{pid}: {:?}", row.problems);
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
    assert_eq!(init.environ.as_ref().unwrap(), &["HOME=/", "TERM=linux"]);
    assert_eq!(
        (init.uid, init.sid, init.pgrp, init.threads),
        (Some(0), Some(1), Some(1), Some(1))
    );
    assert!(
        listing
            .rows
            .iter()
            .all(|r| r.state == 'S' && r.user_ns == Some(0xeffffffd))
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
        assert_eq!(row.vm_size_kb, Some(u64::MAX));
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
            .all(|r| r.groups.as_ref().is_none_or(|g| g.len() <= 65536))
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

/// The mappings of the process 1 over a maple tree whose root is what `build` makes.
fn maps_of(build: impl FnOnce(&mut Guest) -> u64) -> Listing<vmsight_linux::Mapping> {
    let (mut guest, [a, ..]) = three();
    let (mm, _) = guest.user_memory(a, b"x\0", b"");
    let root = build(&mut guest);
    guest.put(
        mm + offset("mm_struct", "mm_mt") + offset("maple_tree", "ma_root"),
        root,
    );
    let start = Instant::now();
    let listing = guest.kernel().maps(1).unwrap();
    assert!(start.elapsed() < Duration::from_secs(20));
    listing
}

/// The pointer to a maple tree's root node of a type (1 leaf, 2 range, 3 arange).
fn maple(node: u64, kind: u64) -> u64 {
    child(node, kind) | 2
}

/// The pointer to a node in another's slot.
fn child(node: u64, kind: u64) -> u64 {
    node | kind << 3 | 4
}

#[test]
fn an_honest_maple_tree_is_listed_whole() {
    let listing = maps_of(|guest| {
        let areas: Vec<u64> = (0..3).map(|_| guest.alloc("vm_area_struct")).collect();
        for (index, &area) in areas.iter().enumerate() {
            let start = 0x1000 + 0x2000 * index as u64;
            guest.set(area, "vm_area_struct", "vm_start", start);
            guest.set(area, "vm_area_struct", "vm_end", start + 0x1000);
            guest.set(area, "vm_area_struct", "vm_flags", 0x75);
            guest.set(area, "vm_area_struct", "vm_mm", 1);
        }
        let (low, high) = (guest.space(256, 256), guest.space(256, 256));
        // Gap, area, gap, area | gap, area, gap to the end.
        for (index, (pivot, slot)) in [(0xfff, 0), (0x1fff, areas[0]), (0x2fff, 0), (0x3fff, areas[1])]
            .iter()
            .enumerate()
        {
            guest.put(low + 8 + index as u64 * 8, *pivot);
            guest.put(low + 128 + index as u64 * 8, *slot);
        }
        for (index, (pivot, slot)) in [(0x4fff, 0), (0x5fff, areas[2]), (u64::MAX, 0)]
            .iter()
            .enumerate()
        {
            guest.put(high + 8 + index as u64 * 8, *pivot);
            guest.put(high + 128 + index as u64 * 8, *slot);
        }
        let root = guest.space(256, 256);
        guest.put(root + 8, 0x3fff);
        guest.put(root + 80, child(low, 1));
        guest.put(root + 88, child(high, 1));
        maple(root, 3)
    });
    assert!(listing.warnings.is_empty(), "{:?}", listing.warnings);
    let rows: Vec<_> = listing
        .rows
        .iter()
        .map(|r| (r.start.0, r.end.0, r.perms.as_str()))
        .collect();
    assert_eq!(
        rows,
        [
            (0x1000, 0x2000, "r-xp"),
            (0x3000, 0x4000, "r-xp"),
            (0x5000, 0x6000, "r-xp")
        ]
    );
}

#[test]
fn maple_trees_that_lie_are_cut() {
    // A node that is its own child.
    let cyclic = maps_of(|guest| {
        let node = guest.space(256, 256);
        guest.put(node + 80, child(node, 3));
        maple(node, 3)
    });
    assert!(
        cyclic.warnings.iter().any(|w| w.contains("cycle")),
        "{:?}",
        cyclic.warnings
    );
    // Falling pivots, unknown type, null node, node outside memory.
    let falling = maps_of(|guest| {
        let node = guest.space(256, 256);
        guest.put(node + 8, 0x5000);
        guest.put(node + 16, 0x1000);
        maple(node, 1)
    });
    assert!(
        falling.warnings.iter().any(|w| w.contains("do not rise")),
        "{:?}",
        falling.warnings
    );
    for root in [
        maple(DIRECT_MAP + 0x10_0000, 9),
        maple(0x1000, 1),
        maple(DIRECT_MAP + (1 << 29), 1),
        u64::MAX - 1,
    ] {
        let listing = maps_of(|_| root);
        assert!(
            listing.warnings.iter().any(|w| w.contains("cut")),
            "{root:#x}: {:?}",
            listing.warnings
        );
    }
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

/// A guest whose `btf_idr` has the root `head`, made by `build`; the types of module "probe" in it.
fn module_types_of(
    build: impl FnOnce(&mut Guest, u64) -> u64,
) -> Result<vmsight_symbols::Types, vmsight_linux::LinuxError> {
    let (mut guest, _) = three();
    let base = guest.kernel().types().clone();
    let mut types = vmsight_symbols::types::Builder::over(&base).unwrap();
    types.add(&vmsight_symbols::types::Def::Struct {
        name: "probe_state",
        size: 24,
        members: &[],
    });
    let blob = types.into_bytes().unwrap();
    let data = guest.space(blob.len() as u64, 8);
    guest.put_bytes(data, &blob);
    let btf = guest.alloc("btf");
    guest.set(btf, "btf", "data", data);
    guest.set(btf, "btf", "data_size", blob.len() as u64);
    guest.set(btf, "btf", "kernel_btf", 1);
    guest.put_bytes(btf + offset("btf", "name"), b"probe\0");
    let idr = guest.alloc("idr");
    guest.symbol("btf_idr", idr);
    let head = build(&mut guest, btf);
    guest.put(idr + offset("idr", "idr_rt.xa_head"), head);
    let start = Instant::now();
    let found = guest.kernel().module_types("probe");
    assert!(start.elapsed() < Duration::from_secs(20));
    found
}

fn xa_node(guest: &mut Guest, shift: u64, slots: &[(u64, u64)]) -> u64 {
    let node = guest.alloc("xa_node");
    guest.set(node, "xa_node", "shift", shift);
    for (slot, value) in slots {
        guest.put(node + offset("xa_node", "slots") + slot * 8, *value);
    }
    node | 2
}

#[test]
fn the_types_of_a_module_are_found_in_a_tree_of_any_depth() {
    let flat = module_types_of(|_, btf| btf).unwrap();
    let types = flat.find_struct("probe_state").unwrap();
    assert_eq!(flat.size_of(types), Some(24));
    assert!(
        flat.find_struct("task_struct").is_some(),
        "the kernel's own types are below"
    );
    let deep = module_types_of(|guest, btf| {
        // A value entry, a sibling entry and another module's slot in between stand for nothing.
        let leaf = xa_node(guest, 0, &[(0, 3), (5, 6), (63, btf)]);
        let inner = xa_node(guest, 6, &[(1, leaf)]);
        xa_node(guest, 12, &[(2, inner)])
    });
    assert!(deep.unwrap().find_struct("probe_state").is_some());
}

#[test]
fn an_entry_of_an_xarray_counts_the_indices_that_it_stands_for() {
    use vmsight_linux::structures::xarray::{Entry, walk_head};
    let mut guest = Guest::new(8);
    let sibling_of = |slot: u64| slot << 2 | 2;
    let pages = [
        (4, 0x1000),
        (5, sibling_of(4)),
        (6, sibling_of(4)),
        (8, 0x2000),
        (10, 7),
    ];
    let leaf = xa_node(&mut guest, 0, &pages);
    // A folio of 128 pages is stored one level up; the sibling of nothing is no entry.
    let folios = [(1, leaf), (3, sibling_of(0)), (4, 0x3000), (5, sibling_of(4))];
    let head = xa_node(&mut guest, 6, &folios);
    let walk = walk_head(&guest.kernel(), head, 100).unwrap();
    assert!(walk.end.is_complete());
    let entry = |index, value, count| Entry { index, value, count };
    let expected = [
        entry(68, 0x1000, 3),
        entry(72, 0x2000, 1),
        entry(74, 7, 1),
        entry(256, 0x3000, 128),
    ];
    assert_eq!(walk.items, expected);
}

#[test]
fn xarrays_that_lie_are_cut() {
    let own_child = module_types_of(|guest, _| {
        let node = xa_node(guest, 6, &[]);
        guest.put((node - 2) + offset("xa_node", "slots"), node);
        node
    });
    assert!(own_child.unwrap_err().to_string().contains("cut"));
    for head in [
        u64::MAX - 1,
        0xdead_0000_0000_0102,
        DIRECT_MAP + (1 << 29) + 2,
        6,
        1,
        0,
    ] {
        assert!(module_types_of(|_, _| head).is_err(), "{head:#x}");
    }
    let endless = module_types_of(|guest, btf| {
        guest.set(btf, "btf", "data_size", 0xffff_ffff);
        btf
    });
    assert!(endless.unwrap_err().to_string().contains("4294967295 bytes"));
}

/// `count` processes whose `signal_struct` is one and the same, with a list of `count` threads.
fn sharing_their_threads(count: i32) -> Guest {
    let mut guest = Guest::new(128);
    let init = guest.init;
    let node = offset("task_struct", "thread_node");
    let first = guest.process(1, "first", init);
    let signal = guest.get(first + offset("task_struct", "signal"));
    let head = signal + offset("signal_struct", "thread_head");
    let mut last = first + node;
    for tid in 1..count {
        let thread = guest.task(10_000 + tid, "thread", Some(init));
        guest.set(thread, "task_struct", "tgid", 1);
        guest.set(thread, "task_struct", "utime", 1_000_000_000);
        guest.set(thread, "task_struct", "se.sum_exec_runtime", 1_000_000_000);
        guest.link(last, thread + node);
        last = thread + node;
    }
    guest.link(last, head);
    guest.set(signal, "signal_struct", "nr_threads", count as u64);
    for pid in 2..=count {
        let task = guest.process(pid, "other", init);
        guest.set(task, "task_struct", "signal", signal);
    }
    guest
}

#[test]
fn processes_that_share_their_threads_do_not_multiply_them() {
    // Their product is more than is looked at for one listing.
    const COUNT: i32 = 4200;
    let kernel = sharing_their_threads(COUNT).kernel();
    let listing = kernel.threads(None).unwrap();
    assert_eq!(
        listing.rows.len() as i32,
        2 * COUNT - 1,
        "each thread once and each process once"
    );
    let marked = |row: &&vmsight_linux::Thread| row.problems.iter().any(|p| p.field == "tid");
    assert_eq!(listing.rows.iter().filter(marked).count() as i32, COUNT - 1);
    let mut tids: Vec<_> = listing.rows.iter().map(|row| row.tid).collect();
    tids.sort_unstable();
    tids.dedup();
    assert_eq!(tids.len(), listing.rows.len(), "and nobody is missing");
    // Their time is summed up once and is that of all who say that they share it.
    let ticks: Vec<_> = kernel
        .processes(fields())
        .unwrap()
        .rows
        .iter()
        .map(|row| row.utime_ticks)
        .collect();
    assert_eq!(ticks, vec![Some((COUNT as u64 - 1) * 100); COUNT as usize]);
}

/// Lets a process claim 2 MiB of arguments, all in one page that is mapped again and again.
fn endless_arguments(guest: &mut Guest, task: u64, text: &[u8]) {
    let (mm, entry) = guest.user_memory(task, text, b"");
    let page = guest.get(entry);
    let table = entry & !0xfff;
    for index in 0..512 {
        guest.put(table + index * 8, page);
    }
    guest.set(mm, "mm_struct", "arg_start", 0x7fe0_0000);
    guest.set(mm, "mm_struct", "arg_end", 0x8000_0000);
    guest.set(mm, "mm_struct", "env_start", 0x8000_0000);
    guest.set(mm, "mm_struct", "env_end", 0x8000_0000);
}

#[test]
fn what_some_claim_to_hold_takes_nothing_from_others() {
    let mut guest = Guest::new(8);
    let init = guest.init;
    // More than fits any listing is claimed, and next to nothing is there.
    for pid in 1..=150 {
        let task = guest.process(pid, "claims", init);
        let (mm, _) = guest.user_memory(task, b"liar\0", b"");
        guest.set(mm, "mm_struct", "arg_end", 0x7fff_f000 + (2 << 20));
    }
    let task = guest.process(200, "honest", init);
    guest.user_memory(task, b"/bin/honest\0", b"A=1\0");
    let listing = list(&guest.kernel());
    for row in &listing.rows[..150] {
        assert!(row.cmdline.as_ref().unwrap().starts_with("liar"));
        assert!(
            row.problems
                .iter()
                .any(|p| p.field == "cmdline" && p.reason.contains("cut after 4096 of 2097152"))
        );
    }
    assert_eq!(listing.rows[150].cmdline.as_deref(), Some("/bin/honest"));
    assert!(listing.rows[150].problems.is_empty());
}

#[test]
fn who_holds_all_that_a_listing_can_hold_hides_nobody() {
    let mut guest = Guest::new(8);
    let init = guest.init;
    // Empty strings: what costs most of all to keep.
    for pid in 1..=6 {
        let task = guest.process(pid, "greedy", init);
        endless_arguments(&mut guest, task, b"");
    }
    let task = guest.process(7, "honest", init);
    let mut argument = [b'a'; 1001];
    argument[1000] = 0;
    guest.user_memory(task, &argument, b"A=1\0B=2\0");
    let kernel = guest.kernel();
    let listing = kernel.processes(fields()).unwrap();
    let honest = listing.rows.last().unwrap();
    assert_eq!(honest.cmdline.as_ref().unwrap().len(), 1000);
    assert_eq!(honest.environ.as_ref().unwrap(), &["A=1", "B=2"]);
    assert!(honest.problems.is_empty(), "{:?}", honest.problems);
    let strings: usize = listing.rows.iter().flat_map(|row| &row.argv).map(Vec::len).sum();
    assert!(strings < 9 << 20, "{strings} strings");
    assert!(
        listing.warnings.iter().any(|w| w.contains("256 MiB")),
        "{:?}",
        listing.warnings
    );
    // Who asks for one alone has all of it.
    let one = kernel.processes_of(&[6, 99], fields()).unwrap();
    assert_eq!(one.rows.len(), 1);
    assert_eq!(
        (one.rows[0].pid, one.rows[0].argv.as_ref().unwrap().len()),
        (6, 2 << 20)
    );
    assert!(one.warnings.is_empty() && one.rows[0].problems.is_empty());
}

#[test]
fn a_process_that_takes_away_its_own_rights_hides_nothing() {
    let (mut guest, [a, b, _]) = three();
    // As mprotect(PROT_NONE) leaves the entry: not present, marked by the global bit, all bits of the address inverted.
    let (_, entry) = guest.user_memory(a, b"/bin/hidden\0--key\0", b"SECRET=1\0");
    let page = guest.get(entry) & 0x000f_ffff_ffff_f000;
    guest.put(entry, !page & 0x000f_ffff_ffff_f000 | 0x160);
    // An entry of swap has that bit clear, and its offset inverted too.
    let (_, entry) = guest.user_memory(b, b"gone\0", b"");
    guest.put(entry, !0x1234_5000 & 0x000f_ffff_ffff_f000 | 2);
    let kernel = guest.kernel();
    let listing = list(&kernel);
    assert_eq!(listing.rows[0].cmdline.as_deref(), Some("/bin/hidden --key"));
    assert_eq!(listing.rows[0].environ.as_ref().unwrap(), &["SECRET=1"]);
    assert!(listing.rows[0].problems.is_empty());
    assert!(
        listing.rows[1]
            .problems
            .iter()
            .any(|p| p.field == "cmdline" && p.reason == "paged out")
    );
    let space = kernel.process_space(1).unwrap().unwrap();
    let mut bytes = [0; 11];
    space.read(vmsight_arch::Gva(0x7fff_f000), &mut bytes).unwrap();
    assert_eq!(&bytes, b"/bin/hidden");
    let swapped = kernel.process_space(20).unwrap().unwrap();
    assert!(
        swapped
            .read_u64(vmsight_arch::Gva(0x7fff_f000))
            .unwrap_err()
            .is_paged_out()
    );
}

#[test]
fn unreadable_memory_is_said_of_every_field_that_comes_from_it() {
    let (mut guest, [a, b, _]) = three();
    guest.user_memory(a, b"x\0", b"Y=1\0");
    guest.set(a, "task_struct", "mm", 0xdead_0000_0000_0100);
    let (mm, _) = guest.user_memory(b, b"x\0", b"Y=1\0");
    guest.set(mm, "mm_struct", "pgd", 0xdead_0000_0000_0100);
    let kernel = guest.kernel();
    let listing = list(&kernel);
    let fields_of = |row: usize| -> Vec<_> { listing.rows[row].problems.iter().map(|p| p.field).collect() };
    for field in ["cmdline", "argv", "environ", "exe", "vm_size_kb", "vm_rss_kb"] {
        assert!(fields_of(0).contains(&field), "{field}: {:?}", fields_of(0));
    }
    for field in ["cmdline", "argv", "environ"] {
        assert!(fields_of(1).contains(&field), "{field}: {:?}", fields_of(1));
    }
    // What was not asked for is not missed.
    let listing = kernel.processes(ProcessFields::ENVIRON).unwrap();
    for row in &listing.rows[..2] {
        let fields: Vec<_> = row.problems.iter().map(|p| p.field).collect();
        assert_eq!(fields, ["environ"]);
    }
}

/// Gives the `mm_struct` one mapping from `start` on.
fn one_mapping(guest: &mut Guest, mm: u64, start: u64) {
    let area = guest.alloc("vm_area_struct");
    guest.set(area, "vm_area_struct", "vm_start", start);
    guest.set(area, "vm_area_struct", "vm_end", start + 0x1000);
    guest.set(area, "vm_area_struct", "vm_flags", 0x75);
    guest.set(area, "vm_area_struct", "vm_mm", mm);
    let leaf = guest.space(256, 256);
    for (index, (pivot, slot)) in [(start - 1, 0), (start + 0xfff, area), (u64::MAX, 0)]
        .iter()
        .enumerate()
    {
        guest.put(leaf + 8 + index as u64 * 8, *pivot);
        guest.put(leaf + 128 + index as u64 * 8, *slot);
    }
    guest.put(
        mm + offset("mm_struct", "mm_mt") + offset("maple_tree", "ma_root"),
        maple(leaf, 1),
    );
}

#[test]
fn of_two_processes_with_one_pid_both_are_mapped() {
    let (mut guest, [a, b, c]) = three();
    for (task, start) in [(a, 0x1_0000), (c, 0x3_0000)] {
        let (mm, _) = guest.user_memory(task, b"x\0", b"");
        one_mapping(&mut guest, mm, start);
    }
    guest.set(b, "task_struct", "mm", 0xdead_0000_0000_0100);
    guest.set(c, "task_struct", "pid", 1);
    let kernel = guest.kernel();
    let all = kernel.all_maps().unwrap();
    assert!(all.warnings.is_empty(), "{:?}", all.warnings);
    let found: Vec<_> = all
        .rows
        .iter()
        .map(|process| {
            let starts: Vec<_> = process.maps.rows.iter().map(|row| row.start.0).collect();
            (process.pid, process.name.as_str(), starts)
        })
        .collect();
    assert_eq!(
        found,
        [
            (1, "init", vec![0x1_0000]),
            (20, "b", vec![]),
            (1, "c", vec![0x3_0000])
        ]
    );
    assert!(
        all.rows[1].maps.warnings[0].contains("maps of process 20"),
        "{:?}",
        all.rows[1].maps.warnings
    );
    let maps = kernel.maps(1).unwrap();
    assert_eq!(
        maps.rows.iter().map(|row| row.start.0).collect::<Vec<_>>(),
        [0x1_0000, 0x3_0000]
    );
    assert!(
        maps.warnings
            .iter()
            .any(|w| w.contains("2 processes have the pid 1")),
        "{:?}",
        maps.warnings
    );
}

#[test]
fn mappings_that_came_out_marked_are_read_again() {
    let (mut guest, [a, ..]) = three();
    let (mm, _) = guest.user_memory(a, b"x\0", b"");
    one_mapping(&mut guest, mm, 0x1_0000);
    let leaf = guest.get(mm + offset("mm_struct", "mm_mt") + offset("maple_tree", "ma_root")) & !0xff;
    let (pivot, area) = (leaf + 8, guest.get(leaf + 136));
    for (at, value) in [(pivot, 1 << 60), (area, 0x9_0000)] {
        let maps = guest.flickering(at, value).maps(1).unwrap();
        assert!(maps.warnings.is_empty(), "{:?}", maps.warnings);
        assert_eq!((maps.rows.len(), maps.rows[0].start.0), (1, 0x1_0000));
        let all = guest.flickering(at, value).all_maps().unwrap();
        assert!(all.rows[0].maps.warnings.is_empty());
        assert_eq!(all.rows[0].maps.rows[0].start.0, 0x1_0000);
    }
}
