//! A process that holds one of every kind of file.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::net::UdpSocket;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};
use nix::sched::CloneFlags;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::Mode;
use nix::sys::time::{TimeSpec, TimeValLike};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::unistd::{mkfifo, pipe2};

use crate::play::{Held, join_cgroup, lacking, stand};

/// Opens everything.
pub(super) fn holder() -> Result<Held> {
    join_cgroup("/system.slice/file-holder.service")?;
    Ok(Box::new((on_file_systems()?, without_names()?)))
}

/// A thread with open files and directories of its own.
pub(super) fn split() -> Result<Held> {
    let (tell, told) = std::sync::mpsc::channel();
    let thread = std::thread::Builder::new().name("own-files".to_owned());
    thread.spawn(move || {
        let own = own_files();
        let _ = tell.send(own.as_ref().map(|_| ()).map_err(|error| format!("{error:#}")));
        let _held = own;
        stand()
    })?;
    told.recv()?.map_err(anyhow::Error::msg)?;
    Ok(Box::new(File::open("/srv/data/plain.txt")?))
}

fn own_files() -> Result<Held> {
    nix::sched::unshare(CloneFlags::CLONE_FILES | CloneFlags::CLONE_FS)?;
    nix::unistd::chdir("/var/log")?;
    Ok(Box::new((
        File::open("/etc/hostname")?,
        nix::unistd::pipe()?,
        UdpSocket::bind("127.0.0.1:5999")?,
        UnixDatagram::pair()?,
    )))
}

/// Files with a path: read in part, appended to, deleted, locked, behind every kind of mount.
fn on_file_systems() -> Result<Vec<Held>> {
    let mut held: Vec<Held> = Vec::new();
    let mut read = File::open("/srv/data/plain.txt")?;
    read.read_exact(&mut [0u8; 7])?;
    held.push(Box::new(read));
    let mut log = OpenOptions::new().append(true).open("/var/log/app.log")?;
    log.write_all(b"holding\n")?;
    held.push(Box::new(log));
    let mut deleted = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open("/tmp/deleted secret.bin")?;
    deleted.write_all(&[0xd5; 5000])?;
    deleted.seek(SeekFrom::Start(4096))?;
    fs::remove_file("/tmp/deleted secret.bin")?;
    held.push(Box::new(deleted));
    let locked = File::create("/run/holder.pid")?;
    held.push(Box::new(
        Flock::lock(locked, FlockArg::LockExclusive).map_err(|(_, e)| e)?,
    ));
    for name in [
        "/tmp/Gr\u{fc}\u{df}e \u{2603}.txt",
        "/tmp/new\nline\ttab",
        "/tmp/\x1b[31mred",
        "/tmp/back\\slash (deleted)",
    ] {
        held.push(Box::new(File::create(name).with_context(|| format!("{name:?}"))?));
    }
    held.push(Box::new(deep_file()?));
    for path in [
        "/mnt/overlay/below.txt",
        "/mnt/overlay/dir/changed.txt",
        "/mnt/bind/plain.txt",
    ] {
        held.push(Box::new(File::open(path).with_context(|| path.to_owned())?));
    }
    held.push(Box::new(File::create("/mnt/tmp/inner/nested.txt")?));
    if let Ok(file) = File::open("/mnt/disk/on-disk.txt") {
        held.push(Box::new(file));
    }
    for path in [
        "/dev/null",
        "/dev/zero",
        "/dev/urandom",
        "/dev/kmsg",
        "/proc/self/ns/net",
        "/proc/1/status",
        "/sys/kernel/notes",
    ] {
        held.push(Box::new(File::open(path).with_context(|| path.to_owned())?));
    }
    held.push(Box::new(
        OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY)
            .open("/srv")?,
    ));
    held.push(Box::new(
        OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open("/etc/passwd")?,
    ));
    held.push(Box::new(
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_TMPFILE)
            .open("/tmp")?,
    ));
    mkfifo("/run/holder.fifo", Mode::from_bits_truncate(0o640))?;
    held.push(Box::new(
        OpenOptions::new()
            .read(true)
            .write(true)
            .open("/run/holder.fifo")?,
    ));
    Ok(held)
}

/// A path of more than a page, made from its deepest folder outwards.
fn deep_file() -> Result<File> {
    let mut path = "/tmp/deep".to_owned();
    for n in 0..14 {
        path.push_str(&format!("/{n:02}-{}", "d".repeat(240)));
    }
    fs::create_dir_all(&path)?;
    Ok(File::create(format!("{path}/bottom"))?)
}

/// Files that are on no file system.
fn without_names() -> Result<Vec<Held>> {
    let mut held: Vec<Held> = Vec::new();
    let mut memory = File::from(memfd_create(
        "lab memory",
        MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
    )?);
    memory.write_all(b"only in memory")?;
    held.push(Box::new(memory));
    let (reader, writer) = pipe2(nix::fcntl::OFlag::O_NONBLOCK)?;
    let mut writer = File::from(writer);
    writer.write_all(b"in the pipe")?;
    held.push(Box::new((reader, writer)));
    let event = EventFd::from_value_and_flags(7, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_SEMAPHORE)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(
        event.as_fd(),
        EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0xfeed),
    )?;
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC)?;
    timer.set(
        Expiration::OneShot(TimeSpec::seconds(1_000_000)),
        TimerSetTimeFlags::empty(),
    )?;
    held.push(Box::new((epoll, event, timer)));
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGHUP);
    signals.add(Signal::SIGUSR2);
    signals.thread_block()?;
    held.push(Box::new(SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC)?));
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC)?;
    inotify.add_watch("/etc", AddWatchFlags::IN_CREATE | AddWatchFlags::IN_DELETE)?;
    held.push(Box::new(inotify));
    match pid_file(1) {
        Ok(file) => held.push(Box::new(file)),
        Err(error) => lacking("pidfd", error),
    }
    Ok(held)
}

fn pid_file(pid: i32) -> Result<OwnedFd> {
    let pid = rustix::process::Pid::from_raw(pid).context("no pid")?;
    Ok(rustix::process::pidfd_open(
        pid,
        rustix::process::PidfdFlags::empty(),
    )?)
}
