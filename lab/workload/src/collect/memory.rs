//! Where the memory of processes lies; and the last act: a process pages out a part of its memory after everybody has looked at
//! it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vmsight_workload::{Frame, Truth};

use super::files;

const PAGE: u64 = 4096;
const HUGE_PAGE: u64 = 2 << 20;
/// Pages taken of one mapping, at most.
const SAMPLES: u64 = 16;
/// Bits of a pagemap entry (Documentation/admin-guide/mm/pagemap.rst).
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FRAME: u64 = (1 << 55) - 1;

/// A mapping, as far as `smaps` tells whether and how its pages stay where they are.
#[derive(Debug, Default, PartialEq, Eq)]
struct Locked {
    start: u64,
    end: u64,
    /// KiB of it in transparent huge pages that are mapped by one entry.
    huge_kib: u64,
    /// KiB of each of its pages.
    page_kib: u64,
    stays: bool,
}

impl Locked {
    /// The size of the page that one entry maps at `address`; 0 where that cannot be told.
    fn page_size(&self, address: u64) -> u64 {
        // The whole pages of 2 MiB in it: either all are huge, or none is, or nobody says which.
        let (first, last) = (
            self.start.next_multiple_of(HUGE_PAGE),
            self.end / HUGE_PAGE * HUGE_PAGE,
        );
        match self.huge_kib << 10 {
            0 => self.page_kib << 10,
            huge if huge == last.saturating_sub(first) => {
                if (first..last).contains(&address) {
                    HUGE_PAGE
                } else {
                    PAGE
                }
            }
            _ => 0,
        }
    }
}

/// Some pages of the locked memory of `pid`.
pub(super) fn frames(pid: u32) -> Result<Vec<Frame>> {
    let smaps = files::bytes(format!("/proc/{pid}/smaps"))?;
    let (pagemap, memory) = (
        File::open(format!("/proc/{pid}/pagemap"))?,
        File::open(format!("/proc/{pid}/mem"))?,
    );
    let mut found = Vec::new();
    for mapping in locked(&smaps) {
        let pages = (mapping.end - mapping.start) / PAGE;
        let step = pages.div_ceil(SAMPLES).max(1);
        for page in (0..pages).step_by(usize::try_from(step)?) {
            let address = mapping.start + page * PAGE;
            let entry = word(&pagemap, address / PAGE * 8)?;
            if entry & PRESENT == 0 || entry & FRAME == 0 {
                bail!("locked memory at {address:#x} of {pid} is nowhere: {entry:#x}");
            }
            found.push(Frame {
                address,
                frame: entry & FRAME,
                page_size: mapping.page_size(address),
                word: word(&memory, address)?,
            });
        }
    }
    Ok(found)
}

fn word(file: &File, at: u64) -> Result<u64> {
    let mut word = [0u8; 8];
    file.read_exact_at(&mut word, at)?;
    Ok(u64::from_le_bytes(word))
}

/// The locked mappings among those in `smaps`, and the ones made of huge pages, which stay as well.
fn locked(smaps: &[u8]) -> Vec<Locked> {
    let mut all: Vec<Locked> = Vec::new();
    for line in String::from_utf8_lossy(smaps).lines() {
        let mut words = line.split_ascii_whitespace();
        let (first, second) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        if let Some((start, end)) = range(first) {
            all.push(Locked {
                start,
                end,
                ..Locked::default()
            });
        } else if let Some(last) = all.last_mut() {
            match first {
                "AnonHugePages:" => last.huge_kib = second.parse().unwrap_or_default(),
                "KernelPageSize:" => last.page_kib = second.parse().unwrap_or_default(),
                "VmFlags:" => last.stays = line.split(' ').any(|flag| matches!(flag, "lo" | "ht")),
                _ => {}
            }
        }
    }
    all.retain(|mapping| mapping.stays);
    all
}

fn range(word: &str) -> Option<(u64, u64)> {
    let (start, end) = word.split_once('-')?;
    Some((
        u64::from_str_radix(start, 16).ok()?,
        u64::from_str_radix(end, 16).ok()?,
    ))
}

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

/// Whether every page of the range is in swap.
fn swapped(pid: u32, start: u64, end: u64) -> Result<bool> {
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    for page in (start..end).step_by(PAGE as usize) {
        if word(&pagemap, page / PAGE * 8)? & SWAPPED == 0 {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_that_stay_are_told_from_the_rest() {
        let smaps = b"\
7f0000000000-7f0000003000 rw-p 00000000 00:00 0 
KernelPageSize:        4 kB
AnonHugePages:         0 kB
VmFlags: rd wr mr mw me lo ac sd 
7f0000100000-7f0000700000 rw-p 00000000 00:00 0 
KernelPageSize:        4 kB
AnonHugePages:      4096 kB
VmFlags: rd wr mr mw me lo ac hg sd 
7f0000800000-7f0000801000 r--p 00000000 00:01 7                          /tmp/a lo b
KernelPageSize:        4 kB
AnonHugePages:         0 kB
VmFlags: rd mr mw me sd 
";
        let found = locked(smaps);
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].page_size(0x7f00_0000_1000), PAGE);
        let sizes = [
            0x7f00_0010_0000,
            0x7f00_0020_0000,
            0x7f00_005f_f000,
            0x7f00_0060_0000,
        ]
        .map(|address| found[1].page_size(address));
        assert_eq!(sizes, [PAGE, HUGE_PAGE, HUGE_PAGE, PAGE]);
        let unknown = Locked {
            huge_kib: 2048,
            ..locked(smaps).swap_remove(1)
        };
        assert_eq!(unknown.page_size(0x7f00_0020_0000), 0);
    }
}
