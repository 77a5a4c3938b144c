//! From a target to a connection for hooks: the stub that is there, or one that is opened for it and closed again.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, chown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::Debugger;
use super::refuse_if_busy;
use crate::control::{QmpControl, VirshControl};
use crate::host::process::Process;
use crate::spec::GdbAddress;
use crate::target::Control;
use crate::{Target, TargetError, VmInfo};

/// What the folders of our stubs begin with.
const FOLDER: &str = "vmsight-gdb-";
/// Where they may be made, as QEMU sees it. The folder is for QEMU's user alone.
const PLACES: [&str; 3] = ["/run", "/tmp", "/var/tmp"];

static OPENED: AtomicU32 = AtomicU32::new(0);

/// The monitor that opens and closes stubs.
#[derive(Clone, Debug)]
enum Monitor {
    Qmp(QmpControl),
    Virsh(VirshControl),
}

impl Monitor {
    fn hmp(&self, line: &str) -> Result<String, TargetError> {
        match self {
            Self::Qmp(control) => control.with(|qmp| qmp.hmp(line)),
            Self::Virsh(control) => control.hmp(line),
        }
    }
}

/// A stub that was opened by us. Dropped it is closed, and its folder removed.
#[derive(Debug)]
pub(crate) struct Lease {
    monitor: Monitor,
    folder: PathBuf,
    left: bool,
}

impl Lease {
    /// Leaves the stub open: closed now it would not hear what the watch has to say, and the breakpoints would
    /// stay. The next one who needs it closes it.
    pub(super) fn leave(mut self) {
        self.left = true;
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.left {
            return;
        }
        // A VM that is gone has closed it.
        if let Err(error) = self.monitor.hmp("gdbserver none")
            && !error.is_exit()
        {
            tracing::debug!(%error, "the gdb stub could not be closed");
        }
        remove(&self.folder);
    }
}

/// Removes a folder of ours with the socket in it, and nothing else.
fn remove(folder: &Path) {
    let _ = fs::remove_file(folder.join("stub"));
    let _ = fs::remove_dir(folder);
}

impl Target {
    /// A connection for hooks to the gdb stub of this VM: the one it has, where nobody is connected to that, or one
    /// that is opened through its monitor, in a folder that only QEMU's user can enter, and closed again. The VM is
    /// paused by it until it is told to go on. `timeout` is the longest wait for each answer.
    ///
    /// # Errors
    /// [`TargetError::NoStub`] for what has none; [`super::GdbError::Busy`] where somebody is connected to it.
    pub fn debug(&self, timeout: Duration) -> Result<Debugger, TargetError> {
        let no = |why: String| TargetError::NoStub {
            target: self.name.clone(),
            why,
        };
        let monitor = match &self.control {
            Control::Gdb {
                control,
                _memory: None,
            } => return control.debug(timeout),
            Control::Gdb { .. } => {
                return Err(no(
                    "its memory is read through the stub, which takes one connection: give vmsight the right to read \
                     its process"
                        .to_owned(),
                ));
            }
            Control::Dump(_) => return Err(no("it is a dump".to_owned())),
            Control::None(why) => return Err(no(why.clone())),
            Control::Qmp(control) => Monitor::Qmp(control.clone()),
            Control::Virsh(control) => Monitor::Virsh(control.clone()),
        };
        let info = self
            .info
            .as_ref()
            .ok_or_else(|| no("its process is not known".to_owned()))?;
        // Before the connection, which pauses it.
        let running = monitor.hmp("info status")?.contains("VM status: running");
        let process = Process { pid: info.pid };
        if let Some(stub) = present(&monitor.hmp("info chardev")?) {
            let address = address(process, &stub)
                .ok_or_else(|| no(format!("it has a stub that cannot be connected to ({stub})")))?;
            let left = left_behind(&address);
            let deadline = Instant::now() + timeout;
            // The watch of a connection that ended badly holds it for a moment, until the last words are read.
            while left.as_ref().is_some_and(Left::may_be_over)
                && refuse_if_busy(&address, info.pid, deadline).is_err()
                && Instant::now() < deadline
            {
                std::thread::sleep(Duration::from_millis(20));
            }
            refuse_if_busy(&address, info.pid, deadline)?;
            let Some(left) = left else {
                return Debugger::connect(&address, Some(info.identity()), timeout, Some(running), None);
            };
            monitor.hmp("gdbserver none")?;
            remove(&left.folder);
        }
        let lease = open(monitor, info).map_err(no)?;
        let address = GdbAddress::Unix(lease.folder.join("stub"));
        Debugger::connect(
            &address,
            Some(info.identity()),
            timeout,
            Some(running),
            Some(lease),
        )
    }
}

/// Opens one. The error is why not, in words.
fn open(monitor: Monitor, info: &VmInfo) -> Result<Lease, String> {
    let process = Process { pid: info.pid };
    let number = OPENED.fetch_add(1, Ordering::Relaxed);
    let name = format!("{FOLDER}{}-{number}", std::process::id());
    let mut failures = Vec::new();
    for place in PLACES {
        let folder = Path::new(place).join(&name);
        let ours = process.own_path(&folder);
        if let Err(error) = make(&ours, info.uid) {
            failures.push(format!("{}: {error}", folder.display()));
            continue;
        }
        let lease = Lease {
            monitor: monitor.clone(),
            folder: ours.clone(),
            left: false,
        };
        let line = format!("gdbserver unix:{}/stub,server=on,wait=off", folder.display());
        match monitor.hmp(&line) {
            Ok(_) if ours.join("stub").exists() => return Ok(lease),
            Ok(text) => failures.push(text.trim().replace('\n', "; ")),
            Err(error) => failures.push(error.to_string()),
        }
    }
    Err(failures.join("; "))
}

/// Makes a folder that is `owner`'s alone.
fn make(folder: &Path, owner: Option<u32>) -> std::io::Result<()> {
    // What a program of the same number left behind; it fails where it is anybody else's.
    remove(folder);
    fs::DirBuilder::new().mode(0o700).create(folder)?;
    let me = rustix::process::geteuid().as_raw();
    match owner.filter(|owner| *owner != me) {
        Some(owner) => chown(folder, Some(owner), None).inspect_err(|_| remove(folder)),
        None => Ok(()),
    }
}

/// A stub that another vmsight opened.
#[derive(Debug)]
struct Left {
    folder: PathBuf,
    maker: u32,
}

impl Left {
    /// Whether nobody may be at it any more but a watch: its maker is gone, or we, who may have given it up.
    fn may_be_over(&self) -> bool {
        self.maker == std::process::id() || Process { pid: self.maker }.is_gone()
    }
}

/// Whose stub that is, where it is one of ours.
fn left_behind(address: &GdbAddress) -> Option<Left> {
    let GdbAddress::Unix(path) = address else {
        return None;
    };
    let folder = path.parent()?;
    let name = folder.file_name()?.to_str()?.strip_prefix(FOLDER)?;
    Some(Left {
        folder: folder.to_owned(),
        maker: name.split('-').next()?.parse().ok()?,
    })
}

/// The stub in the text of `info chardev`: QEMU calls its device `gdb`.
fn present(text: &str) -> Option<String> {
    let name = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("gdb: filename="))?;
    let address = name.strip_prefix("disconnected:").unwrap_or(name);
    // `… <-> PEER`, then the options of the socket.
    let address = address.split(" <-> ").next().unwrap_or(address);
    let address = match address.find(",server") {
        Some(end) => address.get(..end).unwrap_or(address),
        None => address,
    };
    Some(address.to_owned())
}

/// Where that is seen from here.
fn address(process: Process, text: &str) -> Option<GdbAddress> {
    if let Some(path) = text.strip_prefix("unix:") {
        return Some(GdbAddress::Unix(process.own_path(Path::new(path))));
    }
    let (host, port) = text.strip_prefix("tcp:")?.rsplit_once(':')?;
    let host = match host.trim_start_matches('[').trim_end_matches(']') {
        "" | "0.0.0.0" | "::" => "127.0.0.1",
        other => other,
    };
    Some(GdbAddress::Tcp {
        host: host.to_owned(),
        port: port.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str) -> Option<String> {
        let text = format!("#chr014: filename=gdb\n{line}\ncompat_monitor0: filename=unix:/q,server=on\n");
        present(&text)
    }

    #[test]
    fn the_stub_among_the_devices() {
        assert_eq!(of("serial0: filename=null"), None);
        for (line, address) in [
            (
                "gdb: filename=disconnected:unix:/a b,c/stub,server=on",
                "unix:/a b,c/stub",
            ),
            ("gdb: filename=unix:/x/stub,server=on", "unix:/x/stub"),
            (
                "gdb: filename=disconnected:tcp:0.0.0.0:1234,server=on",
                "tcp:0.0.0.0:1234",
            ),
            (
                "gdb: filename=tcp:127.0.0.1:1234,server=on <-> 127.0.0.1:40000",
                "tcp:127.0.0.1:1234",
            ),
            ("gdb: filename=pty:/dev/pts/3", "pty:/dev/pts/3"),
        ] {
            assert_eq!(of(line).as_deref(), Some(address), "{line}");
        }
    }

    #[test]
    fn addresses_and_what_was_left_behind() {
        let me = Process {
            pid: std::process::id(),
        };
        let tcp = |host: &str, port| {
            Some(GdbAddress::Tcp {
                host: host.to_owned(),
                port,
            })
        };
        assert_eq!(address(me, "tcp:0.0.0.0:1234"), tcp("127.0.0.1", 1234));
        assert_eq!(address(me, "tcp:[::1]:99"), tcp("::1", 99));
        assert_eq!(address(me, "pty:/dev/pts/3"), None);
        assert_eq!(address(me, "tcp:localhost:x"), None);
        let ours = address(me, "unix:/run/vmsight-gdb-1-0/stub").unwrap();
        let left = left_behind(&ours).unwrap();
        assert_eq!(
            (left.folder.to_str(), left.maker),
            (Some("/run/vmsight-gdb-1-0"), 1)
        );
        assert!(!left.may_be_over());
        for not_ours in [
            "unix:/run/web/gdb",
            "unix:/run/vmsight-gdb-x-0/stub",
            "tcp:[::1]:99",
        ] {
            assert!(
                left_behind(&address(me, not_ours).unwrap()).is_none(),
                "{not_ours}"
            );
        }
    }
}
