//! What our lab's rootkit does to real guests is found, while they run and in their dumps, and what it has undone is not.
//!
//! A guest is booted once for all of it.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod called;
mod files;
mod golden;
mod posed;
mod written;

use std::time::{Duration, Instant};

use vmsight_analysis::{Context, Finding, checks, run};
use vmsight_lab::orders::{Poke, Prepared, Register, Sent, Tamper, Tampered};
use vmsight_lab::{Format, Guest, Kernel, Memory, Spec, Work};
use vmsight_linux::ProcessFields;
use vmsight_target::{Target, TargetSpec};

/// Where the tests' own listener is.
const LISTENER: &str = "127.0.0.1:7070";
const MODULE: &str = "vmsight_tamper";
const CR4_SMEP: u64 = 1 << 20;
/// An entry of the table of system calls that no program uses: of a call that was removed.
const UNUSED_CALL: u64 = 156;
const USER: u32 = 1000;

struct Lab {
    guest: Guest,
}

/// What a tampering is to bring about: of which check, with words in the subject and in the evidence.
struct Expected {
    check: &'static str,
    subject: String,
    evidence: Vec<String>,
}

fn expect(
    check: &'static str,
    subject: impl Into<String>,
    evidence: impl IntoIterator<Item = String>,
) -> Expected {
    Expected {
        check,
        subject: subject.into(),
        evidence: evidence.into_iter().collect(),
    }
}

fn hex(value: u64) -> String {
    format!("{value:#x}")
}

impl Lab {
    fn boot(version: Kernel) -> Lab {
        let spec = Spec {
            memory: Memory::Memfd,
            ..Spec::new(version).idle().orders().modules()
        };
        let guest = Guest::boot(&spec).unwrap_or_else(|e| panic!("{e:?}"));
        let lab = Lab { guest };
        for name in ["vmsight_poke", MODULE] {
            let load = Work::Load {
                name: name.into(),
                parameters: String::new(),
                from_memory: false,
            };
            let account = lab.guest.order(load).unwrap();
            assert_eq!(account.returned, Some(0), "{}", lab.guest.console());
        }
        lab
    }

    fn live(&self) -> Vec<Finding> {
        let target = TargetSpec::Qmp(self.guest.qmp_path().unwrap());
        findings(&vmsight_target::attach(&target, &Default::default()).unwrap_or_else(|e| panic!("{e}")))
    }

    fn dumped(&self) -> Vec<Finding> {
        let file = self.guest.folder().join("tampered.elf");
        self.guest.dump(Format::Elf, &file).unwrap();
        let target = TargetSpec::File {
            path: file.clone(),
            format: None,
        };
        let found =
            findings(&vmsight_target::attach(&target, &Default::default()).unwrap_or_else(|e| panic!("{e}")));
        std::fs::remove_file(&file).unwrap();
        found
    }

    /// Held against what is expected, while the guest runs and in a dump.
    fn tells(&self, what: &str, expected: &[Expected]) {
        for (found, how) in [(self.live(), "live"), (self.dumped(), "dump")] {
            for one in expected {
                let fits =
                    |finding: &&Finding| finding.check == one.check && finding.subject.contains(&one.subject);
                let shows = |finding: &Finding| {
                    let mut facts: Vec<String> = finding.evidence.iter().map(ToString::to_string).collect();
                    facts.extend(finding.address.map(|at| at.to_string()));
                    facts.extend(finding.module.clone());
                    one.evidence
                        .iter()
                        .all(|fact| facts.iter().any(|f| f.contains(fact)))
                };
                let candidates: Vec<&Finding> = found.iter().filter(fits).collect();
                assert!(
                    candidates.iter().any(|finding| shows(finding)),
                    "{what} ({how}): no {} of '{}' with {:?} in {candidates:#?}",
                    one.check,
                    one.subject,
                    one.evidence
                );
            }
            let others: Vec<&Finding> = found
                .iter()
                .filter(|f| f.is_suspicious())
                .filter(|f| {
                    !expected
                        .iter()
                        .any(|e| f.check == e.check && f.subject.contains(&e.subject))
                })
                .filter(|f| OWN.contains(&f.check))
                .collect();
            assert!(others.is_empty(), "{what} ({how}): {others:#?}");
        }
    }

    fn is_clean(&self, when: &str) {
        let found: Vec<Finding> = self.live().into_iter().filter(Finding::is_suspicious).collect();
        assert!(found.is_empty(), "{when}: {found:#?}");
    }

    fn tamper(&self, tamper: &Tamper, undo: bool) -> Tampered {
        let work = Work::Tamper {
            tamper: tamper.clone(),
            undo,
        };
        let account = self
            .guest
            .order(work)
            .unwrap_or_else(|e| panic!("{tamper:?}: {e:#}"));
        assert_eq!(account.returned, Some(0), "{tamper:?}, undo {undo}: {account:?}");
        account.tampered.unwrap()
    }

    /// Does several things.
    fn do_all(&self, tampers: &[Tamper]) -> Vec<Tampered> {
        tampers.iter().map(|tamper| self.tamper(tamper, false)).collect()
    }

    /// Undoes them, the last one first.
    fn undo_all(&self, tampers: &[Tamper]) {
        for tamper in tampers.iter().rev() {
            self.tamper(tamper, true);
        }
    }

    fn stand(&self, uid: u32) -> Prepared<'_> {
        self.guest.prepare(Work::Stand { uid }).unwrap()
    }

    fn write(&self, path: &str, text: &str) {
        let work = Work::WriteFile {
            path: path.into(),
            bytes: text.into(),
        };
        let account = self.guest.order(work).unwrap();
        assert_eq!(account.returned, Some(text.len() as i64), "{path}");
    }

    fn run(&self, argv: &[&str]) {
        let work = Work::Exec {
            path: "/bin/busybox".into(),
            argv: argv.iter().map(|arg| (*arg).into()).collect(),
            envp: Vec::new(),
        };
        let account = self.guest.order(work).unwrap();
        assert_eq!(
            account.ended,
            Some(vmsight_lab::orders::Ended::Exited(0)),
            "{argv:?}: {account:?}"
        );
    }

    fn kill(&self, pid: u32) {
        let work = Work::Kill {
            pid: Some(pid),
            signal: 9,
        };
        assert_eq!(self.guest.order(work).unwrap().returned, Some(0));
    }

    /// Switches SMEP of the first vCPU off or on, past the kernel.
    fn set_smep(&self, on: bool) {
        let poke = Poke::Set {
            register: Register::Cr4,
            mask: CR4_SMEP,
            value: if on { CR4_SMEP } else { 0 },
            count: 1,
            restore: false,
        };
        let account = self.guest.order(Work::Poke { poke }.on(0)).unwrap();
        assert_eq!(account.returned, Some(0));
    }

    /// Waits until a process has become another program.
    fn wait_for_program(&self, pid: u32, program: &str) {
        let target = TargetSpec::Qmp(self.guest.qmp_path().unwrap());
        let target = vmsight_target::attach(&target, &Default::default()).unwrap_or_else(|e| panic!("{e}"));
        let kernel = vmsight_linux::Kernel::attach(target.memory, Default::default()).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let row = kernel.process(pid as i32, ProcessFields::EXE);
            if row.is_ok_and(|row| {
                row.details()
                    .exe
                    .as_ref()
                    .is_some_and(|exe| exe.contains(program))
            }) {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "process {pid} does not become {program}"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// The checks that are to find nothing else.
const OWN: [&str; 24] = [
    "hidden-modules",
    "hidden-processes",
    "hidden-threads",
    "hidden-sockets",
    "hidden-files",
    "credentials",
    "kernel-pages",
    "process-memory",
    "kernel-helpers",
    "security-modules",
    "kernel-settings",
    "processor",
    "taint",
    "notifiers",
    "timers",
    "hrtimers",
    "workqueues",
    "kernel-threads",
    "stacks",
    "uprobes",
    "perf",
    "seccomp",
    "process-code",
    "process-names",
];

fn findings(target: &Target) -> Vec<Finding> {
    let kernel = vmsight_linux::Kernel::attach(target.memory.clone(), Default::default()).unwrap();
    let registers = target.registers(None).map_err(|e| e.to_string());
    assert!(registers.is_ok(), "{registers:?}");
    let context = Context::new(kernel).with_registers(registers);
    let outcomes = run(&context, checks::ALL, &|_| {});
    for outcome in &outcomes {
        assert!(!outcome.failed, "{}: {:?}", outcome.check, outcome.notes);
        // An idle guest has no sockets of the internet.
        let nothing = outcome.check == "hidden-sockets";
        assert!(
            outcome.looked_at > 0 || nothing,
            "{}: {:?}",
            outcome.check,
            outcome.notes
        );
    }
    outcomes.into_iter().flat_map(|o| o.findings).collect()
}

/// Each round does what does not stand in each other's way, for a dump takes seconds.
fn check(version: Kernel) {
    let lab = Lab::boot(version);
    lab.is_clean("at first");
    golden::check(&lab, version);
    written::check(&lab);
    first_round(&lab);
    second_round(&lab);
    third_round(&lab);
    called::check(&lab);
    posed::check(&lab);
    let log = Work::Exec {
        path: "/bin/busybox".into(),
        argv: vec!["dmesg".into()],
        envp: Vec::new(),
    };
    let log = lab.guest.order(log).unwrap().output.lossy();
    for word in ["BUG", "Oops", "WARNING", "Call Trace"] {
        assert!(!log.contains(word), "{log}");
    }
}

fn module(done: &Tampered, facts: &[&str]) -> Expected {
    let facts = facts.iter().map(|fact| (*fact).to_owned());
    let facts = facts.chain([hex(done.module)]);
    expect("hidden-modules", format!("module {MODULE}"), facts)
}

fn process(pid: u32, facts: &[&str]) -> Expected {
    let facts = facts.iter().map(|fact| (*fact).to_owned());
    expect("hidden-processes", format!("process {pid} "), facts)
}

/// A module marked as not loaded, processes out of one list each; a socket; a cred that is written to; pages.
fn first_round(lab: &Lab) {
    let (unlisted, unnumbered, raised) = (lab.stand(0), lab.stand(0), lab.stand(USER));
    let listener = lab
        .guest
        .prepare(Work::Connect {
            address: LISTENER.into(),
            listen: true,
        })
        .unwrap();
    let (holder, raised) = (listener.pid(), raised.pid());
    let tampers = [
        Tamper::ModuleMark,
        Tamper::TaskList { pid: unlisted.pid() },
        Tamper::TaskPid {
            pid: unnumbered.pid(),
        },
        Tamper::Socket { pid: holder },
        Tamper::CredWrite { pid: raised },
        Tamper::PageWx,
        Tamper::TextAlias {
            symbol: "commit_creds".into(),
        },
        Tamper::SyscallTable { number: UNUSED_CALL },
    ];
    let done = lab.do_all(&tampers);
    let [mark, task, _, socket, cred, page, alias, call] = done.as_slice() else {
        panic!("{done:?}")
    };
    let mut first = process(
        unlisted.pid(),
        &[
            "in the list of tasks: no",
            "in the table of pids: yes",
            "a child of its parent: yes",
        ],
    );
    first.evidence.push(hex(task.object));
    lab.tells(
        "the first round",
        &[
            expect(
                "hidden-modules",
                format!("state of module {MODULE}"),
                [hex(mark.module), "state: Unformed".to_owned()],
            ),
            first,
            process(
                unnumbered.pid(),
                &["in the list of tasks: yes", "in the table of pids: no"],
            ),
            expect(
                "hidden-sockets",
                format!("tcp {LISTENER} LISTEN"),
                [
                    hex(socket.object),
                    format!("{holder} ("),
                    "in the table of ports in use: yes".to_owned(),
                ],
            ),
            expect(
                "credentials",
                format!("process {raised} "),
                [
                    hex(cred.object),
                    "uid, euid, suid, fsuid: 0, 0, 0, 0".to_owned(),
                    format!("accounted to user: {USER}"),
                ],
            ),
            expect(
                "kernel-pages",
                format!("writable code at {}", hex(page.object)),
                ["31 c0 c3".to_owned()],
            ),
            expect(
                "kernel-pages",
                format!("kernel text writable at {}", hex(alias.hook)),
                [hex(alias.object)],
            ),
            expect(
                "syscalls",
                format!("sys_call_table[{UNUSED_CALL}]"),
                [hex(call.object), hex(call.hook)],
            ),
        ],
    );
    lab.undo_all(&tampers);
    lab.is_clean("after the first round");
}

/// A module out of list and sysfs, with a thread that sleeps in it, a process out of list and table, the kernel's own cred, odd programs.
fn second_round(lab: &Lab) {
    let (gone, given) = (lab.stand(0), lab.stand(USER));
    let (pid, given) = (gone.pid(), given.pid());
    let tampers = [
        Tamper::ModuleList,
        Tamper::ModuleSysfs,
        Tamper::TaskList { pid },
        Tamper::TaskPid { pid },
        Tamper::CredShare { pid: given, other: 0 },
        Tamper::KernelThread,
    ];
    let done = lab.do_all(&tampers);
    let [list, _, _, _, cred, thread] = done.as_slice() else {
        panic!("{done:?}")
    };
    let standing = lab.stand(0);
    let victim = standing.pid();
    let injected = lab.guest.order(Work::Inject { pid: victim }).unwrap();
    let injected = injected.address.unwrap();
    let programs = Programs::start(lab);
    let mut expected = programs.expected();
    expected.extend([
        module(
            list,
            &[
                "in the list of modules: no",
                "in /sys/module: no",
                "in the tree by address: yes",
            ],
        ),
        process(
            pid,
            &[
                "in the list of tasks: no",
                "in the table of pids: no",
                "in a control group: yes",
                "in the memory of tasks: yes",
            ],
        ),
        expect(
            "credentials",
            format!("cred of process {given} "),
            [hex(cred.object)],
        ),
        expect("kernel-threads", "(kworker/0:9) threadfn", [hex(thread.hook)]),
        expect(
            "stacks",
            "(kworker/0:9)",
            [
                "where modules lie, but in none that the kernel lists".to_owned(),
                "schedule_timeout".to_owned(),
                "kthread+0x".to_owned(),
            ],
        ),
        expect(
            "process-memory",
            format!("process {victim} (orders): {}", hex(injected)),
            [
                "f3 0f 1e fa b8 22 00 00 00 0f 05".to_owned(),
                "rwxp".to_owned(),
                // Where the SYSCALL instruction of the injected code is.
                format!("thread {victim} at {}", hex(injected + 9)),
            ],
        ),
    ]);
    lab.tells("the second round", &expected);
    lab.kill(victim);
    programs.end(lab);
    lab.undo_all(&tampers);
    lab.is_clean("after the second round");
}

/// A module out of everything, the cred of process 1, settings and a register.
fn third_round(lab: &Lab) {
    const MODPROBE: &str = "/proc/sys/kernel/modprobe";
    const CORE: &str = "/proc/sys/kernel/core_pattern";
    let given = lab.stand(USER);
    let given = given.pid();
    let symbol = |name: &str| name.to_owned();
    let tampers = [
        Tamper::ModuleList,
        Tamper::ModuleSysfs,
        Tamper::ModuleTree,
        Tamper::CredShare { pid: given, other: 1 },
        Tamper::Inline {
            symbol: symbol("__x64_sys_sysinfo"),
        },
        Tamper::Ftrace {
            symbol: symbol("__x64_sys_getdents64"),
        },
        Tamper::Kprobe {
            symbol: symbol("__x64_sys_unlinkat"),
        },
        Tamper::TcpSeq { port: 7070 },
        Tamper::Idt { vector: 9 },
        Tamper::Netfilter,
    ];
    let done = lab.do_all(&tampers);
    let [list, _, _, cred, hooks @ ..] = done.as_slice() else {
        panic!("{done:?}")
    };
    let [inline, ftrace, kprobe, sequence, gate, packets] = hooks else {
        panic!("{done:?}")
    };
    assert!(
        hooks
            .iter()
            .all(|hook| hook.hook & !0xf_ffff == list.text & !0xf_ffff),
        "{done:x?}"
    );
    lab.write(MODPROBE, "/tmp/x");
    lab.write(CORE, "|/dev/shm/y %p");
    lab.set_smep(false);
    lab.tells(
        "the third round",
        &[
            module(
                list,
                &["in the tree by address: no", "in the memory of modules: yes"],
            ),
            expect(
                "credentials",
                format!("cred of process {given} "),
                [
                    hex(cred.object),
                    "process 1 (".to_owned(),
                    format!("process {given} ("),
                ],
            ),
            expect("kernel-helpers", "modprobe_path", ["/tmp/x".to_owned()]),
            expect("kernel-helpers", "core_pattern", ["|/dev/shm/y %p".to_owned()]),
            expect("processor", "CR4.SMEP of vCPU 0", ["CR4".to_owned()]),
            expect(
                "text",
                "__x64_sys_sysinfo",
                [hex(inline.object), hex(inline.hook)],
            ),
            expect("ftrace", "ftrace_ops", [hex(ftrace.hook)]),
            expect("kprobes", "__x64_sys_unlinkat", [hex(kprobe.hook)]),
            expect("seq-ops", "show", [hex(sequence.object), hex(sequence.hook)]),
            expect("idt", "idt_table[9]", [hex(gate.hook)]),
            expect("netfilter", "", [hex(packets.hook)]),
        ],
    );
    lab.set_smep(true);
    lab.write(MODPROBE, "/sbin/modprobe");
    lab.write(CORE, "core");
    lab.undo_all(&tampers);
    lab.is_clean("after the third round");
}

/// Processes with a library loaded before all others, with a program that was deleted, and with one that never was in a file.
struct Programs {
    preloaded: u32,
    deleted: u32,
    in_memory: u32,
    sent: Vec<Sent>,
}

impl Programs {
    fn start(lab: &Lab) -> Programs {
        let argv = || vec!["sleep".into(), "1000".into()];
        let exec = |path: &str, envp| Work::Exec {
            path: path.into(),
            argv: argv(),
            envp,
        };
        lab.run(&["cp", "/bin/busybox", "/tmp/gone"]);
        let works = [
            exec("/bin/busybox", vec!["LD_PRELOAD=/tmp/.x/libhide.so".into()]),
            exec("/tmp/gone", Vec::new()),
            Work::ExecMemory {
                path: "/bin/busybox".into(),
                argv: argv(),
            },
        ];
        let prepared = works.map(|work| lab.guest.prepare(work).unwrap());
        let [preloaded, deleted, in_memory] = [0, 1, 2].map(|n: usize| prepared[n].pid());
        let sent = prepared.into_iter().map(|one| one.send_go().unwrap()).collect();
        lab.wait_for_program(preloaded, "busybox");
        lab.wait_for_program(deleted, "/tmp/gone");
        lab.wait_for_program(in_memory, "/memfd:vmsight");
        lab.run(&["rm", "/tmp/gone"]);
        Programs {
            preloaded,
            deleted,
            in_memory,
            sent,
        }
    }

    fn expected(&self) -> Vec<Expected> {
        let program = |pid: u32| format!("program of process {pid} ");
        vec![
            expect(
                "process-memory",
                format!("LD_PRELOAD of process {} ", self.preloaded),
                ["/tmp/.x/libhide.so".to_owned()],
            ),
            expect("process-memory", program(self.deleted), ["/tmp/gone".to_owned()]),
            expect(
                "process-memory",
                program(self.in_memory),
                ["/memfd:vmsight".to_owned()],
            ),
        ]
    }

    fn end(self, lab: &Lab) {
        for pid in [self.preloaded, self.deleted, self.in_memory] {
            lab.kill(pid);
        }
        for one in self.sent {
            one.wait_all(Duration::from_secs(60)).unwrap();
        }
    }
}

#[test]
fn kernel_6_1_is_tampered_with() {
    check(Kernel::V6_1);
}

#[test]
fn kernel_6_12_is_tampered_with() {
    check(Kernel::V6_12);
}
