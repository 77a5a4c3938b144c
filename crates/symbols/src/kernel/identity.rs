//! Which kernel it is: the banner and the build-id in its read-only data.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use memchr::memmem;
use vmsight_arch::Gpa;
use vmsight_memory::{GuestMemory, ScanOptions};

use super::bytes::ImageBytes;

/// Where an earlier look at the same build has found its banner and build-id.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Known {
    pub(crate) build_id: Vec<u8>,
    /// Bytes from `_text` to the descriptor of the note.
    pub(crate) build_id_at: u64,
    /// Bytes from `_text` to the banner.
    pub(crate) banner_at: u64,
}

pub(super) struct Identity {
    pub(super) banner: String,
    pub(super) build_id: Option<Vec<u8>>,
    pub(super) evidence: String,
}

const BANNER: &[u8] = b"Linux version ";
/// `linux_banner` has release, compiler and build time; 512 bytes are plenty (NEW_UTS_LEN is 64).
pub(crate) const BANNER_MAX: u64 = 512;
/// Bytes of a build-id that are believed: SHA-1 has 20.
const BUILD_ID: std::ops::RangeInclusive<u32> = 8..=64;

/// The identity of an image.
///
/// # Errors
/// If there is no banner in it: then it is no Linux kernel, or what it said has been overwritten.
pub(super) fn of(image: &ImageBytes<'_>, known: &[Known]) -> Result<Identity, String> {
    if let Some(identity) = known.iter().find_map(|k| recall(image, k)) {
        return Ok(identity);
    }
    let mut banner = None;
    let mut build_id = None;
    for (start, bytes) in image.constant_parts() {
        banner = banner.or_else(|| find_banner(&bytes).map(|(at, text)| (start + at as u64, text)));
        build_id = build_id.or_else(|| find_build_id(&bytes).map(|(at, id)| (start + at as u64, id)));
        if banner.is_some() && build_id.is_some() {
            break;
        }
    }
    let (at, banner) = banner.ok_or("there is no Linux banner in the image")?;
    let evidence = format!("its banner is at _text+{at:#x}");
    Ok(Identity {
        banner,
        build_id: build_id.map(|(_, id)| id),
        evidence,
    })
}

fn recall(image: &ImageBytes<'_>, known: &Known) -> Option<Identity> {
    let id = image.read(known.build_id_at, known.build_id.len() as u64)?;
    if *id != *known.build_id {
        return None;
    }
    let len = BANNER_MAX.min(image.len().checked_sub(known.banner_at)?);
    let banner = banner_at(&image.read(known.banner_at, len)?)?;
    let evidence = format!(
        "its build-id and its banner at _text+{:#x} are those of a known build",
        known.banner_at
    );
    Some(Identity {
        banner,
        build_id: Some(known.build_id.clone()),
        evidence,
    })
}

/// The banner in `bytes`, and where. Since 6.2 there are two: the one without a build number ("# SMP") is what an early
/// step of the build leaves (init/version.c), and the kernel shows the other.
pub(crate) fn find_banner(bytes: &[u8]) -> Option<(usize, String)> {
    let mut first = None;
    for at in memmem::find_iter(bytes, BANNER) {
        let Some(text) = bytes.get(at..).and_then(banner_at) else {
            continue;
        };
        if is_numbered(&text) {
            return Some((at, text));
        }
        first = first.or(Some((at, text)));
    }
    first
}

/// Whether the banner has a build number: "#1 SMP".
fn is_numbered(banner: &str) -> bool {
    banner
        .split(" #")
        .skip(1)
        .any(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
}

/// The banner that `bytes` begin with: "Linux version 6.1.0 …", ended by newline and NUL.
pub(crate) fn banner_at(bytes: &[u8]) -> Option<String> {
    let bytes = bytes.get(..bytes.len().min(BANNER_MAX as usize))?;
    let rest = bytes.strip_prefix(BANNER)?;
    let end = rest.iter().position(|&b| b == b'\n' || b == 0)?;
    let text = rest.get(..end)?;
    let dotted = text.first()?.is_ascii_digit() && text.iter().take(4).any(|&b| b == b'.');
    let printable = text.iter().all(|&b| b >= 0x20 && b != 0x7f);
    (dotted && printable).then(|| format!("Linux version {}", String::from_utf8_lossy(text)))
}

/// The GNU build-id note of the kernel itself, and where its descriptor begins. The images of the vDSO are in the same data and
/// have notes of their own, at most a page behind their ELF headers.
pub(crate) fn find_build_id(bytes: &[u8]) -> Option<(usize, Vec<u8>)> {
    // Name size, descriptor size, type 3, name (elf.h, NT_GNU_BUILD_ID).
    const TAIL: &[u8] = b"\x03\0\0\0GNU\0";
    memmem::find_iter(bytes, TAIL).find_map(|at| {
        let word = |at: usize| crate::types::bytes::word(bytes, at);
        let (name, len) = (word(at.checked_sub(8)?)?, word(at - 4)?);
        if name != 4 || !BUILD_ID.contains(&len) {
            return None;
        }
        let page = at & !0xfff;
        let elf = |page: usize| bytes.get(page..page + 4) == Some(b"\x7fELF");
        if elf(page) || page.checked_sub(0x1000).is_some_and(elf) {
            return None;
        }
        let start = at + TAIL.len();
        Some((start, bytes.get(start..start + len as usize)?.to_vec()))
    })
}

/// A few banners from wherever in memory they are, to tell what may be there when nothing can be proven.
pub(super) fn banners_anywhere(memory: &GuestMemory) -> Vec<(Gpa, String)> {
    const MOST: usize = 3;
    let options = ScanOptions {
        overlap: BANNER_MAX as usize,
        ..ScanOptions::default()
    };
    let (stop, count) = (AtomicBool::new(false), AtomicUsize::new(0));
    let scan = memory.scan(&options, &stop, |chunk, bytes| {
        let found = find_banner(bytes).map(|(at, banner)| (chunk.gpa.wrapping_add(at as u64), banner));
        if found.is_some() && count.fetch_add(1, Ordering::Relaxed) + 1 >= MOST {
            stop.store(true, Ordering::Relaxed);
        }
        found.into_iter().collect()
    });
    let mut found = scan.found;
    found.truncate(MOST);
    found
}
