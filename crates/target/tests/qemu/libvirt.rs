//! A machine that libvirt runs: its monitor is held for good, and asked for by way of `virsh`.
//!
//! Needs the Debian packages libvirt-daemon, libvirt-daemon-driver-qemu and libvirt-clients. The daemon is one of our
//! own, in a session of an unprivileged user, with all its files in a folder of its own.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use vmsight_arch::Gpa;
use vmsight_memory::GuestMemory;
use vmsight_target::discover::{Manager, describe};
use vmsight_target::{AttachOptions, Target, TargetError, TargetSpec, attach};

use crate::machine::copy_program;

const NAME: &str = "vmsight-test";
const TEST: &str = "libvirt::a_machine_of_libvirts";

/// A libvirt daemon with one domain; both are ended when this is dropped.
struct Libvirt {
    daemon: Child,
    dir: tempfile::TempDir,
    root: bool,
}

impl Libvirt {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = rustix::process::geteuid().is_root();
        for name in ["run", "config/libvirt", "cache", "data", "home"] {
            std::fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        // Without the daemon that keeps logs, which would outlive the session.
        std::fs::write(
            dir.path().join("config/libvirt/qemu.conf"),
            "stdio_handler = \"file\"\n",
        )
        .unwrap();
        std::fs::write(
            dir.path().join("vm.xml"),
            format!(
                "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>{NAME}</name>
                 <memory unit='MiB'>64</memory><vcpu>2</vcpu><os><type arch='x86_64' machine='pc'>hvm</type></os>
                 <devices><emulator>/usr/bin/qemu-system-x86_64</emulator></devices>
                 <qemu:commandline><qemu:arg value='-device'/>
                 <qemu:arg value='loader,addr=0x300000,data=0x1122334455667788,data-len=8'/></qemu:commandline></domain>"
            ),
        )
        .unwrap();
        copy_program(&std::env::current_exe().unwrap(), &dir.path().join("tests"));
        if root {
            let done = Command::new("chown")
                .args(["-R", "65534:65534"])
                .arg(dir.path())
                .status()
                .unwrap();
            assert!(done.success());
        }
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let daemon = user(dir.path(), root, "libvirtd")
            .arg("--timeout=60")
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|e| panic!("{e}"));
        let this = Self { daemon, dir, root };
        let until = Instant::now() + Duration::from_secs(60);
        while !this.virsh(&["version"]).0 {
            assert!(
                Instant::now() < until,
                "libvirtd does not come up; install the Debian packages libvirt-daemon, \
                libvirt-daemon-driver-qemu and libvirt-clients. It says: {}",
                this.log()
            );
            std::thread::sleep(Duration::from_millis(200));
        }
        let (done, text) = this.virsh(&["create", this.dir.path().join("vm.xml").to_str().unwrap()]);
        assert!(done, "{text}\n{}", this.log());
        this
    }

    fn virsh(&self, args: &[&str]) -> (bool, String) {
        let output = user(self.dir.path(), self.root, "virsh")
            .args(["--quiet", "--connect", "qemu:///session"])
            .args(args)
            .output()
            .expect("setpriv of util-linux");
        let text = [output.stdout, output.stderr].concat();
        (
            output.status.success(),
            String::from_utf8_lossy(&text).into_owned(),
        )
    }

    fn state(&self) -> String {
        self.virsh(&["domstate", NAME]).1.trim().to_owned()
    }

    fn pid(&self) -> u32 {
        self.pid_of(NAME)
    }

    fn pid_of(&self, name: &str) -> u32 {
        let file = self
            .dir
            .path()
            .join("run/libvirt/qemu/run")
            .join(format!("{name}.pid"));
        std::fs::read_to_string(file).unwrap().trim().parse().unwrap()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// This program again as the session's user.
    fn again(&self, what: &str) -> Command {
        let program: PathBuf = self.dir.path().join("tests");
        let mut command = user(self.dir.path(), self.root, program.to_str().unwrap());
        command
            .args(["--exact", TEST, "--nocapture"])
            .env("VMSIGHT_TEST_LIBVIRT", what);
        command.env("VMSIGHT_TEST_PID", self.pid().to_string());
        command
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        self.virsh(&["destroy", NAME]);
        if let Some(pid) = i32::try_from(self.daemon.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::TERM);
        }
        let _ = self.daemon.wait();
    }
}

/// A command in the session's environment, as nobody where we are root.
fn user(dir: &Path, root: bool, program: &str) -> Command {
    let mut command = if root {
        let mut command = Command::new("setpriv");
        command.args([
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "--inh-caps=-all",
            program,
        ]);
        command
    } else {
        Command::new(program)
    };
    command
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", dir.join("home"))
        .env("XDG_RUNTIME_DIR", dir.join("run"))
        .env("XDG_CONFIG_HOME", dir.join("config"))
        .env("XDG_CACHE_HOME", dir.join("cache"))
        .env("XDG_DATA_HOME", dir.join("data"))
        .current_dir(dir)
        .stdin(Stdio::null());
    command
}

fn find_mark(memory: &GuestMemory) -> Result<String, String> {
    match memory.read_u64(Gpa(0x30_0000)) {
        Ok(0x1122_3344_5566_7788) => Ok("the mark is there".to_owned()),
        other => Err(format!("{other:x?}")),
    }
}

fn attached(pid: u32) -> Target {
    let options = AttachOptions {
        prove: Some(&find_mark),
        ..AttachOptions::default()
    };
    attach(&TargetSpec::Pid(pid), &options).unwrap_or_else(|e| panic!("{e}"))
}

#[test]
fn a_machine_of_libvirts() {
    if let Ok(what) = std::env::var("VMSIGHT_TEST_LIBVIRT") {
        return in_the_session(&what);
    }
    let libvirt = Libvirt::start();
    let info = describe(libvirt.pid()).expect("it is listed");
    assert_eq!(info.name.as_deref(), Some(NAME));
    assert_eq!(info.managed_by, Some(Manager::Libvirt));
    assert_eq!((info.memory_bytes, info.vcpus), (Some(64 << 20), Some(2)));
    assert!(info.uuid.is_some());
    assert_eq!(
        info.qmp_sockets().len(),
        1,
        "the socket that libvirt passed as a descriptor: {:?}",
        info.control
    );
    if libvirt.root {
        // Not the session's user: memory as ever, and why there is no more.
        let target = attached(libvirt.pid());
        assert!(
            target.notes.iter().any(|n| n.contains("deduced and then proven")),
            "{:?}",
            target.notes
        );
        let error = target.registers(None).unwrap_err().to_string();
        assert!(error.contains("is busy") && error.contains("libvirtd"), "{error}");
    }
    let output = libvirt.again("use").output().unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && text.contains("all of it works"),
        "{text}"
    );
    assert_eq!(libvirt.state(), "running");
    // Killed while it is paused.
    let mut child = libvirt.again("pause").stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(
        lines.map_while(Result::ok).any(|l| l.ends_with("paused")),
        "the child never paused"
    );
    assert_eq!(libvirt.state(), "paused");
    kill_process(Pid::from_child(&child), Signal::KILL).unwrap();
    child.wait().unwrap();
    let until = Instant::now() + Duration::from_secs(20);
    while libvirt.state() != "running" {
        assert!(Instant::now() < until, "the machine was left {}", libvirt.state());
        std::thread::sleep(Duration::from_millis(50));
    }
    // A domain whose name is the number of another: virsh takes numbers for ids.
    let number = libvirt.virsh(&["domid", NAME]).1.trim().to_owned();
    let xml = std::fs::read_to_string(libvirt.dir.path().join("vm.xml")).unwrap();
    let second = libvirt.dir.path().join("second.xml");
    std::fs::write(&second, xml.replace(NAME, &number)).unwrap();
    let (done, text) = libvirt.virsh(&["create", second.to_str().unwrap()]);
    assert!(done, "{text}");
    let output = libvirt
        .again("pause another")
        .env("VMSIGHT_TEST_PID", libvirt.pid_of(&number).to_string())
        .output();
    let output = output.unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && text.contains("the right one"),
        "{text}"
    );
    let uuid = describe(libvirt.pid_of(&number)).unwrap().uuid.unwrap();
    libvirt.virsh(&["destroy", &uuid]);
    // One that its owner paused stays so.
    assert!(libvirt.virsh(&["suspend", NAME]).0);
    let output = libvirt.again("pause briefly").output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(libvirt.state(), "paused");
}

fn in_the_session(what: &str) {
    let target = attached(std::env::var("VMSIGHT_TEST_PID").unwrap().parse().unwrap());
    if what == "use" {
        let registers = target.registers(None).unwrap();
        assert_eq!(registers.len(), 2);
        assert!(matches!(
            target.registers(Some(7)),
            Err(TargetError::NoVcpu { .. })
        ));
        let pause = target.pause().unwrap();
        assert!(pause.will_resume());
        assert_eq!(target.registers(None).unwrap(), target.registers(None).unwrap());
        drop(pause);
        // What nobody proves libvirt still tells.
        let refuse = |_: &GuestMemory| Err("nothing".to_owned());
        let options = AttachOptions {
            prove: Some(&refuse),
            ..AttachOptions::default()
        };
        let told = attach(&TargetSpec::Pid(target.info.as_ref().unwrap().pid), &options);
        let told = told.unwrap_or_else(|e| panic!("{e}"));
        assert!(
            told.notes.iter().any(|n| n.contains("monitor told")),
            "{:?}",
            told.notes
        );
        assert!(find_mark(&told.memory).is_ok());
        println!("all of it works");
        return;
    }
    if what == "pause another" {
        let state = |pid: u32| {
            let uuid = describe(pid).unwrap().uuid.unwrap();
            let output = Command::new("virsh")
                .args(["--quiet", "--connect", "qemu:///session", "domstate", &uuid])
                .output()
                .unwrap();
            String::from_utf8_lossy(&output.stdout).trim().to_owned()
        };
        let pid = target.info.as_ref().unwrap().pid;
        assert_eq!(state(pid), "running");
        let pause = target.pause().unwrap();
        assert_eq!(state(pid), "paused");
        drop(pause);
        assert_eq!(state(pid), "running");
        println!("the right one");
        return;
    }
    let pause = target.pause().unwrap();
    println!("paused");
    if what == "pause" {
        std::thread::sleep(Duration::from_secs(60));
    }
    assert!(!pause.will_resume());
}
