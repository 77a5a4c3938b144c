//! A running guest.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;
use vmsight_workload::{Truth, frame};

use crate::cache::Lock;
use crate::flat;
use crate::folder::Folder;
use crate::kernel::Fetched;
use crate::orders::{Account, Order, Orders, Prepared};
use crate::qmp::Qmp;
use crate::spec::{Memory, Spec};
use crate::{initramfs, modules};

/// How many guests may be booting at once on this machine. Booting is all work; afterwards they only stand there.
pub(crate) const BOOTING: usize = 2;
/// How long a boot may take, unless `VMSIGHT_LAB_TIMEOUT` (seconds) says otherwise. Usually it is 10 to 20 s.
const TIMEOUT: Duration = Duration::from_secs(300);

/// Forms of a memory dump.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// An ELF core, as `dump-guest-memory` and `virsh dump` write it.
    Elf,
    /// The bytes from guest-physical 0 to the end of memory, with zeroes in the hole below 4 GiB.
    Raw,
}

/// A guest that has booted, has said what it is, and is quiet. Dropping it ends it.
#[derive(Debug)]
pub struct Guest {
    spec: Spec,
    process: Process,
    truth: Truth,
    boot_time: Duration,
    orders: OnceLock<Orders>,
    folder: Folder,
}

/// How a kernel begins to say that it met an INT3 of nobody's.
const OOPS_OF_INT3: &str = "int3: 0000 [#";
/// What becomes of that. A kernel patches its code by INT3s for as long as the other processors may be in it. QEMU, which translates code,
/// now and then executes one that is gone already (seen once in some hundred boots of 6.12 with two vCPUs, in a guest that nobody
/// had touched, at a static key's NOP).
const EMULATORS: &str = "the guest met an INT3 that it had taken out of its code already";

impl Guest {
    /// Boots a guest and waits until it is quiet. Where that fails, the error has the end of its console log.
    pub fn boot(spec: &Spec) -> Result<Guest> {
        Self::boot_with(spec, false)
    }

    /// Boots a guest that outlives this process: whoever asked for it ends it, by its pid.
    pub fn boot_to_keep(spec: &Spec) -> Result<Guest> {
        Self::boot_with(spec, true)
    }

    fn boot_with(spec: &Spec, keep: bool) -> Result<Guest> {
        if spec.paging == crate::Paging::Five && !spec.kernel.has_five_levels() {
            bail!("{} was built without 5-level paging", spec.kernel);
        }
        let kernel = spec.kernel.fetch()?;
        let own = if spec.modules {
            modules::build(&kernel)?
        } else {
            Vec::new()
        };
        let initramfs = initramfs::build_with(&kernel, &own, spec.programs)?;
        match Self::boot_once(spec, keep, &kernel, &initramfs) {
            Err(error) if format!("{error:#}").contains(EMULATORS) => {
                eprintln!("once more, for that was QEMU's doing: {error:#}");
                Self::boot_once(spec, keep, &kernel, &initramfs)
            }
            result => result,
        }
    }

    fn boot_once(spec: &Spec, keep: bool, kernel: &Fetched, initramfs: &Path) -> Result<Guest> {
        let folder = Folder::make(spec.memory_mib, keep)?;
        let _place = Lock::wait_for_place("boot", BOOTING)?;
        let started = Instant::now();
        let mut process = Process::start(spec, &kernel.vmlinuz(), initramfs, folder.path(), keep)?;
        let truth = wait(&mut process, folder.path()).with_context(|| {
            format!(
                "guest {spec} ({}) did not come up; its console says:\n{}",
                kernel.package,
                tail(folder.path())
            )
        })?;
        Ok(Guest {
            spec: spec.clone(),
            process,
            truth,
            boot_time: started.elapsed(),
            orders: OnceLock::new(),
            folder,
        })
    }

    /// What was asked for.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// The pid of its QEMU process.
    pub fn pid(&self) -> u32 {
        self.process.pid
    }

    /// What it said of itself.
    pub fn truth(&self) -> &Truth {
        &self.truth
    }

    /// How long it took from QEMU's start until it was quiet.
    pub fn boot_time(&self) -> Duration {
        self.boot_time
    }

    /// A folder for things that shall go away with the guest.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Its QMP socket, if it has one. QEMU serves one client at a time.
    pub fn qmp_path(&self) -> Option<PathBuf> {
        self.spec.qmp.then(|| self.folder.path().join("qmp"))
    }

    /// The file that holds its memory, if it is in one.
    pub fn memory_path(&self) -> Option<PathBuf> {
        (self.spec.memory == Memory::File).then(|| self.folder.path().join("memory"))
    }

    /// Where the agent in its QEMU listens, if it has one.
    pub fn agent_path(&self) -> Option<PathBuf> {
        self.spec.agent.is_some().then(|| agent_at(self.folder.path()))
    }

    /// The kernel image it runs.
    pub fn vmlinuz(&self) -> Result<PathBuf> {
        Ok(self.spec.kernel.fetch()?.vmlinuz())
    }

    /// What it wrote on its console so far.
    pub fn console(&self) -> String {
        console(self.folder.path())
    }

    /// The socket on which it takes orders, if it does. QEMU serves one client at a time.
    pub fn orders_path(&self) -> Option<PathBuf> {
        self.spec.orders.then(|| self.folder.path().join("orders"))
    }

    /// The line on which it takes orders, connected to when it is first asked for.
    pub fn orders(&self) -> Result<&Orders> {
        let path = self
            .orders_path()
            .with_context(|| format!("guest {} takes no orders", self.spec))?;
        if let Some(orders) = self.orders.get() {
            return Ok(orders);
        }
        // Where another thread was faster, QEMU serves that one, and this connection goes unused.
        let orders = Orders::connect(&path)?;
        Ok(self.orders.get_or_init(|| orders))
    }

    /// Has it do something, and waits for its account: see [`Orders::order`].
    pub fn order(&self, order: impl Into<Order>) -> Result<Account> {
        self.orders()?.order(order)
    }

    /// Has it make something ready: see [`Orders::prepare`].
    pub fn prepare(&self, order: impl Into<Order>) -> Result<Prepared<'_>> {
        self.orders()?.prepare(order)
    }

    /// Connects to its QMP socket.
    pub fn qmp(&self) -> Result<Qmp> {
        let path = self
            .qmp_path()
            .with_context(|| format!("guest {} has no QMP socket", self.spec))?;
        Qmp::connect(&path)
    }

    /// Runs `work` while the guest is paused.
    pub fn paused<T>(&self, work: impl FnOnce(&mut Qmp) -> Result<T>) -> Result<T> {
        let mut qmp = self.qmp()?;
        qmp.execute("stop", json!({}))?;
        let result = work(&mut qmp);
        qmp.execute("cont", json!({}))?;
        result
    }

    /// Dumps its memory into a file while it is paused.
    pub fn dump(&self, format: Format, file: &Path) -> Result<()> {
        self.paused(|qmp| self.dump_paused(qmp, format, file))
    }

    /// Dumps the memory of a guest that is paused already.
    pub fn dump_paused(&self, qmp: &mut Qmp, format: Format, file: &Path) -> Result<()> {
        let name = file
            .to_str()
            .with_context(|| format!("{} is not UTF-8", file.display()))?;
        match format {
            Format::Elf => {
                qmp.execute(
                    "dump-guest-memory",
                    json!({ "paging": false, "protocol": format!("file:{name}") }),
                )?;
            }
            Format::Raw => {
                // Beside the result, which has the room for it; not in the guest's folder, which is in memory.
                let beside = file.with_extension("raw-from-elf");
                self.dump_paused(qmp, Format::Elf, &beside)?;
                let made = flat::from_elf(&beside, file);
                std::fs::remove_file(&beside).with_context(|| format!("remove {}", beside.display()))?;
                made?;
            }
        }
        Ok(())
    }

    /// Ends it and waits until it is gone.
    pub fn stop(mut self) -> Result<()> {
        self.process.end()
    }
}

/// The QEMU process.
///
/// It was started by a thread that lives as long as it does: the kernel ties the "die with your parent" of setpriv(1)
/// to the thread that forked, and the threads of a test runner come and go.
#[derive(Debug)]
struct Process {
    pid: u32,
    ended: Mutex<mpsc::Receiver<ExitStatus>>,
    orders: mpsc::Sender<()>,
    keep: bool,
}

impl Process {
    fn start(spec: &Spec, vmlinuz: &Path, initramfs: &Path, folder: &Path, keep: bool) -> Result<Process> {
        let mut command = command(spec, vmlinuz, initramfs, folder, keep)?;
        let (tell_pid, told_pid) = mpsc::channel();
        let (tell_end, ended) = mpsc::channel();
        let (orders, ordered) = mpsc::channel();
        std::thread::Builder::new()
            .name("lab-guest".to_owned())
            .spawn(move || match command.spawn() {
                Ok(child) => {
                    let _ = tell_pid.send(Ok(child.id()));
                    look_after(child, &ordered, &tell_end);
                }
                Err(error) => {
                    let _ = tell_pid.send(Err(error));
                }
            })?;
        let pid = told_pid
            .recv()?
            .context("start setpriv and qemu-system-x86_64 (see script/packages.txt)")?;
        Ok(Process {
            pid,
            ended: Mutex::new(ended),
            orders,
            keep,
        })
    }

    fn ended(&self) -> MutexGuard<'_, mpsc::Receiver<ExitStatus>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn status(&self) -> Option<ExitStatus> {
        self.ended().try_recv().ok()
    }

    fn end(&mut self) -> Result<()> {
        // Fails where it has ended already, which is as good.
        let _ = self.orders.send(());
        match self.ended().recv_timeout(Duration::from_secs(30)) {
            Ok(_) | Err(mpsc::RecvTimeoutError::Disconnected) => Ok(()),
            Err(error) => Err(error).context("QEMU does not end"),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.keep {
            let _ = self.end();
        }
    }
}

/// Kills the child when told to, and says when it has ended. Only we wait for it, so its pid cannot become another's.
fn look_after(mut child: Child, ordered: &mpsc::Receiver<()>, ended: &mpsc::Sender<ExitStatus>) {
    loop {
        match child.try_wait() {
            Ok(Some(status)) => {
                let _ = ended.send(status);
                return;
            }
            Ok(None) => {}
            Err(_) => return,
        }
        match ordered.recv_timeout(Duration::from_millis(100)) {
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Ok(()) => {
                let _ = child.kill();
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                // The owner of a kept guest has gone; there is nobody to tell.
                return;
            }
        }
    }
}

fn command(spec: &Spec, vmlinuz: &Path, initramfs: &Path, folder: &Path, keep: bool) -> Result<Command> {
    let mut words: Vec<OsString> = match keep {
        true => Vec::new(),
        false => ["setpriv", "--pdeathsig", "KILL", "--"]
            .map(OsString::from)
            .to_vec(),
    };
    if let Some(launcher) = &spec.launcher {
        words.push(launcher.into());
        words.extend(["launch", "--socket"].map(OsString::from));
        words.extend([agent_at(folder).into(), "--".into()]);
    }
    words.extend(spec.qemu.command()?);
    let (program, first) = words.split_first().context("no program is named")?;
    let mut command = Command::new(program);
    command.args(first);
    let size = format!("{}M", spec.memory_mib);
    let at = |name: &str| folder.join(name).display().to_string();
    let mut machine = spec.machine_type().to_owned();
    if spec.memory != Memory::Private {
        machine.push_str(",memory-backend=ram");
    }
    command
        .args([
            "-name",
            &format!("vmsight-lab-{spec}"),
            "-no-user-config",
            "-nodefaults",
            "-display",
            "none",
        ])
        .args([
            "-accel",
            "tcg,thread=multi",
            "-machine",
            &machine,
            "-cpu",
            spec.cpu(),
        ])
        .args(["-m", &size, "-smp", &spec.vcpus.to_string(), "-no-reboot"]);
    match spec.memory {
        Memory::File => {
            let object = format!(
                "memory-backend-file,id=ram,size={size},share=on,mem-path={}",
                at("memory")
            );
            command.args(["-object", &object]);
        }
        Memory::Memfd => {
            command.args([
                "-object",
                &format!("memory-backend-memfd,id=ram,size={size},share=on"),
            ]);
        }
        Memory::Private => {}
    }
    if spec.qmp {
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", at("qmp"))]);
    }
    match (&spec.agent, &spec.launcher) {
        (Some(agent), Some(_)) => {
            command.env("VMSIGHT_AGENT_LIBRARY", agent);
        }
        (Some(agent), None) => {
            command
                .arg("-plugin")
                .arg(agent)
                .env("VMSIGHT_AGENT", agent_at(folder));
        }
        (None, _) => {}
    }
    let mut words = vec!["console=ttyS0", "quiet", "panic=-1", "vmsight.lab"];
    // On a busy host the kernel may find its clock source unstable, and change it after it has said which it has.
    words.push("tsc=nowatchdog");
    if spec.orders {
        words.push("vmsight.orders");
    }
    words.extend(spec.kernel_args.iter().map(String::as_str));
    command
        .args(["-serial", &format!("file:{}", at("console.log"))])
        .args(["-serial", &format!("file:{}", at("truth.log"))]);
    if spec.orders {
        command.args(orders_line(&folder.join("orders")));
    }
    command
        .arg("-kernel")
        .arg(vmlinuz)
        .arg("-initrd")
        .arg(initramfs)
        .args(["-append", &words.join(" ")])
        .args(&spec.qemu_args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(folder.join("qemu.log")).map_or_else(|_| Stdio::null(), Stdio::from))
        // A Ctrl-C is for us; we then end it in order.
        .process_group(0);
    Ok(command)
}

/// Where the agent in a guest's QEMU listens: in a folder of its own, which it makes.
fn agent_at(folder: &Path) -> PathBuf {
    folder.join("agent/vm.sock")
}

/// The arguments of QEMU that give a guest its line for orders, at a socket at `path`; they come after those of two other serial
/// ports. The guest has to have `vmsight.orders` on its kernel command line.
pub fn orders_line(path: &Path) -> [String; 4] {
    [
        "-chardev".to_owned(),
        format!("socket,id=orders,path={},server=on,wait=off", path.display()),
        "-serial".to_owned(),
        "chardev:orders".to_owned(),
    ]
}

/// Waits for the truth and the word that the guest is quiet.
fn wait(process: &mut Process, folder: &Path) -> Result<Truth> {
    let timeout = match std::env::var("VMSIGHT_LAB_TIMEOUT") {
        Ok(seconds) => Duration::from_secs(
            seconds
                .parse()
                .context("VMSIGHT_LAB_TIMEOUT is no number of seconds")?,
        ),
        Err(_) => TIMEOUT,
    };
    let deadline = Instant::now() + timeout;
    let (ready, failed) = (format!("\n{}", frame::READY), frame::FAILED.as_bytes());
    let mut received = Vec::new();
    let mut file = None;
    loop {
        if let Some(status) = process.status() {
            // A kernel that panics ends QEMU, which may be over before it was looked at.
            if console(folder).contains(OOPS_OF_INT3) {
                bail!("{EMULATORS}");
            }
            let errors = fs::read_to_string(folder.join("qemu.log")).unwrap_or_default();
            bail!("QEMU ended ({}): {}", describe(status), errors.trim());
        }
        if file.is_none() {
            file = File::open(folder.join("truth.log")).ok();
        }
        let before = received.len();
        if let Some(file) = &mut file {
            file.read_to_end(&mut received)
                .context("read the guest's truth")?;
        }
        if received.len() > before {
            // A marker may straddle two reads.
            let fresh = &received[before.saturating_sub(256)..];
            if let Some(at) = find(fresh, failed) {
                let line = fresh[at + failed.len()..]
                    .split(|b| *b == b'\n')
                    .next()
                    .unwrap_or_default();
                bail!(
                    "the workload could not be set up: {}",
                    String::from_utf8_lossy(line)
                );
            }
            if find(fresh, ready.as_bytes()).is_some() {
                let json =
                    frame::unpack(&received).map_err(|e| anyhow::anyhow!("the truth came broken: {e:?}"))?;
                return serde_json::from_slice(&json).context("read the truth");
            }
        }
        let console = console(folder);
        if console.contains("Kernel panic") || console.contains(frame::FAILED) {
            match console.contains(OOPS_OF_INT3) {
                true => bail!("{EMULATORS}"),
                false => bail!("the guest failed"),
            }
        }
        if Instant::now() > deadline {
            bail!("not ready after {} s", timeout.as_secs());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn describe(status: ExitStatus) -> String {
    status
        .signal()
        .map_or_else(|| status.to_string(), |signal| format!("signal {signal}"))
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|w| w == needle)
}

/// What a guest wrote on its console so far.
pub(crate) fn console(folder: &Path) -> String {
    let raw = fs::read(folder.join("console.log")).unwrap_or_default();
    String::from_utf8_lossy(&raw).replace('\r', "")
}

/// The end of the console log.
fn tail(folder: &Path) -> String {
    let text = console(folder);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}
