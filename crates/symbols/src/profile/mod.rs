//! The profile of one kernel build: who it is, its symbols and its types.

mod memory;

use std::fmt;

use crate::kernel::release_of;
use crate::{SymbolTable, Types};

pub use memory::ProfileError;
pub(crate) use memory::{Made, link_time_text, make, types_in, types_of};

/// Where a profile came from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ProfileSource {
    /// Read out of the guest's memory.
    Memory,
    /// From the profile cache, after the guest's own bytes were found to be those it was made from.
    Cache,
    /// Symbols, types or both are from a file that somebody gave.
    File(String),
}

impl fmt::Display for ProfileSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory => f.write_str("guest memory"),
            Self::Cache => f.write_str("profile cache"),
            Self::File(path) => f.write_str(path),
        }
    }
}

/// What is known of one kernel build, whatever guest runs it and wherever KASLR has put it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Profile {
    /// The GNU build-id of vmlinux: 20 bytes as a rule.
    pub build_id: Option<Vec<u8>>,
    /// The kernel's `linux_banner`, "Linux version …", without the newline.
    pub banner: String,
    /// The release: `6.1.0-56-amd64`.
    pub release: String,
    /// Symbols, by link-time address.
    pub symbols: SymbolTable,
    /// Types; empty where the kernel carries no BTF and no file has been given: see [`Profile::has_types`].
    pub types: Types,
    /// The guest's own types (empty where it carries none), where `types` are from a file: see [`Profile::guest_types`].
    pub replaced_types: Option<Types>,
    /// Link-time address of `_text`.
    pub text_start: u64,
    /// Where all this came from.
    pub source: ProfileSource,
    /// What was damaged, missing or taken from elsewhere than usual.
    pub warnings: Vec<String>,
}

impl Profile {
    /// A profile put together by an importer.
    pub fn new(
        build_id: Option<Vec<u8>>,
        banner: impl Into<String>,
        symbols: SymbolTable,
        types: Types,
        source: ProfileSource,
    ) -> Self {
        let banner = banner.into();
        Self {
            build_id,
            release: release_of(&banner).to_owned(),
            banner,
            text_start: symbols
                .address("_text")
                .or_else(|| symbols.address("_stext"))
                .unwrap_or(0),
            symbols,
            types,
            replaced_types: None,
            source,
            warnings: Vec::new(),
        }
    }

    /// The types that the guest's kernel itself carries, whatever file was given: those that the BTF of its modules continues, id by id.
    /// Empty where it carries none.
    pub fn guest_types(&self) -> &Types {
        self.replaced_types.as_ref().unwrap_or(&self.types)
    }

    /// Whether there are any types. A kernel built without CONFIG_DEBUG_INFO_BTF has none in its memory.
    pub fn has_types(&self) -> bool {
        !self.types.is_empty()
    }
}

/// What a kernel without BTF has for types.
pub(crate) fn no_types() -> Types {
    // A header of 24 bytes, no types, and the one empty string that every blob has.
    const EMPTY: [u8; 25] = [
        0x9f, 0xeb, 1, 0, 24, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0,
    ];
    Types::from_btf(EMPTY.to_vec()).expect("these bytes are a whole BTF blob without types")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_may_lack_types() {
        let symbols = [("_text", 0xffff_ffff_8100_0000, b'T')].into_iter().collect();
        let p = Profile::new(
            None,
            "Linux version 6.1.0 (x) #1",
            symbols,
            no_types(),
            ProfileSource::Memory,
        );
        assert!(!p.has_types());
        assert_eq!(p.release, "6.1.0");
        assert_eq!(p.text_start, 0xffff_ffff_8100_0000);
        assert_eq!(p.types.find_struct("task_struct"), None);
    }
}
