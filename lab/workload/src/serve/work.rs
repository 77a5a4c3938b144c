//! How each order is carried out: what can be made ready first, and then the work itself.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::fcntl::AtFlags;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Gid, Pid, Uid};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::time::{ClockId, clock_gettime};
use vmsight_workload::Text;
use vmsight_workload::orders::{Account, Work, checksum};

use super::page::{Page, frame, touch, untouched};
use super::{inject, keep, nftables, observe, poke, raw, tamper};
use crate::sys::{self, Side};

/// Where modules are: ours first.
const MODULES: [&str; 2] = ["/lib/modules/vmsight", "/lib/modules"];
/// How long a signal has for its effect on a child made for it. Those that have none do not end it.
const EFFECT: Duration = Duration::from_secs(2);

/// An order of which only the work is left to do.
pub(super) struct Ready {
    /// What can be told already.
    pub(super) account: Account,
    /// The work.
    pub(super) go: Box<dyn FnOnce() -> Result<Account>>,
}

impl Ready {
    fn new(go: impl FnOnce() -> Result<Account> + 'static) -> Ready {
        Ready::at(None, go)
    }

    fn at(place: Option<(u64, Option<u64>)>, go: impl FnOnce() -> Result<Account> + 'static) -> Ready {
        Ready {
            account: Account {
                address: place.map(|(address, _)| address),
                frame: place.and_then(|(_, frame)| frame),
                ..Account::default()
            },
            go: Box::new(go),
        }
    }

    /// Does the work.
    pub(super) fn finish(self) -> Result<Account> {
        let Account { address, frame, .. } = self.account;
        let mut account = (self.go)()?;
        account.address = account.address.or(address);
        account.frame = account.frame.or(frame);
        Ok(account)
    }
}

/// Makes an order ready, in the process that will carry it out. `shared` is the page that all have.
pub(super) fn prepare(work: Work, shared: Page) -> Result<Ready> {
    Ok(match work {
        Work::Ping => Ready::new(|| {
            Ok(Account {
                nanoseconds: Some(now()),
                ..Account::default()
            })
        }),
        Work::GetPid { count } => Ready::new(move || Ok(getpid(count))),
        Work::Int80 {
            number,
            arguments,
            count,
        } => Ready::new(move || {
            // SAFETY: who orders gives no address.
            Ok(repeat(count, |_| unsafe { raw::int80(number, arguments) }))
        }),
        Work::Open { path, flags, count } => {
            let path = text(&path)?;
            Ready::new(move || Ok(open(&path, flags, count)))
        }
        Work::ReadFile { path, limit } => {
            let path = text(&path)?;
            Ready::new(move || Ok(read_file(&path, limit)))
        }
        Work::WriteFile { path, bytes } => {
            let path = text(&path)?;
            Ready::new(move || Ok(write_file(&path, &bytes)))
        }
        Work::Hold { path } => {
            let path = path.lossy();
            let held = File::open(&path).with_context(|| path.clone())?;
            Ready::new(move || {
                drop(held);
                Ok(Account::default())
            })
        }
        Work::Connect { address, listen } => connect(&address, listen)?,
        Work::Exec { path, argv, envp } => {
            let path = text(&path)?;
            let argv = argv.iter().map(text).collect::<Result<Vec<_>>>()?;
            let envp = envp.iter().map(text).collect::<Result<Vec<_>>>()?;
            Ready::new(move || {
                let Err(errno) = nix::unistd::execve(&path, &argv, &envp);
                Ok(once(-i64::from(errno as i32)))
            })
        }
        Work::ExecMemory { path, argv } => {
            let path = path.lossy();
            let image = fs::read(&path).with_context(|| path.clone())?;
            let argv = argv.iter().map(text).collect::<Result<Vec<_>>>()?;
            Ready::new(move || exec_memory(&image, &argv))
        }
        Work::Stand { uid } => {
            let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
            nix::unistd::setresgid(group, group, group)?;
            nix::unistd::setresuid(user, user, user)?;
            Ready::new(|| Ok(Account::default()))
        }
        Work::Pose { name, argument } => {
            rustix::thread::set_name(&CString::new(name)?)?;
            let mut bytes = argument.bytes().to_vec();
            bytes.push(0);
            sys::set_arguments(bytes.leak())?;
            Ready::new(|| Ok(Account::default()))
        }
        Work::Confine => {
            sys::add_seccomp_filter()?;
            Ready::new(|| Ok(Account::default()))
        }
        Work::Observe { event, writes } => {
            let held = observe::observe(event, writes)?;
            Ready::new(move || {
                drop(held);
                Ok(Account::default())
            })
        }
        Work::FilterPackets => Ready::new(nftables::filter),
        Work::Ring => {
            const SETUP: libc::c_long = 425;
            /// Of `struct io_uring_params` (include/uapi/linux/io_uring.h), all of which may be zero.
            const PARAMETERS: usize = 120;
            let mut parameters = [0u64; PARAMETERS / 8];
            // SAFETY: the kernel reads and writes the parameters, which live through the call.
            let returned = unsafe { call(SETUP, [1, parameters.as_mut_ptr() as u64, 0, 0]) };
            Ready::new(move || Ok(once(returned)))
        }
        Work::Overwrite { pid } => Ready::new(move || inject::overwrite(pid)),
        Work::Inject { pid } => Ready::new(move || inject::inject(pid)),
        Work::Fork { count } => Ready::new(move || fork(count)),
        Work::Exit { code } => Ready::new(move || std::process::exit(code)),
        Work::Kill { pid, signal } => Ready::new(move || match pid {
            // SAFETY: kill(2) takes numbers only.
            Some(pid) => Ok(once(unsafe {
                call(libc::SYS_kill, [pid.into(), signal as u64, 0, 0])
            })),
            None => kill_child(signal),
        }),
        Work::SetUid { uid } => Ready::new(move || {
            let uid = u64::from(uid);
            // SAFETY: takes numbers only.
            let returned = unsafe { call(libc::SYS_setresuid, [uid, uid, uid, 0]) };
            let ids = nix::unistd::getresuid()?;
            let values = [ids.real, ids.effective, ids.saved].map(|id| u64::from(id.as_raw()));
            Ok(Account {
                values: values.to_vec(),
                ..once(returned)
            })
        }),
        Work::Write {
            first,
            step,
            count,
            offset,
            shared: together,
        } => {
            let page = if together { shared } else { Page::own()? };
            let place = page.place(offset)?;
            Ready::at(
                Some((place.address(), Some(frame(place.address())?))),
                move || {
                    Ok(repeat(count, |n| {
                        place.write(first.wrapping_add(step.wrapping_mul(n)));
                        0
                    }))
                },
            )
        }
        Work::Read { value, count, offset } => {
            let place = Page::own()?.place(offset)?;
            place.write(value);
            Ready::at(
                Some((place.address(), Some(frame(place.address())?))),
                move || Ok(add_up(count, |_| place.read())),
            )
        }
        Work::Call { count } => {
            let page = Page::code()?;
            Ready::at(Some((page.address(), Some(frame(page.address())?))), move || {
                Ok(add_up(count, |n| page.call(n)))
            })
        }
        Work::Touch { pages } => {
            let at = untouched(pages)?;
            Ready::at(Some((at as u64, None)), move || {
                let (nanoseconds, ()) = timed(|| touch(at, pages));
                Ok(Account {
                    made: pages,
                    nanoseconds: Some(nanoseconds),
                    ..Account::default()
                })
            })
        }
        Work::Raise { exception } => Ready::new(move || {
            raw::raise(exception);
            Ok(Account {
                made: 1,
                ..Account::default()
            })
        }),
        Work::CpuId { leaf, subleaf, count } => Ready::new(move || {
            let mut last = [0; 4];
            let account = repeat(count, |_| {
                last = raw::cpuid(leaf, subleaf);
                0
            });
            Ok(Account {
                values: last.map(u64::from).to_vec(),
                returned: None,
                ..account
            })
        }),
        Work::Port { port, value, count } => {
            let ports = File::options()
                .write(true)
                .open("/dev/port")
                .context("/dev/port")?;
            Ready::new(move || {
                Ok(repeat(count, |_| {
                    ports.write_at(&[value], port.into()).map_or_else(
                        |error| -i64::from(error.raw_os_error().unwrap_or(0)),
                        |n| n as i64,
                    )
                }))
            })
        }
        Work::Keep { memory, aes, key } => {
            let kept = keep::keep(&memory, &aes, key.as_ref())?;
            let mut ready = Ready::new(move || {
                drop(kept.socket);
                Ok(Account::default())
            });
            ready.account.values = kept.addresses;
            ready
        }
        Work::Compute { rounds } => Ready::new(move || {
            let (nanoseconds, sum) = timed(|| checksum(rounds));
            Ok(Account {
                made: rounds,
                checksum: Some(sum),
                nanoseconds: Some(nanoseconds),
                ..Account::default()
            })
        }),
        Work::Syscalls { rounds } => syscalls(rounds)?,
        Work::Load {
            name,
            parameters,
            from_memory,
        } => load(&name, parameters, from_memory)?,
        Work::Unload { name } => {
            let name = CString::new(name)?;
            Ready::new(move || {
                let name = name.as_ptr() as u64;
                let flags = libc::O_NONBLOCK as u64;
                // SAFETY: the kernel reads the name, which lives through the call.
                Ok(once(unsafe {
                    call(libc::SYS_delete_module, [name, flags, 0, 0])
                }))
            })
        }
        Work::Poke { poke } => {
            let mut device = poke::Device::open()?;
            Ready::new(move || device.poke(&poke))
        }
        Work::Tamper { tamper, undo } => {
            let mut device = tamper::Device::open()?;
            Ready::new(move || device.tamper(&tamper, undo))
        }
        Work::Prepare { .. } | Work::Go { .. } | Work::Abandon { .. } => bail!("nothing to prepare"),
    })
}

/// Makes a system call.
///
/// # Safety
/// As [`raw::syscall`].
pub(super) unsafe fn call(number: libc::c_long, arguments: [u64; 4]) -> i64 {
    // SAFETY: as the caller says.
    unsafe { raw::syscall(number, arguments) }
}

fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

fn timed<T>(work: impl FnOnce() -> T) -> (u64, T) {
    let before = now();
    let result = work();
    (now() - before, result)
}

/// The account of one system call.
pub(super) fn once(returned: i64) -> Account {
    Account {
        made: 1,
        failed: u64::from(returned < 0),
        returned: Some(returned),
        ..Account::default()
    }
}

/// Does a thing `count` times that gives a negative number where it failed.
fn repeat(count: u64, mut work: impl FnMut(u64) -> i64) -> Account {
    let (mut failed, mut last) = (0, 0);
    let (nanoseconds, ()) = timed(|| {
        for n in 0..count {
            last = work(n);
            failed += u64::from(last < 0);
        }
    });
    Account {
        made: count,
        failed,
        returned: Some(last),
        nanoseconds: Some(nanoseconds),
        ..Account::default()
    }
}

/// Adds up what `count` runs of a thing give.
fn add_up(count: u64, mut work: impl FnMut(u64) -> u64) -> Account {
    let (nanoseconds, sum) = timed(|| (0..count).fold(0u64, |sum, n| sum.wrapping_add(work(n))));
    Account {
        made: count,
        checksum: Some(sum),
        nanoseconds: Some(nanoseconds),
        ..Account::default()
    }
}

fn text(text: &Text) -> Result<CString> {
    CString::new(text.bytes()).context("a zero byte in a string")
}

/// Nobody else here makes getpid(2): the process's one thread has the process's id.
fn getpid(count: u64) -> Account {
    // SAFETY: takes no arguments.
    let pid = unsafe { call(libc::SYS_gettid, [0; 4]) };
    let mut wrong = 0;
    let account = repeat(count, |_| {
        // SAFETY: takes no arguments.
        let returned = unsafe { call(libc::SYS_getpid, [0; 4]) };
        wrong += u64::from(returned != pid);
        returned
    });
    Account {
        failed: wrong,
        ..account
    }
}

fn open_once(path: &CString, flags: i32) -> i64 {
    const MODE: u64 = 0o600;
    let arguments = [libc::AT_FDCWD as u64, path.as_ptr() as u64, flags as u64, MODE];
    // SAFETY: the kernel reads the path, which lives through the call.
    unsafe { call(libc::SYS_openat, arguments) }
}

fn close(fd: i64) {
    // SAFETY: a descriptor that its opener has told nobody else.
    unsafe { call(libc::SYS_close, [fd as u64, 0, 0, 0]) };
}

fn open(path: &CString, flags: i32, count: u64) -> Account {
    repeat(count, |_| {
        let fd = open_once(path, flags);
        if fd >= 0 {
            close(fd);
        }
        fd
    })
}

fn read_file(path: &CString, limit: u32) -> Account {
    let fd = open_once(path, libc::O_RDONLY);
    if fd < 0 {
        return once(fd);
    }
    let mut bytes = vec![0; limit as usize];
    let mut length = 0;
    let last = loop {
        let room = &mut bytes[length..];
        let arguments = [fd as u64, room.as_mut_ptr() as u64, room.len() as u64, 0];
        // SAFETY: the kernel writes at most `room.len()` bytes to `room`.
        let got = unsafe { call(libc::SYS_read, arguments) };
        if got <= 0 || room.is_empty() {
            break got;
        }
        length += got as usize;
    };
    close(fd);
    bytes.truncate(length);
    Account {
        bytes: bytes.into(),
        ..once(if last < 0 { last } else { length as i64 })
    }
}

fn write_file(path: &CString, bytes: &Text) -> Account {
    let fd = open_once(path, libc::O_WRONLY | libc::O_CREAT | libc::O_TRUNC);
    if fd < 0 {
        return once(fd);
    }
    let bytes = bytes.bytes();
    let arguments = [fd as u64, bytes.as_ptr() as u64, bytes.len() as u64, 0];
    // SAFETY: the kernel reads `bytes`, which live through the call.
    let returned = unsafe { call(libc::SYS_write, arguments) };
    close(fd);
    once(returned)
}

fn exec_memory(image: &[u8], argv: &[CString]) -> Result<Account> {
    let memory = memfd_create(c"vmsight", MFdFlags::MFD_CLOEXEC).context("memfd_create")?;
    File::from(memory.try_clone()?).write_all(image)?;
    let flags = AtFlags::AT_EMPTY_PATH;
    let Err(errno) = nix::unistd::execveat(&memory, c"", argv, &[] as &[CString], flags);
    Ok(once(-i64::from(errno as i32)))
}

fn connect(address: &str, listen: bool) -> Result<Ready> {
    let address: SocketAddr = address.parse().with_context(|| format!("'{address}'"))?;
    let listener = if listen {
        Some(TcpListener::bind(address)?)
    } else {
        None
    };
    let family = if address.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let socket: OwnedFd =
        rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None).context("socket")?;
    Ok(Ready::new(move || {
        let returned = match rustix::net::connect(&socket, &address) {
            Ok(()) => 0,
            Err(errno) => -i64::from(errno.raw_os_error()),
        };
        drop(listener);
        Ok(once(returned))
    }))
}

/// Forks a child, which does its part and exits with its code. Gives its pid.
fn child(part: impl FnOnce() -> i32) -> Result<Pid> {
    match sys::fork_with_pid()? {
        (Side::Child, _) => std::process::exit(part()),
        (Side::Parent, pid) => Ok(Pid::from_raw(pid)),
    }
}

fn fork(count: u32) -> Result<Account> {
    let mut account = Account::default();
    let (nanoseconds, outcome) = timed(|| -> Result<()> {
        for n in 0..count {
            let pid = child(|| (n % 128) as i32)?;
            account.children.push(pid.as_raw() as u32);
            match waitpid(pid, None)? {
                WaitStatus::Exited(_, code) => account.values.push(code as u64),
                other => bail!("child {pid}: {other:?}"),
            }
            account.made += 1;
        }
        Ok(())
    });
    outcome?;
    account.nanoseconds = Some(nanoseconds);
    Ok(account)
}

fn kill_child(signal: i32) -> Result<Account> {
    let pid = child(|| {
        loop {
            nix::unistd::pause();
        }
    })?;
    // SAFETY: takes numbers only.
    let returned = unsafe { call(libc::SYS_kill, [pid.as_raw() as u64, signal as u64, 0, 0]) };
    let deadline = Instant::now() + EFFECT;
    let ended = loop {
        let status = waitpid(pid, Some(WaitPidFlag::WNOHANG))?;
        if status != WaitStatus::StillAlive {
            break status;
        }
        if returned < 0 || Instant::now() > deadline {
            kill(pid, Signal::SIGKILL)?;
            break waitpid(pid, None)?;
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    let (code, signal) = match ended {
        WaitStatus::Exited(_, code) => (code, 0),
        WaitStatus::Signaled(_, signal, _) => (0, signal as i32),
        other => bail!("child {pid}: {other:?}"),
    };
    Ok(Account {
        children: vec![pid.as_raw() as u32],
        values: vec![code as u64, signal as u64],
        ..once(returned)
    })
}

fn syscalls(rounds: u64) -> Result<Ready> {
    const KINDS: u64 = 6;
    let zero = File::open("/dev/zero").context("/dev/zero")?;
    let null = File::options()
        .write(true)
        .open("/dev/null")
        .context("/dev/null")?;
    Ok(Ready::new(move || {
        let (zero, null) = (zero.as_raw_fd() as u64, null.as_raw_fd() as u64);
        let mut buffer = [0u64; 32];
        let at = buffer.as_mut_ptr() as u64;
        let mut failed = 0;
        let account = repeat(rounds, |_| {
            let mut last = 0;
            for (number, arguments) in [
                (libc::SYS_getppid, [0; 4]),
                (libc::SYS_read, [zero, at, 64, 0]),
                (libc::SYS_lseek, [zero, 0, 0, 0]),
                (libc::SYS_fstat, [zero, at, 0, 0]),
                (libc::SYS_sched_yield, [0; 4]),
                (libc::SYS_write, [null, at, 64, 0]),
            ] {
                // SAFETY: read(2) and fstat(2) write 64 and 144 bytes to the buffer, which has 256 and is of plain numbers.
                last = unsafe { call(number, arguments) };
                failed += u64::from(last < 0);
            }
            last
        });
        Ok(Account {
            made: rounds * KINDS,
            failed,
            ..account
        })
    }))
}

fn load(name: &str, parameters: String, from_memory: bool) -> Result<Ready> {
    let path = if name.contains('/') {
        name.to_owned()
    } else {
        MODULES
            .iter()
            .map(|folder| format!("{folder}/{name}.ko"))
            .find(|path| Path::new(path).exists())
            .with_context(|| format!("no module '{name}' in this guest"))?
    };
    let image = fs::read(&path).with_context(|| path.clone())?;
    let file = File::open(&path)?;
    let parameters = CString::new(parameters)?;
    Ok(Ready::new(move || {
        let text = parameters.as_ptr() as u64;
        let (number, arguments) = if from_memory {
            let at = image.as_ptr() as u64;
            (libc::SYS_init_module, [at, image.len() as u64, text, 0])
        } else {
            (libc::SYS_finit_module, [file.as_raw_fd() as u64, text, 0, 0])
        };
        // SAFETY: the kernel reads the image and the parameters, which live through the call.
        Ok(once(unsafe { call(number, arguments) }))
    }))
}
