//! A profile out of the guest's own memory.

use std::borrow::Cow;
use std::ops::Range;

use vmsight_arch::Gva;
use vmsight_memory::GuestMemory;

use super::{Profile, ProfileSource, no_types};
use crate::kallsyms::{self, Image, Kallsyms, KallsymsError, Section, exports};
use crate::kernel::{self, ImageBytes, KernelImage};
use crate::table::is_absolute;
use crate::types::bytes::word;
use crate::{Symbol, SymbolTable, SymbolTableBuilder, Types};

/// Why no profile could be made.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ProfileError {
    /// The kernel's symbol table could not be read, and it exports nothing either.
    #[error("no symbols of {release} could be read from the guest's memory: {cause}")]
    Symbols {
        /// Release of the kernel.
        release: String,
        /// What went wrong.
        cause: KallsymsError,
    },
    /// None of the image's read-only data is in memory.
    #[error("the read-only data of {release} at {text} is not in memory")]
    NoData {
        /// Release of the kernel.
        release: String,
        /// Where the image begins.
        text: Gva,
    },
}

/// A profile, and what it was made from: for the cache.
pub(crate) struct Made {
    pub(crate) profile: Profile,
    /// The bytes that were read, with the offset of the first from `_text`, where they were copied from a guest that runs: it may
    /// show others by now. A dump's stay what they are.
    pub(crate) copied: Option<(u64, Vec<u8>)>,
    /// Bytes of the image, from `_text` on, that decide what the symbols are.
    pub(crate) sources: Vec<Range<u64>>,
    /// The bytes that are the types.
    pub(crate) btf: Option<Range<u64>>,
    pub(crate) facts: Facts,
    /// Something that should be there was damaged or not in memory: the next time it may be whole.
    pub(crate) damaged: bool,
}

impl Made {
    /// Whether the symbols are the kernel's own table, which says where the kernel was linked to. Else they are what it exports.
    pub(crate) fn has_kallsyms(&self) -> bool {
        !self.sources.is_empty()
    }
}

/// What decides about a profile and is not in its sources.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Facts {
    /// Where kallsyms' relative base lies, from `_text`.
    pub(crate) relative_base_at: Option<u64>,
    /// Its link-time value.
    pub(crate) relative_base: u64,
    pub(crate) banner_at: Option<u64>,
    pub(crate) build_id_at: Option<u64>,
    /// Where `boot_params` lies, which says the link-time address.
    pub(crate) boot_params_at: Option<u64>,
}

impl Profile {
    /// Reads symbols and types out of the memory of the guest that runs `image`.
    ///
    /// Kernels that keep no data symbols (CONFIG_KALLSYMS_ALL off) have those added that they export to modules; where the kernel's
    /// own table cannot be read at all, those are all there is; kernels without BTF give a profile without types
    /// ([`Profile::has_types`]). Each is said in [`Profile::warnings`].
    ///
    /// # Errors
    /// If the kernel's symbols cannot be found or contradict the image, and no exports can be found either.
    pub fn from_memory(memory: &GuestMemory, image: &KernelImage) -> Result<Self, ProfileError> {
        make(memory, image).map(|made| made.profile)
    }
}

pub(crate) fn make(memory: &GuestMemory, image: &KernelImage) -> Result<Made, ProfileError> {
    let bytes = ImageBytes::of(memory, image);
    let mut error = None;
    for (start, part) in bytes.constant_parts() {
        match of_part(&bytes, image, start, &part) {
            Ok(made) => {
                let copied = match part {
                    Cow::Owned(part) => Some((start, part)),
                    Cow::Borrowed(_) => None,
                };
                return Ok(Made { copied, ..made });
            }
            // The first part is the likeliest, so its reason is the best.
            Err(e) => error = error.or(Some(e)),
        }
    }
    let release = image.release().to_owned();
    let Some(cause) = error else {
        return Err(ProfileError::NoData {
            release,
            text: image.text,
        });
    };
    exported(&bytes, image, &cause).ok_or(ProfileError::Symbols { release, cause })
}

/// What can be known without kallsyms: the symbols that the kernel exports to modules, and its types. `None` if it exports nothing.
fn exported(bytes: &ImageBytes<'_>, image: &KernelImage, cause: &KallsymsError) -> Option<Made> {
    let bounds = bounds(image, image.slide);
    let (start, part, found) = bytes.constant_parts().find_map(|(start, part)| {
        let found = exports::find(section(image, start, &part), &bounds);
        (!found.symbols.is_empty()).then_some((start, part, found))
    })?;
    let text_start = image.link_time(image.text);
    let mut builder = SymbolTableBuilder::new();
    builder.push("_text", text_start, b'T');
    if let Some((at, _)) = kernel::find_banner(&part) {
        builder.push(BANNER, text_start.wrapping_add(start + at as u64), b'D');
    }
    for e in &found.symbols {
        builder.push(&e.name, image.link_time(Gva(e.address)), b'D');
    }
    let symbols = builder.finish();
    let mut warnings = vec![format!(
        "the kernel's own symbol table could not be read ({cause}); there are only the {} symbols that it exports to modules",
        found.symbols.len()
    )];
    let bound = bind_types(find_types(&part), bytes, &|_| None, start, &mut warnings);
    let mut profile = Profile::new(
        image.build_id.clone(),
        image.banner.clone(),
        symbols,
        bound.types.as_ref().map_or_else(no_types, |(_, t)| t.clone()),
        ProfileSource::Memory,
    );
    profile.warnings = warnings;
    Some(Made {
        profile,
        copied: None,
        sources: Vec::new(),
        btf: bound.types.map(|(range, _)| range),
        facts: Facts {
            relative_base_at: None,
            relative_base: 0,
            banner_at: None,
            build_id_at: None,
            boot_params_at: None,
        },
        damaged: true,
    })
}

/// The kernel's types alone, for kernels of which no symbols can be read.
pub(crate) fn types_of(memory: &GuestMemory, image: &KernelImage) -> Option<Types> {
    types_in(&ImageBytes::of(memory, image))
}

/// The types in an image's constant data.
pub(crate) fn types_in(bytes: &ImageBytes<'_>) -> Option<Types> {
    bytes
        .constant_parts()
        .find_map(|(_, part)| find_types(&part))
        .map(|(_, types)| types)
}

fn section<'a>(image: &KernelImage, start: u64, part: &'a [u8]) -> Section<'a> {
    Section {
        bytes: part,
        address: image.text.0.wrapping_add(start),
    }
}

fn bounds(image: &KernelImage, slide: u64) -> Image {
    Image {
        span: image.text.0..image.text.0.wrapping_add(image.len),
        slide,
    }
}

/// The symbol of the banner, which readers of symbol tables know a kernel by.
const BANNER: &str = "linux_banner";

fn of_part(
    bytes: &ImageBytes<'_>,
    image: &KernelImage,
    start: u64,
    part: &[u8],
) -> Result<Made, KallsymsError> {
    let section = section(image, start, part);
    let mut bounds = bounds(image, image.slide);
    let (symbols, types) = rayon::join(|| kallsyms::decode(section, &bounds), || find_types(part));
    let mut kallsyms = symbols?;

    // Where the image was linked to is not in kallsyms, which KASLR moves as a whole; the boot loader's header says it.
    let boot_params_at = kallsyms
        .symbols
        .address("boot_params")
        .map(|a| image.runtime(a).0.wrapping_sub(image.text.0));
    let text_start = boot_params_at
        .and_then(|at| link_time_text(bytes, at))
        .unwrap_or(image.link_time(image.text));
    if text_start != image.link_time(image.text) {
        bounds.slide = image.text.0.wrapping_sub(text_start);
        kallsyms = kallsyms::decode(section, &bounds)?;
    }

    let mut warnings = Vec::new();
    if kallsyms.damaged_blocks > 0 {
        warnings.push(format!(
            "{} blocks of 256 symbols are damaged in memory and were left out",
            kallsyms.damaged_blocks
        ));
    }
    let mut sources = sources(&kallsyms, start);
    let (mut symbols, exports) = with_exports(kallsyms.symbols.clone(), section, &bounds, &mut warnings);
    sources.extend(
        exports
            .iter()
            .map(|r| start + r.start as u64..start + r.end as u64),
    );
    let offset = |name: &str| symbols.address(name).map(|a| a.wrapping_sub(text_start));

    let bound = bind_types(types, bytes, &offset, start, &mut warnings);
    let types = bound.types;
    let banner = banner(bytes, &offset, start, part);
    let build_id = build_id(bytes, &offset, start, part);
    if let (None, Some((at, _))) = (symbols.address(BANNER), &banner) {
        let symbol = Symbol {
            name: BANNER,
            address: text_start.wrapping_add(*at),
            kind: b'D',
        };
        symbols = symbols.iter().chain([symbol]).collect();
    }
    let mut profile = Profile::new(
        build_id
            .as_ref()
            .map(|(_, id)| id.clone())
            .or_else(|| image.build_id.clone()),
        banner
            .as_ref()
            .map_or_else(|| image.banner.clone(), |(_, text)| text.clone()),
        symbols,
        types.as_ref().map_or_else(no_types, |(_, t)| t.clone()),
        ProfileSource::Memory,
    );
    profile.text_start = text_start;
    profile.warnings = warnings;
    Ok(Made {
        profile,
        copied: None,
        sources,
        damaged: kallsyms.damaged_blocks > 0 || bound.damaged,
        btf: types.map(|(range, _)| range),
        facts: Facts {
            relative_base_at: kallsyms.relative_base_at.map(|at| start + at as u64),
            relative_base: kallsyms.relative_base,
            banner_at: banner.map(|(at, _)| at),
            build_id_at: build_id.map(|(at, _)| at),
            boot_params_at,
        },
    })
}

fn sources(kallsyms: &Kallsyms, start: u64) -> Vec<Range<u64>> {
    kallsyms
        .sources
        .iter()
        .map(|r| start + r.start as u64..start + r.end as u64)
        .collect()
}

/// The link-time address of `_text` out of `struct boot_params`, whose setup header (Documentation/arch/x86/boot.rst) is at
/// 0x1f1: "HdrS" at 0x202, protocol version at 0x206, pref_address (2.10 and later) at 0x258. The image is linked for that
/// physical address. `None` where the boot loader made the header up (PVH, direct boot of an ELF file).
pub(crate) fn link_time_text(bytes: &ImageBytes<'_>, boot_params_at: u64) -> Option<u64> {
    const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
    let header = bytes.read(boot_params_at, 0x260)?;
    let version = u16::from_le_bytes(header.get(0x206..0x208)?.try_into().ok()?);
    let preferred = u64::from_le_bytes(header.get(0x258..0x260)?.try_into().ok()?);
    let sane = header.get(0x202..0x206)? == b"HdrS"
        && version >= 0x20a
        && preferred % 0x20_0000 == 0
        && (0x20_0000..0x4000_0000).contains(&preferred);
    sane.then(|| KERNEL_MAP + preferred)
}

/// Adds exported data symbols where kallsyms has only functions; gives the bytes of the section that they were made from, too.
fn with_exports(
    symbols: SymbolTable,
    section: Section<'_>,
    image: &Image,
    warnings: &mut Vec<String>,
) -> (SymbolTable, Vec<Range<usize>>) {
    if symbols.address("init_task").is_some() {
        return (symbols, Vec::new());
    }
    let exports = exports::find(section, image);
    let mut builder = SymbolTableBuilder::new();
    for s in symbols.iter() {
        builder.push(s.name, s.address, s.kind);
    }
    let mut added = 0;
    for e in exports.symbols {
        let address = if is_absolute(e.address) {
            e.address
        } else {
            e.address.wrapping_sub(image.slide)
        };
        if symbols.address(&e.name).is_none() && builder.push(&e.name, address, b'D') {
            added += 1;
        }
    }
    warnings.push(format!(
        "the kernel keeps no data symbols (CONFIG_KALLSYMS_ALL is off); {added} that it exports to modules were added"
    ));
    (builder.finish(), exports.sources)
}

/// The offset of a symbol from `_text`.
type Offset<'a> = &'a dyn Fn(&str) -> Option<u64>;

/// Places that begin like BTF and are tried.
const MAX_BTF: usize = 8;

/// Bytes that a kernel's BTF can have: megabytes as a rule. Anything small is test data or a module's.
const BTF_LEN: Range<usize> = 0x1_0000..64 << 20;

/// Types of the one BTF blob in `part`, with its range. There may be another in memory, left from boot, but not in the image.
fn find_types(part: &[u8]) -> Option<(Range<usize>, Types)> {
    // Magic, version, flags, and the length of the header (include/uapi/linux/btf.h): 24 bytes, 32 since 7.1.
    let starts = [b"\x9f\xeb\x01\0\x18\0\0\0", b"\x9f\xeb\x01\0\x20\0\0\0"];
    starts.iter().find_map(|start| {
        memchr::memmem::find_iter(part, *start)
            .take(MAX_BTF)
            .find_map(|at| {
                let len = btf_len(part.get(at..)?)?;
                let blob = part
                    .get(at..at.checked_add(len)?)
                    .filter(|_| BTF_LEN.contains(&len))?;
                let types = Types::from_btf(blob.to_vec()).ok()?;
                // Has the index by name made here, while another thread is busy with the symbols.
                types.find_struct("task_struct");
                Some((at..at + len, types))
            })
    })
}

/// The length of the BTF blob at the start of `bytes`, by its header.
fn btf_len(bytes: &[u8]) -> Option<usize> {
    let header = word(bytes, 4)? as usize;
    let section = |at: usize| Some((word(bytes, at)? as usize).saturating_add(word(bytes, at + 4)? as usize));
    let mut end = section(8)?.max(section(16)?);
    if header >= 32 {
        end = end.max(section(24)?);
    }
    header.checked_add(end)
}

/// The types that belong to the kernel, with their range.
struct Bound {
    types: Option<(Range<u64>, Types)>,
    /// There should be some, and they are not there or make no sense.
    damaged: bool,
}

/// Makes sure that the types are those between `__start_BTF` and `__stop_BTF`, where there are such symbols.
fn bind_types(
    found: Option<(Range<usize>, Types)>,
    bytes: &ImageBytes<'_>,
    offset: Offset<'_>,
    start: u64,
    warnings: &mut Vec<String>,
) -> Bound {
    let whole = |types| Bound {
        types,
        damaged: false,
    };
    let damaged = Bound {
        types: None,
        damaged: true,
    };
    let found = found.map(|(r, t)| (start + r.start as u64..start + r.end as u64, t));
    let (Some(from), Some(to)) = (offset("__start_BTF"), offset("__stop_BTF")) else {
        if found.is_none() {
            warnings.push("the kernel has no BTF: no types".to_owned());
        }
        return whole(found);
    };
    if let Some((range, types)) = found {
        // The symbols may include padding.
        if range.start == from && range.end <= to {
            return whole(Some((range, types)));
        }
    }
    let blob = to
        .checked_sub(from)
        .filter(|&len| len > 0)
        .and_then(|len| bytes.read(from, len));
    let Some(blob) = blob else {
        warnings.push("the kernel has no BTF in memory: no types".to_owned());
        return damaged;
    };
    match Types::from_btf(blob.into_owned()) {
        Ok(types) => whole(Some((from..to, types))),
        Err(e) => {
            warnings.push(format!(
                "the kernel's BTF at _text+{from:#x} is damaged: {e}; no types"
            ));
            damaged
        }
    }
}

/// The banner at `linux_banner`, or where there is no such symbol in the read-only data.
fn banner(bytes: &ImageBytes<'_>, offset: Offset<'_>, start: u64, part: &[u8]) -> Option<(u64, String)> {
    let at_symbol = offset(BANNER).and_then(|at| {
        let len = bytes.len().checked_sub(at)?.min(kernel::BANNER_MAX);
        Some((at, kernel::banner_at(&bytes.read(at, len)?)?))
    });
    at_symbol.or_else(|| kernel::find_banner(part).map(|(at, text)| (start + at as u64, text)))
}

/// The build-id between `__start_notes` and `__stop_notes`, or where there are no such symbols in the read-only data.
fn build_id(bytes: &ImageBytes<'_>, offset: Offset<'_>, start: u64, part: &[u8]) -> Option<(u64, Vec<u8>)> {
    let (notes_at, notes): (u64, Cow<'_, [u8]>) = match (offset("__start_notes"), offset("__stop_notes")) {
        (Some(from), Some(to)) => (from, bytes.read(from, to.checked_sub(from)?)?),
        _ => (start, Cow::Borrowed(part)),
    };
    kernel::find_build_id(&notes).map(|(at, id)| (notes_at + at as u64, id))
}
