//! Processes of every sort and in every state.

use std::fs::{self, File};
use std::io::Read;
use std::net::TcpListener;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, raise};
use nix::sys::wait::waitpid;
use nix::unistd::{Gid, Pid, Uid, chdir, chroot, setgroups, setresgid, setresuid, setsid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, SecureComputingMode, configure_capability_in_ambient_set,
    remove_capability_from_bounding_set, set_capabilities, set_keep_capabilities, set_name, set_no_new_privs,
    set_secure_computing_mode,
};

use crate::play::{Held, Part, hush, join_cgroup, ready, ready_with, stand};
use crate::sys;

/// Nothing but its arguments and its environment.
pub(super) fn plain() -> Result<Held> {
    Ok(Box::new(()))
}

/// Gives up root for a user with supplementary groups.
pub(super) fn become_user(uid: u32, gid: u32, groups: &[u32]) -> Result<()> {
    setgroups(&groups.iter().map(|g| Gid::from_raw(*g)).collect::<Vec<_>>())?;
    let gid = Gid::from_raw(gid);
    setresgid(gid, gid, gid)?;
    let uid = Uid::from_raw(uid);
    Ok(setresuid(uid, uid, uid)?)
}

/// A thread that has a name and sleeps.
fn sleeping_thread(name: &str) -> Result<()> {
    let (tell, told) = std::sync::mpsc::channel();
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        let _ = tell.send(());
        stand()
    })?;
    Ok(told.recv()?)
}

/// A network service: own user, groups, session, cgroup and threads.
pub(super) fn web_frontend() -> Result<Held> {
    join_cgroup("/system.slice/web-frontend.service")?;
    setsid()?;
    chdir("/srv/data")?;
    let listeners = (
        TcpListener::bind("0.0.0.0:8080")?,
        TcpListener::bind("[::1]:8080")?,
        File::open("/srv/data/plain.txt")?,
    );
    sys::set_nice(5)?;
    become_user(33, 33, &[33, 1001, 1002])?;
    for n in 0..4 {
        sleeping_thread(&format!("http-{n}"))?;
    }
    Ok(Box::new(listeners))
}

/// Many threads with names, some of them odd.
pub(super) fn pool() -> Result<Held> {
    join_cgroup("/system.slice/pool.service")?;
    for n in 0..12 {
        sleeping_thread(&format!("pool-{n}"))?;
    }
    sleeping_thread("fifteen-letters")?;
    sleeping_thread("\u{1f980} crab")?;
    sleeping_thread("esc\x1b[1m")?;
    sleeping_thread("a b) S 1 (")?;
    Ok(Box::new(()))
}

/// A process whose first thread has ended while another lives on: a zombie that works.
pub(super) fn leaderless() -> Result<Held> {
    let (tell, told) = std::sync::mpsc::channel::<()>();
    thread::Builder::new()
        .name("survivor".to_owned())
        .spawn(move || {
            // The leader is a zombie once its state says so; only then is everything in place.
            let _ = told.recv();
            let own = format!("/proc/self/task/{}/stat", std::process::id());
            while !fs::read_to_string(&own).is_ok_and(|stat| stat.contains(") Z ")) {
                thread::sleep(std::time::Duration::from_millis(5));
            }
            let _ = ready();
            stand()
        })?;
    tell.send(())?;
    sys::end_thread()
}

/// Writes a title over its own arguments, as sshd and nginx do.
pub(super) fn retitled() -> Result<Held> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_ascii_whitespace()
        .collect();
    // Fields 48 and 49 of proc(5); the first after the name is number 3.
    let address =
        |number: usize| -> Result<u64> { Ok(fields.get(number - 3).context("short stat")?.parse()?) };
    let (start, end) = (address(48)?, address(49)?);
    let mut title = b"retitled: alice@pts/0 [priv]".to_vec();
    title.resize(usize::try_from(end - start)?, 0);
    File::options()
        .write(true)
        .open("/proc/self/mem")?
        .write_all_at(&title, start)?;
    set_name(c"sshd-like name")?;
    Ok(Box::new(()))
}

/// A user's process with a few capabilities in each set.
pub(super) fn few_capabilities() -> Result<Held> {
    join_cgroup("/user.slice/user-1000.slice/session-3.scope")?;
    fs::write("/proc/self/oom_score_adj", "500")?;
    for capability in [
        CapabilitySet::SYS_BOOT,
        CapabilitySet::SYS_TIME,
        CapabilitySet::MKNOD,
    ] {
        remove_capability_from_bounding_set(capability)?;
    }
    set_keep_capabilities(true)?;
    become_user(1000, 1000, &[27, 100, 1000])?;
    let few = CapabilitySet::NET_BIND_SERVICE | CapabilitySet::DAC_READ_SEARCH;
    set_capabilities(
        None,
        CapabilitySets {
            effective: few,
            permitted: few | CapabilitySet::CHOWN,
            inheritable: few,
        },
    )?;
    configure_capability_in_ambient_set(CapabilitySet::NET_BIND_SERVICE, true)?;
    set_no_new_privs(true)?;
    Ok(Box::new(()))
}

/// Two stacked seccomp filters.
pub(super) fn seccomp_filter() -> Result<Held> {
    set_no_new_privs(true)?;
    sys::add_seccomp_filter()?;
    sys::add_seccomp_filter()?;
    Ok(Box::new(()))
}

/// Strict seccomp: nothing but reading, and nothing ever comes.
pub(super) fn seccomp_strict() -> Result<Held> {
    let (reader, writer) = nix::unistd::pipe()?;
    let mut reader = File::from(reader);
    ready()?;
    set_secure_computing_mode(SecureComputingMode::Strict)?;
    let mut byte = [0u8; 1];
    let read = reader.read(&mut byte);
    bail!("read from a pipe ended: {read:?}, {writer:?}")
}

/// Nice 19.
pub(super) fn low_priority() -> Result<Held> {
    sys::set_nice(19)?;
    become_user(65534, 65534, &[])?;
    Ok(Box::new(()))
}

/// The batch policy.
pub(super) fn batch() -> Result<Held> {
    sys::set_policy(libc::SCHED_BATCH, 0)?;
    Ok(Box::new(()))
}

/// A real-time policy.
pub(super) fn realtime() -> Result<Held> {
    sys::set_policy(libc::SCHED_FIFO, 10)?;
    sys::set_nice(-11)?;
    Ok(Box::new(()))
}

/// Stopped by a signal.
pub(super) fn stopped() -> Result<Held> {
    ready()?;
    raise(Signal::SIGSTOP)?;
    Ok(Box::new(()))
}

/// Held in uninterruptible sleep by a child that never execs.
pub(super) fn uninterruptible() -> Result<Held> {
    match sys::fork_and_hold_parent()? {
        sys::Side::Child => {
            set_name(c"vfork-child")?;
            ready()?;
            stand()
        }
        sys::Side::Parent => bail!("the child let go of its parent"),
    }
}

/// A chain of descendants, as deep as its argument says.
pub(super) fn with_descendants() -> Result<Held> {
    let depth: u32 = std::env::args().nth(1).context("no depth given")?.parse()?;
    if depth > 0 {
        Part::new("app-server")
            .args(["app-server".to_owned(), (depth - 1).to_string()])
            .start()?;
        Part::new("worker")
            .args(["worker".to_owned(), format!("--of={depth}")])
            .start()?;
    }
    Ok(Box::new(()))
}

/// Its child has ended, and it does not look.
pub(super) fn zombie_parent() -> Result<Held> {
    let (pid, _) = Part::new("zombie-child").args(["zombie-child", "gone"]).start()?;
    while !fs::read_to_string(format!("/proc/{pid}/stat"))?.contains(") Z ") {
        thread::sleep(std::time::Duration::from_millis(5));
    }
    Ok(Box::new(()))
}

/// Ends at once.
pub(super) fn ends() -> Result<Held> {
    ready()?;
    std::process::exit(3)
}

/// Holds the process named `traced` in a tracing stop.
pub(super) fn tracer() -> Result<Held> {
    let pid = fs::read_dir("/proc")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .find(|pid| fs::read(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm == b"traced\n"))
        .context("no process to trace")?;
    let pid = Pid::from_raw(pid);
    ptrace::seize(pid, ptrace::Options::empty())?;
    ptrace::interrupt(pid)?;
    waitpid(pid, None)?;
    Ok(Box::new(()))
}

/// Lives in another root.
pub(super) fn jailed() -> Result<Held> {
    let null = File::options().write(true).open("/dev/null")?;
    chroot("/srv/jail")?;
    chdir("/etc")?;
    let inside = File::open("/etc/inside")?;
    become_user(105, 65534, &[])?;
    ready_with(&null)?;
    let _held = (inside, null);
    stand()
}

/// The extra processes: `sleepers N`. They are forked, not started, so that ten thousand take seconds.
pub(super) fn sleepers() -> Result<Held> {
    let count: u32 = std::env::args().nth(1).context("no number given")?.parse()?;
    join_cgroup("/system.slice/sleepers.service")?;
    for _ in 0..count {
        if let sys::Side::Child = sys::fork()? {
            set_name(c"sleeper")?;
            hush()?;
            stand()
        }
    }
    Ok(Box::new(()))
}

/// Starts a program that loads a library, and waits until it sleeps: all is relocated then, and stays as it is.
pub(super) fn dynamic() -> Result<Held> {
    let mut child = Command::new("/bin/sleep")
        .arg("infinity")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .context("start a dynamic program")?;
    loop {
        if let Some(status) = child.try_wait()? {
            bail!("the dynamic program ended: {status}");
        }
        // `running`, or the number of the system call that it is in.
        let call = fs::read_to_string(format!("/proc/{}/syscall", child.id()))?;
        let number = call.split(' ').next().and_then(|word| word.parse::<i64>().ok());
        if number
            .is_some_and(|n| [libc::SYS_pause, libc::SYS_nanosleep, libc::SYS_clock_nanosleep].contains(&n))
        {
            return Ok(Box::new(child));
        }
        thread::sleep(Duration::from_millis(10));
    }
}
