//! Through libvirt, which holds the monitor of its VMs: `virsh` shares it with us as its owner wants it shared.
//!
//! A register listing goes by `qemu-monitor-command`, which makes libvirt note in its log that somebody used the
//! monitor ("tainted: custom-monitor"); so it is asked only when somebody wants registers. A pause is libvirt's own
//! `suspend` and `resume`, so that its picture of the VM stays true.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmsight_arch::Registers;

use super::{PauseGuard, Pauses, lock};
use crate::discover::Manager;
use crate::guard::Guard;
use crate::host::process::Identity;
use crate::monitor;
use crate::{TargetError, VmInfo};

/// The most that is read of what virsh prints.
const MAX_OUTPUT: u64 = 16 << 20;
/// What virsh may take at least: it starts a daemon where none runs.
const MIN_TIMEOUT: Duration = Duration::from_secs(10);

/// A domain of libvirt's. Clones share one state.
#[derive(Clone, Debug)]
pub(crate) struct VirshControl {
    program: PathBuf,
    uri: &'static str,
    /// libvirt's UUID of the domain. Not its name: `virsh` takes a number for the id of another one.
    uuid: String,
    /// Where libvirt keeps what it knows of the domains that run, and this one's name there.
    folder: PathBuf,
    domain: String,
    vm: Identity,
    timeout: Duration,
    held: Arc<Mutex<Held>>,
}

#[derive(Default, Debug)]
struct Held {
    pauses: usize,
    /// `None` where the VM did not run before.
    guard: Option<Guard>,
}

impl VirshControl {
    /// The way through libvirt to a VM that it runs; `None` where libvirt does not say that this process is its
    /// domain's, or there is no `virsh`. The VM's own command line is not trusted with the name: it could name another
    /// domain.
    pub(crate) fn of(info: &VmInfo, timeout: Duration) -> Option<Self> {
        let domain = info
            .name
            .as_deref()
            .filter(|n| !n.contains('/') && !n.is_empty())?;
        if info.managed_by != Some(Manager::Libvirt) {
            return None;
        }
        let me = rustix::process::geteuid().as_raw();
        // libvirt writes the pid of each domain into a folder that only it can write to.
        let system = (me == 0, PathBuf::from("/run/libvirt/qemu"), "qemu:///system");
        let session = std::env::var_os("XDG_RUNTIME_DIR").map(|dir| {
            (
                info.uid == Some(me),
                Path::new(&dir).join("libvirt/qemu/run"),
                "qemu:///session",
            )
        });
        let (_, folder, uri) = [Some(system), session]
            .into_iter()
            .flatten()
            .find(|(may, folder, _)| *may && pid_of(folder, domain) == Some(info.pid))?;
        let uuid = uuid_of(&folder, domain)?;
        let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into());
        let program = std::env::split_paths(&path)
            .map(|dir| dir.join("virsh"))
            .find(|p| p.is_file())?;
        let timeout = timeout.max(MIN_TIMEOUT);
        Some(Self {
            program,
            uri,
            uuid,
            domain: domain.to_owned(),
            folder,
            vm: info.identity(),
            timeout,
            held: Arc::default(),
        })
    }

    /// The registers of all vCPUs. The machine is not stopped for it.
    pub(crate) fn registers(&self) -> Result<Vec<Registers>, TargetError> {
        Ok(monitor::parse_registers(&self.hmp("info registers -a")?))
    }

    /// Runs one line of QEMU's human monitor and gives its text.
    pub(crate) fn hmp(&self, line: &str) -> Result<String, TargetError> {
        self.refuse_another("qemu-monitor-command")?;
        self.run(&["qemu-monitor-command", "--hmp", &self.domain_option(), line])
    }

    /// Pauses the machine until the guard that is returned is dropped.
    pub(crate) fn pause(&self) -> Result<PauseGuard, TargetError> {
        let mut held = lock(&self.held);
        self.refuse_another("suspend")?;
        if held.pauses == 0 && self.run(&["domstate", &self.domain_option()])?.trim() == "running" {
            let program = self.program.to_string_lossy();
            let command = [&*program, "--connect", self.uri, "resume", &self.domain_option()];
            let guard = Guard::command(&command).map_err(|source| TargetError::Guard {
                what: "/bin/sh cannot be started",
                source,
            })?;
            // From here on the watch lets it go on whatever happens.
            self.run(&["suspend", &self.domain_option()])?;
            held.guard = Some(guard);
        }
        held.pauses += 1;
        Ok(PauseGuard {
            control: Pauses::Virsh(self.clone()),
        })
    }

    /// Whether the machine goes on when the pause ends.
    pub(super) fn will_resume(&self) -> bool {
        lock(&self.held).guard.is_some()
    }

    pub(super) fn resume(&self) {
        let mut held = lock(&self.held);
        held.pauses = held.pauses.saturating_sub(1);
        if held.pauses > 0 {
            return;
        }
        if let Some(guard) = held.guard.take() {
            match self.run(&["resume", &self.domain_option()]) {
                Ok(_) => guard.dismiss(),
                // The watch tries once more as it is dropped.
                Err(error) => tracing::warn!(%error, "the machine could not be told to go on"),
            }
        }
    }

    fn domain_option(&self) -> String {
        format!("--domain={}", self.uuid)
    }

    /// An error where the domain is by now run by another process: it was started anew.
    fn refuse_another(&self, doing: &str) -> Result<(), TargetError> {
        if !self.vm.runs() {
            return Err(TargetError::Exited { pid: self.vm.pid });
        }
        match pid_of(&self.folder, &self.domain) {
            Some(pid) if pid == self.vm.pid => Ok(()),
            _ => Err(TargetError::Virsh {
                doing: doing.to_owned(),
                reason: format!(
                    "libvirt no longer says that process {} is its domain's",
                    self.vm.pid
                ),
            }),
        }
    }

    /// What virsh prints; an error where it fails or takes too long.
    fn run(&self, args: &[&str]) -> Result<String, TargetError> {
        let doing = args.first().copied().unwrap_or_default();
        let failed = |reason: String| TargetError::Virsh {
            doing: doing.to_owned(),
            reason,
        };
        let (done, output, messages) = run_for(
            Command::new(&self.program)
                .args(["--quiet", "--connect", self.uri])
                .args(args),
            self.timeout,
        )
        .map_err(|e| failed(e.to_string()))?;
        if done {
            Ok(output)
        } else {
            Err(failed(messages.trim().to_owned()))
        }
    }
}

/// The process of a domain that runs, as libvirt keeps it.
fn pid_of(folder: &Path, domain: &str) -> Option<u32> {
    let text = fs::read_to_string(folder.join(format!("{domain}.pid"))).ok()?;
    text.trim().parse().ok()
}

/// The UUID of a domain that runs, out of its status file.
fn uuid_of(folder: &Path, domain: &str) -> Option<String> {
    let file = File::open(folder.join(format!("{domain}.xml"))).ok()?;
    let mut text = Vec::new();
    file.take(MAX_OUTPUT).read_to_end(&mut text).ok()?;
    uuid_in(&String::from_utf8_lossy(&text)).map(str::to_owned)
}

/// The first `<uuid>` within `<domain …>`: what an owner may write (title, metadata) comes after it, and has no `<`.
fn uuid_in(status: &str) -> Option<&str> {
    let domain = status.split_once("<domain ")?.1;
    let uuid = domain.split_once("<uuid>")?.1.split_once("</uuid>")?.0.trim();
    let dashes = [8, 13, 18, 23];
    let is_uuid = uuid.len() == 36
        && uuid.bytes().enumerate().all(|(i, b)| {
            if dashes.contains(&i) {
                b == b'-'
            } else {
                b.is_ascii_hexdigit()
            }
        });
    is_uuid.then_some(uuid)
}

/// Runs a program for at most `timeout`: whether it succeeded, its output and its messages.
fn run_for(command: &mut Command, timeout: Duration) -> io::Result<(bool, String, String)> {
    let mut child = command
        .env("LC_ALL", OsStr::new("C"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let read = |pipe: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(pipe) = pipe {
                let _ = pipe.take(MAX_OUTPUT).read_to_end(&mut bytes);
            }
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let output = read(child.stdout.take().map(|p| Box::new(p) as _));
    let messages = read(child.stderr.take().map(|p| Box::new(p) as _));
    let deadline = Instant::now() + timeout;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() >= deadline {
            let _ = child.kill();
            let _ = child.wait();
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("no answer within {timeout:?}"),
            ));
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let gone = |_| io::Error::other("its output was lost");
    Ok((
        status.success(),
        output.join().map_err(gone)?,
        messages.join().map_err(gone)?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_hangs_is_ended() {
        let start = Instant::now();
        let error = run_for(Command::new("sleep").arg("600"), Duration::from_millis(100)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(start.elapsed() < Duration::from_secs(60));
        let (done, output, _) = run_for(Command::new("echo").arg("a"), Duration::from_secs(5)).unwrap();
        assert_eq!((done, output.as_str()), (true, "a\n"));
    }

    #[test]
    fn the_uuid_is_the_domains_own() {
        let status = "<domstatus state='running' pid='7'>\n<job uuid='x'/><domain type='qemu' id='1'>\n\
                      <name>1</name>\n<uuid>0f7f2b9e-6b0c-4a0b-8f57-0a4c1c6f2a11</uuid>\n<title>&lt;uuid&gt;</title>";
        assert_eq!(uuid_in(status), Some("0f7f2b9e-6b0c-4a0b-8f57-0a4c1c6f2a11"));
        for bad in [
            "",
            "<domain type='x'>",
            "<domain ><uuid>1</uuid>",
            "<uuid>0f7f2b9e-6b0c-4a0b-8f57-0a4c1c6f2a11</uuid>",
            "<domain ><uuid>0f7f2b9e-6b0c-4a0b-8f57-0a4c1c6f2a1 </uuid>",
        ] {
            assert_eq!(uuid_in(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_command_line_is_not_believed_when_it_names_a_domain() {
        let mut info = VmInfo::new(crate::Vmm::Qemu, std::process::id(), "qemu-system-x86_64");
        info.managed_by = Some(Manager::Libvirt);
        info.uid = Some(rustix::process::geteuid().as_raw());
        for name in ["no-such-domain", "../x", ""] {
            info.name = Some(name.to_owned());
            assert!(VirshControl::of(&info, MIN_TIMEOUT).is_none(), "{name}");
        }
    }
}
