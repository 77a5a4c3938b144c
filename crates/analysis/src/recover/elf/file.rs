//! ELF files as this writes them: the header, the program headers, and behind the contents sections and symbols.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use object::elf::{
    EM_X86_64, ET_EXEC, EV_CURRENT, FileHeader64, PF_R, PF_W, PF_X, PT_LOAD, ProgramHeader64, SHF_ALLOC,
    SHF_EXECINSTR, SHF_WRITE, SHN_ABS, SHT_PROGBITS, SHT_STRTAB, SHT_SYMTAB, STB_GLOBAL, STB_LOCAL, STT_FUNC,
    STT_NOTYPE, STT_OBJECT, SectionHeader64, Sym64,
};
use object::pod::bytes_of;
use object::{LittleEndian as LE, U16, U32, U64};

/// Bytes of the file header, of a program header and of a section header.
pub(super) const HEADER: u64 = size_of::<FileHeader64<LE>>() as u64;
pub(super) const PROGRAM_HEADER: u64 = size_of::<ProgramHeader64<LE>>() as u64;
const SECTION_HEADER: u16 = size_of::<SectionHeader64<LE>>() as u16;
/// Sections of one file: fewer than the format has room for without extensions.
const MAX_SECTIONS: usize = 4096;

/// A stretch of memory that lies in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Section {
    pub(super) name: String,
    pub(super) address: u64,
    pub(super) size: u64,
    /// Where it lies in the file.
    pub(super) offset: u64,
    pub(super) rights: Rights,
}

/// What may be done with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rights {
    Execute,
    Write,
    Read,
}

impl Rights {
    /// As a program header has them.
    pub(super) fn of_segment(flags: u32) -> Self {
        match flags {
            _ if flags & PF_X != 0 => Self::Execute,
            _ if flags & PF_W != 0 => Self::Write,
            _ => Self::Read,
        }
    }

    fn segment(self) -> u32 {
        match self {
            Self::Execute => PF_R | PF_X,
            Self::Write => PF_R | PF_W,
            Self::Read => PF_R,
        }
    }

    fn section(self) -> u64 {
        u64::from(match self {
            Self::Execute => SHF_ALLOC | SHF_EXECINSTR,
            Self::Write => SHF_ALLOC | SHF_WRITE,
            Self::Read => SHF_ALLOC,
        })
    }

    /// What such memory is called where nothing else is known.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Execute => ".text",
            Self::Write => ".data",
            Self::Read => ".rodata",
        }
    }
}

/// A name for an address.
#[derive(Clone, Debug)]
pub(super) struct Symbol {
    pub(super) name: String,
    pub(super) address: u64,
    pub(super) size: u64,
    /// The letter of nm(1).
    pub(super) kind: char,
}

/// A header for what lies at the addresses at which it was found.
pub(super) fn header() -> FileHeader64<LE> {
    FileHeader64 {
        e_ident: object::elf::Ident {
            magic: object::elf::ELFMAG,
            class: object::elf::ELFCLASS64,
            data: object::elf::ELFDATA2LSB,
            version: EV_CURRENT,
            os_abi: 0,
            abi_version: 0,
            padding: [0; 7],
        },
        e_type: U16::new(LE, ET_EXEC),
        e_machine: U16::new(LE, EM_X86_64),
        e_version: U32::new(LE, u32::from(EV_CURRENT)),
        e_entry: U64::new(LE, 0),
        e_phoff: U64::new(LE, HEADER),
        e_shoff: U64::new(LE, 0),
        e_flags: U32::new(LE, 0),
        e_ehsize: U16::new(LE, HEADER as u16),
        e_phentsize: U16::new(LE, PROGRAM_HEADER as u16),
        e_phnum: U16::new(LE, 0),
        e_shentsize: U16::new(LE, SECTION_HEADER),
        e_shnum: U16::new(LE, 0),
        e_shstrndx: U16::new(LE, 0),
    }
}

/// The program header of a piece of the file.
pub(super) fn load(piece: &Section) -> ProgramHeader64<LE> {
    ProgramHeader64 {
        p_type: U32::new(LE, PT_LOAD),
        p_flags: U32::new(LE, piece.rights.segment()),
        p_offset: U64::new(LE, piece.offset),
        p_vaddr: U64::new(LE, piece.address),
        p_paddr: U64::new(LE, 0),
        p_filesz: U64::new(LE, piece.size),
        p_memsz: U64::new(LE, piece.size),
        p_align: U64::new(LE, 4096),
    }
}

/// Writes all but the contents: the header and the program headers where the header says, and from `end` on symbols and sections.
pub(super) fn finish(
    out: &File,
    mut header: FileHeader64<LE>,
    segments: &[ProgramHeader64<LE>],
    sections: &[Section],
    symbols: &[Symbol],
    end: u64,
) -> io::Result<()> {
    let sections = sections.get(..sections.len().min(MAX_SECTIONS)).unwrap_or(&[]);
    let mut names = Strings::default();
    let mut headers = vec![section(0, 0, 0, 0, 0)];
    for one in sections {
        let mut header = section(
            names.add(&one.name),
            SHT_PROGBITS,
            one.rights.section(),
            one.offset,
            one.size,
        );
        header.sh_addr.set(LE, one.address);
        headers.push(header);
    }
    let mut at = end.next_multiple_of(16);
    if !symbols.is_empty() {
        let (table, strings, locals) = symbol_table(symbols, sections);
        let mut header = section(names.add(".symtab"), SHT_SYMTAB, 0, at, table.len() as u64);
        header.sh_entsize.set(LE, size_of::<Sym64<LE>>() as u64);
        header.sh_info.set(LE, locals);
        // The names come right behind.
        header.sh_link.set(LE, headers.len() as u32 + 1);
        headers.push(header);
        out.write_all_at(&table, at)?;
        at += table.len() as u64;
        let name = names.add(".strtab");
        headers.push(section(name, SHT_STRTAB, 0, at, strings.len() as u64));
        out.write_all_at(&strings, at)?;
        at += strings.len() as u64;
    }
    let name = names.add(".shstrtab");
    headers.push(section(name, SHT_STRTAB, 0, at, names.0.len() as u64));
    out.write_all_at(&names.0, at)?;
    at = (at + names.0.len() as u64).next_multiple_of(8);
    header.e_shoff.set(LE, at);
    header.e_shentsize.set(LE, SECTION_HEADER);
    header.e_shnum.set(LE, headers.len() as u16);
    header.e_shstrndx.set(LE, headers.len() as u16 - 1);
    header.e_phnum.set(LE, segments.len() as u16);
    for one in &headers {
        out.write_all_at(bytes_of(one), at)?;
        at += u64::from(SECTION_HEADER);
    }
    let mut at = header.e_phoff.get(LE);
    for one in segments {
        out.write_all_at(bytes_of(one), at)?;
        at += PROGRAM_HEADER;
    }
    out.write_all_at(bytes_of(&header), 0)
}

fn section(name: u32, kind: u32, flags: u64, offset: u64, size: u64) -> SectionHeader64<LE> {
    SectionHeader64 {
        sh_name: U32::new(LE, name),
        sh_type: U32::new(LE, kind),
        sh_flags: U64::new(LE, flags),
        sh_addr: U64::new(LE, 0),
        sh_offset: U64::new(LE, offset),
        sh_size: U64::new(LE, size),
        sh_link: U32::new(LE, 0),
        sh_info: U32::new(LE, 0),
        sh_addralign: U64::new(LE, 1),
        sh_entsize: U64::new(LE, 0),
    }
}

/// NUL-terminated strings, the empty one first.
struct Strings(Vec<u8>);

impl Default for Strings {
    fn default() -> Self {
        Self(vec![0])
    }
}

impl Strings {
    fn add(&mut self, text: &str) -> u32 {
        let at = u32::try_from(self.0.len()).unwrap_or(0);
        self.0.extend(text.bytes().filter(|&b| b != 0));
        self.0.push(0);
        at
    }
}

/// The symbols, local ones first as the format wants it, their names, and how many are local, the null one included.
fn symbol_table(symbols: &[Symbol], sections: &[Section]) -> (Vec<u8>, Vec<u8>, u32) {
    let mut by_address: Vec<(usize, &Section)> = sections.iter().enumerate().collect();
    by_address.sort_by_key(|(_, section)| section.address);
    let mut strings = Strings::default();
    let mut table = vec![0; size_of::<Sym64<LE>>()];
    let is_local = |symbol: &&Symbol| symbol.kind.is_ascii_lowercase();
    let (locals, globals): (Vec<&Symbol>, Vec<&Symbol>) = symbols.iter().partition(is_local);
    let count = u32::try_from(locals.len()).unwrap_or(u32::MAX - 1) + 1;
    for symbol in locals.iter().chain(&globals) {
        let after = by_address.partition_point(|(_, section)| section.address <= symbol.address);
        let place = after
            .checked_sub(1)
            .and_then(|nth| by_address.get(nth))
            .filter(|(_, section)| symbol.address - section.address < section.size);
        let kind = match place.map(|(_, section)| section.rights) {
            None => STT_NOTYPE,
            Some(Rights::Execute) => STT_FUNC,
            Some(_) => STT_OBJECT,
        };
        let bind = match is_local(symbol) {
            true => STB_LOCAL,
            false => STB_GLOBAL,
        };
        table.extend_from_slice(bytes_of(&Sym64::<LE> {
            st_name: U32::new(LE, strings.add(&symbol.name)),
            st_info: bind << 4 | kind,
            st_other: 0,
            st_shndx: U16::new(LE, place.map_or(SHN_ABS, |(nth, _)| *nth as u16 + 1)),
            st_value: U64::new(LE, symbol.address),
            st_size: U64::new(LE, symbol.size),
        }));
    }
    (table, strings.0, count)
}
