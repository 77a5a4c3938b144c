//! The test's side: starts the VMM with the agent in it, and looks into the guest's memory.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use vmsight_events::Monitor;
use vmsight_events::agent::AgentBackend;

use super::guest::{CODE, DONE, END, GuestKind, RESULTS, START, WATCHED, code, labels};
use super::vmm::MEMORY;

/// How long a guest may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Machine {
    vmm: Child,
    says: BufReader<ChildStdout>,
    memory: File,
    vcpus: u32,
    folder: tempfile::TempDir,
}

/// The agent: what the environment names, or what cargo built beside this test.
fn agent() -> PathBuf {
    if let Some(library) = std::env::var_os("VMSIGHT_AGENT_LIBRARY") {
        return library.into();
    }
    let library = std::env::current_exe()
        .unwrap()
        .with_file_name("libvmsight_agent.so");
    assert!(library.exists(), "{} is not there", library.display());
    library
}

impl Machine {
    /// Starts a guest that waits; `None` where this machine has no KVM.
    pub(crate) fn start(kind: GuestKind, vcpus: u32) -> Option<Self> {
        if !Path::new("/dev/kvm").exists() {
            println!("skipped: there is no /dev/kvm here");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory");
        let memory = File::options()
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        memory.set_len(MEMORY).unwrap();
        let mut vmm = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_vmm", "--nocapture", "--test-threads=1"])
            .env(
                "VMSIGHT_TEST_VMM",
                format!("{} {vcpus} {}", kind.name(), path.display()),
            )
            .env("VMSIGHT_AGENT", socket(folder.path()))
            .env("LD_PRELOAD", agent())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let says = BufReader::new(vmm.stdout.take().unwrap());
        let mut machine = Self {
            vmm,
            says,
            memory,
            vcpus,
            folder,
        };
        assert_eq!(machine.hear(), "ready");
        Some(machine)
    }

    fn hear(&mut self) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            let read = self.says.read_line(&mut line).unwrap();
            assert_ne!(read, 0, "the VMM ended: {:?}", self.vmm.try_wait());
            if let Some(said) = line.trim_end().strip_prefix("@@") {
                return said.to_owned();
            }
        }
    }

    /// Has the VMM do something.
    pub(crate) fn command(&mut self, command: &str) -> String {
        writeln!(self.vmm.stdin.as_mut().unwrap(), "{command}").unwrap();
        self.hear()
    }

    pub(crate) fn backend(&self) -> AgentBackend {
        let socket = socket(self.folder.path());
        let end = Instant::now() + PATIENCE;
        // The agent begins to listen a moment after the VM is made.
        loop {
            match AgentBackend::open(&socket) {
                Ok(backend) => return backend,
                Err(error) if Instant::now() > end => panic!("{error}: {error:?}"),
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    pub(crate) fn try_backend(&self) -> Result<AgentBackend, vmsight_events::EventError> {
        AgentBackend::open(&socket(self.folder.path()))
    }

    pub(crate) fn monitor(&self) -> Monitor {
        Monitor::new(Box::new(self.backend()))
    }

    /// A monitor in a process of its own.
    pub(crate) fn monitor_process(&self) -> MonitorProcess {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_monitor", "--nocapture", "--test-threads=1"])
            .env("VMSIGHT_TEST_MONITOR", socket(self.folder.path()))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut monitor = MonitorProcess(child);
        monitor.hear("@@hooked");
        monitor
    }

    pub(crate) fn labels(&self) -> HashMap<&'static str, u64> {
        labels()
    }

    pub(crate) fn go(&self) {
        self.memory.write_all_at(&1_u64.to_le_bytes(), START).unwrap();
    }

    pub(crate) fn let_end(&self) {
        self.memory.write_all_at(&1_u64.to_le_bytes(), END).unwrap();
    }

    pub(crate) fn word(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.memory.read_exact_at(&mut bytes, at).unwrap();
        u64::from_le_bytes(bytes)
    }

    /// Whether all vCPUs came to their end.
    pub(crate) fn is_done(&mut self) -> bool {
        if let Some(status) = self.vmm.try_wait().unwrap() {
            panic!("the VMM ended: {status}");
        }
        self.word(DONE) == u64::from(self.vcpus)
    }

    pub(crate) fn wait_until_done(&mut self) {
        let end = Instant::now() + PATIENCE;
        while !self.is_done() {
            assert!(
                Instant::now() < end,
                "the guest hangs; it has {:?}",
                self.results()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn sum(&self, at: u64) -> u64 {
        (0..u64::from(self.vcpus))
            .map(|v| self.word(RESULTS + 64 * v + at))
            .sum()
    }

    /// What all vCPUs counted.
    pub(crate) fn results(&self) -> [u64; 3] {
        [self.sum(0), self.sum(8), self.sum(16)]
    }

    /// How many calls one vCPU has begun, of a guest that makes them until it is told to end.
    pub(crate) fn calls_of(&self, vcpu: u32) -> u64 {
        self.word(RESULTS + 64 * u64::from(vcpu) + 24)
    }

    /// Where the agent listens.
    pub(crate) fn socket(&self) -> PathBuf {
        socket(self.folder.path())
    }

    pub(crate) fn calls(&self) -> u64 {
        self.sum(24)
    }

    /// What the first vCPU left.
    pub(crate) fn results_n(&self, n: u64) -> Vec<u64> {
        (0..n).map(|i| self.word(RESULTS + 8 * i)).collect()
    }

    pub(crate) fn watched_words(&self, n: u64) -> Vec<u64> {
        (0..n).map(|i| self.word(WATCHED + 8 * i)).collect()
    }

    /// Whether the guest's code is what it was.
    pub(crate) fn code_is_clean(&self) -> bool {
        self.code_now() == code()
    }

    /// The guest's code as it is in its memory.
    pub(crate) fn code_now(&self) -> Vec<u8> {
        let mut bytes = vec![0; code().len()];
        self.memory.read_exact_at(&mut bytes, CODE).unwrap();
        bytes
    }

    /// Ends the VMM in good order.
    pub(crate) fn finish(mut self) {
        writeln!(self.vmm.stdin.as_mut().unwrap(), "exit").unwrap();
        assert_eq!(self.hear(), "bye");
        assert!(self.vmm.wait().unwrap().success());
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.vmm.kill();
        let _ = self.vmm.wait();
    }
}

fn socket(folder: &Path) -> PathBuf {
    folder.join("run").join("vm.sock")
}

/// See [`Machine::monitor_process`].
pub(crate) struct MonitorProcess(Child);

impl MonitorProcess {
    fn hear(&mut self, wanted: &str) {
        let out = self.0.stdout.as_mut().unwrap();
        // Byte by byte: nothing may be read ahead and lost.
        let mut line = Vec::new();
        let mut byte = [0];
        while std::io::Read::read(out, &mut byte).unwrap() == 1 {
            line.push(byte[0]);
            if line.ends_with(wanted.as_bytes()) {
                return;
            }
        }
        panic!("the monitor said {}", String::from_utf8_lossy(&line));
    }

    pub(crate) fn wait_until_it_holds(&mut self) {
        self.hear("@@holds");
    }

    /// As `kill -9`.
    pub(crate) fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for MonitorProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Becomes a monitor where the environment says so: it hooks, holds what comes first for an hour, and says so.
pub(crate) fn monitor_if_asked() {
    use vmsight_hooks::{Access, Delivery, Expiry, Hook, HookKind, Range};
    let Ok(socket) = std::env::var("VMSIGHT_TEST_MONITOR") else {
        return;
    };
    let monitor = Monitor::new(Box::new(AgentBackend::open(Path::new(&socket)).unwrap()));
    let patiently = Delivery::Held {
        deadline: Duration::from_secs(3600),
        expiry: Expiry::Open,
    };
    let mut guards = Vec::new();
    let labelled = ["function", "push", "inc", "pushf", "nop", "inc_again"];
    let count = if super::has_int3() { labelled.len() } else { 4 };
    for label in labelled.into_iter().take(count) {
        let hook = Hook::execute(vmsight_arch::Gva(labels()[label])).delivered(patiently);
        guards.push(monitor.hook(&hook).unwrap());
    }
    let page = HookKind::Memory {
        range: Range::Physical {
            start: vmsight_arch::Gpa(RESULTS),
            len: 64,
        },
        access: Access::WRITE,
    };
    guards.push(monitor.hook(&Hook::new(page).delivered(patiently)).unwrap());
    println!("\n@@hooked");
    // Some are answered, so that breakpoints are being stepped over; then nothing more.
    let mut held = Vec::new();
    for n in 0..40 {
        let occurrence = monitor.next(PATIENCE).unwrap().expect("an event");
        if n > 35 {
            held.push(occurrence);
        }
        if held.len() == 2 {
            break;
        }
    }
    println!("\n@@holds");
    std::io::stdout().flush().unwrap();
    std::thread::sleep(Duration::from_secs(3600));
}
