//! A module's own file (`.ko`), as its distribution ships it: a relocatable ELF file, of which is kept what its code is made of.
//!
//! [`ModuleFile::placed`] does with it what the kernel's loader does (kernel/module/main.c, arch/x86/kernel/module.c): each section
//! lies somewhere, and what refers to it is made to. [`Placed::sites`] are the places that the file itself says the kernel patches.

mod placed;
mod sites;
#[cfg(test)]
mod tests;

use object::elf::{SHF_ALLOC, SHF_EXECINSTR, SHF_WRITE};
use object::{
    Architecture, Object as _, ObjectKind, ObjectSection as _, ObjectSymbol as _, RelocationFlags,
    RelocationTarget, SectionFlags, SectionKind, SymbolSection,
};

use super::kernel_file;

pub use placed::{Outside, Placed, Relocated};
pub use sites::{AlternativeLayout, Site, SiteKind};

/// Tables of places in code that are kept beside the code.
const TABLES: [&str; 11] = [
    ".altinstructions",
    ".parainstructions",
    ".retpoline_sites",
    ".return_sites",
    ".call_sites",
    ".ibt_endbr_seal",
    ".smp_locks",
    ".static_call_sites",
    "__jump_table",
    "__mcount_loc",
    ".cfi_sites",
];

/// The most of symbols that are read. Drivers of graphics cards have some 100,000.
const MAX_SYMBOLS: usize = 1 << 20;

/// Why a file is no module.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModuleFileError {
    /// It is no ELF file, or damaged.
    #[error("it is no ELF file: {0}")]
    Elf(#[from] object::Error),
    /// It is one of another kind.
    #[error("it is no module for x86-64: {0}")]
    Foreign(&'static str),
    /// It says what cannot be.
    #[error("it is damaged: {0}")]
    Damaged(String),
}

/// A module's file.
#[derive(Clone, Debug)]
pub struct ModuleFile {
    /// The module's name, as the kernel spells it.
    pub name: String,
    /// Its GNU build-id in hexadecimal.
    pub build_id: Option<String>,
    /// Checksum of its sources.
    pub srcversion: Option<String>,
    /// The release of the kernel that it is for, and how that was configured.
    pub vermagic: Option<String>,
    pub(super) sections: Vec<Section>,
    /// By their number.
    pub(super) symbols: Vec<Symbol>,
}

/// A section that is loaded.
#[derive(Clone, Debug)]
pub(super) struct Section {
    pub(super) name: String,
    /// The ELF file's number for it.
    pub(super) index: usize,
    pub(super) size: u64,
    pub(super) alignment: u64,
    pub(super) is_writable: bool,
    pub(super) kind: Kind,
    /// Only of code, read-only data and tables.
    pub(super) bytes: Vec<u8>,
    pub(super) relocations: Vec<Relocation>,
}

/// What a section is of interest for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Code,
    /// Data that nobody writes to.
    Constant,
    Table,
    Other,
}

#[derive(Clone, Debug)]
pub(super) struct Relocation {
    pub(super) offset: usize,
    pub(super) form: Form,
    /// Its number; 0 is none.
    pub(super) symbol: usize,
    pub(super) addend: i64,
}

/// How a place refers to something (x86-64 psABI, chapter 4.4): in so many bytes, and whether from where it lies.
#[derive(Clone, Copy, Debug)]
pub(super) struct Form {
    pub(super) size: usize,
    pub(super) relative: bool,
}

#[derive(Clone, Default, Debug)]
pub(super) struct Symbol {
    /// Only of those that somebody else defines or uses, and of trampolines.
    pub(super) name: String,
    pub(super) place: Place,
    pub(super) value: u64,
    pub(super) weak: bool,
    /// Other modules may use it.
    pub(super) exported: bool,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(super) enum Place {
    /// Nowhere that is known.
    #[default]
    Unknown,
    /// Its value is its address.
    Absolute,
    /// In another module, or the kernel.
    Outside,
    Section(usize),
}

impl ModuleFile {
    /// Reads one. Memory is used as the file has bytes.
    ///
    /// # Errors
    /// If it is no module for x86-64, or damaged.
    pub fn parse(file: &[u8]) -> Result<Self, ModuleFileError> {
        let elf = object::File::parse(file)?;
        if elf.kind() != ObjectKind::Relocatable {
            return Err(ModuleFileError::Foreign("it is linked already"));
        }
        if elf.architecture() != Architecture::X86_64 {
            return Err(ModuleFileError::Foreign("it is for another processor"));
        }
        let data = |name: &str| elf.section_by_name(name).and_then(|s| s.data().ok());
        let facts = data(".modinfo").unwrap_or_default();
        let fact = |key: &str| {
            let mut facts = facts.split(|byte| *byte == 0);
            let value = facts.find_map(|fact| fact.strip_prefix(key.as_bytes())?.strip_prefix(b"="))?;
            Some(String::from_utf8_lossy(value).into_owned())
        };
        let name = fact("name").filter(|name| !name.is_empty());
        let build_id = data(".note.gnu.build-id").and_then(kernel_file::build_id);
        let mut module = Self {
            name: name.ok_or(ModuleFileError::Foreign("it does not say its name"))?,
            build_id: build_id.map(|id| super::hex(&id)),
            srcversion: fact("srcversion"),
            vermagic: fact("vermagic"),
            sections: Vec::new(),
            symbols: symbols(&elf)?,
        };
        for section in elf.sections() {
            module.sections.extend(read_section(&section)?);
        }
        let count = module.symbols.len();
        let mut relocations = module.sections.iter().flat_map(|s| &s.relocations);
        if let Some(relocation) = relocations.find(|r| r.symbol >= count && r.symbol != 0) {
            let number = relocation.symbol;
            return Err(ModuleFileError::Damaged(format!("it has no symbol {number}")));
        }
        Ok(module)
    }

    /// The release of the kernel that it is for.
    pub fn release(&self) -> Option<&str> {
        self.vermagic.as_deref()?.split(' ').next()
    }

    /// Whether its code is rewritten as a whole for the checking of indirect calls (kCFI, FineIBT): the file does not say how.
    pub fn is_rewritten(&self) -> bool {
        self.sections.iter().any(|s| s.name == ".cfi_sites")
    }
}

fn symbols(elf: &object::File<'_>) -> Result<Vec<Symbol>, ModuleFileError> {
    const EXPORT: &str = "__ksymtab_";
    let mut symbols: Vec<Symbol> = Vec::new();
    let mut exports = rustc_hash::FxHashSet::default();
    for symbol in elf.symbols() {
        let index = symbol.index().0;
        if index >= MAX_SYMBOLS {
            return Err(ModuleFileError::Damaged("it has too many symbols".to_owned()));
        }
        let name = symbol.name().unwrap_or_default();
        exports.extend(name.strip_prefix(EXPORT).map(str::to_owned));
        let place = match symbol.section() {
            SymbolSection::Undefined => Place::Outside,
            SymbolSection::Absolute => Place::Absolute,
            SymbolSection::Section(section) => Place::Section(section.0),
            _ => Place::Unknown,
        };
        let named = symbol.is_global() || place == Place::Outside || name.starts_with(sites::TRAMPOLINE);
        if symbols.len() <= index {
            symbols.resize_with(index + 1, Symbol::default);
        }
        if let Some(slot) = symbols.get_mut(index) {
            *slot = Symbol {
                name: if named { name.to_owned() } else { String::new() },
                place,
                value: symbol.address(),
                weak: symbol.is_weak(),
                exported: false,
            };
        }
    }
    for symbol in &mut symbols {
        symbol.exported = matches!(symbol.place, Place::Section(_)) && exports.contains(&symbol.name);
    }
    Ok(symbols)
}

/// A section, if it is loaded.
fn read_section(section: &object::Section<'_, '_>) -> Result<Option<Section>, ModuleFileError> {
    let SectionFlags::Elf { sh_flags } = section.flags() else {
        return Ok(None);
    };
    let has = |flag: u32| sh_flags & u64::from(flag) != 0;
    if !has(SHF_ALLOC) {
        return Ok(None);
    }
    let name = section.name()?.to_owned();
    let is_init = name.starts_with(".init");
    let kind = if section.kind() == SectionKind::UninitializedData || is_init || section.size() == 0 {
        Kind::Other
    } else if has(SHF_EXECINSTR) {
        Kind::Code
    } else if TABLES.contains(&&*name) {
        Kind::Table
    } else if !has(SHF_WRITE) && name.starts_with(".rodata") {
        Kind::Constant
    } else {
        Kind::Other
    };
    let mut read = Section {
        name,
        index: section.index().0,
        size: section.size(),
        alignment: section.align().max(1),
        is_writable: has(SHF_WRITE),
        kind,
        bytes: Vec::new(),
        relocations: Vec::new(),
    };
    if kind == Kind::Other {
        return Ok(Some(read));
    }
    read.bytes = section.data()?.to_vec();
    for (offset, relocation) in section.relocations() {
        let damaged = |what: String| ModuleFileError::Damaged(format!("{}: {what}", read.name));
        let RelocationFlags::Elf { r_type } = relocation.flags() else {
            return Err(damaged("a relocation is none of ELF".to_owned()));
        };
        let Some(form) = Form::of(r_type) else {
            return Err(damaged(format!("a relocation is of type {r_type}")));
        };
        let fits = usize::try_from(offset).ok().filter(|at| {
            let end = at.checked_add(form.size);
            end.is_some_and(|end| end <= read.bytes.len())
        });
        let offset = fits.ok_or_else(|| damaged(format!("a relocation is for {offset:#x}")))?;
        if relocation.has_implicit_addend() {
            return Err(damaged("a relocation has no addend".to_owned()));
        }
        read.relocations.push(Relocation {
            offset,
            form,
            symbol: match relocation.target() {
                RelocationTarget::Symbol(symbol) => symbol.0,
                _ => 0,
            },
            addend: relocation.addend(),
        });
    }
    read.relocations.sort_by_key(|r| r.offset);
    Ok(Some(read))
}

impl Form {
    /// The types that the kernel's loader knows.
    fn of(r_type: u32) -> Option<Self> {
        use object::elf;
        let (size, relative) = match r_type {
            elf::R_X86_64_NONE => (0, false),
            elf::R_X86_64_64 => (8, false),
            elf::R_X86_64_32 | elf::R_X86_64_32S => (4, false),
            elf::R_X86_64_PC32 | elf::R_X86_64_PLT32 => (4, true),
            elf::R_X86_64_PC64 => (8, true),
            _ => return None,
        };
        Some(Self { size, relative })
    }
}
