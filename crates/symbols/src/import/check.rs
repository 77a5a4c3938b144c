//! Whether a file belongs to the kernel at hand.

use std::path::PathBuf;

use thiserror::Error;

use super::Imported;
use crate::{Profile, SymbolTable};

/// What a kernel is known by.
#[derive(Clone, Copy, Debug, Default)]
pub struct Identity<'a> {
    /// Its GNU build-id.
    pub build_id: Option<&'a [u8]>,
    /// Its banner, "Linux version …".
    pub banner: Option<&'a str>,
    /// Its symbols by link-time address.
    pub symbols: Option<&'a SymbolTable>,
}

impl<'a> From<&'a Profile> for Identity<'a> {
    fn from(profile: &'a Profile) -> Self {
        Self {
            build_id: profile.build_id.as_deref(),
            banner: Some(profile.banner.as_str()).filter(|b| !b.is_empty()),
            symbols: Some(&profile.symbols).filter(|s| !s.is_empty()),
        }
    }
}

/// By what a file was found to be the right one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checked {
    /// The build-id.
    BuildId,
    /// The banner.
    Banner,
    /// The addresses of symbols that both know.
    Symbols,
    /// Nothing: it says nothing that could be compared, and is taken on its owner's word.
    Unchecked,
}

/// A file of another kernel.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error(
    "{path} belongs to another kernel, by its {by}: the file has {file}, the target {target}; give the file of the \
     kernel that runs, or none, to have symbols read out of the target's memory"
)]
pub struct WrongFile {
    /// The file.
    pub path: PathBuf,
    /// What differs: "build-id", "banner" or "symbols".
    pub by: &'static str,
    /// What the file says.
    pub file: String,
    /// What the target says.
    pub target: String,
}

impl Imported {
    /// Holds the file against the kernel it is meant for, by the strongest mark that both have.
    pub fn check(&self, kernel: &Identity<'_>) -> Result<Checked, WrongFile> {
        if let (Some(file), Some(target)) = (self.build_id.as_deref(), kernel.build_id) {
            let wrong = || self.wrong("build-id", hex(file), hex(target));
            return if file == target {
                Ok(Checked::BuildId)
            } else {
                Err(wrong())
            };
        }
        if let (Some(file), Some(target)) = (self.banner.as_deref(), kernel.banner) {
            let (file, target) = (file.trim(), target.trim());
            let wrong = || {
                self.wrong(
                    "banner",
                    file.escape_debug().to_string(),
                    target.escape_debug().to_string(),
                )
            };
            return if file == target {
                Ok(Checked::Banner)
            } else {
                Err(wrong())
            };
        }
        if let (Some(file), Some(target)) = (self.symbols.as_ref(), kernel.symbols) {
            return self.compare(file, target);
        }
        Ok(Checked::Unchecked)
    }

    /// Two builds of a kernel agree in next to no address; the same one in all but those that were moved by hand. Addresses are
    /// counted from `_text`: a copy of /proc/kallsyms has those at which KASLR had put one boot of the kernel.
    fn compare(&self, file: &SymbolTable, target: &SymbolTable) -> Result<Checked, WrongFile> {
        // Spread over the whole table, and few enough to cost nothing.
        const SAMPLES: usize = 2000;
        let step = (file.len() / SAMPLES).max(1);
        let sample = file.iter().step_by(step).filter(|s| !s.is_absolute());
        let moved = match (text_of(file), text_of(target)) {
            (Some(file), Some(target)) => file.wrapping_sub(target),
            _ => 0,
        };
        let known = sample.filter_map(|s| {
            let mut addresses = target.addresses(s.name).peekable();
            addresses.peek()?;
            let first = target.address(s.name)?;
            Some((s, first, addresses.any(|a| a.wrapping_add(moved) == s.address)))
        });
        let (mut same, mut both, mut example) = (0usize, 0usize, None);
        for (symbol, first, agrees) in known {
            both += 1;
            same += usize::from(agrees);
            if !agrees && example.is_none() {
                example = Some((symbol, first));
            }
        }
        if both < 20 {
            return Ok(Checked::Unchecked);
        }
        match example {
            Some((symbol, first)) if same * 10 < both * 9 => {
                let say = |address: u64| format!("{} at {address:#x}", symbol.name.escape_debug());
                Err(self.wrong("symbols", say(symbol.address), say(first)))
            }
            _ => Ok(Checked::Symbols),
        }
    }

    fn wrong(&self, by: &'static str, file: String, target: String) -> WrongFile {
        WrongFile {
            path: self.path.clone(),
            by,
            file,
            target,
        }
    }

    /// Checks the file, then puts what it has in the place of what the profile has.
    pub fn apply(self, profile: &mut Profile) -> Result<Checked, WrongFile> {
        let checked = self.check(&Identity::from(&*profile))?;
        if checked == Checked::Unchecked {
            let path = self.path.display();
            profile.warnings.push(format!(
                "{path} says nothing of the kernel it belongs to, so it was not checked"
            ));
        }
        profile.source = crate::ProfileSource::File(self.path.display().to_string());
        profile.warnings.extend(self.notes);
        if let Some(symbols) = self.symbols {
            profile.symbols = symbols;
            profile.text_start = text_of(&profile.symbols).unwrap_or(profile.text_start);
        }
        if let Some(types) = self.types {
            let own = std::mem::replace(&mut profile.types, types);
            profile.replaced_types.get_or_insert(own);
        }
        profile.build_id = profile.build_id.take().or(self.build_id);
        Ok(checked)
    }
}

/// Where the image begins. `_stext` stands there too, on x86 and most others.
pub(crate) fn text_of(symbols: &SymbolTable) -> Option<u64> {
    symbols.address("_text").or_else(|| symbols.address("_stext"))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
