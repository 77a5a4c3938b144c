//! Machines reached by their gdb stub.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use vmsight_arch::Gpa;
use vmsight_target::gdb::GdbError;
use vmsight_target::{AttachOptions, TargetError, TargetKind, TargetSpec, Vmm, attach};

use crate::machine::Machine;

const HMP: [&str; 4] = [
    "-chardev",
    "socket,id=h,path=DIR/hmp,server=on,wait=off",
    "-mon",
    "chardev=h,mode=readline",
];
const MARK: &str = "loader,addr=0x300000,data=0x1122334455667788,data-len=8";

fn start(more: &[&str], running: bool) -> Machine {
    let mut args = HMP.to_vec();
    args.extend(["-m", "64", "-smp", "2"]);
    args.extend(more);
    if running {
        Machine::start_running(&args)
    } else {
        Machine::start(&args)
    }
}

fn status(vm: &Machine) -> String {
    let text = vm.human("info status");
    text.lines()
        .find_map(|l| l.split_once("VM status: "))
        .map(|(_, s)| s.trim().to_owned())
        .unwrap_or(text)
}

fn spec(text: &str) -> TargetSpec {
    text.parse().unwrap()
}

/// Somebody else holds QMP, so that only the stub is left.
fn hold_qmp(vm: &Machine) -> UnixStream {
    let stream = UnixStream::connect(vm.qmp()).unwrap();
    BufReader::new(stream.try_clone().unwrap())
        .lines()
        .next()
        .unwrap()
        .unwrap();
    stream
}

fn short() -> AttachOptions<'static> {
    AttachOptions {
        timeout: Duration::from_millis(500),
        ..AttachOptions::default()
    }
}

#[test]
fn the_stub_tells_layout_and_registers_and_the_machine_goes_on() {
    let vm = start(
        &["-gdb", "unix:DIR/gdb,server=on,wait=off", "-device", MARK],
        true,
    );
    let _owner = hold_qmp(&vm);
    assert_eq!(status(&vm), "running");
    let target = attach(
        &spec(&format!("gdb:{}", vm.dir().join("gdb").display())),
        &short(),
    )
    .unwrap();
    assert_eq!(
        target.kind,
        TargetKind::Vm(Vmm::Qemu),
        "memory through the process: {:?}",
        target.notes
    );
    assert_eq!(status(&vm), "running");
    assert_eq!(target.memory.end(), Gpa(64 << 20));
    let all = target.registers(None).unwrap();
    assert_eq!(all.iter().map(|r| r.vcpu).collect::<Vec<_>>(), [0, 1]);
    assert!(
        all[0].kernel_gs_base.is_some(),
        "the stub knows more than the monitor"
    );
    assert!(
        all[0].cs.limit > 0 && all[0].cs.attributes > 0,
        "and the monitor more than the stub"
    );
    assert_eq!(status(&vm), "running");
    let pause = target.pause().unwrap();
    assert!(pause.will_resume());
    assert!(status(&vm).starts_with("paused"));
    assert_eq!(target.registers(None).unwrap(), target.registers(None).unwrap());
    drop(pause);
    assert_eq!(status(&vm), "running");
}

#[test]
fn with_qmp_free_nothing_is_paused() {
    let vm = start(&["-gdb", "tcp:127.0.0.1:0,server=on,wait=off"], true);
    // Port 0: the kernel chose one, and the process listens there.
    let info = vmsight_target::discover::describe(vm.pid()).unwrap();
    let address = info
        .control
        .iter()
        .find(|c| c.address.starts_with("127.0.0.1:") && c.listening == Some(true));
    let address = address
        .unwrap_or_else(|| panic!("{:?}", info.control))
        .address
        .clone();
    let target = attach(&spec(&format!("gdb:{address}")), &AttachOptions::default()).unwrap();
    assert_eq!(target.info.as_ref().unwrap().pid, vm.pid());
    assert_eq!(target.registers(None).unwrap().len(), 2);
    assert_eq!(status(&vm), "running");
}

#[test]
fn of_two_machines_at_one_port_the_one_at_the_address_is_meant() {
    let port = TcpListener::bind("127.0.0.2:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let stub = |host: &str| format!("tcp:{host}:{port},server=on,wait=off");
    // The other one has the lower pid, so it is listed first.
    let other = start(&["-gdb", &stub("127.0.0.2")], true);
    let vm = start(&["-gdb", &stub("127.0.0.1")], true);
    for (host, pid) in [("127.0.0.1", vm.pid()), ("127.0.0.2", other.pid())] {
        let target = attach(&spec(&format!("gdb:{host}:{port}")), &AttachOptions::default()).unwrap();
        assert_eq!(target.info.as_ref().unwrap().pid, pid, "{host}");
    }
}

#[test]
fn a_machine_that_did_not_run_is_left_so() {
    let vm = start(&["-gdb", "unix:DIR/gdb,server=on,wait=off"], false);
    let _owner = hold_qmp(&vm);
    assert_eq!(status(&vm), "paused (prelaunch)");
    let target = attach(
        &spec(&format!("gdb:{}", vm.dir().join("gdb").display())),
        &short(),
    )
    .unwrap();
    let registers = target.registers(Some(0)).unwrap();
    assert_eq!((registers[0].cs.base, registers[0].rip), (0xffff_0000, 0xfff0));
    drop(target);
    assert_eq!(status(&vm), "paused (prelaunch)");
}

#[test]
fn a_debugger_that_is_connected_is_not_disturbed() {
    for stub in [
        "unix:DIR/gdb,server=on,wait=off",
        "tcp:127.0.0.1:0,server=on,wait=off",
    ] {
        let vm = start(&["-gdb", stub], true);
        let _owner = hold_qmp(&vm);
        let unix = stub.starts_with("unix");
        let name = if unix {
            format!("gdb:{}", vm.dir().join("gdb").display())
        } else {
            let info = vmsight_target::discover::describe(vm.pid()).unwrap();
            let control = info
                .control
                .iter()
                .find(|c| c.address.starts_with("127.0.0.1:"))
                .unwrap()
                .clone();
            format!("gdb:{}", control.address)
        };
        let _debugger: Box<dyn Send> = if unix {
            Box::new(UnixStream::connect(vm.dir().join("gdb")).unwrap())
        } else {
            Box::new(TcpStream::connect(name.strip_prefix("gdb:").unwrap()).unwrap())
        };
        std::thread::sleep(Duration::from_millis(100));
        let error = attach(&spec(&name), &short()).unwrap_err();
        assert!(
            matches!(error, TargetError::Gdb(GdbError::Busy { pid, .. }) if pid == vm.pid()),
            "{error}"
        );
    }
}

#[test]
fn a_debugger_is_not_disturbed_by_another_user_either() {
    if let Ok(address) = std::env::var("VMSIGHT_TEST_BUSY_STUB") {
        let error = attach(&spec(&address), &short()).unwrap_err();
        assert!(
            matches!(error, TargetError::Gdb(GdbError::Busy { .. })),
            "{error}"
        );
        println!("left alone");
        return;
    }
    if !rustix::process::geteuid().is_root() {
        eprintln!(
            "not root: another user cannot be taken on; the case is covered where the tests run as root"
        );
        return;
    }
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let vm = start(
        &["-gdb", &format!("tcp:127.0.0.1:{port},server=on,wait=off")],
        true,
    );
    let _debugger = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let text = vm.as_nobody_with(
        "gdb::a_debugger_is_not_disturbed_by_another_user_either",
        &[("VMSIGHT_TEST_BUSY_STUB", &format!("gdb:127.0.0.1:{port}"))],
    );
    assert!(text.contains("left alone"), "{text}");
}

#[test]
fn without_the_process_memory_comes_through_the_stub() {
    if let Ok(address) = std::env::var("VMSIGHT_TEST_STUB") {
        return read_through_the_stub(&address);
    }
    if !rustix::process::geteuid().is_root() {
        eprintln!(
            "not root: another user cannot be taken on; the case is covered where the tests run as root"
        );
        return;
    }
    let vm = start(
        &["-gdb", "tcp:127.0.0.1:0,server=on,wait=off", "-device", MARK],
        false,
    );
    vm.command("{\"execute\":\"cont\"}");
    let info = vmsight_target::discover::describe(vm.pid()).unwrap();
    let address = info
        .control
        .iter()
        .find(|c| c.address.starts_with("127.0.0.1:"))
        .unwrap()
        .address
        .clone();
    let text = vm.as_nobody_with(
        "gdb::without_the_process_memory_comes_through_the_stub",
        &[("VMSIGHT_TEST_STUB", &address)],
    );
    assert!(text.contains("read all of it"), "{text}");
    assert_eq!(status(&vm), "running");
    assert!(
        vm.hmp("xp /1gx 0x2000000").contains("0x00000000cafef00d"),
        "what was written is there"
    );
}

fn read_through_the_stub(address: &str) {
    let options = AttachOptions {
        write: true,
        timeout: Duration::from_secs(5),
        prove: None,
        ahead: None,
    };
    let target = attach(&spec(&format!("gdb:{address}")), &options).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(target.kind, TargetKind::GdbStub);
    assert_eq!(
        target.memory.read_u64(Gpa(0x30_0000)).unwrap(),
        0x1122_3344_5566_7788
    );
    assert_eq!(target.memory.end(), Gpa(64 << 20));
    let mut all = vec![0; 4 << 20];
    let start = Instant::now();
    target.memory.read(Gpa(0x10_0000), &mut all).unwrap();
    println!("4 MiB in {:?}", start.elapsed());
    assert_eq!(all[0x20_0000..0x20_0008], 0x1122_3344_5566_7788_u64.to_le_bytes());
    target
        .memory
        .write(Gpa(0x200_0000), &0xcafe_f00d_u64.to_le_bytes())
        .unwrap();
    assert_eq!(target.memory.read_u64(Gpa(0x200_0000)).unwrap(), 0xcafe_f00d);
    assert_eq!(target.registers(None).unwrap().len(), 2);
    let memory = target.memory.clone();
    drop(target);
    assert!(
        memory.read_u64(Gpa(0x10_0000 - 8)).is_err(),
        "the connection went with the target"
    );
    println!("read all of it");
}

#[test]
fn it_goes_on_when_we_are_killed() {
    if let Ok(address) = std::env::var("VMSIGHT_TEST_STUB_PAUSE") {
        let target = attach(&spec(&address), &short()).unwrap();
        let _pause = target.pause().unwrap();
        println!("paused");
        std::thread::sleep(Duration::from_secs(60));
        return;
    }
    let vm = start(&["-gdb", "unix:DIR/gdb,server=on,wait=off"], true);
    let _owner = hold_qmp(&vm);
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "gdb::it_goes_on_when_we_are_killed", "--nocapture"])
        .env(
            "VMSIGHT_TEST_STUB_PAUSE",
            format!("gdb:{}", vm.dir().join("gdb").display()),
        )
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(
        lines.map_while(Result::ok).any(|l| l.ends_with("paused")),
        "the child never paused"
    );
    assert!(status(&vm).starts_with("paused"));
    kill_process(Pid::from_child(&child), Signal::KILL).unwrap();
    child.wait().unwrap();
    let until = Instant::now() + Duration::from_secs(5);
    while status(&vm) != "running" {
        assert!(Instant::now() < until, "the machine was left {}", status(&vm));
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn what_is_no_stub_is_refused_in_time() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let start = Instant::now();
    let error = attach(&spec(&format!("gdb:{}", silent.local_addr().unwrap())), &short()).unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(30));
    assert!(
        matches!(error, TargetError::Gdb(GdbError::Timeout { .. })),
        "{error}"
    );
    let port = silent.local_addr().unwrap().port();
    drop(silent);
    let error = attach(&spec(&format!("gdb::{port}")), &short())
        .unwrap_err()
        .to_string();
    assert!(error.contains("nobody listens there"), "{error}");
    // Something that answers and is no stub of QEMU's.
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = other.local_addr().unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = other.accept().unwrap();
        // "Not supported" to everything.
        let mut chunk = [0; 256];
        while matches!(std::io::Read::read(&mut stream, &mut chunk), Ok(n) if n > 0) {
            if chunk.contains(&b'$') && stream.write_all(b"+$#00").is_err() {
                break;
            }
            chunk.fill(0);
        }
    });
    let error = attach(&spec(&format!("gdb:{address}")), &short()).unwrap_err();
    assert!(matches!(error, TargetError::NoMemoryMap { .. }), "{error}");
    server.join().unwrap();
}
