//! vmlinux: symbols from its symbol table, types from `.BTF` or DWARF, and who it is.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use object::read::ReadCache;
use object::{
    CompressionFormat, Object, ObjectSection, ObjectSymbol, SectionFlags, SectionKind, SymbolFlags, elf,
};

use super::{FileKind, ImportError, Imported, dwarf};
use crate::{SymbolTable, SymbolTableBuilder, Types};

/// Largest section that is loaded, in MiB, decompressed. A distribution's kernel has about 300 of `.debug_info`.
pub(super) const MAX_SECTION: u64 = 1024;
const MAX_BANNER: usize = 4096;

type ElfFile<'a> = object::File<'a, &'a ReadCache<File>>;

pub(super) fn read(path: &Path) -> Result<Imported, ImportError> {
    let kind = FileKind::Elf;
    let broken = |why: String| ImportError::Broken {
        path: path.to_owned(),
        kind,
        why,
    };
    let file = File::open(path).map_err(|cause| ImportError::Io {
        path: path.to_owned(),
        cause,
    })?;
    let cache = ReadCache::new(file);
    let file = object::File::parse(&cache).map_err(|e| broken(e.to_string()))?;
    if !file.is_little_endian() {
        return Err(broken("it is big-endian, which vmsight does not read".to_owned()));
    }
    if file.kind() == object::ObjectKind::Relocatable {
        let why = "it is a relocatable object (a module?); give the vmlinux of the kernel";
        return Err(broken(why.to_owned()));
    }
    let mut imported = Imported::nothing(path, kind);
    imported.build_id = file.build_id().ok().flatten().map(<[u8]>::to_vec);
    imported.symbols = symbols(&file, &mut imported.notes);
    imported.banner = imported
        .symbols
        .as_ref()
        .and_then(|symbols| banner(&file, symbols));
    if let Some(btf) = section(&file, ".BTF", path)? {
        imported.kind = FileKind::ElfBtf;
        let types = Types::from_btf(btf);
        let of = |cause| ImportError::Types {
            path: path.to_owned(),
            kind: FileKind::ElfBtf,
            cause,
        };
        imported.types = Some(types.map_err(of)?);
    } else if let Some(debug_info) = section(&file, ".debug_info", path)? {
        imported.kind = FileKind::Dwarf;
        let sections = dwarf::Sections::load(debug_info, |name| section(&file, name, path))?;
        let made = dwarf::types(&sections).map_err(|e| ImportError::Broken {
            path: path.to_owned(),
            kind: FileKind::Dwarf,
            why: e.to_string(),
        })?;
        imported.types = Some(made.types);
        imported.notes.extend(made.notes);
    }
    if imported.symbols.is_none() && imported.types.is_none() {
        return Err(broken(
            "it has neither symbols, BTF nor DWARF (a stripped file?)".to_owned(),
        ));
    }
    Ok(imported)
}

/// A section's bytes, decompressed; `None` where there is none or it is empty.
fn section(file: &ElfFile<'_>, name: &str, path: &Path) -> Result<Option<Vec<u8>>, ImportError> {
    let Some(section) = file.section_by_name(name) else {
        return Ok(None);
    };
    let kind = FileKind::Elf;
    let broken = |why: String| ImportError::Broken {
        path: path.to_owned(),
        kind,
        why,
    };
    let of_section = |e: object::Error| broken(format!("section {name}: {e}"));
    let range = section.compressed_file_range().map_err(of_section)?;
    if range.uncompressed_size > MAX_SECTION << 20 {
        let unpacked = range.format != CompressionFormat::None;
        return Err(ImportError::TooLarge {
            path: path.to_owned(),
            kind,
            limit: MAX_SECTION,
            unpacked,
        });
    }
    let data = if range.format == CompressionFormat::None {
        // Past the cache, which would keep hundreds of megabytes for a second use that never comes.
        let io = |cause| ImportError::Io {
            path: path.to_owned(),
            cause,
        };
        let mut data = Vec::new();
        let mut raw = File::open(path).map_err(io)?;
        raw.seek(SeekFrom::Start(range.offset)).map_err(io)?;
        raw.take(range.uncompressed_size)
            .read_to_end(&mut data)
            .map_err(io)?;
        if data.len() as u64 != range.uncompressed_size {
            return Err(broken(format!("section {name} reaches over the end of the file")));
        }
        data
    } else {
        let data = section.compressed_data().map_err(of_section)?;
        data.decompress().map_err(of_section)?.into_owned()
    };
    Ok((!data.is_empty()).then_some(data))
}

fn symbols(file: &ElfFile<'_>, notes: &mut Vec<String>) -> Option<SymbolTable> {
    let mut builder = SymbolTableBuilder::new();
    let (mut kept, mut left) = (0usize, 0usize);
    for symbol in file.symbols() {
        let SymbolFlags::Elf { st_info, .. } = symbol.flags() else {
            continue;
        };
        // Sections and source files are no places; undefined symbols are none here.
        if matches!(st_info & 0xf, elf::STT_SECTION | elf::STT_FILE) || symbol.is_undefined() {
            continue;
        }
        let Ok(name) = symbol.name() else { continue };
        if name.is_empty() || name.starts_with(".L") || name.starts_with('$') {
            continue;
        }
        if builder.push(name, symbol.address(), letter(file, &symbol, st_info >> 4)) {
            kept += 1;
        } else {
            left += 1;
        }
    }
    if left > 0 {
        notes.push(format!(
            "{left} symbols were left out: there are too many, or their names are too long"
        ));
    }
    (kept > 0).then(|| builder.finish())
}

/// nm's letter for a symbol.
fn letter<'a>(file: &ElfFile<'a>, symbol: &impl ObjectSymbol<'a>, binding: u8) -> u8 {
    if binding == elf::STB_WEAK {
        return b'W';
    }
    let section = symbol
        .section_index()
        .and_then(|index| file.section_by_index(index).ok());
    let letter = match section {
        None => b'A',
        Some(section) => match (section.kind(), section.flags()) {
            (SectionKind::UninitializedData, _) => b'B',
            (_, SectionFlags::Elf { sh_flags }) if sh_flags & u64::from(elf::SHF_EXECINSTR) != 0 => b'T',
            (_, SectionFlags::Elf { sh_flags }) if sh_flags & u64::from(elf::SHF_WRITE) != 0 => b'D',
            _ => b'R',
        },
    };
    if binding == elf::STB_LOCAL {
        letter.to_ascii_lowercase()
    } else {
        letter
    }
}

/// The text of `linux_banner`, where the file still has the data (a file of debug information alone has not).
fn banner(file: &ElfFile<'_>, symbols: &SymbolTable) -> Option<String> {
    let address = symbols.address("linux_banner")?;
    let section = file.sections().find(|s| {
        let end = s.address().checked_add(s.size());
        s.kind() != SectionKind::UninitializedData
            && s.address() <= address
            && end.is_some_and(|end| address < end)
    })?;
    let room = section
        .address()
        .checked_add(section.size())?
        .checked_sub(address)?
        .min(MAX_BANNER as u64);
    let text = section.data_range(address, room).ok()??;
    let text = text.split(|&b| b == 0).next()?;
    let text = std::str::from_utf8(text).ok()?.trim();
    text.starts_with("Linux version ").then(|| text.to_owned())
}
