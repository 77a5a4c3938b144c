//! Running an image in Bochs, headless.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;
use vmsight_lab::cache::Lock;

use crate::{Channel, Image};

/// The processor of the machine, as Bochs calls it.
pub const WITH_VMX: &str = "corei7_skylake_x";
/// One that has the monitor trap flag, too.
pub const WITH_TRAP_FLAG: &str = "corei7_icelake_u";
/// One with long mode but without VT-x.
pub const WITHOUT_VMX: &str = "athlon64_clawhammer";

/// What the hypervisor says last when there is no guest.
pub const HALTED: &str = "vmsight-hypervisor: halted";

/// A machine: 256 MiB, one disc.
#[derive(Debug)]
pub struct Machine {
    folder: TempDir,
    process: Child,
    channel: Channel,
    _lock: Lock,
}

/// How a run ended, and what came over the serial port.
#[derive(Debug)]
pub struct Run {
    /// Whether the machine was switched off.
    pub off: bool,
    /// The serial port's output. Bytes that are no UTF-8 are replaced.
    pub serial: String,
    /// The second serial port's: the hypervisor's lines, if it has a policy.
    pub channel: String,
}

impl Machine {
    /// Starts an image. One Bochs at a time: others wait.
    pub fn start(image: &Image, processor: &str) -> Result<Self> {
        Self::with_processors(image, processor, 1)
    }

    /// The same with more than one processor.
    pub fn with_processors(image: &Image, processor: &str, count: u32) -> Result<Self> {
        let lock = Lock::wait("bochs")?;
        let folder = tempfile::tempdir().context("make a temporary folder")?;
        image.write(&folder.path().join("image.iso"))?;
        let channel = Channel::listen()?;
        let configuration = configuration(processor, count, channel.port());
        fs::write(folder.path().join("bochsrc"), configuration)?;
        // Debian's Bochs has its debugger in, which asks before it starts and after each reset.
        fs::write(folder.path().join("commands"), "c\n".repeat(8))?;
        let process = Command::new("nice")
            .args(["bochs", "-q", "-f", "bochsrc", "-rc", "commands"])
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(fs::File::create(folder.path().join("output"))?)
            .stderr(Stdio::null())
            .spawn()
            .context("start bochs (see script/packages.txt)")?;
        Ok(Self {
            folder,
            process,
            channel,
            _lock: lock,
        })
    }

    /// The line to the hypervisor.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// What has come over the first serial port.
    pub fn serial(&self) -> Result<String> {
        read(&self.folder.path().join("serial"))
    }

    /// Waits until the machine is switched off, or the hypervisor has halted, or `limit` is over.
    pub fn wait(mut self, limit: Duration) -> Result<Run> {
        let deadline = Instant::now() + limit;
        loop {
            let off = self.process.try_wait().context("wait for bochs")?.is_some();
            let serial = read(&self.folder.path().join("serial"))?;
            let halted = serial.contains(HALTED);
            if off && serial.is_empty() {
                let output = read(&self.folder.path().join("output"))?;
                bail!("bochs ended before the machine said anything:\n{output}");
            }
            if off || halted || Instant::now() > deadline {
                let channel = if off {
                    self.channel.rest()
                } else {
                    self.channel.text()
                };
                return Ok(Run { off, serial, channel });
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended already; then there is nothing to do.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn read(path: &Path) -> Result<String> {
    match fs::read(path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}

fn configuration(processor: &str, count: u32, port: u16) -> String {
    format!(
        "megs: 256\n\
         romimage: file=/usr/share/bochs/BIOS-bochs-latest\n\
         vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest\n\
         cpu: model={processor}, count={count}, ips=50000000, reset_on_triple_fault=1\n\
         plugin_ctrl: unmapped=1, biosdev=1, speaker=0, extfpuirq=0, gameport=0\n\
         display_library: rfb, options=\"timeout=0\"\n\
         com1: enabled=1, mode=file, dev=serial\n\
         com2: enabled=1, mode=socket-client, dev=127.0.0.1:{port}\n\
         ata0-master: type=cdrom, path=image.iso, status=inserted\n\
         boot: cdrom\n\
         log: log\n\
         panic: action=fatal\n\
         error: action=ignore\n\
         info: action=ignore\n\
         debug: action=ignore\n\
         clock: sync=none\n"
    )
}
