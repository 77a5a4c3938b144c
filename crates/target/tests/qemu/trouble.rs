//! Machines that are busy, stopped, forbidden or dying.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use vmsight_arch::Gpa;
use vmsight_memory::{GuestMemory, MemoryError};
use vmsight_target::qmp::QmpError;
use vmsight_target::{AttachOptions, TargetError, TargetSpec, attach};

use crate::machine::Machine;

const GIB: u64 = 1 << 30;

fn pid_of(vm: &Machine) -> Pid {
    Pid::from_raw(i32::try_from(vm.pid()).expect("a pid")).expect("not zero")
}

/// The owner's QMP session, held open.
fn owner(vm: &Machine) -> (UnixStream, impl Iterator<Item = String>) {
    let stream = UnixStream::connect(vm.qmp()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap())
        .lines()
        .map(|l| l.expect("QMP answers"));
    lines.next();
    (stream, lines)
}

/// A machine with marks that QEMU itself put into its memory: above 4 GiB too.
fn marked(machine: &str) -> Machine {
    Machine::start(&[
        "-machine",
        machine,
        "-m",
        "5G",
        "-device",
        "loader,addr=0x300000,data=0x1122334455667788,data-len=8",
        "-device",
        "loader,addr=0x100200000,data=0x99aabbccddeeff00,data-len=8",
    ])
}

/// Proves a layout by these marks.
fn find_marks(memory: &GuestMemory) -> Result<String, String> {
    for (gpa, value) in [
        (0x30_0000, 0x1122_3344_5566_7788),
        (0x1_0020_0000, 0x99aa_bbcc_ddee_ff00),
    ] {
        match memory.read_u64(Gpa(gpa)) {
            Ok(found) if found == value => {}
            other => return Err(format!("{other:x?} at {gpa:#x}")),
        }
    }
    Ok("the marks are there".to_owned())
}

#[test]
fn a_busy_monitor_is_left_alone_and_the_layout_is_deduced() {
    for machine in ["pc", "q35"] {
        let vm = marked(machine);
        let (mut session, mut answers) = owner(&vm);
        let options = AttachOptions {
            prove: Some(&find_marks),
            timeout: Duration::from_secs(20),
            ..Default::default()
        };
        let start = Instant::now();
        let target = attach(&TargetSpec::Pid(vm.pid()), &options).unwrap_or_else(|e| panic!("{e}"));
        assert!(
            start.elapsed() < Duration::from_secs(2),
            "a client that is seen is not waited for"
        );
        let notes = target.notes.join("\n");
        assert!(
            notes.contains("deduced and then proven") && notes.contains("the marks are there"),
            "{notes}"
        );
        let low = if machine == "pc" { 3 * GIB } else { 2 * GIB };
        let regions: Vec<_> = target
            .memory
            .regions()
            .iter()
            .map(|r| (r.start.0, r.end().0))
            .collect();
        assert_eq!(regions, [(0, low), (4 * GIB, 9 * GIB - low)]);
        let error = target.registers(None).unwrap_err().to_string();
        assert!(
            error.contains("busy") && error.contains(&std::process::id().to_string()),
            "{error}"
        );
        assert!(target.pause().is_err());
        // The owner's session works as before.
        session
            .write_all(b"{\"execute\":\"qmp_capabilities\"}\n")
            .unwrap();
        assert!(answers.next().unwrap().contains("return"));
        match attach(&TargetSpec::Qmp(vm.qmp()), &options) {
            Err(TargetError::Qmp(QmpError::Busy { clients, .. })) => {
                assert_eq!(clients[0].0, std::process::id())
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_layout_that_nobody_proves_is_refused_with_what_was_tried() {
    let vm = marked("q35");
    let _session = owner(&vm);
    let refuse = |_: &GuestMemory| Err("no kernel in it".to_owned());
    let options = AttachOptions {
        prove: Some(&refuse),
        timeout: Duration::from_millis(200),
        ..Default::default()
    };
    let error = attach(&TargetSpec::Pid(vm.pid()), &options).unwrap_err();
    let text = error.to_string();
    match error {
        TargetError::Unproven { tried, .. } => assert!(tried.len() > 2, "{tried:?}"),
        other => panic!("{other}"),
    }
    assert!(
        text.contains("no kernel in it") && text.contains("0x80000000 bytes") && text.contains("busy"),
        "{text}"
    );
    // Without anybody to prove it a guess is not taken either.
    let options = AttachOptions {
        timeout: Duration::from_millis(200),
        ..Default::default()
    };
    assert!(matches!(
        attach(&TargetSpec::Pid(vm.pid()), &options),
        Err(TargetError::Unproven { .. })
    ));
}

#[test]
fn a_wrong_first_guess_is_found_out() {
    // The command line names no machine type; a file that vmsight may read does, after the fact: the owner replaced
    // it since. So pc's layout is tried first and q35's is the machine's.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("vm.cfg");
    std::fs::write(&file, "[machine]\n  type = \"q35\"\n").unwrap();
    let vm = Machine::start(&[
        "-readconfig",
        file.to_str().unwrap(),
        "-m",
        "5G",
        "-device",
        "loader,addr=0x300000,data=0x1122334455667788,data-len=8",
        "-device",
        "loader,addr=0x100200000,data=0x99aabbccddeeff00,data-len=8",
    ]);
    std::fs::write(&file, "[machine]\n  type = \"pc\"\n").unwrap();
    let _session = owner(&vm);
    let options = AttachOptions {
        prove: Some(&find_marks),
        timeout: Duration::from_millis(200),
        ..Default::default()
    };
    let target = attach(&TargetSpec::Pid(vm.pid()), &options).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(target.memory.regions()[0].end().0, 2 * GIB, "{:?}", target.notes);
}

#[test]
fn a_stopped_qemu_is_named_as_such() {
    let vm = Machine::start(&["-m", "64"]);
    kill_process(pid_of(&vm), Signal::STOP).unwrap();
    // The signal takes effect a moment later.
    let state = || std::fs::read_to_string(format!("/proc/{}/stat", vm.pid())).unwrap();
    let until = Instant::now() + Duration::from_secs(5);
    while !state().contains(") T ") {
        assert!(Instant::now() < until, "{}", state());
    }
    let options = AttachOptions {
        timeout: Duration::from_millis(300),
        ..Default::default()
    };
    let start = Instant::now();
    let error = attach(&TargetSpec::Qmp(vm.qmp()), &options)
        .unwrap_err()
        .to_string();
    assert!(start.elapsed() < Duration::from_secs(30));
    assert!(error.contains("is stopped"), "{error}");
    kill_process(pid_of(&vm), Signal::CONT).unwrap();
    assert!(attach(&TargetSpec::Qmp(vm.qmp()), &AttachOptions::default()).is_ok());
}

#[test]
fn a_qemu_that_dies_is_said_to_have_exited() {
    let mut vm = Machine::start(&["-m", "64"]);
    let target = attach(&TargetSpec::Pid(vm.pid()), &AttachOptions::default()).unwrap();
    assert!(target.memory.read_u64(Gpa(0x1000)).is_ok());
    assert!(!target.has_exited());
    vm.kill();
    assert!(target.has_exited());
    assert_eq!(
        target.memory.read_u64(Gpa(0x1000)),
        Err(MemoryError::Exited { pid: vm.pid() })
    );
    for error in [target.registers(None).unwrap_err(), target.pause().unwrap_err()] {
        assert!(matches!(error, TargetError::Exited { .. }), "{error}");
    }
    let error = attach(&TargetSpec::Pid(vm.pid()), &AttachOptions::default()).unwrap_err();
    assert!(matches!(error, TargetError::NoProcess { .. }), "{error}");
}

#[test]
fn a_qemu_that_dies_while_paused_ends_the_pause() {
    let mut vm = Machine::start_running(&["-m", "64"]);
    let target = attach(&TargetSpec::Pid(vm.pid()), &AttachOptions::default()).unwrap();
    let pause = target.pause().unwrap();
    vm.kill();
    let start = Instant::now();
    assert!(matches!(target.registers(None), Err(TargetError::Exited { .. })));
    drop(pause);
    assert!(start.elapsed() < Duration::from_secs(30));
}

#[test]
fn another_user_is_told_what_would_help() {
    if let Ok(pid) = std::env::var("VMSIGHT_TEST_ATTACH") {
        let pid = pid.parse().expect("a pid");
        let error = attach(&TargetSpec::Pid(pid), &AttachOptions::default()).unwrap_err();
        assert!(matches!(error, TargetError::NoPermission { .. }), "{error}");
        println!("refused: {error}");
        return;
    }
    if !rustix::process::geteuid().is_root() {
        eprintln!(
            "not root: another user cannot be taken on; the case is covered where the tests run as root"
        );
        return;
    }
    let vm = Machine::start(&["-m", "64"]);
    let text = vm.as_nobody(
        "trouble::another_user_is_told_what_would_help",
        "VMSIGHT_TEST_ATTACH",
    );
    assert!(
        text.contains("refused:") && text.contains("CAP_SYS_PTRACE"),
        "{text}"
    );
}

#[test]
fn no_word_of_ours_stays_in_the_way() {
    // After an attach and its registers the socket is free for its owner at once.
    let vm = Machine::start(&["-m", "64"]);
    let target = attach(&TargetSpec::Pid(vm.pid()), &AttachOptions::default()).unwrap();
    target.registers(None).unwrap();
    let (mut session, mut answers) = owner(&vm);
    session
        .write_all(b"{\"execute\":\"qmp_capabilities\"}\n")
        .unwrap();
    assert!(answers.next().unwrap().contains("return"));
    drop(target);
}

#[test]
fn every_backend_is_found_without_a_monitor() {
    let find = |memory: &GuestMemory| match memory.read_u64(Gpa(0x30_0000)) {
        Ok(0x1122_3344_5566_7788) => Ok("the mark is there".to_owned()),
        other => Err(format!("{other:x?}")),
    };
    let options = AttachOptions {
        prove: Some(&find),
        ..AttachOptions::default()
    };
    for backend in [
        "memory-backend-ram,id=m,size=64M",
        "memory-backend-ram,id=m,size=64M,share=on",
        "memory-backend-memfd,id=m,size=64M,share=on",
        "memory-backend-memfd,id=m,size=64M,share=off",
        "memory-backend-file,id=m,size=64M,share=on,mem-path=DIR",
        "memory-backend-file,id=m,size=64M,share=on,mem-path=DIR/file",
        "memory-backend-file,id=m,size=64M,share=off,mem-path=DIR/file",
        "",
    ] {
        let machine = if backend.is_empty() {
            "pc"
        } else {
            "pc,memory-backend=m"
        };
        let mark = "loader,addr=0x300000,data=0x1122334455667788,data-len=8";
        let mut args = vec!["-m", "64M", "-device", mark, "-machine", machine];
        args.extend(if backend.is_empty() {
            ["-mem-path", "DIR"]
        } else {
            ["-object", backend]
        });
        let vm = Machine::start(&args);
        let _session = owner(&vm);
        let target =
            attach(&TargetSpec::Pid(vm.pid()), &options).unwrap_or_else(|e| panic!("{backend}: {e}"));
        assert_eq!(target.memory.size(), 64 << 20);
    }
}

#[test]
fn a_qemu_that_waits_for_its_owner_is_not_started_by_us() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("q");
    let mut child = std::process::Command::new("qemu-system-x86_64")
        .args(["-nodefaults", "-display", "none", "-S", "-m", "64"])
        .args(["-qmp", &format!("unix:{},server=on", socket.display())])
        .stderr(std::process::Stdio::null())
        .spawn()
        .expect("qemu-system-x86_64");
    let until = Instant::now() + Duration::from_secs(30);
    while !socket.exists() {
        assert!(Instant::now() < until, "QEMU opened no socket");
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(Duration::from_millis(300));
    let threads = || {
        std::fs::read_dir(format!("/proc/{}/task", child.id()))
            .unwrap()
            .count()
    };
    let before = threads();
    for spec in [TargetSpec::Pid(child.id()), TargetSpec::Qmp(socket.clone())] {
        let error = attach(&spec, &AttachOptions::default()).unwrap_err().to_string();
        assert!(error.contains("waits for its first QMP client"), "{error}");
    }
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(threads(), before, "it still waits");
    assert!(before <= 2, "{before}");
    child.kill().unwrap();
    child.wait().unwrap();
}

/// A machine of three nodes whose memory looks alike, with a mark in the last one's.
fn three_nodes() -> Machine {
    let mut args = vec![
        "-m",
        "192M",
        "-device",
        "loader,addr=0x9000000,data=0x1122334455667788,data-len=8",
    ];
    // Not in the order of the nodes.
    for backend in [
        "memory-backend-ram,id=c,size=64M",
        "memory-backend-ram,id=a,size=64M",
        "memory-backend-ram,id=b,size=64M",
    ] {
        args.extend(["-object", backend]);
    }
    for node in ["node,memdev=a", "node,memdev=b", "node,memdev=c"] {
        args.extend(["-numa", node]);
    }
    Machine::start(&args)
}

#[test]
fn backends_that_look_alike_are_tried_in_qemus_own_order_and_believed_only_where_one_order_proves() {
    let vm = three_nodes();
    let told = attach(&TargetSpec::Pid(vm.pid()), &AttachOptions::default()).unwrap();
    assert_eq!(
        told.memory.pieces().len(),
        3 + 1,
        "firmware cuts the first: {:?}",
        told.memory.pieces()
    );
    let _session = owner(&vm);
    let tried = std::cell::Cell::new(0);
    let find = |memory: &GuestMemory| {
        tried.set(tried.get() + 1);
        // The mark is in node c; that a and b are in their places shows nothing but QEMU's own map.
        let same = |gpa| memory.read_u64(Gpa(gpa)) == told.memory.read_u64(Gpa(gpa));
        match memory.read_u64(Gpa(0x900_0000)) {
            Ok(0x1122_3344_5566_7788) if tried.get() == 1 && same(0x900_0000) => Ok("the mark".to_owned()),
            other => Err(format!("{other:x?}")),
        }
    };
    let options = AttachOptions {
        prove: Some(&find),
        ..AttachOptions::default()
    };
    let target = attach(&TargetSpec::Pid(vm.pid()), &options).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(target.memory.pieces().len(), 3);
    assert_eq!(
        tried.get(),
        6,
        "the first is right, and the five others were tried too"
    );
    // A proof that holds for every order is none.
    let credulous = |_: &GuestMemory| Ok("it looks fine".to_owned());
    let options = AttachOptions {
        prove: Some(&credulous),
        ..AttachOptions::default()
    };
    let error = attach(&TargetSpec::Pid(vm.pid()), &options).unwrap_err();
    assert!(matches!(error, TargetError::Unproven { .. }));
    assert!(error.to_string().contains("as much speaks for"), "{error}");
}

#[test]
fn memory_that_was_plugged_in_is_named_where_nothing_can_be_proven() {
    let vm = Machine::start(&[
        "-m",
        "64M,slots=1,maxmem=1G",
        "-object",
        "memory-backend-ram,id=d0,size=128M",
        "-device",
        "pc-dimm,memdev=d0",
    ]);
    let _session = owner(&vm);
    let refuse = |_: &GuestMemory| Err("its memory ends elsewhere".to_owned());
    let options = AttachOptions {
        prove: Some(&refuse),
        ..AttachOptions::default()
    };
    let error = attach(&TargetSpec::Pid(vm.pid()), &options)
        .unwrap_err()
        .to_string();
    assert!(error.contains("plugged in (d0)"), "{error}");
}

#[test]
fn another_vm_behind_the_same_path_is_asked_nothing() {
    let vm = Machine::start(&["-m", "64"]);
    let target = attach(&TargetSpec::Pid(vm.pid()), &AttachOptions::default()).unwrap();
    let other = Machine::start_running(&["-m", "64"]);
    std::fs::rename(vm.qmp(), vm.dir().join("aside")).unwrap();
    std::os::unix::fs::symlink(other.qmp(), vm.qmp()).unwrap();
    for error in [target.registers(None).unwrap_err(), target.pause().unwrap_err()] {
        match error {
            TargetError::Qmp(QmpError::AnotherVm { pid, server, .. }) => {
                assert_eq!((pid, server), (vm.pid(), Some(other.pid())));
            }
            other => panic!("{other}"),
        }
    }
    assert!(
        other
            .command("{\"execute\":\"query-status\"}")
            .contains("\"running\": true")
    );
    // Attaching by pid finds it out as well.
    let error = attach(&TargetSpec::Pid(vm.pid()), &AttachOptions::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains("is not that of process"), "{error}");
}

#[test]
fn a_monitor_whose_socket_was_passed_to_qemu_is_its() {
    // As libvirt does it: the socket is made by one process and served by another.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("q");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).unwrap();
    let fd = std::os::fd::AsRawFd::as_raw_fd(&listener);
    let chardev = format!("socket,id=q,fd={fd},server=on,wait=off");
    let mut child = std::process::Command::new("qemu-system-x86_64")
        .args(["-nodefaults", "-display", "none", "-S", "-m", "64"])
        .args(["-chardev", &chardev, "-mon", "chardev=q,mode=control"])
        .spawn()
        .expect("qemu-system-x86_64");
    drop(listener);
    let options = AttachOptions {
        timeout: Duration::from_secs(30),
        ..AttachOptions::default()
    };
    for spec in [TargetSpec::Qmp(path.clone()), TargetSpec::Pid(child.id())] {
        let target = attach(&spec, &options).unwrap_or_else(|e| panic!("{spec}: {e}"));
        assert_eq!(target.info.as_ref().unwrap().pid, child.id());
        assert_eq!(target.registers(None).unwrap().len(), 1);
    }
    child.kill().unwrap();
    child.wait().unwrap();
}
