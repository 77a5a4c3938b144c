//! What `list` says of real machines.

use std::process::Command;

use vmsight_target::discover::{ControlKind, describe};
use vmsight_target::{Vmm, list};

use crate::machine::{Machine, copy_program};

#[test]
fn a_machine_is_described_as_it_is() {
    let vm = Machine::start(&[
        "-name",
        "guest=web,,1,debug-threads=on",
        "-uuid",
        "5c0ad1a4-6e4c-4dd3-9b6e-1a9a4a9f4a11",
        "-machine",
        "q35,memory-backend=ram0",
        "-accel",
        "tcg",
        "-m",
        "size=256M,slots=2,maxmem=1G",
        "-smp",
        "3",
        "-object",
        "memory-backend-memfd,id=ram0,size=256M,share=on",
        "-chardev",
        "socket,id=h,path=DIR/hmp,server=on,wait=off",
        "-mon",
        "chardev=h,mode=readline",
        "-gdb",
        "unix:DIR/gdb,server=on,wait=off",
    ]);
    let all = list().unwrap();
    let info = all
        .iter()
        .find(|v| v.pid == vm.pid())
        .expect("the machine is listed");
    assert_eq!(info.vmm, Vmm::Qemu);
    assert_eq!(info.name.as_deref(), Some("web,1"));
    assert_eq!(info.uuid.as_deref(), Some("5c0ad1a4-6e4c-4dd3-9b6e-1a9a4a9f4a11"));
    assert_eq!(info.machine.as_deref(), Some("q35"));
    assert_eq!(info.accelerator.as_deref(), Some("tcg"));
    assert_eq!(info.memory_bytes, Some(256 << 20));
    assert_eq!(info.vcpus, Some(3), "counted by threads");
    assert_eq!(info.managed_by, None);
    assert!(info.process_memory);
    let shared = info.shared_memory.as_ref().unwrap();
    assert!(
        shared
            .iter()
            .any(|s| s.path.starts_with("/memfd:") && s.bytes == 256 << 20),
        "{shared:?}"
    );
    for (kind, file) in [
        (ControlKind::Qmp, "qmp"),
        (ControlKind::Hmp, "hmp"),
        (ControlKind::Gdb, "gdb"),
    ] {
        let control = info
            .control
            .iter()
            .find(|c| c.kind == kind)
            .unwrap_or_else(|| panic!("{:?}", info.control));
        assert_eq!(control.address, vm.dir().join(file).to_str().unwrap());
        assert_eq!(control.listening, Some(true));
    }
    assert_eq!(info.qmp_sockets(), [vm.qmp()]);
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let started = info.started.unwrap();
    assert!(started.abs_diff(now) < 120, "started {started}, now {now}");
    assert!(info.problems.is_empty(), "{:?}", info.problems);
}

#[test]
fn defaults_are_known() {
    let vm = Machine::start(&[]);
    let info = describe(vm.pid()).unwrap();
    assert_eq!(info.name, None);
    assert_eq!(info.machine.as_deref(), Some("pc"));
    assert_eq!((info.memory_bytes, info.vcpus), (Some(128 << 20), Some(1)));
    assert_eq!(info.accelerator.as_deref(), Some("tcg"));
}

#[test]
fn a_gdb_stub_opened_at_run_time_is_seen() {
    let vm = Machine::start(&["-m", "64"]);
    let path = vm.dir().join("late");
    vm.command(&format!(
        r#"{{"execute":"human-monitor-command","arguments":{{"command-line":"gdbserver unix:{},server=on,wait=off"}}}}"#,
        path.display()
    ));
    let info = describe(vm.pid()).unwrap();
    let found = info.control.iter().find(|c| c.address == path.to_str().unwrap());
    assert_eq!(
        found.map(|c| c.kind),
        Some(ControlKind::Unknown),
        "{:?}",
        info.control
    );
}

#[test]
fn what_another_user_may_not_see_is_null_with_a_reason() {
    // A QEMU of root's, looked at by nobody: this test's own program, run again under that user.
    if std::env::var_os("VMSIGHT_TEST_DESCRIBE").is_some() {
        return describe_for_another_user();
    }
    if !rustix::process::geteuid().is_root() {
        eprintln!(
            "not root: another user cannot be taken on; the case is covered where the tests run as root"
        );
        return;
    }
    let vm = Machine::start(&["-m", "64", "-name", "secret"]);
    let text = vm.as_nobody(
        "discovery::what_another_user_may_not_see_is_null_with_a_reason",
        "VMSIGHT_TEST_DESCRIBE",
    );
    assert!(text.contains("another user saw it"), "{text}");
}

fn describe_for_another_user() {
    let pid = std::env::var("VMSIGHT_TEST_DESCRIBE")
        .expect("set")
        .parse()
        .expect("a pid");
    let info = describe(pid).expect("still listed: the command line is public");
    assert_eq!(info.name.as_deref(), Some("secret"));
    assert_eq!(info.memory_bytes, Some(64 << 20));
    assert_eq!(info.uid, Some(0));
    assert!(info.started.is_some());
    assert!(!info.process_memory);
    assert_eq!(info.shared_memory, None);
    for field in ["process_memory", "shared_memory", "control"] {
        let problem = info
            .problems
            .iter()
            .find(|p| p.field == field)
            .unwrap_or_else(|| panic!("{:?}", info.problems));
        assert!(problem.reason.contains("ermission denied"), "{problem}");
    }
    assert!(info.control.iter().all(|c| c.listening.is_none()));
    println!("another user saw it");
}

#[test]
fn tools_of_qemu_are_not_listed() {
    // A program of QEMU's that is no machine, under a name that has "qemu" in it.
    let dir = tempfile::tempdir().unwrap();
    let tool = dir.path().join("qemu-img");
    copy_program("/bin/sleep".as_ref(), &tool);
    let mut child = Command::new(&tool).arg("60").spawn().unwrap();
    let listed = list().unwrap().iter().any(|v| v.pid == child.id());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!listed);
}

#[test]
fn files_that_a_command_line_names_are_not_waited_for() {
    // A shell under the name of a QEMU, whose configuration is a pipe that nobody writes to.
    let dir = tempfile::tempdir().unwrap();
    let fake = dir.path().join("qemu-system-x86_64");
    copy_program("/bin/sh".as_ref(), &fake);
    let pipe = dir.path().join("pipe");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &pipe,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    let mut child = Command::new(&fake)
        .args(["-c", "while :; do sleep 1; done", "-readconfig"])
        .arg(&pipe)
        .spawn()
        .unwrap();
    let pid = child.id();
    // A moment after it was started it has no command line yet.
    let line = || std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let until = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while line().is_empty() {
        assert!(std::time::Instant::now() < until);
    }
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || tell.send(describe(pid).map(Box::new)));
    let info = told.recv_timeout(std::time::Duration::from_secs(30));
    child.kill().unwrap();
    child.wait().unwrap();
    let info = info
        .expect("it is described without waiting")
        .expect("it looks like a QEMU");
    assert!(
        info.problems.iter().any(|p| p.reason.contains("-readconfig")),
        "{:?}",
        info.problems
    );
}
