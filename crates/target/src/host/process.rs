//! One process as `/proc/PID` shows it.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::time::{ClockId, clock_gettime};
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};

/// The most of a command line that is read. libvirt's longest are about 100 KiB; the kernel allows megabytes.
const MAX_CMDLINE: u64 = 1 << 20;
/// Most arguments looked at in one command line.
const MAX_ARGS: usize = 16 * 1024;
/// Most descriptors looked at in one process: QEMU with many devices has hundreds.
const MAX_FDS: usize = 64 * 1024;
/// Most threads looked at in one process.
const MAX_THREADS: usize = 16 * 1024;

/// A process id together with where its files are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Process {
    /// The id in our own pid namespace.
    pub(crate) pid: u32,
}

/// One process for good: pids are used again, the pair is not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Identity {
    /// Its pid.
    pub(crate) pid: u32,
    /// When it was started; `None` where that could not be read.
    pub(crate) start_ticks: Option<u64>,
}

impl Identity {
    /// Whether the process still runs.
    pub(crate) fn runs(self) -> bool {
        match (Process { pid: self.pid }).stat() {
            Ok(stat) => !stat.is_over() && self.start_ticks.is_none_or(|ticks| ticks == stat.start_ticks),
            Err(error) => !is_absent(&error) && self.start_ticks.is_none(),
        }
    }
}

/// What an open descriptor is: the text of the link in `/proc/PID/fd`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Descriptor {
    /// The number in that process.
    pub(crate) fd: u32,
    /// Where the link points: a path, `socket:[inode]`, `anon_inode:kvm-vm`, …
    pub(crate) link: String,
}

impl Descriptor {
    /// The socket's inode where this is one.
    pub(crate) fn socket_inode(&self) -> Option<u64> {
        self.link
            .strip_prefix("socket:[")?
            .strip_suffix(']')?
            .parse()
            .ok()
    }
}

/// The fields of `/proc/PID/stat` that we use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Stat {
    /// `Z` zombie, `X` dead, others alive.
    pub(crate) state: u8,
    /// The parent's pid.
    pub(crate) parent: u32,
    /// When it was started, in clock ticks after boot. Pid and start time name a process for good.
    pub(crate) start_ticks: u64,
}

impl Stat {
    /// Whether only the entry in the table of processes is left.
    fn is_over(&self) -> bool {
        matches!(self.state, b'Z' | b'X' | b'x')
    }
}

/// Whether an error of a file of `/proc/PID` says that there is no such process.
fn is_absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(3)
}

/// Every process that is there now, by pid. Processes come and go meanwhile: none of it is a promise.
pub(crate) fn all() -> io::Result<Vec<Process>> {
    let mut pids: Vec<Process> = fs::read_dir("/proc")?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .map(|pid| Process { pid })
        .collect();
    pids.sort_by_key(|p| p.pid);
    Ok(pids)
}

impl Process {
    /// A file of this process below `/proc/PID`.
    pub(crate) fn path(self, rest: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{rest}", self.pid))
    }

    /// A path as this process itself means it, seen from our mount namespace: relative ones start at its
    /// working directory, absolute ones at its root (a container's, a jail's).
    pub(crate) fn own_path(self, path: &Path) -> PathBuf {
        let Ok(absolute) = path.strip_prefix("/") else {
            return self.path("cwd").join(path);
        };
        // Same mount namespace and root as ours: the plain path, which also works where /proc/PID/root may not
        // be followed. A process whose links we may not read is taken to share our view.
        let shares = |link: &str| match (
            fs::read_link(self.path(link)),
            fs::read_link(Path::new("/proc/self").join(link)),
        ) {
            (Ok(theirs), Ok(ours)) => theirs == ours,
            _ => true,
        };
        if shares("ns/mnt") && shares("root") {
            path.to_owned()
        } else {
            self.path("root").join(absolute)
        }
    }

    /// A regular file by its path as this process itself means it, not opened yet in any way that could touch what it is
    /// (`O_PATH`): links lead nowhere outside the process's root, and what is a device or a pipe is refused.
    ///
    /// The path is the word of whoever started the process, and we may be root.
    pub(crate) fn own_file(self, path: &Path) -> io::Result<OwnedFd> {
        let folder = |link: &str| {
            rustix::fs::open(
                self.path(link),
                OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            )
        };
        // Where its links may not be followed it is taken to share our view.
        let (root, root_path) = match folder("root") {
            Ok(root) => (root, fs::read_link(self.path("root"))?),
            Err(_) => (
                rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?,
                PathBuf::from("/"),
            ),
        };
        let absolute = if path.is_absolute() {
            path.to_owned()
        } else {
            let here = fs::read_link(self.path("cwd"))?;
            let here = here.strip_prefix(&root_path).map_err(io::Error::other)?;
            Path::new("/").join(here).join(path)
        };
        let file = rustix::fs::openat2(
            root,
            absolute,
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
        )?;
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode);
        if kind != FileType::RegularFile {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is no regular file",
            ));
        }
        Ok(file)
    }

    /// The text of a file that the process names, see [`Self::own_file`]; an error where it has more than `max` bytes.
    pub(crate) fn own_text(self, path: &Path, max: u64) -> io::Result<String> {
        let file = self.own_file(path)?;
        let file = File::from(rustix::fs::open(
            format!("/proc/self/fd/{}", file.as_raw_fd()),
            OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC,
            Mode::empty(),
        )?);
        if file.metadata()?.len() > max {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is too long"));
        }
        let mut bytes = Vec::new();
        file.take(max).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The short name (at most 15 bytes).
    pub(crate) fn comm(self) -> io::Result<String> {
        let bytes = read_bounded(&self.path("comm"), 256)?;
        Ok(String::from_utf8_lossy(bytes.trim_ascii_end()).into_owned())
    }

    /// The arguments; empty for kernel threads and zombies. An owner may have overwritten them.
    pub(crate) fn cmdline(self) -> io::Result<Vec<String>> {
        let bytes = read_bounded(&self.path("cmdline"), MAX_CMDLINE)?;
        Ok(split_cmdline(&bytes))
    }

    /// The executable file. Needs the right to trace the process.
    pub(crate) fn exe(self) -> io::Result<PathBuf> {
        let link = fs::read_link(self.path("exe"))?.into_os_string().into_vec();
        let link = link.strip_suffix(b" (deleted)").unwrap_or(&link);
        Ok(PathBuf::from(OsStr::from_bytes(link)))
    }

    /// The user id that owns the process (its effective uid, unless the kernel marked it undumpable: then
    /// `/proc/PID` belongs to root, so the answer is taken from `status`).
    pub(crate) fn uid(self) -> io::Result<u32> {
        let status = read_bounded(&self.path("status"), 64 * 1024)?;
        let status = String::from_utf8_lossy(&status);
        match status
            .lines()
            .find_map(|l| l.strip_prefix("Uid:"))
            .and_then(|l| l.split_whitespace().nth(1)?.parse().ok())
        {
            Some(effective) => Ok(effective),
            None => Ok(fs::metadata(self.path(""))?.uid()),
        }
    }

    /// State and start time.
    pub(crate) fn stat(self) -> io::Result<Stat> {
        let bytes = read_bounded(&self.path("stat"), 4096)?;
        parse_stat(&bytes)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unexpected form of stat"))
    }

    /// Whether `child` was just made by this process and does not run a program of its own yet, or no longer runs one: what it ran is gone
    /// before its descriptors are (`do_exit`, kernel/exit.c), and that it has ended is said last.
    pub(crate) fn is_starting(self, child: Process) -> bool {
        let of_ours = child.stat().is_ok_and(|stat| stat.parent == self.pid);
        of_ours
            && match child.exe() {
                Ok(exe) => self.exe().is_ok_and(|own| own == exe),
                Err(error) => is_absent(&error),
            }
    }

    /// Whether the process is gone or only a zombie remains of it.
    pub(crate) fn is_gone(self) -> bool {
        match self.stat() {
            Ok(stat) => stat.is_over(),
            Err(error) => is_absent(&error),
        }
    }

    /// The names of its threads, readable by everybody.
    pub(crate) fn thread_names(self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.path("task"))?.flatten().take(MAX_THREADS) {
            if let Ok(bytes) = read_bounded(&entry.path().join("comm"), 256) {
                names.push(String::from_utf8_lossy(bytes.trim_ascii_end()).into_owned());
            }
        }
        Ok(names)
    }

    /// Its open descriptors. Needs the right to trace the process.
    pub(crate) fn descriptors(self) -> io::Result<Vec<Descriptor>> {
        let mut all = Vec::new();
        for entry in fs::read_dir(self.path("fd"))?.take(MAX_FDS) {
            let entry = entry?;
            let Some(fd) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
                continue;
            };
            if let Ok(link) = fs::read_link(entry.path()) {
                all.push(Descriptor {
                    fd,
                    link: link.to_string_lossy().into_owned(),
                });
            }
        }
        all.sort_by_key(|d| d.fd);
        Ok(all)
    }

    /// The text of one of its files, up to `max` bytes.
    pub(crate) fn text(self, file: &str, max: u64) -> io::Result<String> {
        Ok(String::from_utf8_lossy(&read_bounded(&self.path(file), max)?).into_owned())
    }

    /// Whether its memory may be read: the kernel checks it when the file is opened, nothing is touched.
    pub(crate) fn memory_readable(self) -> io::Result<()> {
        File::open(self.path("mem")).map(drop)
    }
}

/// When the host was booted, in seconds since 1970: what `btime` in `/proc/stat` says, for which the kernel would add up the
/// interrupts of all processors.
pub(crate) fn boot_time() -> io::Result<u64> {
    let now = clock_gettime(ClockId::CLOCK_REALTIME)?;
    let since = clock_gettime(ClockId::CLOCK_BOOTTIME)?;
    u64::try_from((now - since).tv_sec())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "the clock is before the time of boot"))
}

/// A file that may have more than this is a list.
const MANY: u64 = 1 << 20;

/// Reads at most `max` bytes of a file.
pub(crate) fn read_bounded(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    // Files of /proc do not tell their length. Most of them come whole in one read of a page; those that may be long must not
    // be asked for in driblets where the room runs out.
    let mut bytes = Vec::with_capacity(if max > MANY { 64 * 1024 } else { 4096 });
    File::open(path)?.take(max).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn split_cmdline(bytes: &[u8]) -> Vec<String> {
    let bytes = bytes.strip_suffix(b"\0").unwrap_or(bytes);
    if bytes.is_empty() {
        return Vec::new();
    }
    bytes
        .split(|b| *b == 0)
        .take(MAX_ARGS)
        .map(|a| String::from_utf8_lossy(a).into_owned())
        .collect()
}

/// The name in `stat` may hold spaces and parentheses: what counts starts after the last `)`.
fn parse_stat(bytes: &[u8]) -> Option<Stat> {
    let close = bytes.iter().rposition(|b| *b == b')')?;
    let rest = std::str::from_utf8(bytes.get(close + 1..)?).ok()?;
    let mut fields = rest.split_ascii_whitespace();
    let state = *fields.next()?.as_bytes().first()?;
    // state is field 3 of proc_pid_stat(5), the parent field 4, starttime field 22
    let parent = fields.next()?.parse().ok()?;
    let start_ticks = fields.nth(22 - 5)?.parse().ok()?;
    Some(Stat {
        state,
        parent,
        start_ticks,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_shift_stat() {
        let line = b"12 (a) S 1 (x)) R 1 12 12 0 -1 4194304 1 0 0 0 5 6 0 0 20 0 3 0 7777 1000 20 18446744073709551615";
        assert_eq!(
            parse_stat(line),
            Some(Stat {
                state: b'R',
                parent: 1,
                start_ticks: 7777
            })
        );
        assert_eq!(parse_stat(b"12 (cut) S 1 2"), None);
        assert_eq!(parse_stat(b""), None);
    }

    #[test]
    fn arguments_keep_empty_ones_and_spaces() {
        assert_eq!(
            split_cmdline(b"qemu\0-name\0\0a b\0"),
            ["qemu", "-name", "", "a b"]
        );
        assert!(split_cmdline(b"").is_empty());
        assert_eq!(
            split_cmdline(b"one title without a zero"),
            ["one title without a zero"]
        );
        assert_eq!(split_cmdline(b"\xff\xfe\0x\0").len(), 2);
    }

    #[test]
    fn a_child_that_no_longer_runs_a_program_is_waited_for() {
        let me = Process {
            pid: std::process::id(),
        };
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let other = Process { pid: child.id() };
        // spawn() returns when it runs its program.
        assert!(!me.is_starting(other));
        child.kill().unwrap();
        let end = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while !other.is_gone() {
            assert!(std::time::Instant::now() < end);
            std::thread::yield_now();
        }
        assert!(me.is_starting(other), "its parent has not been told yet");
        child.wait().unwrap();
        assert!(!me.is_starting(other));
    }

    #[test]
    fn our_own_process_is_there() {
        let me = Process {
            pid: std::process::id(),
        };
        assert!(all().unwrap().contains(&me));
        assert!(!me.is_gone());
        assert!(me.stat().unwrap().start_ticks > 0);
        assert!(!me.cmdline().unwrap().is_empty());
        assert!(
            me.thread_names().unwrap().len() > 1,
            "the test harness has threads"
        );
        assert!(me.memory_readable().is_ok());
        assert!(!me.descriptors().unwrap().is_empty());
        assert_eq!(
            me.own_path(Path::new("/etc/hostname")),
            Path::new("/etc/hostname")
        );
        assert_eq!(me.own_path(Path::new("a/b")), me.path("cwd").join("a/b"));
    }

    #[test]
    fn only_regular_files_of_a_bounded_size_are_read() {
        let me = Process {
            pid: std::process::id(),
        };
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("file"), "text").unwrap();
        std::os::unix::fs::symlink("file", at("link")).unwrap();
        std::os::unix::fs::symlink("/proc/self/exe", at("exe")).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, at("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        for good in ["file", "link"] {
            assert_eq!(me.own_text(&at(good), 4).unwrap(), "text");
        }
        assert!(me.own_text(&at("file"), 3).is_err(), "too long");
        // A pipe would be waited for, and a device touched.
        for bad in ["fifo", "exe", ".", "none"] {
            assert!(me.own_text(&at(bad), 1 << 20).is_err(), "{bad}");
        }
        assert!(me.own_text(Path::new("/dev/zero"), 16).is_err());
        assert!(
            me.own_text(Path::new("Cargo.toml"), 1 << 20)
                .unwrap()
                .contains("vmsight-target")
        );
    }

    #[test]
    fn links_lead_nowhere_outside_the_root_of_a_process() {
        if !rustix::process::geteuid().is_root() {
            eprintln!(
                "not root: no other root can be given; the case is covered where the tests run as root"
            );
            return;
        }
        // A shell and what it is linked with, in a root of its own.
        let dir = tempfile::tempdir().unwrap();
        let linked = std::process::Command::new("ldd").arg("/bin/sh").output().unwrap();
        let linked = String::from_utf8_lossy(&linked.stdout).into_owned();
        let libraries = linked.split_whitespace().filter(|word| word.starts_with('/'));
        for file in libraries.chain(["/bin/sh"]) {
            let copy = dir.path().join(file.trim_start_matches('/'));
            fs::create_dir_all(copy.parent().unwrap()).unwrap();
            let done = std::process::Command::new("cp")
                .arg(file)
                .arg(&copy)
                .status()
                .unwrap();
            assert!(done.success());
        }
        fs::write(dir.path().join("passwd"), "inside").unwrap();
        fs::create_dir(dir.path().join("etc")).unwrap();
        for (link, to) in [
            ("a", "/passwd"),
            ("b", "/etc/passwd"),
            ("c", "../../../../etc/passwd"),
        ] {
            std::os::unix::fs::symlink(to, dir.path().join(link)).unwrap();
        }
        let mut child = std::process::Command::new("chroot")
            .arg(dir.path())
            .args(["/bin/sh", "-c", "echo; read -r line"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // Its first word means that it is there.
        child.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
        let process = Process { pid: child.id() };
        let found =
            ["/a", "/passwd", "/b", "/c", "passwd"].map(|p| process.own_text(Path::new(p), 1 << 20).ok());
        child.kill().unwrap();
        child.wait().unwrap();
        let inside = || Some("inside".to_owned());
        assert_eq!(found, [inside(), inside(), None, None, inside()]);
    }

    #[test]
    fn the_time_of_boot_is_the_kernels() {
        let text = fs::read_to_string("/proc/stat").unwrap();
        let btime = text.lines().find_map(|line| line.strip_prefix("btime ")).unwrap();
        // The clock may be set in between.
        assert!(btime.parse::<u64>().unwrap().abs_diff(boot_time().unwrap()) <= 1);
    }

    #[test]
    fn a_process_that_never_was_is_gone() {
        assert!(Process { pid: u32::MAX }.is_gone());
    }
}
