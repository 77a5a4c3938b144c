//! A kernel's image: its bytes by link-time address, its symbols and its types.

use object::{Object, ObjectSection, SectionFlags, elf};
use vmsight_symbols::kallsyms::{self, Image, KallsymsError, Section};
use vmsight_symbols::{SymbolTable, Types, TypesError};

use crate::unpack;

/// Where kernels are linked.
const KERNEL: u64 = 0xffff_ffff_8000_0000;
/// The image with all that it has in memory ends before this.
const END: u64 = 0xffff_ffff_c000_0000;

/// Why a file is no kernel that a policy can be made for.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Neither a bzImage nor an ELF file.
    #[error("it is neither a kernel's bzImage nor its vmlinux")]
    NoKernel,
    /// It is shorter than its header says, or what is in it is damaged.
    #[error("it is shorter than it says, or damaged")]
    CutShort,
    /// Compressed in another way than kernels of distributions are.
    #[error("it is compressed by something else than xz, zstd, gzip or LZ4")]
    Compression,
    /// It does not unpack.
    #[error("its {how} does not unpack")]
    Unpack {
        /// How it is compressed.
        how: &'static str,
        /// What the decompressor says.
        #[source]
        cause: std::io::Error,
    },
    /// It is no ELF file after all.
    #[error("its vmlinux is damaged")]
    Elf(#[from] object::read::Error),
    /// A section that is needed is not there.
    #[error("its vmlinux has no section {0}")]
    Section(&'static str),
    /// Its symbols cannot be read.
    #[error("its symbols cannot be read (CONFIG_KALLSYMS_ALL is needed)")]
    Symbols(#[from] KallsymsError),
    /// Its types cannot be read.
    #[error("its types cannot be read")]
    Types(#[from] TypesError),
}

/// A kernel's image.
#[derive(Debug)]
pub struct KernelImage {
    /// By link-time address.
    pub symbols: SymbolTable,
    /// The kernel's types.
    pub types: Types,
    /// Sections that are in memory: where they begin, and their bytes.
    parts: Vec<(u64, Vec<u8>)>,
}

impl KernelImage {
    /// Reads a bzImage, or a vmlinux that carries its symbols and types as a bzImage's does.
    ///
    /// # Errors
    /// If it is no such file, or built without kallsyms or BTF.
    pub fn read(file: &[u8]) -> Result<Self, ImageError> {
        let unpacked;
        let vmlinux = if file.starts_with(b"\x7fELF") {
            file
        } else {
            unpacked = unpack::payload(file)?;
            &unpacked
        };
        let elf = object::File::parse(vmlinux)?;
        let mut parts = Vec::new();
        let (mut first, mut last) = (u64::MAX, 0);
        for section in elf.sections() {
            let SectionFlags::Elf { sh_flags } = section.flags() else {
                continue;
            };
            let range = section.address()..section.address().saturating_add(section.size());
            let linked =
                u64::from(elf::SHF_ALLOC) & sh_flags != 0 && range.start >= KERNEL && range.end <= END;
            if !linked {
                continue;
            }
            (first, last) = (first.min(range.start), last.max(range.end));
            parts.push((range.start, section.data()?.to_vec()));
        }
        let section = |name: &'static str| -> Result<(u64, &[u8]), ImageError> {
            let section = elf.section_by_name(name).ok_or(ImageError::Section(name))?;
            Ok((section.address(), section.data()?))
        };
        let (address, bytes) = section(".rodata")?;
        let image = Image {
            span: first..last,
            slide: 0,
        };
        let symbols = kallsyms::decode(Section { bytes, address }, &image)?.symbols;
        let types = Types::from_btf(section(".BTF")?.1.to_vec())?;
        Ok(Self {
            symbols,
            types,
            parts,
        })
    }

    /// The same kernel with other symbols, as for one whose own are known to be wrong.
    #[must_use]
    pub fn with_symbols(&self, symbols: SymbolTable) -> Self {
        Self {
            symbols,
            types: self.types.clone(),
            parts: self.parts.clone(),
        }
    }

    /// Bytes at a link-time address: as many as are wanted, or none.
    pub fn bytes<const N: usize>(&self, address: u64) -> Option<[u8; N]> {
        self.parts.iter().find_map(|(start, bytes)| {
            let at = usize::try_from(address.checked_sub(*start)?).ok()?;
            bytes.get(at..at.checked_add(N)?)?.try_into().ok()
        })
    }

    /// The number of a system call of 64 bits, by its name as in `openat`.
    pub fn call_number(&self, name: &str) -> Option<usize> {
        let wanted = self.symbols.address(&format!("__x64_sys_{name}"))?;
        let table = self.symbols.address("sys_call_table")?;
        (0..vmsight_sim_abi::CALLS).find(|&number| {
            let entry = self.bytes(table.wrapping_add(8 * number as u64));
            entry.map(u64::from_le_bytes) == Some(wanted)
        })
    }
}
