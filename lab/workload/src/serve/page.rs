//! Pages of memory that orders work on.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail};

use crate::sys;

const SIZE: usize = 4096;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const RX: i32 = libc::PROT_READ | libc::PROT_EXEC;
/// `lea rax, [rdi + 1]; ret`.
const ADD_ONE: [u8; 5] = [0x48, 0x8d, 0x47, 0x01, 0xc3];

/// A page, mapped for as long as the process lives.
#[derive(Debug, Clone, Copy)]
pub(super) struct Page {
    at: usize,
}

impl Page {
    /// A page of this process alone, which stays in its frame, full of zeroes.
    pub(super) fn own() -> Result<Page> {
        Page::map(libc::MAP_PRIVATE)
    }

    /// A page which processes that are forked later share.
    pub(super) fn shared() -> Result<Page> {
        Page::map(libc::MAP_SHARED)
    }

    /// A page of this process alone with a function in it that returns its argument plus one.
    pub(super) fn code() -> Result<Page> {
        let page = Page::own()?;
        for (offset, byte) in ADD_ONE.into_iter().enumerate() {
            // SAFETY: within the page, which is writable and of which nobody holds a reference.
            unsafe { std::ptr::write_volatile((page.at + offset) as *mut u8, byte) };
        }
        sys::protect(page.at, SIZE, RX)?;
        Ok(page)
    }

    fn map(kind: i32) -> Result<Page> {
        let at = sys::map(SIZE, RW, kind | libc::MAP_ANONYMOUS, None)?;
        sys::touch(at, SIZE, 0);
        sys::lock(at, SIZE)?;
        Ok(Page { at })
    }

    /// The place at an offset.
    pub(super) fn place(self, offset: u64) -> Result<Place> {
        if !offset.is_multiple_of(8) || offset >= SIZE as u64 {
            bail!("{offset} is no multiple of 8 below 4096");
        }
        let place = Place {
            at: self.at + offset as usize,
        };
        // A shared page is in the tables of this process only once it was written to, and the compiler knows that a zero
        // changes nothing.
        place.cell().fetch_or(std::hint::black_box(0), Ordering::Relaxed);
        Ok(place)
    }

    /// Calls the function of a page made by [`Page::code`].
    pub(super) fn call(self, argument: u64) -> u64 {
        // SAFETY: the page is executable, and holds a function of this type.
        let function: extern "C" fn(u64) -> u64 = unsafe { std::mem::transmute(self.at) };
        function(argument)
    }

    /// Its address.
    pub(super) fn address(self) -> u64 {
        self.at as u64
    }
}

/// 64 bits in a page.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    at: usize,
}

impl Place {
    /// Its address.
    pub(super) fn address(self) -> u64 {
        self.at as u64
    }

    /// Writes it with one instruction.
    pub(super) fn write(self, value: u64) {
        self.cell().store(value, Ordering::Relaxed);
    }

    /// Reads it with one instruction.
    pub(super) fn read(self) -> u64 {
        self.cell().load(Ordering::Relaxed)
    }

    fn cell(self) -> &'static AtomicU64 {
        // SAFETY: aligned, in a page that is mapped for as long as the process lives, and accessed in this way only.
        unsafe { AtomicU64::from_ptr(self.at as *mut u64) }
    }
}

/// The physical page that an address of this process lies in.
pub(super) fn frame(address: u64) -> Result<u64> {
    const PRESENT: u64 = 1 << 63;
    const NUMBER: u64 = (1 << 55) - 1;
    let mut entry = [0; 8];
    File::open("/proc/self/pagemap")
        .and_then(|file| file.read_exact_at(&mut entry, address / SIZE as u64 * 8))
        .context("/proc/self/pagemap")?;
    let entry = u64::from_le_bytes(entry);
    if entry & PRESENT == 0 {
        bail!("no page at {address:#x}");
    }
    Ok(entry & NUMBER)
}

/// Maps pages, and touches none of them. Gives their address.
pub(super) fn untouched(pages: u64) -> Result<usize> {
    let length = usize::try_from(pages)?
        .checked_mul(SIZE)
        .context("so many pages")?;
    let at = sys::map(length, RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None)?;
    // Else the first touch brings in a huge page's worth.
    sys::small_pages(at, length)?;
    Ok(at)
}

/// Touches pages that [`untouched`] gave.
pub(super) fn touch(at: usize, pages: u64) {
    sys::touch(at, pages as usize * SIZE, 1);
}
