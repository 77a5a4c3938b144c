//! Every order does what it says, on a real guest.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::process::Command;
use std::time::Duration;

use vmsight_arch::{Gpa, Gva};
use vmsight_lab::orders::{Ended, Exception, UNMAPPED, WITNESS, checksum};
use vmsight_lab::truth::Text;
use vmsight_lab::{Account, Guest, Kernel, Memory, Order, Spec, Work, compare};
use vmsight_target::TargetSpec;

fn order(guest: &Guest, order: impl Into<Order>) -> Account {
    guest.order(order).unwrap_or_else(|e| panic!("{e:#}"))
}

fn errno(number: i32) -> Option<i64> {
    Some(-i64::from(number))
}

/// What the guest's kernel says in a file.
fn file(guest: &Guest, path: &str) -> String {
    let account = order(
        guest,
        Work::ReadFile {
            path: path.into(),
            limit: 1 << 16,
        },
    );
    assert_eq!(account.failed, 0, "{path}: {account:?}");
    account.bytes.lossy()
}

#[test]
fn a_guest_does_what_it_is_told() {
    let spec = Spec {
        memory: Memory::Memfd,
        vcpus: 2,
        ..Spec::new(Kernel::V6_12).idle().orders()
    };
    let guest = Guest::boot(&spec).unwrap_or_else(|e| panic!("{e:?}"));
    assert!(
        guest.truth().named("orders").is_some(),
        "the server has its place in the truth"
    );
    system_calls(&guest);
    files(&guest);
    processes(&guest);
    exceptions(&guest);
    work(&guest);
    modules(&guest);
    memory(&guest);
    several(&guest);
    refusals(&guest);
}

fn system_calls(guest: &Guest) {
    let ping = order(guest, Work::Ping);
    let later = order(guest, Work::Ping);
    assert!(ping.nanoseconds < later.nanoseconds);

    let account = order(guest, Work::GetPid { count: 10_000 }.on(1));
    assert_eq!((account.made, account.failed), (10_000, 0));
    assert_eq!(account.returned, Some(account.pid.into()));
    assert_eq!(account.ended, Some(Ended::Exited(0)));

    let account = order(
        guest,
        Work::Connect {
            address: "127.0.0.1:81".into(),
            listen: false,
        },
    );
    assert_eq!(account.returned, errno(111), "refused");
    for address in ["127.0.0.1:81", "[::1]:81"] {
        let account = order(
            guest,
            Work::Connect {
                address: address.into(),
                listen: true,
            },
        );
        assert_eq!(account.returned, Some(0), "{address}");
    }

    let account = order(guest, Work::SetUid { uid: 1234 });
    assert_eq!((account.returned, account.values), (Some(0), vec![1234; 3]));
}

fn files(guest: &Guest) {
    let open = |path: &str, flags, count| {
        let path = path.into();
        order(guest, Work::Open { path, flags, count })
    };
    let account = open("/proc/version", 0, 50);
    assert_eq!((account.made, account.failed), (50, 0));
    let account = open("/not/there", 0, 3);
    assert_eq!((account.failed, account.returned), (3, errno(2)));

    let path = "/proc/sys/kernel/modprobe";
    let before = file(guest, path);
    let write = |bytes: &str| {
        let account = order(
            guest,
            Work::WriteFile {
                path: path.into(),
                bytes: bytes.into(),
            },
        );
        assert_eq!(account.returned, Some(bytes.len() as i64));
    };
    write("/tmp/evil");
    assert_eq!(file(guest, path), "/tmp/evil\n");
    write(before.trim());
    assert_eq!(file(guest, path), before);
}

fn processes(guest: &Guest) {
    let account = order(
        guest,
        Work::Exec {
            path: WITNESS.into(),
            argv: vec!["a name".into(), Text(vec![0xff, 0xfe]), "--exit=42".into()],
            envp: vec!["SECRET=known".into()],
        },
    );
    assert_eq!(account.ended, Some(Ended::Exited(42)));
    assert_eq!(
        account.output,
        Text(b"arg a name\narg \xff\xfe\narg --exit=42\nenv SECRET=known\n".to_vec())
    );
    let account = order(
        guest,
        Work::Exec {
            path: "/proc/version".into(),
            argv: Vec::new(),
            envp: Vec::new(),
        },
    );
    assert_eq!(
        (account.returned, account.ended),
        (errno(13), Some(Ended::Exited(0)))
    );

    let account = order(guest, Work::Fork { count: 5 });
    assert_eq!((account.children.len(), account.values), (5, vec![0, 1, 2, 3, 4]));
    assert_eq!(
        order(guest, Work::Exit { code: 77 }).ended,
        Some(Ended::Exited(77))
    );
    let account = order(
        guest,
        Work::Kill {
            pid: None,
            signal: 15,
        },
    );
    assert_eq!((account.returned, account.values), (Some(0), vec![0, 15]));

    // A prepared one is there until it is let go, or killed.
    let held = guest.prepare(Work::Exit { code: 1 }).unwrap();
    assert!(file(guest, &format!("/proc/{}/stat", held.pid())).contains("(orders)"));
    let pid = Some(held.pid());
    assert_eq!(order(guest, Work::Kill { pid, signal: 9 }).returned, Some(0));
    assert_eq!(held.go().unwrap().ended, Some(Ended::Signalled(9)));
    let held = guest.prepare(Work::Exit { code: 1 }).unwrap();
    let other = guest.prepare(Work::Exit { code: 2 }).unwrap();
    let stat = Text::from(format!("/proc/{}/stat", held.pid()).as_str());
    drop(held);
    let gone = || {
        let path = stat.clone();
        order(guest, Work::ReadFile { path, limit: 1 }).returned == errno(2)
    };
    assert!(
        (0..500).any(|_| gone()),
        "an abandoned order stays while others are held"
    );
    assert_eq!(other.go().unwrap().ended, Some(Ended::Exited(2)));
}

fn exceptions(guest: &Guest) {
    for (exception, signal) in [
        (Exception::Divide, 8),
        (Exception::Breakpoint, 5),
        (Exception::InvalidOpcode, 4),
        (Exception::Protection, 11),
        (Exception::PageFault, 11),
    ] {
        let account = order(guest, Work::Raise { exception });
        assert_eq!(account.ended, Some(Ended::Signalled(signal)), "{exception:?}");
    }
    // The kernel tells of faults in programs, by thread name.
    let log = guest.order(Work::Exec {
        path: "/bin/busybox".into(),
        argv: vec!["dmesg".into()],
        envp: Vec::new(),
    });
    let log = log.unwrap().output.lossy();
    for said in [
        "trap divide error ip:".to_owned(),
        "trap invalid opcode ip:".to_owned(),
        "general protection fault ip:".to_owned(),
        format!("segfault at {UNMAPPED:x} ip"),
    ] {
        assert!(
            log.lines()
                .any(|line| line.contains("orders[") && line.contains(&said)),
            "{said}: {log}"
        );
    }
}

fn work(guest: &Guest) {
    let account = order(guest, Work::Compute { rounds: 100_000 });
    assert_eq!(account.checksum, Some(checksum(100_000)));
    assert!(account.nanoseconds.unwrap() > 0);
    let account = order(guest, Work::Syscalls { rounds: 100 });
    assert_eq!((account.made, account.failed), (600, 0));
    let account = order(
        guest,
        Work::CpuId {
            leaf: 0,
            subleaf: 0,
            count: 3,
        },
    );
    let name: Vec<u8> = [1, 3, 2]
        .iter()
        .flat_map(|n| u32::try_from(account.values[*n]).unwrap().to_le_bytes())
        .collect();
    assert_eq!((account.made, name.as_slice()), (3, &b"AuthenticAMD"[..]));
    // 0x80 is where firmware tells how far it has come; nobody listens.
    let account = order(
        guest,
        Work::Port {
            port: 0x80,
            value: 7,
            count: 20,
        },
    );
    assert_eq!((account.made, account.failed), (20, 0));
    let account = order(guest, Work::Touch { pages: 300 });
    assert_eq!(account.made, 300);
}

fn modules(guest: &Guest) {
    let load = |name: &str, from_memory| {
        order(
            guest,
            Work::Load {
                name: name.into(),
                parameters: "numdummies=0".into(),
                from_memory,
            },
        )
        .returned
    };
    let unload = |name: &str| order(guest, Work::Unload { name: name.into() }).returned;
    let loaded = || file(guest, "/proc/modules").contains("dummy ");
    assert_eq!(load("dummy", false), errno(17), "it is loaded");
    assert_eq!(unload("dummy"), Some(0));
    assert!(!loaded());
    assert_eq!(unload("dummy"), errno(2));
    for from_memory in [true, false] {
        assert_eq!(load("dummy", from_memory), Some(0));
        assert!(loaded());
        assert_eq!(unload("dummy"), Some(0));
    }
    let parameters = String::new();
    let error = guest
        .order(Work::Load {
            name: "none-such".into(),
            parameters,
            from_memory: false,
        })
        .unwrap_err();
    assert!(error.to_string().contains("none-such"), "{error:#}");
}

/// What is said of memory, looked at from outside.
fn memory(guest: &Guest) {
    let target = TargetSpec::Qmp(guest.qmp_path().unwrap());
    let outside = vmsight_target::attach(&target, &Default::default())
        .unwrap_or_else(|e| panic!("{e}"))
        .memory;
    let kernel =
        vmsight_linux::Kernel::attach(outside.clone(), Default::default()).unwrap_or_else(|e| panic!("{e}"));
    let at = |held: &vmsight_lab::orders::Prepared<'_>| {
        let space = kernel
            .process_space(held.pid().try_into().unwrap())
            .unwrap()
            .expect("a process that is held");
        let gpa = space.translate(Gva(held.address())).unwrap().gpa;
        let frame = Gpa((held.frame() << 12) | (held.address() & 0xfff));
        assert_eq!(gpa, frame, "{held:?}");
        gpa
    };

    let write = |shared, offset| Work::Write {
        first: 5,
        step: 3,
        count: 1000,
        offset,
        shared,
    };
    for shared in [false, true] {
        let held = guest.prepare(write(shared, 0x128)).unwrap();
        let gpa = at(&held);
        assert_eq!(gpa.0 & 0xfff, 0x128);
        assert_eq!(
            outside.read_u64(gpa).unwrap(),
            0,
            "nothing is written before it is let go"
        );
        let account = held.go().unwrap();
        assert_eq!((account.made, account.frame), (1000, Some(gpa.0 >> 12)));
        if shared {
            assert_eq!(outside.read_u64(gpa).unwrap(), 5 + 999 * 3);
        }
    }

    let value = 0x1234_5678_9abc_def0;
    let held = guest
        .prepare(Work::Read {
            value,
            count: 100,
            offset: 8,
        })
        .unwrap();
    assert_eq!(outside.read_u64(at(&held)).unwrap(), value);
    assert_eq!(held.go().unwrap().checksum, Some(value.wrapping_mul(100)));

    let held = guest.prepare(Work::Call { count: 1000 }).unwrap();
    let mut code = [0; 5];
    outside.read(at(&held), &mut code).unwrap();
    assert_eq!(code, [0x48, 0x8d, 0x47, 0x01, 0xc3], "lea rax, [rdi + 1]; ret");
    assert_eq!(held.go().unwrap().checksum, Some(1000 * 1001 / 2));
}

fn several(guest: &Guest) {
    // Two write to one page, on two processors, in the same moment.
    let held = [0, 1].map(|cpu| {
        let work = Work::Write {
            first: 0,
            step: 1,
            count: 100_000,
            offset: 8 * u64::from(cpu),
            shared: true,
        };
        guest.prepare(work.on(cpu)).unwrap()
    });
    let [one, two] = [&held[0], &held[1]].map(|h| (h.pid(), h.frame()));
    assert!(one.0 != two.0 && one.1 == two.1, "{held:?}");
    let accounts = guest.orders().unwrap().go(held).unwrap();
    assert_eq!(accounts.iter().map(|a| a.pid).collect::<Vec<_>>(), [one.0, two.0]);

    // What takes long is overtaken.
    let orders = guest.orders().unwrap();
    let long = guest.prepare(Work::Exit { code: 3 }).unwrap();
    let sent = std::thread::scope(|scope| {
        for n in 0..4 {
            scope.spawn(move || {
                let account = order(guest, Work::Exit { code: n });
                assert_eq!(account.ended, Some(Ended::Exited(n)));
            });
        }
        long.send_go().unwrap()
    });
    let accounts = sent.wait_all(Duration::from_secs(60)).unwrap();
    assert_eq!(accounts[0].ended, Some(Ended::Exited(3)));
    let error = orders
        .order_within(Work::Compute { rounds: 1 << 40 }, Duration::from_millis(300))
        .unwrap_err();
    assert!(error.to_string().contains("no answer"), "{error:#}");
    order(guest, Work::Ping);
}

fn refusals(guest: &Guest) {
    let refused = |order: Order, why: &str| {
        let error = guest.order(order).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    };
    refused(Work::Ping.on(7), "run on CPU 7");
    refused(Work::Go { pids: vec![1] }.into(), "no prepared order 1");
    refused(Work::Abandon { pid: 1 }.into(), "no prepared order 1");
    let order = Box::new(Work::Go { pids: vec![] }.into());
    refused(Work::Prepare { order }.into(), "nothing to prepare");
    let work = Work::Read {
        value: 0,
        count: 1,
        offset: 4096,
    };
    refused(work.into(), "4096 is no multiple of 8 below 4096");
}

#[test]
fn the_workload_stands_still_beside_it() {
    let guest = Guest::boot(&Spec::new(Kernel::V6_12).orders()).unwrap_or_else(|e| panic!("{e:?}"));
    // From the command line, as people and scripts give orders.
    let output = Command::new(env!("CARGO_BIN_EXE_vmsight-lab"))
        .arg("order")
        .arg(guest.orders_path().unwrap())
        .args([r#"{"do":"ping"}"#, r#"{"do":"exit","code":9}"#])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let accounts: Vec<Account> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(
        accounts.len(),
        2,
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(accounts[1].ended, Some(Ended::Exited(9)));
    // And all is as the guest has said before.
    let target = TargetSpec::Qmp(guest.qmp_path().unwrap());
    let target = vmsight_target::attach(&target, &Default::default()).unwrap_or_else(|e| panic!("{e}"));
    let kernel =
        vmsight_linux::Kernel::attach(target.memory, Default::default()).unwrap_or_else(|e| panic!("{e}"));
    let differences = compare::all(&kernel, guest.truth());
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[test]
fn a_guest_that_was_not_asked_to_takes_none() {
    let guest = Guest::boot(&Spec::new(Kernel::V6_12).idle()).unwrap_or_else(|e| panic!("{e:?}"));
    assert!(
        guest
            .order(Work::Ping)
            .unwrap_err()
            .to_string()
            .contains("takes no orders")
    );
    assert!(guest.truth().named("orders").is_none());
    let line = std::fs::read_to_string(format!("/proc/{}/cmdline", guest.pid())).unwrap();
    assert!(!line.contains("orders"), "{line:?}");
}
