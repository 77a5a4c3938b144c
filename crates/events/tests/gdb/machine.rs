//! Starting and stopping a QEMU with such a guest.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vmsight_arch::Gpa;
use vmsight_events::Monitor;
use vmsight_events::gdb::{self, GdbOptions};
use vmsight_target::{AttachOptions, Target, TargetSpec, attach};

use crate::guest::{DONE, Guest, IDLE, ROUNDS, physical};

/// The longest wait for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A QEMU of our own; killed and its folder removed when dropped.
pub(crate) struct Machine {
    child: Child,
    dir: tempfile::TempDir,
    pub(crate) guest: Guest,
    pub(crate) target: Target,
}

impl Machine {
    /// A guest of so many vCPUs, all of which wait for work.
    pub(crate) fn start(vcpus: u32) -> Self {
        Self::start_with(vcpus, &[])
    }

    pub(crate) fn start_with(vcpus: u32, more: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let guest = Guest::new();
        let image = dir.path().join("image");
        std::fs::write(&image, &guest.image).unwrap();
        let qmp = format!("unix:{},server=on,wait=off", dir.path().join("qmp").display());
        let more = more
            .iter()
            .map(|a| a.replace("DIR", dir.path().to_str().unwrap()));
        let child = Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-display", "none", "-accel", "tcg", "-cpu", "max"])
            .args(["-m", "16", "-smp", &vcpus.to_string(), "-qmp", &qmp, "-bios"])
            .arg(&image)
            .args(more)
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| {
                panic!("qemu-system-x86_64: {e}; install the Debian package qemu-system-x86")
            });
        let pid = child.id();
        let options = AttachOptions {
            write: true,
            timeout: Duration::from_secs(10),
            prove: None,
            ahead: None,
        };
        let until = Instant::now() + PATIENCE;
        let target = loop {
            match attach(&TargetSpec::Pid(pid), &options) {
                Ok(target) => break target,
                Err(error) => assert!(Instant::now() < until, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        let machine = Self {
            child,
            dir,
            guest,
            target,
        };
        for vcpu in 0..vcpus {
            machine.wait_for(|m| m.word(vcpu, IDLE) > 0);
        }
        machine
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn monitor(&self) -> Monitor {
        gdb::open(&self.target, GdbOptions::default()).unwrap()
    }

    /// Attaches to the machine of another test process.
    pub(crate) fn monitor_of(pid: u32) -> Monitor {
        let target = attach(&TargetSpec::Pid(pid), &AttachOptions::default()).unwrap();
        gdb::open(&target, GdbOptions::default()).unwrap()
    }

    /// A member of a vCPU's page.
    pub(crate) fn word(&self, vcpu: u32, member: u64) -> u64 {
        let mut bytes = [0; 8];
        self.target
            .memory
            .read(Gpa(physical(vcpu, member)), &mut bytes)
            .unwrap();
        u64::from_le_bytes(bytes)
    }

    /// Changes a member of a vCPU's page.
    pub(crate) fn set(&self, vcpu: u32, member: u64, value: u64) {
        let at = Gpa(physical(vcpu, member));
        self.target.memory.write(at, &value.to_le_bytes()).unwrap();
    }

    /// Gives a vCPU so many rounds to do.
    pub(crate) fn work(&self, vcpu: u32, rounds: u64) {
        self.set(vcpu, ROUNDS, rounds);
    }

    /// Whether a vCPU is through with its work for the nth time.
    pub(crate) fn is_done(&self, vcpu: u32, times: u64) -> bool {
        self.word(vcpu, DONE) == times
    }

    pub(crate) fn wait_for(&self, mut what: impl FnMut(&Self) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !what(self) {
            if Instant::now() >= until {
                let registers = self.hmp("info registers -a");
                panic!(
                    "it did not come to pass; the machine is {}: {registers}",
                    self.status()
                );
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The machine runs, all its vCPUs.
    pub(crate) fn lives(&self, vcpus: u32) {
        for vcpu in 0..vcpus {
            let before = self.word(vcpu, IDLE);
            self.wait_for(|m| m.word(vcpu, IDLE) != before);
        }
    }

    /// What the machine is, by QEMU's word: `running`, `paused`, `debug`.
    pub(crate) fn status(&self) -> String {
        let answer = self.command(r#"{"execute":"query-status"}"#);
        let (_, rest) = answer.split_once(r#""status": ""#).unwrap();
        rest.split('"').next().unwrap().to_owned()
    }

    pub(crate) fn hmp(&self, line: &str) -> String {
        self.command(&format!(
            r#"{{"execute":"human-monitor-command","arguments":{{"command-line":"{line}"}}}}"#
        ))
    }

    /// One QMP command through a connection of its own; the answer's line.
    pub(crate) fn command(&self, json: &str) -> String {
        let path: PathBuf = self.dir().join("qmp");
        let mut stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        let mut answer = move || loop {
            let line = lines.next().expect("QMP ended").unwrap();
            if !line.contains("\"event\"") {
                return line;
            }
        };
        answer();
        let mut last = String::new();
        for line in [r#"{"execute":"qmp_capabilities"}"#, json] {
            stream.write_all(line.as_bytes()).unwrap();
            last = answer();
            assert!(last.contains("\"return\""), "{line}: {last}");
        }
        last
    }

    /// Kills it, as a crash or an administrator would.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
