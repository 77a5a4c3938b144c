//! Secure In-VM Monitoring, through the program: the gate's cost, every attack, and what goes wrong without a run.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use vmsight_lab::Kernel;
use vmsight_lab::cache::Lock;
use vmsight_lab::cpio::Archive;
use vmsight_sim_image::Program;

fn vmsight() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmsight"));
    command.env_remove("VMSIGHT_LOG");
    command
}

fn sim(args: &[&str]) -> Output {
    vmsight().arg("sim").args(args).output().unwrap()
}

/// What it printed, if it ended as it must.
fn fine(args: &[&str]) -> String {
    let out = sim(args);
    let error = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(0), "{args:?}: {error}");
    String::from_utf8(out.stdout).unwrap()
}

/// How it complained.
fn refused(args: &[&str]) -> String {
    let out = sim(args);
    let error = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(2), "{args:?}: {error}");
    assert!(out.stdout.is_empty() && !error.contains("panicked"), "{error}");
    error
}

fn path(folder: &tempfile::TempDir, name: &str) -> String {
    folder.path().join(name).to_str().unwrap().to_owned()
}

/// Files that a command must not have left behind.
fn files(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    names.map(|name| name.into_string().unwrap()).collect()
}

/// Each finding, and what must be found: that an attack was stopped by the exit that is said to stop it.
const FINDINGS: &[&str] = &[
    "exits through the gate: ok 0 in 1000 calls",
    "exits by VMCALL: ok 1000 in 1000 calls",
    "the monitor reads and writes guest memory: ok 0x123456789abcdef; 0 exits",
    "addresses that lead astray: ok handler called 25 times",
    "write to a protected hook: ok exit 48",
    "write to the stub: ok exit 48",
    "read, write, execute each page of the monitor, also by an alias: ok",
    "read, write, execute each page of the hypervisor: ok",
    "VMFUNC into the gate from elsewhere: ok exit 2",
    "A4: VMFUNC into the unarmed monitor: ok exit 59",
    "VMFUNC with an empty entry of the list: ok exit 59",
    "VMFUNC with index 512: ok exit 59",
    "VMFUNC with the greatest index: ok exit 59",
    "VMFUNC of a function that there is not: ok exit 59",
    "A1: VMFUNC at the end of a page, the monitor's own page next: ok exit 2",
    "A1 into the unarmed monitor: ok exit 59",
    "A1 onto the gate's page tables: ok exit 48",
    "A1 onto the list: ok exit 48",
    "A3: the attacker's page at the monitor's address: ok exit 2",
    "A3 into the unarmed monitor: ok exit 59",
    "A1 with the monitor's whole address space forged: ok exit 2",
    "landing on each byte of the gate, registers zero: ok 1 of 4096",
    "landing on each byte of the gate, registers at the list: ok 1 of 4096",
    "landing on each byte of the gate, registers at guest memory: ok 1 of 4096",
    "landing on each byte of the gate, registers all ones: ok 1 of 4096",
    "A5: page tables of the attacker's, read-write in the monitor's view: ok exit 48: 1; end 14; handler called 1 times",
    "A5 with a list of the attacker's: ok exit 48: 1; end 14; handler called 1 times",
    "A5: the list that is cleared is the monitor's: ok",
    "a hook under other page tables: ok",
    "a hook with a PCID: ok",
    "a hook with bit 63 of CR3: ok",
    "single step into the gate: ok exit 0",
    "breakpoint on the gate: ok exit 0",
    "breakpoint after the arming: ok exit 0",
    "breakpoint on the monitor's entry: ok exit 0",
    "the monitor is unarmed then: ok exit 59",
    "breakpoint on what a handler reads: ok exit 0: 1; end 0; handler called 1 times",
    "registers after a handler that ended: ok",
    "stack pointer in the monitor's stack: ok",
    "stack pointer zero: ok",
    "stack pointer not canonical: ok",
    "stack pointer in the list: ok",
    "flags: ok",
    "IDT at the list: ok",
    "IDT in guest memory as the monitor sees it, before the lockdown: ok",
    "IDT in guest memory as the monitor sees it: ok",
    "IDT at the list, before the lockdown: ok",
    "GDT in guest memory as the monitor sees it, before the lockdown: ok",
    "TR: task state segment in guest memory as the monitor sees it, before the lockdown: ok",
    "TR: task state segment at the monitor's state, before the lockdown: ok",
    "TR: all stacks at the monitor's, an exception in the monitor, before the lockdown: ok exit 0: 1; end 0; handler called 0 times",
    "TR: task state segment in guest memory as the monitor sees it: ok",
    "TR: task state segment at the monitor's state: ok",
    "TR: all stacks at the monitor's, an exception in the monitor: ok exit 0: 1; end 0; handler called 0 times",
    "FS at the monitor's state: ok",
    "FS at the list: ok",
    "GS at the monitor's state: ok",
    "GS at the list: ok",
    "a call from what is no registered hook: ok",
    "GDT in guest memory as the monitor sees it: ok",
    "VMFUNC from code of 32 bits: ok exit 2",
    "VMFUNC from user mode: ok exit 2",
    "VMCALL from user mode: ok exit 18",
    "CR0.PE: ok exit 28",
    "CR0.WP: ok exit 28",
    "CR0.PG: ok exit 28",
    "CR4.PKS: ok exit 28",
    "EFER.NXE: ok exit 32",
    "EFER.LME: ok exit 32",
    "CR4.PAE: ok exit 28",
    "CR4.LA57: ok exit 28",
    "CR4.SMEP: ok exit 28",
    "CR4.SMAP: ok exit 28",
    "CR4.VMXE: ok exit 28",
    "CR4.CET: ok exit 28",
    "LSTAR: ok exit 32",
    "DS_AREA: ok exit 32",
    "DEBUGCTL: branch trace store: ok exit 32",
    "FEATURE_CONTROL: ok exit 32",
    "VMX capabilities: ok exit 31",
    "APIC over the monitor: ok exit 32",
    "calls after the lockdown: ok 4 of 4 refused",
    "calls that change nothing, after the lockdown: ok 12 of 12",
    "a report for user mode, after the lockdown: ok exit 18",
    "hooks while the timer interrupts: ok 20000 of 20000 handled",
    "a hook after all this: ok",
    // Of two processors one does what it can while the other goes through the gate.
    "the other processor starts: ok exit 3: 0; exit 4: 1",
    "calls on both processors at once: ok",
    "the race to re-arm: ok",
    "hooks in a storm of NMIs: ok 2200 of 2200 handled",
    "a handler without an end: ok 1 ended",
    "a processor restarted after the lockdown: ok came again: false",
];

/// One run of the trial, and the two controls: the table, what was saved of it, and what is read of that.
#[test]
fn every_attack_is_stopped_and_the_gate_costs_no_exit() {
    let folder = tempfile::tempdir().unwrap();
    let log = path(&folder, "log");
    let lock = Lock::wait("bochs").unwrap();
    let rows = fine(&["attack", "--controls", "--save", &log, "-o", "json"]);
    drop(lock);
    let rows: Vec<Value> = serde_json::from_str(&rows).unwrap();
    let console = fs::read_to_string(&log).unwrap();
    for finding in FINDINGS {
        let line = console
            .lines()
            .find(|l| l.strip_prefix("trial: ").is_some_and(|l| l.starts_with(finding)))
            .unwrap_or_else(|| panic!("not found: {finding}\n{console}"));
        let (name, facts) = line["trial: ".len()..].trim_end().split_once(": ok ").unwrap();
        let no_attack = name.starts_with("exits ")
            || [
                "the monitor reads and writes guest memory",
                "the other processor starts",
            ]
            .contains(&name);
        let row = rows
            .iter()
            .find(|row| row["attack"] == name && row["facts"] == facts);
        assert_eq!(row.is_none(), no_attack, "{name}: {rows:?}");
    }
    // Without the view of the gate A1 and A3 succeed, and without its load of CR3 A5: the same code that finds them stopped above finds that.
    let of_controls = |row: &&Value| row["build"] != "three views";
    let (controls, attacks): (Vec<_>, Vec<_>) = rows.iter().partition(of_controls);
    // None is missing above.
    for row in &attacks {
        let begin = format!("{}: ok", row["attack"].as_str().unwrap());
        assert!(
            FINDINGS.iter().any(|finding| finding.starts_with(&begin)),
            "{row}"
        );
    }
    assert!(
        attacks
            .iter()
            .all(|row| row["verdict"] == "held" && row["as_it_must"] == true)
    );
    // Each of them says that gates, tables and the monitor's text are what they were.
    for row in &attacks {
        let facts = row["facts"].as_str().unwrap();
        assert!(
            row["hash"] == "same" && facts.ends_with("; hash unchanged"),
            "{row}"
        );
    }
    assert_eq!(controls.len(), 3);
    for (control, attack) in controls.iter().zip(["A1", "A3", "A5"]) {
        assert!(
            control["attack"].as_str().unwrap().starts_with(attack),
            "{control}"
        );
        assert_eq!(
            (&control["verdict"], &control["handled"]),
            (&"SUCCEEDED".into(), &1.into())
        );
    }
    let a4 = rows
        .iter()
        .find(|row| row["attack"] == "A4: VMFUNC into the unarmed monitor")
        .unwrap();
    assert_eq!((&a4["exit"], &a4["reason"]), (&59.into(), &"VMFUNC".into()));

    let again: Vec<Value> = serde_json::from_str(&fine(&["attack", "--from", &log, "-o", "json"])).unwrap();
    assert_eq!(again[..], rows[..attacks.len()]);
    let costs: Vec<Value> = serde_json::from_str(&fine(&["bench", "--from", &log, "-o", "json"])).unwrap();
    let of = |way: usize, key: &str| costs[way][key].as_u64().unwrap();
    assert_eq!(
        (&costs[0]["way"], &costs[1]["way"]),
        (&"gate".into(), &"exit".into())
    );
    let (gate, exit) = (of(0, "instructions"), of(1, "instructions"));
    assert!(gate <= 60 && exit > 2 * gate, "{costs:?}");
    assert_eq!((of(0, "exits"), of(0, "calls")), (0, 1000));
    assert_eq!((of(1, "exits"), of(1, "calls")), (1000, 1000));
    assert!(of(0, "bytes") > 50, "{costs:?}");
    // In an emulator nothing is said about time.
    assert!(
        costs
            .iter()
            .all(|cost| cost["microseconds"].is_null() && cost["published_microseconds"].is_null())
    );

    // An attack that succeeded, and a trial that did not come to its end, are told apart by the exit code.
    let (first, second) = console.split_once(" passed, 0 failed").unwrap();
    let (first, passed) = first.rsplit_once("trial: ").unwrap();
    let passed = passed.parse::<usize>().unwrap() - 1;
    let broken = format!("{first}trial: {passed} passed, 1 failed{second}");
    let broken = broken.replacen("A1 onto the list: ok", "A1 onto the list: FAILED", 1);
    fs::write(&log, broken).unwrap();
    let out = sim(&["attack", "--from", &log]);
    let table = String::from_utf8_lossy(&out.stdout).into_owned();
    assert_eq!(out.status.code(), Some(1), "{table}");
    assert!(
        table
            .lines()
            .any(|l| l.starts_with("A1 onto the list") && l.ends_with("SUCCEEDED")),
        "{table}"
    );
    fs::write(&log, console.rsplit_once("trial: ").unwrap().0).unwrap();
    assert!(refused(&["attack", "--from", &log]).contains("did not come to its end"));
    // The table shows with --nocapture.
    println!("{console}");
}

/// A guest that measured: one round without hooks, and one with a hundred.
fn workload(way: &str, instructions: [u64; 2], left: u64) -> String {
    let [none, hooked] = instructions;
    let account = |mark: u64, handled: u64, left: u64| {
        format!(
            "{{\"state\":\"stats\",\"handled\":{handled},\"exits\":{{\"CPUID\":{mark},\"VMCALL\":{left}}}}}\n"
        )
    };
    let accounts = [
        account(1, 0, 0),
        account(2, 0, 0),
        account(4, 7, 7),
        account(5, 107, 7 + left),
    ]
    .concat();
    format!(
        "workload: syscalls {way}\nwitness: round none files {none} 100 0 0\r\n\
         witness: round hooked files {hooked} 100 0 0\r\nwitness: done\r\n{accounts}"
    )
}

#[test]
fn what_monitors_cost_in_a_workload_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let log = path(&folder, "log");
    let trial = "trial: exits through the gate: ok 0 in 1000 calls\r\ntrial: round trip through the gate: ok 57 instructions\r\n\
        trial: exits by VMCALL: ok 1000 in 1000 calls\r\ntrial: round trip by VMCALL: ok 435 instructions\r\n";
    let put = |left: u64| {
        let (gate, exit) = ([400_000, 410_000], [400_800, 440_000]);
        fs::write(
            &log,
            [
                trial.to_owned(),
                workload("gate", gate, left),
                workload("exit", exit, 100),
            ]
            .concat(),
        )
        .unwrap();
    };
    put(0);
    let rows: Vec<Value> = serde_json::from_str(&fine(&["bench", "--from", &log, "-o", "json"])).unwrap();
    let found: Vec<String> = rows
        .iter()
        .map(|row| {
            let keys = [
                "handler",
                "way",
                "instructions",
                "exits",
                "calls",
                "workload_instructions",
                "slowdown",
            ];
            keys.map(|key| row[key].to_string()).join(" ").replace('"', "")
        })
        .collect();
    assert_eq!(
        found,
        [
            "null gate 57 0 1000 null null",
            "null exit 435 1000 1000 null null",
            "syscalls none null 0 0 400000 1.0",
            "syscalls gate 100 0 100 410000 1.025",
            "syscalls exit 400 100 100 440000 1.1",
        ]
    );
    // A hook through the gate that left the guest is not as it must be.
    put(1);
    let out = sim(&["bench", "--from", &log]);
    let table = String::from_utf8_lossy(&out.stdout);
    assert_eq!(out.status.code(), Some(2), "{table}");
    assert!(table.contains("SLOWDOWN") && table.contains("1.025"), "{table}");
    let warned = String::from_utf8_lossy(&out.stderr);
    assert!(
        warned.contains("syscalls through the gate: not every hook"),
        "{warned}"
    );
    fs::write(
        &log,
        format!(
            "{trial}{}",
            workload("gate", [1, 2], 0).replace("witness: done", "")
        ),
    )
    .unwrap();
    assert!(refused(&["bench", "--from", &log]).contains("did not come to its end: 2 rounds"));
}

/// What is said to a trial on hardware has it measure time there, and nowhere else.
#[test]
fn an_image_that_measures_time_on_hardware_does_not_in_an_emulator() {
    let folder = tempfile::tempdir().unwrap();
    let image = path(&folder, "bench.iso");
    let made: Vec<Value> =
        serde_json::from_str(&fine(&["image", &image, "--bench", "-q", "-o", "json"])).unwrap();
    assert_eq!(made[0]["bytes"], fs::metadata(&image).unwrap().len());
    assert!(made[0]["boots_by"].as_array().unwrap().contains(&"BIOS".into()));
    let _lock = Lock::wait("bochs").unwrap();
    let said = fine(&["run", &image]);
    assert!(
        said.contains("trial: this is an emulator, in which instructions are counted"),
        "{said}"
    );
    assert!(
        said.contains("round trip through the gate: ok ") && said.contains(" instructions"),
        "{said}"
    );
    assert!(!said.contains("microseconds") && !said.contains('\x1b'), "{said}");
    let table = said.rsplit_once("EXIT  REASON").unwrap().1;
    assert!(table.contains("VMCALL"), "{said}");
}

/// A run that has begun, what is still to be read of it, and its Bochs.
fn begun() -> (Child, impl Sized, Pid) {
    let mut child = vmsight()
        .args(["sim", "run"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(
        lines.any(|line| line.unwrap().starts_with("trial: ")),
        "nothing was said"
    );
    let children = format!("/proc/{0}/task/{0}/children", child.id());
    let bochs: i32 = fs::read_to_string(children).unwrap().trim().parse().unwrap();
    (child, lines, Pid::from_raw(bochs).unwrap())
}

fn ends(process: Pid) {
    let deadline = Instant::now() + Duration::from_secs(60);
    let stat = format!("/proc/{}/stat", process.as_raw_nonzero());
    // One that has ended and waits for its parent is a zombie.
    while fs::read_to_string(&stat).is_ok_and(|s| !s.contains(") Z ")) {
        assert!(Instant::now() < deadline, "Bochs is still there");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Local addresses of a process's TCP sockets that listen, in the kernel's hexadecimal.
fn listening(process: u32) -> Vec<String> {
    let descriptors = fs::read_dir(format!("/proc/{process}/fd")).unwrap();
    let sockets: Vec<String> = descriptors
        .filter_map(|entry| {
            fs::read_link(entry.ok()?.path())
                .ok()?
                .into_os_string()
                .into_string()
                .ok()
        })
        .filter_map(|link| Some(link.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect();
    let mut found = Vec::new();
    for table in ["tcp", "tcp6"] {
        let Ok(lines) = fs::read_to_string(format!("/proc/{process}/net/{table}")) else {
            continue;
        };
        for line in lines.lines().skip(1) {
            // Number, local address, remote one, state (0A listens), queues, timer, retransmits, uid, timeout, inode.
            let words: Vec<&str> = line.split_whitespace().collect();
            if words[3] == "0A" && sockets.iter().any(|inode| inode == words[9]) {
                found.push(words[1].to_owned());
            }
        }
    }
    found
}

#[test]
fn a_socket_that_listens_is_seen() {
    let socket = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let port = socket.local_addr().unwrap().port();
    assert!(listening(std::process::id()).contains(&format!("00000000:{port:04X}")));
}

#[test]
fn bochs_ends_with_the_program_however_that_ends_and_listens_nowhere() {
    let _lock = Lock::wait("bochs").unwrap();
    for signal in [Signal::INT, Signal::KILL] {
        let (mut child, _unread, bochs) = begun();
        // 127.0.0.1, as the kernel writes it.
        let local = |address: &String| address.starts_with("0100007F:");
        assert_eq!(listening(bochs.as_raw_nonzero().get() as u32), [""; 0]);
        assert!(
            listening(child.id()).iter().all(local),
            "{:?}",
            listening(child.id())
        );
        kill_process(Pid::from_child(&child), signal).unwrap();
        child.wait().unwrap();
        ends(bochs);
    }
}

#[test]
fn what_is_not_installed_is_said_with_the_packages_that_have_it() {
    let folder = tempfile::tempdir().unwrap();
    let image = path(&folder, "out.iso");
    for (args, program, package) in [
        (&["run"][..], "bochs", "bochs-term"),
        (&["bench"], "bochs", "bochs-term"),
        (&["attack"], "bochs", "bochs-term"),
        (&["image", &image, "--attack"], "grub-mkrescue", "grub-common"),
    ] {
        let out = vmsight()
            .arg("sim")
            .args(args)
            .env("PATH", folder.path())
            .output()
            .unwrap();
        let error = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(2), "{args:?}: {error}");
        assert!(
            error.contains(&format!("{program} is not installed")) && error.contains(package),
            "{error}"
        );
    }
    assert!(files(folder.path()).is_empty());
}

#[test]
fn what_cannot_be_started_is_refused_before_anything_runs() {
    let folder = tempfile::tempdir().unwrap();
    let (image, text) = (path(&folder, "out.iso"), path(&folder, "text"));
    fs::write(&text, "not a kernel").unwrap();
    assert!(refused(&["image", &image, "--kernel", &text]).contains("no bzImage"));
    assert!(refused(&["run", "--kernel", &text]).contains("no bzImage"));
    assert!(refused(&["run", "--kernel", "/nonexistent/vmlinuz"]).contains("/nonexistent/vmlinuz"));
    assert!(refused(&["run", &text]).contains("no image of a disc"));
    assert!(refused(&["image", &image]).contains("--kernel FILE, or --bench, or --attack"));
    assert!(refused(&["image", &text, "--bench"]).contains("--force"));
    assert!(refused(&["attack", "--save", &text]).contains("is there already"));
    assert!(refused(&["bench", "--from", &text]).contains("not a kernel"));
    assert!(refused(&["bench", "--kernel", &text]).contains("no bzImage"));
    assert!(refused(&["bench", "--kernel", &text, "--from", &text]).contains("cannot be used with"));
    assert!(refused(&["attack", "--from", "/nonexistent/log"]).contains("/nonexistent/log"));
    assert_eq!(fs::read_to_string(&text).unwrap(), "not a kernel");
    assert_eq!(files(folder.path()), ["text"]);
}

const INIT: &str = "\
#!/bin/busybox sh
/bin/busybox mkdir /tmp; echo \"guest: mkdir $?\"
/bin/busybox sh -c 'exec /bin/busybox true'
echo \"guest: processors $(/bin/busybox nproc)\"
echo 'guest: until unhooked'
until /bin/busybox hostname free 2>/error; do :; done
echo \"guest: $(/bin/busybox hostname)\"
/bin/busybox poweroff -f
";

/// Runs a guest to its end, and gives these orders on standard input once it has said something on its console.
fn ordered(args: &[&str], once: &str, orders: &str) -> Output {
    let mut child = vmsight()
        .arg("sim")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take();
    let mut output = child.stdout.take().unwrap();
    let told = std::thread::spawn(move || {
        let mut all = Vec::new();
        output.read_to_end(&mut all).unwrap();
        all
    });
    let mut console = String::new();
    for line in BufReader::new(child.stderr.take().unwrap()).lines() {
        let line = line.unwrap();
        if line.contains(once)
            && let Some(mut input) = input.take()
        {
            input.write_all(orders.as_bytes()).unwrap();
        }
        console.push_str(&line);
        console.push('\n');
    }
    Output {
        status: child.wait().unwrap(),
        stdout: told.join().unwrap(),
        stderr: console.into_bytes(),
    }
}

/// A policy is made out of the kernel, the hypervisor hooks it, and what the monitor tells is printed as it comes.
#[test]
fn a_debian_is_watched_as_it_runs() {
    let folder = tempfile::tempdir().unwrap();
    let (initrd, saved) = (path(&folder, "initrd"), path(&folder, "policy"));
    let monitor = path(&folder, "monitor");
    fs::write(&monitor, Program::Monitor.bytes().unwrap()).unwrap();
    let kernel = Kernel::V6_1Cloud
        .fetch()
        .unwrap_or_else(|e| panic!("{e:?}"))
        .vmlinuz();
    let kernel = kernel.to_str().unwrap();
    let mut archive = Archive::new();
    archive.folder("dev");
    archive.file("bin/busybox", 0o755, &fs::read("/bin/busybox").unwrap());
    archive.file("init", 0o755, INIT.as_bytes());
    fs::write(&initrd, archive.finish()).unwrap();

    let guest = ["run", "--kernel", kernel, "--initrd", &initrd];
    let with = |rest: &[&'static str]| refused(&[&guest[..], rest].concat());
    assert!(with(&["--deny", "no_such_call"]).contains("no system call no_such_call"));
    assert!(with(&["--deny", "mkdir=EACCES"]).contains("no error number"));
    assert!(with(&["--tell", "openat", "--no-hooks"]).contains("rules are nothing without hooks"));
    assert!(with(&["--policy", "/bin/busybox"]).contains("no policy"));
    assert!(with(&["--monitor", "/bin/busybox"]).contains("does not begin as one"));
    assert!(with(&["--control", "--no-hooks"]).contains("--control is of use for a guest with hooks"));
    assert!(with(&["--processors", "3"]).contains("1..=2"));

    let _lock = Lock::wait("bochs").unwrap();
    let rules = [
        "--deny",
        "mkdir=13",
        "--deny",
        "sethostname=1",
        "--tell",
        "openat",
    ];
    let options = [
        ["--save-policy", &saved],
        ["--monitor", &monitor],
        ["--command-line", "console=ttyS0 quiet"],
    ];
    let more = ["--processors", "2", "--control", "-o", "jsonl"];
    // The guest may not set its name until the hooks are out.
    let out = ordered(
        &[&guest[..], &rules, options.as_flattened(), &more].concat(),
        "guest: until unhooked",
        "stats\nout with them\nunhook\n",
    );
    let console = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(0), "{console}");
    for said in ["guest: mkdir 1", "guest: processors 2", "guest: free"] {
        assert!(console.contains(said), "not found: {said}\n{console}");
    }
    assert!(
        console.contains("out with them: no order; there are stats, hook, unhook"),
        "{console}"
    );
    let lines = String::from_utf8(out.stdout).unwrap();
    let events: Vec<Value> = lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let all = |key: &'static str, value: &'static str| events.iter().filter(move |e| e[key] == value);
    // This kernel is built without the calls of x32.
    assert!(all("state", "installed").any(|e| e["hooks"] == 7), "{lines}");
    assert!(
        all("event", "exec").any(|e| e["path"] == "/bin/busybox"),
        "{lines}"
    );
    assert!(
        all("event", "process").any(|e| e["parent"] == 1 && e["name"] == "init"),
        "{lines}"
    );
    // mkdir and openat.
    assert!(
        all("event", "call").any(|e| e["number"] == 83 && e["errno"] == 13),
        "{lines}"
    );
    assert!(
        all("event", "call").any(|e| e["number"] == 257 && e["errno"] == 0),
        "{lines}"
    );
    assert_eq!(all("state", "stats").count(), 1, "{lines}");
    assert_eq!(all("state", "unhooked").count(), 1, "{lines}");
    let off = all("state", "off").next().unwrap();
    assert_eq!(
        (&off["lost"], &off["tampered"]),
        (&0.into(), &0.into()),
        "{lines}"
    );
    assert!(
        off["calls"]["83"] == 1 && off["handled"].as_u64().unwrap() > 50,
        "{lines}"
    );
    let exits: Vec<_> = all("event", "exits").collect();
    assert!(
        exits
            .iter()
            .any(|e| e["reason"] == "CPUID" && e["count"].as_u64().unwrap() > 0),
        "{lines}"
    );
    // What was saved is a policy for this kernel.
    let image = path(&folder, "out.iso");
    fine(&["image", &image, "--kernel", kernel, "--policy", &saved, "-q"]);
}
