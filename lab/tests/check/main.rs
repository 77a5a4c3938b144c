//! The checks find nothing in guests in which there is nothing, running and dumped, and find what is planted.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod golden;

use std::cell::Cell;

use vmsight_analysis::{Certainty, Context, Evidence, Finding, Known, Outcome, Severity, checks, run};
use vmsight_arch::Gva;
use vmsight_lab::{Format, Guest, Memory, Paging, Spec};
use vmsight_linux::Kernel;
use vmsight_memory::dump;
use vmsight_target::{AttachOptions, TargetSpec};

fn all(context: &Context) -> Vec<Outcome> {
    run(context, checks::ALL, &|_| {})
}

/// Nothing is wrong, everything was looked at, and in memory that stands still nothing could not be looked at but MSRs.
fn clean(what: &str, context: &Context) {
    for outcome in all(context) {
        let Outcome { check, notes, .. } = &outcome;
        let suspicious: Vec<_> = outcome.findings.iter().filter(|f| f.is_suspicious()).collect();
        assert!(suspicious.is_empty(), "{what}: {check}: {suspicious:#?}");
        assert!(!outcome.failed, "{what}: {check}: {notes:?}");
        assert!(outcome.looked_at > 0, "{what}: {check}: {notes:?}");
        let unexpected: Vec<_> = notes
            .iter()
            // Neither QEMU's monitor nor its dumps have them.
            .filter(|note| !note.contains("the target does not give all MSRs"))
            // A list that is changed while it is read is said to be cut there, and a finding that is gone to be gone.
            .filter(|_| !context.is_changing())
            .collect();
        assert!(unexpected.is_empty(), "{what}: {check}: {unexpected:?}");
    }
}

struct Live {
    guest: Guest,
    context: Context,
    /// Of the looks at its code before.
    known: Known,
    looks: Cell<u32>,
}

impl Live {
    fn boot(spec: &Spec) -> Live {
        let guest = Guest::boot(spec).unwrap_or_else(|e| panic!("{e:?}"));
        let target = TargetSpec::Qmp(guest.qmp_path().unwrap());
        let options = AttachOptions {
            write: true,
            ..AttachOptions::default()
        };
        let target = vmsight_target::attach(&target, &options).unwrap_or_else(|e| panic!("{e}"));
        let registers = target.registers(None).map_err(|e| e.to_string());
        let kernel =
            Kernel::attach(target.memory.clone(), Default::default()).unwrap_or_else(|e| panic!("{e}"));
        let context = Context::new(kernel).with_registers(registers);
        Live {
            guest,
            context,
            known: Known::default(),
            looks: Cell::new(0),
        }
    }

    fn symbol(&self, name: &str) -> Gva {
        self.context.symbol(&[name]).unwrap_or_else(|e| panic!("{e}"))
    }

    fn word(&self, at: Gva) -> u64 {
        self.context.space().read_u64(at).unwrap()
    }

    /// A function of a module.
    fn in_module(&self) -> (Gva, String) {
        let symbols = self.context.module_symbols();
        let found = symbols
            .iter()
            .find(|s| *s.module == *"ext4" && s.name == "ext4_readdir");
        let found = found.expect("every guest has ext4 loaded");
        (found.address, found.module.to_string())
    }

    /// What the checks find while other bytes stand there, with the guest standing still so that it does not run into them.
    fn with(&self, at: Gva, bytes: &[u8]) -> Vec<Finding> {
        self.guest
            .paused(|_| {
                let mut old = vec![0; bytes.len()];
                self.context.space().read(at, &mut old).unwrap();
                self.context.space().write(at, bytes).unwrap();
                let still = Context::new(self.context.kernel().clone())
                    .with_registers(self.context.registers().map(<[_]>::to_vec).map_err(str::to_owned))
                    .paused();
                let found: Vec<Finding> = all(&still).into_iter().flat_map(|o| o.findings).collect();
                self.again(still, &found);
                self.context.space().write(at, &old).unwrap();
                Ok(found)
            })
            .unwrap()
    }

    /// A look at the code that knows of those before finds the same, and does not decode all of it anew.
    fn again(&self, context: Context, found: &[Finding]) {
        let text = checks::named("text").unwrap();
        let before = self.looks.replace(self.looks.get() + 1);
        let outcome = run(&context.with_known(self.known.clone()), &[text], &|_| {}).remove(0);
        let places = |found: &[Finding]| -> Vec<_> {
            let of_text = found.iter().filter(|f| f.check == text.name);
            of_text.map(|f| (f.subject.clone(), f.address)).collect()
        };
        assert_eq!(places(&outcome.findings), places(found));
        let functions = usize::try_from(outcome.looked_at).unwrap();
        let unchanged = self.known.unchanged_functions();
        assert_eq!(
            unchanged * 2 > functions,
            before > 0,
            "{unchanged} of {functions}"
        );
    }

    fn pointer_to(&self, at: Gva, to: Gva) -> Vec<Finding> {
        self.with(at, &to.0.to_le_bytes())
    }
}

/// The finding of this check about this, which must lie there.
#[track_caller]
fn expect<'f>(found: &'f [Finding], check: &str, subject: &str, at: Gva) -> &'f Finding {
    let one = found.iter().find(|f| f.check == check && f.subject == subject);
    let one = one.unwrap_or_else(|| panic!("{check} says nothing of {subject}: {found:#?}"));
    assert_eq!(one.address, Some(at), "{one:#?}");
    assert_eq!(one.certainty, Certainty::Still);
    one
}

/// Nothing but these checks has a word to say.
#[track_caller]
fn only(found: &[Finding], checks: &[&str]) {
    let suspicious = found.iter().filter(|f| f.is_suspicious());
    let others: Vec<_> = suspicious.filter(|f| !checks.contains(&f.check)).collect();
    assert!(others.is_empty(), "{others:#?}");
}

fn shows(finding: &Finding, what: &str, address: Gva) {
    let is = |e: &Evidence| matches!(e, Evidence::Address { what: w, at, .. } if w == what && *at == address);
    assert!(finding.evidence.iter().any(is), "{finding:#?}");
}

/// A jump or call with a distance of 32 bits.
fn near(opcode: u8, at: Gva, to: Gva) -> Vec<u8> {
    let mut bytes = vec![opcode];
    bytes.extend_from_slice(&(to.0.wrapping_sub(at.0 + 5) as u32).to_le_bytes());
    bytes
}

/// What is looked at again and again in a guest that runs is known from the look before, until it is gone.
fn seen_again(live: &Live) {
    let (evil, _) = live.in_module();
    // No program of today makes this call.
    let slot = live.symbol("sys_call_table").wrapping_add(156 * 8);
    let known = Known::default();
    let look = || {
        let context = Context::new(live.context.kernel().clone()).with_known(known.clone());
        let syscalls = checks::named("syscalls").unwrap();
        let found = run(&context, &[syscalls], &|_| {}).remove(0).findings;
        assert!(
            found.iter().all(|f| f.subject == "sys_call_table[156]"),
            "{found:#?}"
        );
        found.iter().map(|f| f.certainty).collect::<Vec<_>>()
    };
    let (old, new) = (live.word(slot), evil.0);
    let write = |word: u64| live.context.space().write(slot, &word.to_le_bytes()).unwrap();
    assert_eq!(look(), []);
    write(new);
    assert_eq!(look(), [Certainty::Seen(3)]);
    assert_eq!(look(), [Certainty::Seen(4)]);
    write(old);
    assert_eq!(look(), []);
    write(new);
    assert_eq!(look(), [Certainty::Seen(3)]);
    write(old);
}

fn planted(live: &Live) {
    let (evil, module) = live.in_module();

    // An entry of the table of system calls.
    let slot = live.symbol("sys_call_table").wrapping_add(156 * 8);
    let found = live.pointer_to(slot, evil);
    let finding = expect(&found, "syscalls", "sys_call_table[156]", slot);
    assert_eq!(
        (finding.severity, finding.module.as_deref()),
        (Severity::Critical, Some(&*module))
    );
    shows(finding, "handler", evil);
    expect(&found, "rodata", "sys_call_table+0x4e0", slot);
    only(&found, &["syscalls", "rodata"]);

    // Another call's handler in the place of one is the kernel's own; where a switch dispatches, it says otherwise.
    let getpid = live.word(live.symbol("sys_call_table").wrapping_add(39 * 8));
    let found = live.pointer_to(slot, Gva(getpid));
    if live.context.symbol(&["x64_sys_call"]).is_ok() {
        assert!(
            found
                .iter()
                .any(|f| f.check == "syscalls" && f.subject == "x64_sys_call(156)"),
            "{found:#?}"
        );
    }

    // A jump over the begin of a function; through a register, too.
    let function = live.symbol("kernel_halt");
    let found = live.with(function, &near(0xe9, function, evil));
    let finding = expect(&found, "text", "kernel_halt", function);
    assert_eq!(finding.module.as_deref(), Some(&*module));
    assert!(
        finding
            .evidence
            .iter()
            .any(|e| matches!(e, Evidence::Bytes { bytes, .. } if bytes[0] == 0xe9)),
        "{finding:#?}"
    );
    only(&found, &["text", "ftrace"]);
    let mut absolute = vec![0x48, 0xb8];
    absolute.extend_from_slice(&evil.0.to_le_bytes());
    absolute.extend_from_slice(&[0xff, 0xe0]);
    let found = live.with(function, &absolute);
    expect(&found, "text", "kernel_halt+0xa", function.wrapping_add(10));
    let found = live.with(function, &[0xcc]);
    expect(&found, "text", "kernel_halt", function);

    // A call where function tracing has its place.
    let mut head = [0; 4];
    live.context.space().read(function, &mut head).unwrap();
    let behind = if head == [0xf3, 0x0f, 0x1e, 0xfa] || head == [0x66, 0x0f, 0x1f, 0x00] {
        4
    } else {
        0
    };
    let site = function.wrapping_add(behind);
    let found = live.with(site, &near(0xe8, site, evil));
    let name = if behind == 0 {
        "kernel_halt"
    } else {
        "kernel_halt+0x4"
    };
    expect(&found, "ftrace", name, site);
    expect(&found, "text", name, site);

    // The listing of TCP connections.
    let table = live
        .context
        .object("seq_operations", live.symbol("tcp4_seq_ops"))
        .unwrap();
    let show = table.member("show").unwrap();
    let found = live.pointer_to(show, evil);
    let finding = expect(&found, "seq-ops", "tcp4_seq_ops seq_operations.show", show);
    assert_eq!(finding.module.as_deref(), Some(&*module));
    shows(finding, "leads to", evil);
    only(&found, &["seq-ops", "rodata", "proc"]);
    // The kernel's own function, but another's.
    let found = live.pointer_to(show, live.symbol("kernel_halt"));
    expect(&found, "seq-ops", "tcp4_seq_ops seq_operations.show", show);

    // A gate of interrupts.
    let gate = live.symbol("idt_table").wrapping_add(9 * 16);
    let other = live.symbol("asm_exc_page_fault").0;
    let mut bytes = [0; 16];
    live.context.space().read(gate, &mut bytes).unwrap();
    bytes[0..2].copy_from_slice(&(other as u16).to_le_bytes());
    bytes[6..8].copy_from_slice(&((other >> 16) as u16).to_le_bytes());
    let found = live.with(gate, &bytes);
    expect(&found, "idt", "idt_table[9]", gate);
    only(&found, &["idt"]);

    // A call gate for programs.
    let page = live.context.kernel().per_cpu_symbol("gdt_page").unwrap();
    let page = live.context.kernel().per_cpu().unwrap().copy(page, 0).unwrap();
    let found = live.with(page.wrapping_add(7 * 8), &0xffff_ec00_0010_1234u64.to_le_bytes());
    expect(&found, "gdt", "GDT of CPU 0, entry 7", page.wrapping_add(7 * 8));
    only(&found, &["gdt"]);

    // What terminals call with each key.
    let discipline = live
        .context
        .object("tty_ldisc_ops", live.symbol("n_tty_ops"))
        .unwrap();
    let receive = discipline.member("receive_buf").unwrap();
    let found = live.pointer_to(receive, evil);
    let finding = expect(
        &found,
        "tty",
        "line discipline 0 tty_ldisc_ops.receive_buf",
        receive,
    );
    assert_eq!(finding.module.as_deref(), Some(&*module));

    // A notifier whose function lies in no code at all.
    let head = live
        .context
        .object("blocking_notifier_head", live.symbol("reboot_notifier_list"))
        .unwrap();
    let first = head.pointer("head").unwrap();
    let found = live.pointer_to(first, live.symbol("init_task"));
    let finding = expect(&found, "notifiers", "reboot_notifier_list notifier_call", first);
    assert_eq!(finding.severity, Severity::Critical);

    clean("after all was undone", &live.context);
}

fn check(spec: &Spec, plant: bool) {
    let live = Live::boot(spec);
    clean("running", &live.context);
    if plant {
        planted(&live);
        golden::copy(&live);
        seen_again(&live);
    }
    golden::files(&live, spec.kernel);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("memory");
    live.guest
        .dump(Format::Elf, &file)
        .unwrap_or_else(|e| panic!("{e:?}"));
    let memory = dump::open(&file, None).unwrap();
    let kernel = Kernel::attach(memory.memory.clone(), Default::default()).unwrap_or_else(|e| panic!("{e}"));
    clean(
        "dumped",
        &Context::new(kernel).with_registers(Ok(memory.registers)),
    );
}

fn spec(kernel: vmsight_lab::Kernel, vcpus: u32, paging: Paging, memory: Memory) -> Spec {
    Spec {
        vcpus,
        paging,
        memory,
        ..Spec::new(kernel)
    }
}

#[test]
fn kernel_5_10() {
    check(
        &spec(vmsight_lab::Kernel::V5_10, 1, Paging::Four, Memory::Memfd),
        true,
    );
}

#[test]
fn kernel_6_1() {
    check(
        &spec(vmsight_lab::Kernel::V6_1, 2, Paging::Four, Memory::File),
        true,
    );
}

#[test]
fn kernel_6_1_cloud() {
    check(
        &spec(vmsight_lab::Kernel::V6_1Cloud, 1, Paging::Four, Memory::Private),
        false,
    );
}

#[test]
fn kernel_6_1_rt() {
    check(
        &spec(vmsight_lab::Kernel::V6_1Rt, 2, Paging::Five, Memory::Memfd),
        false,
    );
}

#[test]
fn kernel_6_12() {
    check(
        &spec(vmsight_lab::Kernel::V6_12, 2, Paging::Five, Memory::Memfd),
        true,
    );
}

#[test]
fn kernel_sid() {
    check(
        &spec(vmsight_lab::Kernel::Sid, 2, Paging::Four, Memory::Memfd),
        true,
    );
}
