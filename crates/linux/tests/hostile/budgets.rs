//! What one process claims takes nothing from others, and what cannot be read is said.

use vmsight_linux::ProcessFields;

use crate::synthetic::{Guest, offset};
use crate::trees::maple;
use crate::{fields, list, three};

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
        .map(|row| row.details().utime_ticks)
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
    assert_eq!(honest.details().environ.as_ref().unwrap(), &["A=1", "B=2"]);
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
    assert_eq!(listing.rows[0].details().environ.as_ref().unwrap(), &["SECRET=1"]);
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
