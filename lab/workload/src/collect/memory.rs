//! The last act: a process pages out a part of its memory after everybody has looked at it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vmsight_workload::Truth;

const PAGE: u64 = 4096;

/// Tells `pid` to page out its arguments, waits until the guest's own pagemap says so, and notes it in `truth`.
/// Where the kernel does not do it (no swap), that is noted instead.
pub(super) fn page_out(truth: &mut Truth, pid: u32) -> Result<()> {
    let process = truth
        .processes
        .iter_mut()
        .find(|p| p.pid == pid)
        .context("the process to page out is gone")?;
    let vm = process
        .vm
        .as_ref()
        .context("the process to page out has no memory")?;
    // Whole pages of nothing but arguments.
    let (start, end) = (vm.arg_start.next_multiple_of(PAGE), vm.arg_end / PAGE * PAGE);
    if start >= end {
        bail!("the arguments of the process to page out fill no page");
    }
    kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGUSR1)?;
    let deadline = Instant::now() + Duration::from_secs(5);
    while Instant::now() < deadline {
        if swapped(pid, start, end)? {
            process.paged_out = Some((start, end));
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    truth
        .lacking
        .push("paged-out: the kernel kept the pages in memory".to_owned());
    Ok(())
}

/// Whether every page of the range is in swap (bit 62 of its pagemap entry, Documentation/admin-guide/mm/pagemap.rst).
fn swapped(pid: u32, start: u64, end: u64) -> Result<bool> {
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    for page in (start..end).step_by(PAGE as usize) {
        let mut entry = [0u8; 8];
        pagemap.read_exact_at(&mut entry, page / PAGE * 8)?;
        if u64::from_le_bytes(entry) & (1 << 62) == 0 {
            return Ok(false);
        }
    }
    Ok(true)
}
