//! Guests that lie: every check ends in bounded time, says what it could not look at, and never panics.

#![allow(clippy::unwrap_used)]

mod synthetic;

use std::time::{Duration, Instant};

use synthetic::{DATA, Guest, IMAGE, RODATA, TEXT};
use vmsight_analysis::{
    Certainty, Check, Context, Evidence, Finding, Findings, Outcome, Severity, checks, run,
};
use vmsight_arch::{Gpa, Gva, Registers};
use vmsight_lab::chance::Dice;
use vmsight_linux::{Kernel, LinuxError};

fn all(kernel: Kernel) -> Vec<Outcome> {
    let start = Instant::now();
    let outcomes = run(&Context::new(kernel), checks::ALL, &|_| {});
    assert!(
        start.elapsed() < Duration::from_secs(120),
        "took {:?}",
        start.elapsed()
    );
    outcomes
}

fn of<'o>(outcomes: &'o [Outcome], check: &str) -> &'o Outcome {
    outcomes.iter().find(|o| o.check == check).unwrap()
}

/// A word that leads somewhere more often than not.
fn word(dice: &mut Dice, reach: u64) -> u64 {
    let data = IMAGE + DATA.start + dice.roll(reach) / 8 * 8;
    match dice.roll(16) {
        0..=8 => data,
        9 => IMAGE + TEXT.start + dice.roll(TEXT.end - TEXT.start),
        10 => data + 1,
        11 => data + 2,
        12 => dice.roll(4096),
        13 => 0xffff_ffff_c000_0000 + dice.roll(0x10_0000),
        14 => dice.roll(u64::MAX),
        _ => 0,
    }
}

#[test]
fn memory_that_leads_anywhere() {
    for (seed, reach) in [
        (1, 0x1000),
        (2, 0x8000),
        (3, 0x2_0000),
        (4, 0xd_0000),
        (5, 0xd_0000),
        (6, 0x40),
    ] {
        let mut dice = Dice::new(0x9e37_79b9_7f4a_7c15 + 2 * seed);
        let mut guest = Guest::new();
        for at in RODATA.chain(DATA).step_by(8) {
            guest.put(at, word(&mut dice, reach));
        }
        for at in TEXT.step_by(8) {
            guest.put(at, dice.roll(u64::MAX));
        }
        // One CPU, whose variables are where they are linked.
        guest.put(DATA.start, 0);
        guest.put(DATA.start + 0x40, 1);
        let outcomes = all(guest.kernel());
        let found: usize = outcomes.iter().map(|o| o.findings.len()).sum();
        assert!(found > 0, "seed {seed}: it is no kernel at all");
        for outcome in &outcomes {
            assert!(
                outcome.findings.len() <= 512 && outcome.notes.len() <= 66,
                "{}",
                outcome.check
            );
        }
    }
}

/// Each list within its bound, and together thirty million: only what all of them may cost ends it.
#[test]
fn users_of_function_tracing_without_end() {
    let mut guest = Guest::new();
    let [ops, hashes, hash, buckets] =
        [0, 0x100, 0x200, 0x1000].map(|offset| guest.at("end_of_variables") + offset);
    guest.put(guest.at("ftrace_ops_list"), IMAGE + ops);
    // Members as synthetic::STRUCTS has them: func, next, flags, saved_func, func_hash; it follows itself.
    for (offset, word) in [
        (0, 0xffff_ffff_c012_3456),
        (8, IMAGE + ops),
        (24, 0xffff_ffff_c012_3456),
        (32, IMAGE + hashes),
    ] {
        guest.put(ops + offset, word);
    }
    guest.put(hashes + 8, IMAGE + hash);
    guest.put(hash, 12);
    guest.put(hash + 8, IMAGE + buckets);
    let outcomes = all(guest.kernel());
    let ftrace = of(&outcomes, "ftrace");
    assert!(
        ftrace.notes.iter().any(|note| note.contains("given up after")),
        "{:?}",
        ftrace.notes
    );
    let subject = format!("ftrace_ops {} func", Gva(IMAGE + ops));
    let found = ftrace.findings.iter().find(|f| f.subject == subject).unwrap();
    assert_eq!(found.severity, Severity::Critical);
}

/// A thousand pages of records that are all the same two million.
#[test]
fn records_of_function_tracing_that_pages_share() {
    const PAGES: u64 = 1000;
    let mut guest = Guest::new();
    let first = guest.at("end_of_variables");
    guest.put(guest.at("ftrace_pages_start"), IMAGE + first);
    for page in 0..PAGES {
        // next, records, index and order: see synthetic::STRUCTS.
        let at = first + page * 24;
        let next = if page + 1 < PAGES { IMAGE + at + 24 } else { 0 };
        guest.put(at, next);
        guest.put(at + 8, IMAGE + first);
        guest.put(at + 16, u64::from(u32::MAX));
    }
    let outcomes = all(guest.kernel());
    let notes = &of(&outcomes, "ftrace").notes;
    assert!(
        notes
            .iter()
            .any(|note| note.contains("records of function tracing do not end")),
        "{notes:?}"
    );
}

#[test]
fn memory_of_nothing() {
    for outcome in all(Guest::new().kernel()) {
        assert!(
            outcome.looked_at > 0 || !outcome.notes.is_empty(),
            "{} looked at nothing and does not say why",
            outcome.check
        );
    }
}

#[test]
fn a_table_that_leads_elsewhere() {
    let mut guest = Guest::new();
    let table = guest.at("sys_call_table");
    for (number, name) in ["__x64_sys_read", "__x64_sys_write", "kernel_halt"]
        .iter()
        .enumerate()
    {
        guest.put(table + number as u64 * 8, guest.address(name));
    }
    guest.put(table + 24, 0xffff_ffff_c012_3456);
    let outcomes = all(guest.kernel());
    let found = &of(&outcomes, "syscalls").findings;
    let about: Vec<_> = found
        .iter()
        .filter(|f| f.subject.starts_with("sys_call_table"))
        .map(|f| (f.subject.as_str(), f.severity))
        .collect();
    assert_eq!(
        about,
        [
            ("sys_call_table[2]", Severity::High),
            ("sys_call_table[3]", Severity::Critical)
        ]
    );
    let last = found.iter().find(|f| f.subject == "sys_call_table[3]").unwrap();
    assert_eq!(last.address, Some(Gva(IMAGE + table + 24)));
    assert!(
        last.evidence.iter().any(|e| matches!(
            e,
            Evidence::Address { at, place, .. } if at.0 == 0xffff_ffff_c012_3456 && place.contains("none that the kernel lists")
        )),
        "{last:#?}"
    );
}

#[test]
fn a_function_of_another_in_a_listing() {
    let mut guest = Guest::new();
    let table = guest.at("tcp4_seq_ops");
    for (number, name) in ["tcp_seq_start", "tcp_seq_stop", "tcp_seq_next", "tcp4_seq_show"]
        .iter()
        .enumerate()
    {
        guest.put(table + number as u64 * 8, guest.address(name));
    }
    assert!(of(&all(guest.kernel()), "seq-ops").findings.is_empty());
    guest.put(table + 24, guest.address("kernel_halt"));
    let outcomes = all(guest.kernel());
    assert_eq!(
        of(&outcomes, "seq-ops").findings[0].subject,
        "tcp4_seq_ops seq_operations.show"
    );
    // Not at a function's begin.
    guest.put(table + 24, guest.address("tcp4_seq_show") + 1);
    let outcomes = all(guest.kernel());
    assert!(
        of(&outcomes, "seq-ops").findings[0]
            .explanation
            .contains("middle of a function")
    );
}

#[test]
fn registers_are_held_against_the_kernel() {
    let guest = Guest::new();
    let vcpu = |lstar| Registers {
        lstar: Some(lstar),
        cstar: Some(0),
        sysenter_eip: Some(0),
        ..Registers::default()
    };
    let check = |lstar| {
        let context = Context::new(guest.kernel()).with_registers(Ok(vec![vcpu(lstar)]));
        let outcome = run(&context, &[checks::named("entry").unwrap()], &|_| {}).remove(0);
        outcome.findings.iter().any(|f| f.subject == "LSTAR of vCPU 0")
    };
    assert!(!check(guest.address("entry_SYSCALL_64")));
    assert!(check(guest.address("kernel_halt")));
    assert!(check(0xffff_ffff_c000_0000));
    assert!(check(0));
}

/// Finds what `_text` begins with.
const BEGIN: Check = Check {
    name: "begin",
    summary: "",
    compares: "",
    why: "",
    techniques: &[],
    blind_spots: &[],
    run: begin,
};

fn begin(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let at = context.symbol(&["_text"])?;
    let value = context.pointer("the begin", at)?;
    findings.looked_at(1);
    if !value.is_null() {
        findings.report(Finding::new(Severity::Low, "begin", "is not null").at(at));
    }
    Ok(())
}

#[test]
fn what_is_gone_when_read_anew_is_no_finding() {
    let mut guest = Guest::new();
    guest.put(TEXT.start, 1);
    let (kernel, memory) = guest.live();
    // It stays: a finding.
    let context = Context::new(kernel.clone());
    let outcome = run(&context, &[&BEGIN], &|_| {}).remove(0);
    assert_eq!(outcome.findings[0].certainty, Certainty::Seen(3));
    assert_eq!(outcome.findings[0].check, "begin");
    // It goes between two looks: none, and that is said.
    let outcome = run(&context, &[&BEGIN], &|_| {
        memory.write(Gpa(TEXT.start), &[0; 8]).unwrap()
    })
    .remove(0);
    assert!(outcome.findings.is_empty());
    assert!(
        outcome.notes[0].contains("not there any more"),
        "{:?}",
        outcome.notes
    );
    // A guest that stands still is looked at once.
    memory.write(Gpa(TEXT.start), &[1]).unwrap();
    let outcome = run(&Context::new(kernel).paused(), &[&BEGIN], &|_| {
        memory.write(Gpa(TEXT.start), &[0; 8]).unwrap()
    });
    assert_eq!(outcome[0].findings[0].certainty, Certainty::Still);
}

#[test]
fn every_check_says_what_it_is() {
    for check in checks::ALL {
        assert_eq!(checks::named(check.name).map(|c| c.name), Some(check.name));
        assert!(
            check.name.bytes().all(|b| b.is_ascii_lowercase() || b == b'-'),
            "{}",
            check.name
        );
        for text in [check.summary, check.compares, check.why] {
            assert!(text.len() > 10, "{}", check.name);
        }
        assert!(
            !check.blind_spots.is_empty() && !check.techniques.is_empty(),
            "{}",
            check.name
        );
    }
    let mut names: Vec<_> = checks::ALL.iter().map(|c| c.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), checks::ALL.len());
}
