//! The machines that the guest of the bench runs in.

use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;
use vmsight_events::agent::AgentBackend;
use vmsight_events::gdb::{self, GdbOptions};
use vmsight_events::{EventError, Monitor};
use vmsight_gauge::Timer;
use vmsight_gauge::image::{Image, MEMORY};
use vmsight_gauge::vmm::Privilege;
use vmsight_target::{AttachOptions, TargetSpec, attach};

/// The longest wait for a machine to run, and for it to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// What runs the guest.
#[derive(Clone, Debug)]
pub(super) enum Host {
    /// The VMM of some lines, on this machine's KVM.
    Vmm(Privilege),
    /// Stock QEMU.
    Qemu { program: PathBuf, accelerator: String },
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vmm(Privilege::Kernel) => f.write_str("least VMM, kvm"),
            Self::Vmm(Privilege::Program) => f.write_str("least VMM, kvm, as a program"),
            Self::Qemu { program, accelerator } => {
                write!(f, "{}, {accelerator}", program.display())
            }
        }
    }
}

/// A machine that runs the guest; it ends when this is dropped, or this program does.
pub(super) struct Machine {
    child: Child,
    folder: TempDir,
    pub(super) timer: Timer,
}

impl Machine {
    /// Starts the guest, with the agent in its VMM or without.
    pub(super) fn start(host: &Host, agent: bool) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("vmsight-bench-")
            .tempdir()
            .context("making a folder")?;
        let path = folder.path().join("memory");
        let memory = File::options()
            .create_new(true)
            .read(true)
            .write(true)
            .open(&path)
            .with_context(|| format!("making {}", path.display()))?;
        memory.set_len(MEMORY).context("making the guest's memory")?;
        let image = Image::assemble().context("making the guest's code")?;
        let own = std::env::current_exe().context("finding this program")?;
        let mut command = Command::new(&own);
        command.args(["bench", "child", "--"]);
        if agent {
            command.arg(&own).args(["launch", "--socket"]);
            command.arg(socket(folder.path())).arg("--");
        }
        match host {
            Host::Vmm(privilege) => {
                command.arg(&own).args(["bench", "vmm"]).arg(&path);
                if *privilege == Privilege::Program {
                    command.arg("--program");
                }
            }
            Host::Qemu { program, accelerator } => {
                let firmware = folder.path().join("firmware");
                std::fs::write(&firmware, &image.bytes).context("writing the guest's code")?;
                let backend = format!(
                    "memory-backend-file,id=memory,size={MEMORY},share=on,mem-path={}",
                    path.display()
                );
                let monitor = format!("unix:{},server=on,wait=off", folder.path().join("qmp").display());
                command
                    .arg(program)
                    .args([
                        "-nodefaults",
                        "-display",
                        "none",
                        "-accel",
                        accelerator,
                        "-cpu",
                        "max",
                    ])
                    .args(["-machine", "pc,memory-backend=memory"])
                    .args(["-m", &format!("{}M", MEMORY >> 20), "-object", &backend])
                    .args(["-qmp", &monitor, "-bios"])
                    .arg(&firmware);
            }
        }
        let log = folder.path().join("log");
        let errors = File::create(&log).context("making a log")?;
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors)
            .spawn()
            .context("starting the guest")?;
        let alive = || matches!(child.try_wait(), Ok(None));
        match Timer::start(memory, image, PATIENCE, alive) {
            Ok(timer) => Ok(Self { child, folder, timer }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                let said = std::fs::read_to_string(&log).unwrap_or_default();
                let lines: Vec<&str> = said.lines().map(str::trim).collect();
                match lines.is_empty() {
                    false => bail!("{error}: {}", lines.join(" ")),
                    true => Err(error).context("starting the guest"),
                }
            }
        }
    }

    /// Where the agent listens, if there is one.
    pub(super) fn socket(&self) -> PathBuf {
        socket(self.folder.path())
    }

    /// The process.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }
}

/// A monitor by the agent in a VMM.
pub(super) fn by_agent(socket: &Path) -> Result<Monitor> {
    retry(|| AgentBackend::open(socket).map(|backend| Monitor::new(Box::new(backend))))
        .context("reaching the agent")
}

/// A monitor by a QEMU's gdb stub.
pub(super) fn by_stub(pid: u32) -> Result<Monitor> {
    let options = AttachOptions::default();
    let target = attach(&TargetSpec::Pid(pid), &options).context("attaching to QEMU")?;
    retry(|| gdb::open(&target, GdbOptions { timeout: PATIENCE })).context("opening the gdb stub")
}

/// What listens comes to do so a moment after the guest runs.
fn retry<T>(mut open: impl FnMut() -> Result<T, EventError>) -> Result<T, EventError> {
    let end = Instant::now() + PATIENCE;
    loop {
        match open() {
            Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(10)),
            result => return result,
        }
    }
}

/// In a folder of its own, which the agent's must be.
fn socket(folder: &Path) -> PathBuf {
    folder.join("run").join("vm.sock")
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
