//! The kernel and its modules as pieces of memory with names.

use vmsight_arch::Gva;
use vmsight_linux::module::Module;
use vmsight_linux::{Kernel, LinuxError};

use super::file::{HEADER, PROGRAM_HEADER, Rights, Section, Symbol};
use crate::recover::frames::PAGE;

/// The largest piece that is believed: a kernel's text and modules have 2.5 GiB of addresses.
const MAX_PIECE: u64 = 1 << 30;
/// Where the kernel's image begins at the lowest; what is below is a value and no address (arch/x86: `__START_KERNEL_map`).
const LOWEST: u64 = 0xffff_ffff_8000_0000;

/// What becomes a file: pieces of memory, the sections in them, names.
#[derive(Debug, Default)]
pub(super) struct Parts {
    pub(super) pieces: Vec<Section>,
    pub(super) sections: Vec<Section>,
    pub(super) symbols: Vec<Symbol>,
    /// What is not whole, and why.
    pub(super) problems: Vec<String>,
}

impl Parts {
    /// Puts the pieces one behind the other into the file, each where its address allows it to be mapped.
    fn place(&mut self) {
        let mut at = HEADER + self.pieces.len() as u64 * PROGRAM_HEADER;
        for piece in &mut self.pieces {
            at = at.next_multiple_of(PAGE) + piece.address % PAGE;
            piece.offset = at;
            at += piece.size;
            for section in &mut self.sections {
                if let Some(within) = section.address.checked_sub(piece.address)
                    && within < piece.size
                {
                    section.offset = piece.offset + within;
                }
            }
        }
    }

    /// Where the contents end.
    pub(super) fn end(&self) -> u64 {
        let ends = self.pieces.iter().map(|piece| piece.offset + piece.size);
        ends.max().unwrap_or(HEADER)
    }
}

/// A module: its areas, its sections at their addresses, its symbols.
pub(super) fn module(kernel: &Kernel, module: &Module) -> Parts {
    let mut out = Parts::default();
    // Its table of symbols is written anew.
    let is_table = |name: &str| matches!(name, ".symtab" | ".strtab" | ".shstrtab");
    let mut known: Vec<_> = module.sections.iter().flatten().collect();
    known.retain(|section| !is_table(&section.name));
    known.sort_by_key(|section| section.address.0);
    known.dedup_by_key(|section| section.address.0);
    for range in &module.ranges {
        // What a module has for each processor is elsewhere.
        if range.kind == "percpu" || range.size == 0 {
            continue;
        }
        if range.size > MAX_PIECE || range.base.0.checked_add(range.size).is_none() {
            out.problems
                .push(format!("{} is said to have {} bytes", range.kind, range.size));
            continue;
        }
        let (start, end) = (range.base.0, range.base.0 + range.size);
        let within: Vec<_> = known
            .iter()
            .filter(|section| (start..end).contains(&section.address.0))
            .collect();
        let before = out.sections.len();
        if within.first().is_none_or(|first| first.address.0 > start) {
            let until = within.first().map_or(end, |first| first.address.0);
            out.sections.push(stretch(
                &format!(".module.{}", range.kind),
                start,
                until,
                &range.kind,
            ));
        }
        for (nth, section) in within.iter().enumerate() {
            let until = within.get(nth + 1).map_or(end, |next| next.address.0);
            out.sections
                .push(stretch(&section.name, section.address.0, until, &range.kind));
        }
        let own = out.sections.get(before..).unwrap_or(&[]);
        // Up to 6.3 one area has all kinds of sections.
        let rights = match own.iter().any(|section| section.rights == Rights::Execute) {
            true => Rights::Execute,
            false => rights_of("", &range.kind),
        };
        out.pieces.push(Section {
            name: range.kind.clone(),
            address: start,
            size: range.size,
            offset: 0,
            rights,
        });
    }
    match kernel.symbols_of_module(module.address, &module.name.as_str().into()) {
        Ok(listing) => {
            out.problems.extend(listing.warnings);
            out.symbols.extend(
                listing
                    .rows
                    .into_iter()
                    .filter(|symbol| nameable(&symbol.name))
                    .map(|symbol| Symbol {
                        name: symbol.name,
                        address: symbol.address.0,
                        size: symbol.size,
                        kind: symbol.kind,
                    }),
            );
        }
        Err(error) => out.problems.push(format!("its symbols: {error}")),
    }
    out.place();
    out
}

fn stretch(name: &str, start: u64, end: u64, area: &str) -> Section {
    Section {
        name: name.chars().filter(|c| !c.is_control()).collect(),
        address: start,
        size: end - start,
        offset: 0,
        rights: rights_of(name, area),
    }
}

/// What may be done with a section, by its name where that says it, else by the area it lies in.
fn rights_of(section: &str, area: &str) -> Rights {
    let begins = |names: &[&str]| names.iter().any(|name| section.starts_with(name));
    if section.contains(".text") || area == "text" || area == "init_text" {
        Rights::Execute
    } else if begins(&[".rodata", ".note", "__ksymtab", "__param", ".orc_unwind"]) || area.contains("rodata")
    {
        Rights::Read
    } else {
        Rights::Write
    }
}

fn nameable(name: &str) -> bool {
    !name.is_empty() && !name.chars().any(char::is_control)
}

/// The kernel: text, read-only data and data between its own symbols for their ends, and all its symbols.
pub(super) fn image(kernel: &Kernel) -> Result<Parts, LinuxError> {
    const PIECES: [(&str, &str, &str, Rights); 4] = [
        (".text", "_stext", "_etext", Rights::Execute),
        (".rodata", "__start_rodata", "__end_rodata", Rights::Read),
        (".data", "_sdata", "_edata", Rights::Write),
        (".bss", "__bss_start", "__bss_stop", Rights::Write),
    ];
    let mut out = Parts::default();
    for (name, first, last, rights) in PIECES {
        let (Some(start), Some(end)) = (kernel.find_symbol(&[first]), kernel.find_symbol(&[last])) else {
            out.problems
                .push(format!("{name} is left out: no symbols {first} and {last}"));
            continue;
        };
        let Some(size) = end.0.checked_sub(start.0).filter(|&size| size <= MAX_PIECE) else {
            out.problems
                .push(format!("{name} is left out: it cannot end at {end}"));
            continue;
        };
        out.pieces.push(Section {
            name: name.to_owned(),
            address: start.0,
            size,
            offset: 0,
            rights,
        });
    }
    if out.pieces.is_empty() {
        return Err(LinuxError::NotFound(
            "nothing of the kernel's image can be told".to_owned(),
        ));
    }
    out.sections.clone_from(&out.pieces);
    let symbols = kernel.profile().symbols.iter();
    out.symbols = symbols
        .filter(|symbol| nameable(symbol.name))
        .map(|symbol| Symbol {
            name: symbol.name.to_owned(),
            address: match symbol.address >= LOWEST {
                true => kernel.image().runtime(symbol.address).0,
                false => symbol.address,
            },
            size: 0,
            kind: char::from(symbol.kind),
        })
        .collect();
    out.place();
    Ok(out)
}

/// From where to where the kernel's text reaches.
pub(super) fn extent(parts: &Parts) -> (Gva, Gva) {
    let start = parts.pieces.iter().map(|piece| piece.address).min();
    let end = parts.pieces.iter().map(|piece| piece.address + piece.size).max();
    (Gva(start.unwrap_or(0)), Gva(end.unwrap_or(0)))
}
