//! A guest in which honest people use what rootkits use is as clean as one in which nobody does.
//!
//! Of what a module of ours is (out of the tree, not signed, a live patch) the kernel's own marks are told, which are only worth
//! knowing.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::sync::Arc;

use vmsight_analysis::baseline::{Source, Trusted};
use vmsight_analysis::{Check, Context, Finding, checks, run};
use vmsight_lab::orders::{Ended, Prepared};
use vmsight_lab::{Format, Guest, Kernel, Memory, Spec, Work, modules};
use vmsight_target::{Target, TargetSpec};

const TRACE: &str = "/sys/kernel/tracing";
/// What each needs before it; which of these there are depends on the kernel.
const MODULES: &[&str] = &[
    "rng_core",
    "ccp",
    "irqbypass",
    "kvm",
    "kvm_amd",
    "libcrc32c",
    "nfnetlink",
    "nf_tables",
];

/// Of all checks, and of code held against what the distribution ships and against the files of our own modules.
fn findings(target: &Target, version: Kernel) -> Vec<Finding> {
    let kernel = vmsight_linux::Kernel::attach(target.memory.clone(), Default::default()).unwrap();
    let registers = target.registers(None).map_err(|e| e.to_string());
    let context = Context::new(kernel).with_registers(registers);
    let fetched = version.fetch().unwrap();
    let mut given = vec![fetched.vmlinuz(), fetched.modules_folder()];
    let own = modules::build(&fetched).unwrap();
    given.extend(
        own.into_iter()
            .filter(|path| path.ends_with("vmsight_livepatch.ko")),
    );
    let sources = given.iter().map(|path| Source::open(path).unwrap()).collect();
    let trusted = Trusted::read(&context, sources).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(trusted.module_files(), context.modules().len());
    let context = context.with_trusted(Arc::new(trusted));
    let all: Vec<&Check> = checks::ALL.iter().copied().chain([&checks::GOLDEN]).collect();
    let outcomes = run(&context, &all, &|_| {});
    for outcome in &outcomes {
        assert!(!outcome.failed, "{}: {:?}", outcome.check, outcome.notes);
    }
    outcomes.into_iter().flat_map(|o| o.findings).collect()
}

struct Lab {
    guest: Guest,
    version: Kernel,
}

impl Lab {
    fn boot(version: Kernel) -> Lab {
        let spec = Spec {
            memory: Memory::Memfd,
            ..Spec::new(version).orders().modules()
        };
        let guest = Guest::boot(&spec).unwrap_or_else(|e| panic!("{e:?}"));
        Lab { guest, version }
    }

    fn run(&self, argv: &[&str]) {
        let work = Work::Exec {
            path: "/bin/busybox".into(),
            argv: argv.iter().map(|arg| (*arg).into()).collect(),
            envp: Vec::new(),
        };
        let account = self.guest.order(work).unwrap();
        assert_eq!(account.ended, Some(Ended::Exited(0)), "{argv:?}: {account:?}");
    }

    fn write(&self, path: &str, text: &str) {
        let work = Work::WriteFile {
            path: format!("{TRACE}/{path}").as_str().into(),
            bytes: text.into(),
        };
        let account = self.guest.order(work).unwrap();
        assert_eq!(account.returned, Some(text.len() as i64), "{path}: {account:?}");
    }

    fn read(&self, path: &str) -> String {
        let work = Work::ReadFile {
            path: path.into(),
            limit: 4096,
        };
        let account = self.guest.order(work).unwrap();
        assert!(account.returned.is_some_and(|n| n > 0), "{path}: {account:?}");
        account.bytes.lossy()
    }

    fn load(&self, name: &str) -> bool {
        let work = Work::Load {
            name: name.into(),
            parameters: String::new(),
            from_memory: false,
        };
        self.guest
            .order(work)
            .is_ok_and(|account| account.returned == Some(0))
    }

    fn has_module(&self, name: &str) -> bool {
        self.read("/proc/modules")
            .lines()
            .any(|line| line.starts_with(&format!("{name} ")))
    }

    /// What is found while it runs and in its dump, but for what is only worth knowing.
    #[track_caller]
    fn tells(&self, suspicious: &[(&str, &str)]) {
        let live = TargetSpec::Qmp(self.guest.qmp_path().unwrap());
        let file = self.guest.folder().join("honest.elf");
        self.guest.dump(Format::Elf, &file).unwrap();
        let dump = TargetSpec::File {
            path: file.clone(),
            format: None,
        };
        for spec in [live, dump] {
            let target = vmsight_target::attach(&spec, &Default::default()).unwrap_or_else(|e| panic!("{e}"));
            let found = findings(&target, self.version);
            let found: Vec<&Finding> = found.iter().filter(|f| f.is_suspicious()).collect();
            let fits = |f: &&&Finding| {
                suspicious
                    .iter()
                    .any(|(check, subject)| f.check == *check && f.subject.contains(subject))
            };
            let others: Vec<_> = found.iter().filter(|f| !fits(f)).collect();
            assert!(others.is_empty(), "{spec:?}: {others:#?}");
            for (check, subject) in suspicious {
                let one = found
                    .iter()
                    .find(|f| f.check == *check && f.subject.contains(subject));
                assert!(
                    one.is_some(),
                    "{spec:?}: {check} says nothing of {subject}: {found:#?}"
                );
            }
        }
        std::fs::remove_file(&file).unwrap();
    }
}

/// A place in busybox where an instruction begins: its first.
fn entry() -> u64 {
    let paths = ["/bin/busybox", "/usr/bin/busybox"];
    let file = paths.iter().find_map(|path| std::fs::read(path).ok()).unwrap();
    let number = |at: usize, size: usize| {
        let mut bytes = [0; 8];
        bytes[..size].copy_from_slice(&file[at..at + size]);
        u64::from_le_bytes(bytes)
    };
    let (entry, table, count) = (number(24, 8), number(32, 8) as usize, number(56, 2) as usize);
    let inside = |at: &usize| {
        let (start, size) = (number(at + 16, 8), number(at + 32, 8));
        number(*at, 4) == 1 && (start..start + size).contains(&entry)
    };
    let segment = (0..count).map(|n| table + n * 56).find(inside).unwrap();
    entry - number(segment + 16, 8) + number(segment + 8, 8)
}

fn check(version: Kernel) {
    let lab = Lab::boot(version);
    // Function tracing of everything, probes on the kernel, a module and a program. One is on what stands behind a function's place for
    // tracing.
    lab.run(&["mount", "-t", "tracefs", "none", TRACE]);
    let behind = if version == Kernel::V6_1 { 5 } else { 9 };
    let probes = format!(
        "p:vm do_sys_openat2\nr:vmr do_sys_openat2\np:vmm ext4:ext4_readdir\np:vmb ext4:ext4_sync_file+{behind}\n"
    );
    lab.write("kprobe_events", &probes);
    lab.write("uprobe_events", &format!("p:vmu /bin/busybox:{:#x}\n", entry()));
    lab.write("current_tracer", "function");
    for event in [
        "kprobes/vm",
        "kprobes/vmr",
        "kprobes/vmm",
        "kprobes/vmb",
        "uprobes/vmu",
        "sched/sched_switch",
    ] {
        lab.write(&format!("events/{event}/enable"), "1");
    }
    // KVM, nftables, a live patch.
    for module in MODULES {
        lab.load(module);
    }
    assert!(
        lab.has_module("kvm_amd") && lab.has_module("nf_tables"),
        "{}",
        lab.guest.console()
    );
    assert!(lab.load("vmsight_livepatch"), "{}", lab.guest.console());
    let filtered = lab.guest.order(Work::FilterPackets).unwrap();
    assert_eq!(filtered.values, [0, 0], "{filtered:?}");
    // BPF, perf, io_uring.
    let event = lab.read(&format!("{TRACE}/events/kprobes/vm/id"));
    let event = event.trim().parse().unwrap();
    let watching = lab.guest.prepare(Work::Observe { event, writes: false }).unwrap();
    let ring = lab.guest.prepare(Work::Ring).unwrap();
    assert_eq!(lab.read("/proc/cmdline"), "patched\n");
    lab.run(&["true"]);
    let held = files(&lab);
    lab.tells(&[]);
    // The same with what no honest program needs.
    let writing = lab.guest.prepare(Work::Observe { event, writes: true }).unwrap();
    lab.tells(&[("bpf", "(vmsight)")]);
    drop((watching, ring, writing, held));
}

/// Files of which a name is gone and that somebody has open: removed, removed by one of two names, and replaced by another. A directory
/// on which another filesystem is mounted.
fn files(lab: &Lab) -> Vec<Prepared<'_>> {
    lab.run(&["mkdir", "-p", "/tmp/honest/under"]);
    let path = |name: &str| format!("/tmp/honest/{name}");
    let mut held = Vec::new();
    for name in ["removed", "linked", "replaced", "new", "under/covered"] {
        lab.run(&[
            "dd",
            "if=/dev/zero",
            &format!("of={}", path(name)),
            "bs=4096",
            "count=2",
        ]);
        let work = Work::Hold {
            path: path(name).as_str().into(),
        };
        held.push(lab.guest.prepare(work).unwrap());
    }
    lab.run(&["ln", &path("linked"), &path("other")]);
    lab.run(&["rm", &path("removed"), &path("linked")]);
    lab.run(&["mv", &path("new"), &path("replaced")]);
    lab.run(&["mount", "-t", "tmpfs", "none", &path("under")]);
    held
}

#[test]
fn an_honest_6_1_is_clean() {
    check(Kernel::V6_1);
}

#[test]
fn an_honest_6_12_is_clean() {
    check(Kernel::V6_12);
}
