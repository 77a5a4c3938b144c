//! Puts code into another process, as a debugger could.

use std::io::IoSlice;

use anyhow::{Context, Result, bail};
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::uio::{RemoteIoVec, process_vm_writev};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use vmsight_workload::orders::{Account, INJECTED, OVERWRITTEN};

const PAGE: u64 = 4096;
/// `syscall; int3`.
const CALL_AND_STOP: i64 = 0xcc_05_0f;

/// Has the process map a page, writable and executable, writes [`INJECTED`] to it, and has the process go on there.
pub(super) fn inject(pid: u32) -> Result<Account> {
    let pid = Pid::from_raw(pid as i32);
    ptrace::attach(pid).context("attach")?;
    wait(pid, Signal::SIGSTOP)?;
    let before = ptrace::getregs(pid)?;
    let at = before.rip as ptrace::AddressType;
    let code = ptrace::read(pid, at)?;
    ptrace::write(pid, at, CALL_AND_STOP)?;
    let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    ptrace::setregs(
        pid,
        libc::user_regs_struct {
            // Not in a system call: none is to be started anew.
            orig_rax: u64::MAX,
            rax: libc::SYS_mmap as u64,
            rdi: 0,
            rsi: PAGE,
            rdx: protection as u64,
            r10: flags as u64,
            r8: u64::MAX,
            r9: 0,
            ..before
        },
    )?;
    ptrace::cont(pid, None)?;
    wait(pid, Signal::SIGTRAP)?;
    let page = ptrace::getregs(pid)?.rax;
    ptrace::write(pid, at, code)?;
    if page > u64::MAX - PAGE {
        bail!("mmap: error {}", page as i64);
    }
    let there = RemoteIoVec {
        base: page as usize,
        len: INJECTED.len(),
    };
    process_vm_writev(pid, &[IoSlice::new(&INJECTED)], &[there]).context("write to the process")?;
    ptrace::setregs(
        pid,
        libc::user_regs_struct {
            orig_rax: u64::MAX,
            rip: page,
            ..before
        },
    )?;
    ptrace::detach(pid, None)?;
    Ok(Account {
        made: 1,
        address: Some(page),
        ..Account::default()
    })
}

/// Writes [`OVERWRITTEN`] over the first instructions of the process's program, which it is past.
pub(super) fn overwrite(pid: u32) -> Result<Account> {
    /// `AT_ENTRY` (include/uapi/linux/auxvec.h).
    const ENTRY: u64 = 9;
    let vector = std::fs::read(format!("/proc/{pid}/auxv")).context("auxv")?;
    let (words, _) = vector.as_chunks::<8>();
    let (pairs, _) = words.as_chunks::<2>();
    let entry = pairs
        .iter()
        .map(|pair| pair.map(u64::from_le_bytes))
        .find(|[key, _]| *key == ENTRY);
    let [_, at] = entry.context("auxv has no entry")?;
    let pid = Pid::from_raw(pid as i32);
    ptrace::attach(pid).context("attach")?;
    wait(pid, Signal::SIGSTOP)?;
    ptrace::write(pid, at as ptrace::AddressType, i64::from_le_bytes(OVERWRITTEN))?;
    ptrace::detach(pid, None)?;
    Ok(Account {
        made: 1,
        address: Some(at),
        ..Account::default()
    })
}

fn wait(pid: Pid, expected: Signal) -> Result<()> {
    match waitpid(pid, Some(WaitPidFlag::__WALL))? {
        WaitStatus::Stopped(_, signal) if signal == expected => Ok(()),
        other => bail!("process {pid}: {other:?}"),
    }
}
