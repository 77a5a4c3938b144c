//! Symbols as an ELF file for debuggers: addresses and names, no code.
//!
//! Debuggers look for the section that an address lies in before they look for its name, so memory is laid
//! out in sections that have no bytes in the file (SHT_NOBITS): stretches of code, and of everything else, as
//! the kinds of the symbols say.

use std::io::{self, Write};

use object::elf;
use object::write::StringId;
use object::write::elf::{FileHeader, SectionHeader, SectionIndex, Sym, Writer};
use object::{Endianness, write};

/// Below this there is no kernel: what lies there is a number and no place (a per-CPU variable linked at zero).
const LOWEST: u64 = 1 << 63;
/// Symbols further apart than this do not share a section: nothing says that there is anything between them.
const MAX_GAP: u64 = 16 << 20;
/// Most sections. A kernel and its modules need some hundred.
const MAX_SECTIONS: usize = 4096;
/// The longest name that is written.
const MAX_NAME: usize = 512;
/// The longest a symbol is said to be whose size is not known.
const MAX_SIZE: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// A symbol where it lies in the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PlacedSymbol<'a> {
    /// Its name. Names with anything but printable ASCII are left out: a debugger would show them as they are.
    pub name: &'a str,
    /// Its run-time address.
    pub address: u64,
    /// Bytes, 0 where it is not known: then it reaches to the next one.
    pub size: u64,
    /// Kind as in `nm`.
    pub kind: u8,
}

impl PlacedSymbol<'_> {
    fn is_code(&self) -> bool {
        matches!(self.kind, b't' | b'T' | b'w' | b'W')
    }

    fn is_local(&self) -> bool {
        self.kind.is_ascii_lowercase()
    }

    fn is_place(&self) -> bool {
        self.address >= LOWEST
    }
}

/// Memory that becomes one section.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Stretch {
    start: u64,
    end: u64,
    code: bool,
}

/// Writes an x86-64 ELF file with these symbols; how many it has.
///
/// # Errors
/// If writing fails.
pub fn elf<'a>(
    symbols: impl IntoIterator<Item = PlacedSymbol<'a>>,
    out: &mut dyn Write,
) -> io::Result<usize> {
    let mut symbols: Vec<_> = symbols.into_iter().filter(|s| can_be_named(s.name)).collect();
    symbols.sort_by_key(|s| (s.address, !s.is_code()));
    let (stretches, sections) = stretches(&symbols);
    let sizes = sizes(&symbols, &sections, &stretches);
    // Local ones come first (ELF specification, symbol table).
    let mut order: Vec<usize> = (0..symbols.len()).collect();
    order.sort_by_key(|i| !symbols.get(*i).is_some_and(PlacedSymbol::is_local));
    let locals = symbols.iter().filter(|s| s.is_local()).count();

    // Debuggers know the plain names.
    let mut seen = [false; 2];
    let names: Vec<String> = (0..)
        .zip(&stretches)
        .map(|(number, stretch): (usize, _)| {
            let (base, seen) = match (stretch.code, &mut seen) {
                (true, [code, _]) => (".text", code),
                (false, [_, data]) => (".data", data),
            };
            match std::mem::replace(seen, true) {
                false => base.to_owned(),
                true => format!("{base}.{number}"),
            }
        })
        .collect();
    let mut bytes = Vec::new();
    let mut writer = Writer::new(Endianness::Little, true, &mut bytes);
    writer.reserve_file_header();
    writer.reserve_null_section_index();
    let placed: Vec<(StringId, SectionIndex)> = names
        .iter()
        .map(|name| {
            (
                writer.add_section_name(name.as_bytes()),
                writer.reserve_section_index(),
            )
        })
        .collect();
    writer.reserve_symtab_section_index();
    writer.reserve_strtab_section_index();
    writer.reserve_shstrtab_section_index();
    let ids: Vec<StringId> = symbols
        .iter()
        .map(|s| writer.add_string(s.name.as_bytes()))
        .collect();
    writer.reserve_null_symbol_index();
    for i in &order {
        let section = section_of(&sections, &placed, *i);
        writer.reserve_symbol_index(section);
    }
    writer.reserve_symtab();
    writer.reserve_symtab_shndx();
    writer.reserve_strtab();
    writer.reserve_shstrtab();
    writer.reserve_section_headers();

    let failed = |error: write::Error| io::Error::other(error.to_string());
    writer
        .write_file_header(&FileHeader {
            os_abi: elf::ELFOSABI_NONE,
            abi_version: 0,
            e_type: elf::ET_EXEC,
            e_machine: elf::EM_X86_64,
            e_entry: 0,
            e_flags: 0,
        })
        .map_err(failed)?;
    writer.write_null_symbol();
    for i in &order {
        let (Some(symbol), Some(size), Some(name)) = (symbols.get(*i), sizes.get(*i), ids.get(*i)) else {
            continue;
        };
        let section = section_of(&sections, &placed, *i);
        let binding = if symbol.is_local() {
            elf::STB_LOCAL
        } else {
            elf::STB_GLOBAL
        };
        let kind = match (section, symbol.is_code()) {
            (None, _) => elf::STT_NOTYPE,
            (_, true) => elf::STT_FUNC,
            (_, false) => elf::STT_OBJECT,
        };
        writer.write_symbol(&Sym {
            name: Some(*name),
            section,
            st_info: (binding << 4) | kind,
            st_other: elf::STV_DEFAULT,
            st_shndx: if section.is_some() { 0 } else { elf::SHN_ABS },
            st_value: symbol.address,
            st_size: *size,
        });
    }
    writer.write_symtab_shndx();
    writer.write_strtab();
    writer.write_shstrtab();
    writer.write_null_section_header();
    for (stretch, (name, _)) in stretches.iter().zip(&placed) {
        let flags = match stretch.code {
            true => elf::SHF_ALLOC | elf::SHF_EXECINSTR,
            false => elf::SHF_ALLOC | elf::SHF_WRITE,
        };
        writer.write_section_header(&SectionHeader {
            name: Some(*name),
            sh_type: elf::SHT_NOBITS,
            sh_flags: u64::from(flags),
            sh_addr: stretch.start,
            sh_offset: 0,
            sh_size: stretch.end - stretch.start,
            sh_link: 0,
            sh_info: 0,
            sh_addralign: 1,
            sh_entsize: 0,
        });
    }
    writer.write_symtab_section_header(u32::try_from(locals + 1).unwrap_or(u32::MAX));
    writer.write_strtab_section_header();
    writer.write_shstrtab_section_header();
    out.write_all(&bytes)?;
    Ok(symbols.len())
}

fn can_be_named(name: &str) -> bool {
    !name.is_empty() && name.len() <= MAX_NAME && name.bytes().all(|b| b.is_ascii_graphic())
}

fn section_of(
    sections: &[Option<usize>],
    placed: &[(StringId, SectionIndex)],
    symbol: usize,
) -> Option<SectionIndex> {
    let stretch = (*sections.get(symbol)?)?;
    placed.get(stretch).map(|(_, index)| *index)
}

/// The stretches, none of which overlap, and which one each symbol is in. The symbols are sorted by address.
fn stretches(symbols: &[PlacedSymbol<'_>]) -> (Vec<Stretch>, Vec<Option<usize>>) {
    let mut stretches: Vec<Stretch> = Vec::new();
    let mut sections = Vec::with_capacity(symbols.len());
    for symbol in symbols {
        if !symbol.is_place() {
            sections.push(None);
            continue;
        }
        let full = stretches.len() >= MAX_SECTIONS;
        let at = symbol.address;
        // One page more than its first byte, so that what comes behind the last symbol has a section too.
        let end = at
            .saturating_add(symbol.size.clamp(1, MAX_SIZE))
            .div_ceil(PAGE)
            .saturating_mul(PAGE);
        match stretches.last_mut() {
            Some(last) if full => last.end = last.end.max(end),
            Some(last) if last.code == symbol.is_code() && at.saturating_sub(last.end) <= MAX_GAP => {
                last.end = last.end.max(end);
            }
            last => {
                if let Some(last) = last {
                    let behind = at.saturating_sub(last.end) > MAX_GAP;
                    last.end = if behind { last.end } else { at };
                }
                stretches.push(Stretch {
                    start: at,
                    end,
                    code: symbol.is_code(),
                });
            }
        }
        sections.push(stretches.len().checked_sub(1));
    }
    (stretches, sections)
}

/// How long each symbol is: as long as it says, or up to the next one in its section.
fn sizes(symbols: &[PlacedSymbol<'_>], sections: &[Option<usize>], stretches: &[Stretch]) -> Vec<u64> {
    let mut next: Option<(usize, u64)> = None;
    let mut following: Option<(usize, u64)> = None;
    let mut sizes = vec![0; symbols.len()];
    for ((symbol, section), size) in symbols.iter().zip(sections).zip(&mut sizes).rev() {
        let Some(section) = *section else { continue };
        // Those that share an address end where the one behind them begins.
        if next.is_some_and(|(_, at)| at != symbol.address) {
            following = next;
        }
        next = Some((section, symbol.address));
        let end = match following {
            Some((its, at)) if its == section => at,
            _ => stretches.get(section).map_or(symbol.address, |s| s.end),
        };
        let reach = end.saturating_sub(symbol.address).min(MAX_SIZE);
        *size = if symbol.size == 0 {
            reach
        } else {
            symbol.size.min(MAX_SIZE)
        };
    }
    sizes
}

#[cfg(test)]
mod tests {
    use object::{Object, ObjectSection, ObjectSymbol};

    use super::*;

    const TEXT: u64 = 0xffff_ffff_8100_0000;

    fn placed(name: &str, address: u64, size: u64, kind: u8) -> PlacedSymbol<'_> {
        PlacedSymbol {
            name,
            address,
            size,
            kind,
        }
    }

    fn file(symbols: &[PlacedSymbol<'_>]) -> Vec<u8> {
        let mut out = Vec::new();
        elf(symbols.iter().copied(), &mut out).unwrap();
        out
    }

    #[test]
    fn names_have_their_addresses_and_sizes() {
        let bytes = file(&[
            placed("schedule", TEXT + 0x100, 0, b'T'),
            placed("helper", TEXT + 0x40, 0, b't'),
            placed("alias", TEXT + 0x40, 0, b'T'),
            placed("jiffies", TEXT + 0x2000, 8, b'D'),
            placed("this_cpu_off", 0x1fbc0, 0, b'd'),
            placed("in_module", 0xffff_ffff_c000_0010, 5, b't'),
        ]);
        let parsed = object::File::parse(&*bytes).unwrap();
        let all: Vec<_> = parsed
            .symbols()
            .map(|s| (s.name().unwrap().to_owned(), s.address(), s.size(), s.is_global()))
            .collect();
        for wanted in [
            ("schedule", TEXT + 0x100, 0x1f00, true),
            ("helper", TEXT + 0x40, 0xc0, false),
            ("alias", TEXT + 0x40, 0xc0, true),
            ("jiffies", TEXT + 0x2000, 8, true),
            ("this_cpu_off", 0x1fbc0, 0, false),
            ("in_module", 0xffff_ffff_c000_0010, 5, false),
        ] {
            let (name, address, size, global) = wanted;
            assert!(
                all.contains(&(name.to_owned(), address, size, global)),
                "{wanted:?} in {all:?}"
            );
        }
        let first_global = all.iter().position(|s| s.3).unwrap();
        assert!(
            all[first_global..].iter().all(|s| s.3),
            "local symbols come first"
        );
    }

    #[test]
    fn every_symbol_lies_in_its_section_and_sections_do_not_overlap() {
        let bytes = file(&[
            placed("a", TEXT, 0, b'T'),
            placed("b", TEXT + 0x1800, 0, b'r'),
            placed("c", TEXT + 0x1800, 0, b'T'),
            placed("d", TEXT + 0x1900, 0, b'D'),
            placed("far", TEXT + 0x1000_0000, 0, b'T'),
            placed("end", u64::MAX, 0, b'A'),
        ]);
        let parsed = object::File::parse(&*bytes).unwrap();
        let mut sections: Vec<_> = parsed
            .sections()
            .filter(|s| s.kind() != object::SectionKind::Metadata && s.address() != 0)
            .map(|s| (s.address(), s.address() + s.size()))
            .collect();
        sections.sort_unstable();
        for pair in sections.windows(2) {
            assert!(pair[0].1 <= pair[1].0, "{sections:x?}");
        }
        for symbol in parsed.symbols() {
            let section = parsed.section_by_index(symbol.section_index().unwrap()).unwrap();
            let range = section.address()..=section.address().saturating_add(section.size());
            assert!(range.contains(&symbol.address()), "{symbol:?} {range:x?}");
        }
    }

    #[test]
    fn what_would_move_a_terminal_is_left_out() {
        let bytes = file(&[
            placed("\u{1b}[2J", TEXT, 0, b'T'),
            placed("", TEXT, 0, b'T'),
            placed("ok", TEXT, 0, b'T'),
        ]);
        let parsed = object::File::parse(&*bytes).unwrap();
        assert_eq!(parsed.symbols().count(), 1);
    }

    #[test]
    fn a_guest_cannot_have_sections_without_end() {
        let symbols: Vec<_> = (0..40_000u64)
            .map(|i| placed("x", TEXT + i * 16, 0, if i % 2 == 0 { b'T' } else { b'D' }))
            .collect();
        assert_eq!(stretches(&symbols).0.len(), MAX_SECTIONS);
        assert!(!file(&symbols).is_empty());
    }
}
