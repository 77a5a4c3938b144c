//! From a target's memory to its kernel.

mod cut;
mod pieces;

use std::path::PathBuf;

use thiserror::Error;
use vmsight_memory::{GuestMemory, Region};
use vmsight_symbols::cache::Cache;
use vmsight_symbols::kernel::Hints;
use vmsight_symbols::{LocateError, Located, locate, locate_with_file, recall};

use crate::{Kernel, LinuxError};

/// How to find the kernel and its profile.
#[derive(Debug, Default)]
pub struct AttachOptions {
    /// What else is known of the guest.
    pub hints: Hints,
    /// Where profiles are kept; [`Cache::disabled`] by default.
    pub cache: Cache,
    /// A file with symbols or types to use instead of what memory has; the cache is not used then.
    pub symbols: Option<PathBuf>,
}

/// Why there is no kernel to look into.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AttachError {
    /// No kernel was found, or it lets nothing be read of it.
    #[error(transparent)]
    Locate(#[from] LocateError),
}

/// A kernel that was found at a glance in what is thought to be the guest's memory.
#[derive(Debug)]
pub struct Foreseen(Located);

impl Kernel {
    /// Looks for the kernel where kernels lie, and for its profile in the cache, and for neither anywhere else: what can be done while
    /// somebody else is asked where the guest's memory lies.
    pub fn foresee(memory: &GuestMemory, cache: &Cache) -> Option<Foreseen> {
        recall(memory, cache).map(Foreseen)
    }

    /// The kernel that was foreseen in a part of `memory`: the same bytes at the same addresses.
    pub fn foreseen(memory: GuestMemory, foreseen: Foreseen) -> Self {
        Self::located(memory, foreseen.0)
    }

    /// Finds the kernel that runs in `memory`, and its symbols and types in the cache or in memory itself.
    ///
    /// # Errors
    /// If no kernel can be proven, or its symbols cannot be read.
    pub fn attach(memory: GuestMemory, options: AttachOptions) -> Result<Self, AttachError> {
        let located = match &options.symbols {
            None => locate(&memory, &options.hints, &options.cache)?,
            Some(file) => locate_with_file(&memory, &options.hints, file)?,
        };
        Ok(Self::located(memory, located))
    }

    /// Whether the kernel agrees that guest-physical memory is what [`Kernel::memory`] makes it: proof of a layout which
    /// was only deduced, for a kernel found at a low address says nothing of where other memory lies. `Ok` says how.
    ///
    /// Memory must end where the kernel says: `max_pfn` is the page after the last one of RAM in the memory map that
    /// firmware gave (arch/x86/kernel/e820.c, all versions); a guest told to use less (`mem=`) does not prove its layout.
    /// And every piece that it is made of must show something of the kernel's that names its own address.
    ///
    /// A dump may end earlier, where it was cut. Then what is there must agree with firmware's memory map.
    ///
    /// # Errors
    /// If it says otherwise, or says nothing.
    pub fn confirm_memory_end(&self) -> Result<String, LinuxError> {
        let at = self.symbol("max_pfn")?;
        let pages = self
            .space()
            .read_u64(at)
            .map_err(LinuxError::read("max_pfn", at))?;
        let end = self.memory().end().0 >> 12;
        if pages > end && !self.memory().is_live() {
            cut::confirm(self)?;
            return Ok(format!(
                "Linux {} found, whose memory goes on to {:#x}: the image is cut, and what lies above {} is missing",
                self.release(),
                pages.saturating_mul(4096),
                self.memory().end()
            ));
        }
        if pages > end || end - pages > FIRMWARE_PAGES {
            return Err(implausible(format!(
                "the kernel found says that memory ends at page {pages:#x}, this layout at {end:#x}"
            )));
        }
        let pieces = self.memory().pieces();
        let many = pieces.len() > 1;
        refuse_unproven(self, pieces)?;
        let pieces = if many {
            ", and each piece of memory has something of its own"
        } else {
            ""
        };
        Ok(format!(
            "Linux {} found, whose memory ends where this layout ends{pieces}",
            self.release()
        ))
    }
}

/// An error where one of the pieces shows nothing that proves its place.
fn refuse_unproven(kernel: &Kernel, all: Vec<Vec<Region>>) -> Result<(), LinuxError> {
    let unproven = pieces::unproven(kernel, all);
    if unproven.is_empty() {
        return Ok(());
    }
    let shown: Vec<String> = unproven
        .iter()
        .flatten()
        .take(8)
        .map(ToString::to_string)
        .collect();
    Err(implausible(format!(
        "a kernel is found, but nothing of it at {}: another piece of memory may belong there",
        shown.join(", ")
    )))
}

fn implausible(reason: String) -> LinuxError {
    LinuxError::Implausible {
        what: "the memory layout".to_owned(),
        reason,
    }
}

/// Firmware keeps tables for itself at the end of memory; it never keeps this many pages.
const FIRMWARE_PAGES: u64 = 0x1000;
