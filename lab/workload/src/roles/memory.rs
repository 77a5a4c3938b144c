//! Processes with memory of every sort.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;

use anyhow::{Context, Result};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{SigSet, Signal};

use crate::play::{Held, lacking, ready, stand};
use crate::sys;

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const MIB: usize = 1 << 20;

/// Maps files, anonymous and shared memory, huge and tiny, allowed and not.
pub(super) fn mapper() -> Result<Held> {
    let file = File::options()
        .read(true)
        .write(true)
        .open("/srv/data/mapped.bin")?;
    sys::map(64 << 10, RW, libc::MAP_SHARED, Some((file.as_fd(), 0x4000)))?;
    sys::map(
        32 << 10,
        libc::PROT_READ | libc::PROT_EXEC,
        libc::MAP_PRIVATE,
        Some((file.as_fd(), 0)),
    )?;
    let mut gone = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open("/srv/data/mapped and gone.bin")?;
    gone.write_all(&[0x47; 8192])?;
    sys::map(8192, libc::PROT_READ, libc::MAP_PRIVATE, Some((gone.as_fd(), 0)))?;
    fs::remove_file("/srv/data/mapped and gone.bin")?;
    let memory = File::from(memfd_create("mapped memory", MFdFlags::MFD_CLOEXEC)?);
    memory.set_len(16384)?;
    let at = sys::map(16384, RW, libc::MAP_SHARED, Some((memory.as_fd(), 0)))?;
    sys::touch(at, 16384, b'm');
    let shared = sys::map(MIB, RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, None)?;
    sys::touch(shared, MIB / 2, b's');
    // Reserved and never used.
    sys::map(
        1 << 30,
        libc::PROT_NONE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        None,
    )?;
    let code = sys::map(
        8192,
        RW | libc::PROT_EXEC,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        None,
    )?;
    sys::touch(code, 8192, 0x90);
    locked(16)?;
    patchwork()?;
    transparent_huge()?;
    huge()?;
    Ok(Box::new((file, gone, memory)))
}

/// This many pages of memory that is not moved about.
pub(super) fn locked(pages: usize) -> Result<()> {
    let at = sys::map(pages * 4096, RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None)?;
    sys::touch(at, pages * 4096, std::process::id() as u8);
    Ok(sys::lock(at, pages * 4096)?)
}

/// Hundreds of small mappings, so that the tree that holds them is a deep one.
fn patchwork() -> Result<()> {
    const PAGES: usize = 600;
    let at = sys::map(PAGES * 4096, RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None)?;
    for page in (0..PAGES).step_by(2) {
        sys::protect(at + page * 4096, 4096, libc::PROT_READ)?;
    }
    Ok(())
}

/// Page table entries that map 2 MiB, where the kernel hands such out.
fn transparent_huge() -> Result<()> {
    let at = sys::map(6 * MIB, RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None)?;
    match sys::advise(at, 6 * MIB, libc::MADV_HUGEPAGE) {
        Ok(()) => {
            sys::touch(at, 6 * MIB, b't');
            sys::lock(at, 6 * MIB)?;
        }
        Err(error) => lacking("transparent huge pages", error),
    }
    Ok(())
}

/// The same out of the reserved pool.
fn huge() -> Result<()> {
    fs::write("/proc/sys/vm/nr_hugepages", "2").context("reserve huge pages")?;
    match sys::map(
        2 * MIB,
        RW,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB,
        None,
    ) {
        Ok(at) => sys::touch(at, 2 * MIB, b'h'),
        Err(error) => lacking("huge pages", error),
    }
    Ok(())
}

/// Waits for a SIGUSR1 and then has its arguments paged out. It never looks at them.
pub(super) fn paged_out() -> Result<Held> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_ascii_whitespace()
        .collect();
    let address =
        |number: usize| -> Result<usize> { Ok(fields.get(number - 3).context("short stat")?.parse()?) };
    let (start, end) = (address(48)?.next_multiple_of(4096), address(49)? / 4096 * 4096);
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGUSR1);
    signals.thread_block()?;
    ready()?;
    signals.wait()?;
    // Pages just written may sit in a per-CPU batch that paging out passes by; a second round finds them.
    for _ in 0..10 {
        sys::advise(start, end - start, libc::MADV_PAGEOUT)?;
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    stand()
}
