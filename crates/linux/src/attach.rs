//! From a target's memory to its kernel.

use std::path::PathBuf;

use thiserror::Error;
use vmsight_memory::GuestMemory;
use vmsight_symbols::cache::Cache;
use vmsight_symbols::kernel::Hints;
use vmsight_symbols::{LocateError, locate, locate_with_file};

use crate::Kernel;

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

impl Kernel {
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
}
