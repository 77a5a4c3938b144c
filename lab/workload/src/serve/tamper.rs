//! Talks to our kernel module `vmsight_tamper`.

use std::fs::File;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, bail};
use vmsight_workload::orders::{Account, Tamper, Tampered};

use super::work::{call, once};

const PATH: &str = "/dev/vmsight_tamper";
/// Bytes of a symbol, its NUL included.
const SYMBOL: usize = 64;

/// `struct tamper` of lab/modules/vmsight_tamper.c.
#[derive(Debug)]
#[repr(C)]
struct Message {
    what: u64,
    undo: u64,
    pid: u64,
    number: u64,
    symbol: [u8; SYMBOL],
    object: u64,
    hook: u64,
    module: u64,
    text: u64,
}

/// `_IOWR('v', 2, struct tamper)`.
const TAMPER: u64 = 3 << 30 | (size_of::<Message>() as u64) << 16 | (b'v' as u64) << 8 | 2;

/// The module's device, opened.
pub(super) struct Device {
    file: File,
}

impl Device {
    /// Opens it.
    pub(super) fn open() -> Result<Device> {
        let file = File::open(PATH).with_context(|| format!("{PATH} (is vmsight_tamper loaded?)"))?;
        Ok(Device { file })
    }

    /// Has it do something, or undo it.
    pub(super) fn tamper(&mut self, tamper: &Tamper, undo: bool) -> Result<Account> {
        let mut message = message(tamper, undo)?;
        let argument = (&raw mut message) as u64;
        // SAFETY: the module reads and writes one message there.
        let returned = unsafe {
            call(
                libc::SYS_ioctl,
                [self.file.as_raw_fd() as u64, TAMPER, argument, 0],
            )
        };
        let Message {
            object,
            hook,
            module,
            text,
            ..
        } = message;
        Ok(Account {
            tampered: Some(Tampered {
                object,
                hook,
                module,
                text,
            }),
            ..once(returned)
        })
    }
}

fn message(tamper: &Tamper, undo: bool) -> Result<Message> {
    // `enum what` of the module, a process, a number, a symbol or a path.
    let (what, pid, number, name) = match tamper {
        Tamper::ModuleList => (0, 0, 0, ""),
        Tamper::ModuleSysfs => (1, 0, 0, ""),
        Tamper::ModuleTree => (2, 0, 0, ""),
        Tamper::TaskList { pid } => (3, *pid, 0, ""),
        Tamper::TaskPid { pid } => (4, *pid, 0, ""),
        Tamper::SyscallTable { number } => (5, 0, *number, ""),
        Tamper::Inline { symbol } => (6, 0, 0, symbol.as_str()),
        Tamper::Ftrace { symbol } => (7, 0, 0, symbol.as_str()),
        Tamper::Kprobe { symbol } => (8, 0, 0, symbol.as_str()),
        Tamper::TcpSeq { port } => (9, 0, (*port).into(), ""),
        Tamper::Idt { vector } => (10, 0, (*vector).into(), ""),
        Tamper::Netfilter => (11, 0, 0, ""),
        Tamper::CredWrite { pid } => (12, *pid, 0, ""),
        Tamper::CredShare { pid, other } => (13, *pid, (*other).into(), ""),
        Tamper::PageWx => (14, 0, 0, ""),
        Tamper::TextAlias { symbol } => (15, 0, 0, symbol.as_str()),
        Tamper::Socket { pid } => (16, *pid, 0, ""),
        Tamper::ModuleMark => (17, 0, 0, ""),
        Tamper::Timer => (18, 0, 0, ""),
        Tamper::HrTimer => (19, 0, 0, ""),
        Tamper::DelayedWork => (20, 0, 0, ""),
        Tamper::KernelThread => (21, 0, 0, ""),
        Tamper::Keyboard => (22, 0, 0, ""),
        Tamper::Uprobe { program } => (23, 0, 0, program.as_str()),
        Tamper::Breakpoint { symbol } => (24, 0, 0, symbol.as_str()),
        Tamper::Seccomp { pid } => (25, *pid, 0, ""),
        Tamper::FileList { path } => (26, 0, 0, path.as_str()),
        Tamper::FileName { path } => (27, 0, 0, path.as_str()),
    };
    if name.len() >= SYMBOL {
        bail!("'{name}' is too long for a symbol or a path");
    }
    let mut symbol = [0; SYMBOL];
    symbol[..name.len()].copy_from_slice(name.as_bytes());
    Ok(Message {
        what,
        undo: undo.into(),
        pid: pid.into(),
        number,
        symbol,
        object: 0,
        hook: 0,
        module: 0,
        text: 0,
    })
}
