//! The stage: how parts of the workload are started, say that they are ready, and then stand still.

use std::any::Any;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use vmsight_workload::frame;

use crate::{collect, sys};

/// Where the binary has all its names.
pub(crate) const STAGE: &str = "/srv/bin";
/// What a part holds on to while it stands still.
pub(crate) type Held = Box<dyn Any>;

/// A part of the workload, to be started.
pub(crate) struct Part {
    name: &'static str,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
}

impl Part {
    /// A part whose only argument is its name.
    pub(crate) fn new(name: &'static str) -> Part {
        Part {
            name,
            args: vec![name.into()],
            env: vec![("PATH".into(), "/srv/bin:/bin".into())],
        }
    }

    /// Its arguments, from the zeroth on.
    pub(crate) fn args<T: Into<OsString>>(mut self, args: impl IntoIterator<Item = T>) -> Part {
        self.args = args.into_iter().map(Into::into).collect();
        self
    }

    /// Its name.
    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// One more environment variable.
    pub(crate) fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Part {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Starts it and waits until it says that it is ready. Gives its pid, and what it could not do.
    pub(crate) fn start(self) -> Result<(u32, Vec<String>)> {
        let path = format!("{STAGE}/{}", self.name);
        let mut args = self.args.into_iter();
        let mut child = Command::new(&path)
            .arg0(args.next().unwrap_or_default())
            .args(args)
            .env_clear()
            .envs(self.env)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {path}"))?;
        let mut lacking = Vec::new();
        let output = child.stdout.take().context("no pipe")?;
        for line in BufReader::new(output).lines() {
            let line = line?;
            match line.strip_prefix("lacking ") {
                Some(what) => lacking.push(format!("{}: {what}", self.name)),
                None if line == "ready" => return Ok((child.id(), lacking)),
                None => bail!("{} says '{line}'", self.name),
            }
        }
        bail!("{} ended before it was ready", self.name)
    }
}

/// Says what this kernel cannot do; the part goes on without it.
pub(crate) fn lacking(what: &str, why: impl std::fmt::Display) {
    let why = why.to_string().replace('\n', " ");
    println!("lacking {what}: {why}");
}

/// Says that everything is in place, and lets go of the pipe that said so.
pub(crate) fn ready() -> Result<()> {
    println!("ready");
    hush()
}

/// Like [`ready`], for a program whose root no longer has a /dev/null: `null` was opened before.
pub(crate) fn ready_with(null: &File) -> Result<()> {
    println!("ready");
    nix::unistd::dup2_stdout(null.as_fd()).context("let go of the pipe")
}

/// Points standard output at /dev/null.
pub(crate) fn hush() -> Result<()> {
    let null = File::options()
        .write(true)
        .open("/dev/null")
        .context("/dev/null")?;
    nix::unistd::dup2_stdout(null.as_fd()).context("let go of the pipe")
}

/// Stands still for ever.
pub(crate) fn stand() -> ! {
    loop {
        nix::unistd::pause();
    }
}

/// Makes a cgroup below the unified hierarchy.
pub(crate) fn make_cgroup(path: &str) -> Result<()> {
    let folder = format!("/sys/fs/cgroup{path}");
    fs::create_dir_all(&folder).with_context(|| folder)
}

/// Moves this process to a cgroup, which is made if need be.
pub(crate) fn join_cgroup(path: &str) -> Result<()> {
    make_cgroup(path)?;
    fs::write(format!("/sys/fs/cgroup{path}/cgroup.procs"), "0")
        .with_context(|| format!("join cgroup {path}"))
}

/// Runs a busybox tool; its output goes to the console.
pub(crate) fn busybox(line: &str) -> Result<()> {
    let output = Command::new("/bin/busybox")
        .args(line.split(' '))
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("run busybox {line}"))?;
    if !output.status.success() {
        bail!(
            "busybox {line}: {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

/// The collector: `collector PID LACKING…`, where PID is the process that shall page out its memory, 0 for none.
pub(crate) fn collect() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let swap_out = args.next().context("no pid given")?.parse::<u32>()?;
    let truth = collect::truth((swap_out != 0).then_some(swap_out), args.collect())?;
    let json = serde_json::to_vec(&truth)?;
    send(&frame::pack(&json)?)
}

/// Writes to the second serial port.
///
/// Not through the kernel's driver: half a megabyte of interrupts is slow, and a kernel with PREEMPT_RT takes so many
/// of them for stray ones and switches the line off. And not with a user's port I/O in a guest of a guest, which
/// `vmsight.nested` says this is: QEMU's emulation of SVM (7.2) keeps the task state's busy bit that VMLOAD brings, and then
/// finds no I/O permissions in it. There the kernel does it for us, byte by byte.
pub(crate) fn send(bytes: &[u8]) -> Result<()> {
    let line = fs::read_to_string("/proc/cmdline").context("/proc/cmdline")?;
    let sent = if line.split_ascii_whitespace().any(|word| word == "vmsight.nested") {
        File::options().write(true).open("/dev/port").and_then(|ports| {
            bytes
                .iter()
                .try_for_each(|byte| ports.write_all_at(&[*byte], sys::SERIAL_PORT.into()))
        })
    } else {
        sys::serial_out(bytes)
    };
    sent.context("write to the second serial port")
}
