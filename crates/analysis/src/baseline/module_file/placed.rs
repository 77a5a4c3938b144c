//! A module's file as the kernel's loader lays it out.

use std::ops::Range;

use rustc_hash::FxHashMap;
use vmsight_arch::Gva;

use super::{Kind, ModuleFile, Place, Section};

/// The module's per-CPU data: the loader keeps it elsewhere (kernel/module/main.c, `find_pcpusec`).
const PER_CPU: &str = ".data..percpu";

/// Writable while the module is loaded, and kept apart from what stays so (kernel/module/main.c, `module_mark_ro_after_init`).
const AFTER_INIT: [&str; 3] = [".data..ro_after_init", "__jump_table", ".static_call_sites"];

/// Where what a module does not have itself lies.
pub struct Outside<'o> {
    /// Its sections, as the kernel lists them: name and address.
    pub sections: &'o [(&'o str, Gva)],
    /// Its per-CPU data.
    pub per_cpu: Option<Gva>,
    /// The value of what the kernel or another module exports by this name.
    pub symbol: &'o dyn Fn(&str) -> Option<u64>,
}

impl std::fmt::Debug for Outside<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sections = self.sections.len();
        write!(
            f,
            "Outside {{ sections: {sections}, per_cpu: {:?} }}",
            self.per_cpu
        )
    }
}

/// A module's file, and where each of its parts lies.
#[derive(Debug)]
pub struct Placed<'f> {
    pub(super) file: &'f ModuleFile,
    sections: FxHashMap<usize, u64>,
    /// The value of each symbol, by its number.
    symbols: Vec<Option<u64>>,
}

/// A section's bytes with all that they refer to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Relocated {
    /// The section's name.
    pub name: String,
    /// Where it lies.
    pub at: Gva,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Which of them refer to something of which it is not known where it is.
    pub unknown: Vec<Range<usize>>,
    /// Where whole addresses stand.
    pub pointers: Vec<usize>,
}

impl ModuleFile {
    /// Lays it out.
    pub fn placed(&self, outside: &Outside<'_>) -> Placed<'_> {
        let mut taken: FxHashMap<&str, usize> = FxHashMap::default();
        let mut sections = FxHashMap::default();
        for section in &self.sections {
            if section.name == PER_CPU {
                sections.extend(outside.per_cpu.map(|at| (section.index, at.0)));
                continue;
            }
            if section.size == 0 {
                // The kernel does not list it. It lies where what was laid out before it ends.
                let end = end_before(&self.sections, section, &sections);
                sections.extend(end.map(|at| (section.index, at)));
                continue;
            }
            // Of several with one name, in their order.
            let number = taken.entry(&section.name).or_default();
            let mut same = outside.sections.iter().filter(|(name, _)| *name == section.name);
            sections.extend(same.nth(*number).map(|(_, at)| (section.index, at.0)));
            *number += 1;
        }
        let value = |symbol: &super::Symbol| match symbol.place {
            Place::Unknown => None,
            Place::Absolute => Some(symbol.value),
            Place::Section(index) => sections.get(&index).map(|at| at.wrapping_add(symbol.value)),
            Place::Outside => match (outside.symbol)(&symbol.name) {
                None if symbol.weak => Some(0),
                value => value,
            },
        };
        let symbols = self.symbols.iter().map(value).collect();
        Placed {
            file: self,
            sections,
            symbols,
        }
    }
}

/// Where writable data ends that stands before an empty section of such.
fn end_before(all: &[Section], empty: &Section, placed: &FxHashMap<usize, u64>) -> Option<u64> {
    let stays = |s: &&Section| {
        let apart = AFTER_INIT.contains(&&*s.name) || s.name.starts_with(".init") || s.name == PER_CPU;
        s.is_writable && s.size > 0 && !apart
    };
    let before = all.iter().take_while(|s| s.index != empty.index).filter(stays);
    let last = before.last().filter(|_| empty.is_writable)?;
    let end = placed.get(&last.index)?.checked_add(last.size)?;
    end.checked_next_multiple_of(empty.alignment)
}

impl Placed<'_> {
    /// Its code, section by section; not what is given back when it has been loaded, nor what lies nowhere.
    pub fn code(&self) -> impl Iterator<Item = Relocated> {
        self.of_kind(Kind::Code)
    }

    /// Its read-only data.
    pub fn constants(&self) -> impl Iterator<Item = Relocated> {
        self.of_kind(Kind::Constant)
    }

    /// Names of sections of its code of which it is not known where they lie.
    pub fn missing(&self) -> impl Iterator<Item = &str> {
        let code = self.file.sections.iter().filter(|s| s.kind == Kind::Code);
        code.filter(|s| !self.sections.contains_key(&s.index))
            .map(|s| s.name.as_str())
    }

    /// What it exports: name and address.
    pub fn exports(&self) -> impl Iterator<Item = (&str, u64)> {
        let symbols = self.file.symbols.iter().zip(&self.symbols);
        symbols
            .filter(|(symbol, _)| symbol.exported)
            .filter_map(|(symbol, value)| Some((symbol.name.as_str(), (*value)?)))
    }

    fn of_kind(&self, kind: Kind) -> impl Iterator<Item = Relocated> {
        let sections = self.file.sections.iter().filter(move |s| s.kind == kind);
        sections.filter_map(|section| self.relocated(section))
    }

    fn relocated(&self, section: &Section) -> Option<Relocated> {
        let at = *self.sections.get(&section.index)?;
        let mut relocated = Relocated {
            name: section.name.clone(),
            at: Gva(at),
            bytes: section.bytes.clone(),
            unknown: Vec::new(),
            pointers: Vec::new(),
        };
        for relocation in &section.relocations {
            let place = relocation.offset..relocation.offset + relocation.form.size;
            let Some(value) = self.target(relocation.symbol, relocation.addend) else {
                relocated.unknown.push(place);
                continue;
            };
            let from = match relocation.form.relative {
                true => at.wrapping_add(relocation.offset as u64),
                false => 0,
            };
            let value = value.wrapping_sub(from).to_le_bytes();
            if let (Some(to), Some(value)) =
                (relocated.bytes.get_mut(place), value.get(..relocation.form.size))
            {
                to.copy_from_slice(value);
            }
            if relocation.form.size == 8 && !relocation.form.relative {
                relocated.pointers.push(relocation.offset);
            }
        }
        Some(relocated)
    }

    fn target(&self, symbol: usize, addend: i64) -> Option<u64> {
        let value = match symbol {
            0 => 0,
            _ => (*self.symbols.get(symbol)?)?,
        };
        Some(value.wrapping_add(addend as u64))
    }

    /// What the places of a table refer to, by offset in it: wherever the table lies.
    pub(super) fn references(&self, section: &Section) -> FxHashMap<usize, u64> {
        let references = section.relocations.iter();
        references
            .filter_map(|r| Some((r.offset, self.target(r.symbol, r.addend)?)))
            .collect()
    }

    /// Symbols of this begin, and where they lie.
    pub(super) fn named(&self, begin: &str) -> impl Iterator<Item = u64> {
        let symbols = self.file.symbols.iter().zip(&self.symbols);
        symbols
            .filter(move |(symbol, _)| {
                symbol.name.starts_with(begin) && matches!(symbol.place, Place::Section(_))
            })
            .filter_map(|(_, value)| *value)
    }
}
