//! The form of a cache file and of its name.
//!
//! All integers are little-endian, all offsets into the image count from `_text`.
//!
//! | part | form |
//! |---|---|
//! | magic | `VMSPROF` and the version of the format |
//! | lengths | header, file: `u64` each |
//! | checksum | CRC-32 of the rest of the header, the symbols and the index of the types: `u64` |
//! | facts | text_start, image_len, relative base (place, value), boot_params, banner_at, build_id_at: `u64`, all ones for none |
//! | build-id, banner | length `u64` and bytes |
//! | warnings | how many: `u64`; length `u64` and bytes of each |
//! | sources | how many, which of them is BTF; offset in the image and length of each: `u64` |
//! | lengths | symbols, index: `u64` |
//! | symbols | [`SymbolTable`](crate::SymbolTable) |
//! | index | of the types |
//! | sources | the bytes, one after another; checked against the guest, so not part of the checksum |
//!
//! The name says what is needed before a file is opened: build-id, where it and the banner lie, digest of the rest.

use std::borrow::Cow;
use std::ops::Range;

use crate::kernel::{ImageBytes, Known};
use crate::profile::Made;
use crate::{Bytes, SymbolTable};

/// To be changed with every change of this format or of what it contains.
const MAGIC: &[u8; 8] = b"VMSPROF3";
const CHECKSUM: Range<usize> = 24..32;
const NONE: u64 = u64::MAX;
const SUFFIX: &str = ".profile";
/// Names of files that are being written begin with this.
pub(super) const TEMPORARY: &str = ".new-";

/// A cache file, taken apart. Everything is inside the file, nothing is believed yet.
pub(super) struct Entry {
    pub(super) text_start: u64,
    pub(super) image_len: u64,
    /// Where it lies, and its link-time value.
    pub(super) relative_base: Option<(u64, u64)>,
    pub(super) boot_params_at: Option<u64>,
    pub(super) build_id: Vec<u8>,
    pub(super) banner: String,
    /// What the kernel lacks by its configuration.
    pub(super) warnings: Vec<String>,
    /// Offset in the image, and bytes.
    pub(super) sources: Vec<(u64, Bytes)>,
    pub(super) btf: Option<Bytes>,
    pub(super) symbols: Bytes,
    pub(super) types_index: Bytes,
    /// Header behind the checksum.
    header: Bytes,
    checksum: u64,
}

impl Entry {
    pub(super) fn parse(file: &Bytes) -> Result<Self, String> {
        Self::of(file).ok_or_else(|| "the file is cut, damaged or of another version".to_owned())
    }

    fn of(file: &Bytes) -> Option<Self> {
        let all = file.as_slice();
        if all.get(..8)? != MAGIC {
            return None;
        }
        let mut r = Reader { bytes: all, at: 8 };
        let header_len = usize::try_from(r.u64()?).ok()?;
        if r.u64()? != all.len() as u64 {
            return None;
        }
        let checksum = r.u64()?;
        let [text_start, image_len, base_at, base, boot_params_at] =
            [r.u64()?, r.u64()?, r.u64()?, r.u64()?, r.u64()?];
        let build_id = r.bytes()?.to_vec();
        let banner = String::from_utf8(r.bytes()?.to_vec()).ok()?;
        let count = r.u64().filter(|&n| n <= 16)?;
        let warnings = (0..count).map(|_| String::from_utf8(r.bytes()?.to_vec()).ok());
        let warnings = warnings.collect::<Option<_>>()?;
        let count = usize::try_from(r.u64()?).ok().filter(|&n| n <= 64)?;
        let btf = r.u64()?;
        let ranges = (0..count).map(|_| Some((r.u64()?, usize::try_from(r.u64()?).ok()?)));
        let ranges: Vec<(u64, usize)> = ranges.collect::<Option<_>>()?;
        let [symbols, index] = [usize::try_from(r.u64()?).ok()?, usize::try_from(r.u64()?).ok()?];
        if r.at != header_len {
            return None;
        }
        let mut at = header_len;
        let mut take = |len: usize| {
            let part = file.slice(at..at.checked_add(len)?)?;
            at += len;
            Some(part)
        };
        let (symbols, types_index) = (take(symbols)?, take(index)?);
        let sources: Vec<(u64, Bytes)> = ranges
            .into_iter()
            .map(|(offset, len)| Some((offset, take(len)?)))
            .collect::<Option<_>>()?;
        if at != all.len() {
            return None;
        }
        let some = |v: u64| (v != NONE).then_some(v);
        Some(Self {
            text_start,
            image_len,
            relative_base: some(base_at).map(|at| (at, base)),
            boot_params_at: some(boot_params_at),
            build_id,
            banner,
            warnings,
            btf: match some(btf) {
                Some(i) => Some(sources.get(usize::try_from(i).ok()?)?.1.clone()),
                None => None,
            },
            sources,
            symbols,
            types_index,
            header: file.slice(CHECKSUM.end..header_len)?,
            checksum,
        })
    }

    /// Whether the file holds what binds it to a guest: the build-id and the banner it claims, and tables that symbols can be made
    /// of. A file without would be taken for every guest of the build-id in its name.
    pub(super) fn is_bound(&self) -> bool {
        let has = |want: &[u8]| self.sources.iter().any(|(_, bytes)| bytes.as_slice() == want);
        let bytes: usize = self.sources.iter().map(|(_, bytes)| bytes.len()).sum();
        // Two bytes at least stand for the name of a symbol.
        let tables = bytes - self.btf.as_ref().map_or(0, Bytes::len);
        let symbols = SymbolTable::from_bytes(self.symbols.clone()).map_or(0, |s| s.len());
        has(&self.build_id) && has(self.banner.as_bytes()) && tables / 2 >= symbols.max(1)
    }

    /// Whether what was derived is as it was written.
    pub(super) fn is_intact(&self) -> bool {
        checksum(
            self.header.as_slice(),
            self.symbols.as_slice(),
            self.types_index.as_slice(),
        ) == self.checksum
    }
}

/// Tells damage from none. Nobody is kept out by it who can write the file (a cryptographic digest in the same file would not
/// keep him out either), so it is the fastest sum that finds what crashes and disks do: each run pays for it.
fn checksum(header: &[u8], symbols: &[u8], index: &[u8]) -> u64 {
    let mut hasher = crc32fast::Hasher::new();
    for part in [header, symbols, index] {
        hasher.update(part);
    }
    u64::from(hasher.finalize())
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn u64(&mut self) -> Option<u64> {
        let bytes = self.bytes.get(self.at..self.at.checked_add(8)?)?;
        self.at += 8;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    }

    fn bytes(&mut self) -> Option<&'a [u8]> {
        let len = usize::try_from(self.u64()?).ok()?;
        let bytes = self.bytes.get(self.at..self.at.checked_add(len)?)?;
        self.at += len;
        Some(bytes)
    }
}

/// A file to be written.
pub(super) struct Encoded<'a> {
    pub(super) name: String,
    header: Vec<u8>,
    symbols: &'a [u8],
    index: Vec<u8>,
    sources: Vec<(u64, Cow<'a, [u8]>)>,
}

impl Encoded<'_> {
    /// The contents, piece by piece.
    pub(super) fn parts(&self) -> impl Iterator<Item = &[u8]> {
        let derived = [self.header.as_slice(), self.symbols, self.index.as_slice()];
        derived
            .into_iter()
            .chain(self.sources.iter().map(|(_, bytes)| &**bytes))
    }
}

/// Name and contents of the file for a profile. `None` where it lacks what a file needs.
pub(super) fn encode<'a>(made: &'a Made, image: &ImageBytes<'a>) -> Option<Encoded<'a>> {
    let (profile, facts) = (&made.profile, &made.facts);
    let build_id = profile.build_id.as_deref()?;
    let (banner_at, build_id_at) = (facts.banner_at?, facts.build_id_at?);
    let mut sources: Vec<(u64, Cow<'a, [u8]>)> = Vec::with_capacity(made.sources.len() + 3);
    for range in &made.sources {
        sources.push((range.start, source(made, image, range)?));
    }
    let btf = made.btf.as_ref().map(|range| {
        sources.push((range.start, Cow::Borrowed(profile.types.btf().as_slice())));
        sources.len() as u64 - 1
    });
    sources.push((build_id_at, Cow::Borrowed(build_id)));
    sources.push((banner_at, Cow::Borrowed(profile.banner.as_bytes())));

    let symbols = profile.symbols.as_bytes();
    let index = if btf.is_some() {
        profile.types.index_bytes()
    } else {
        Vec::new()
    };
    let mut body = Vec::new();
    let put = |body: &mut Vec<u8>, v: u64| body.extend_from_slice(&v.to_le_bytes());
    for v in [
        profile.text_start,
        image.len(),
        facts.relative_base_at.unwrap_or(NONE),
        facts.relative_base,
        facts.boot_params_at.unwrap_or(NONE),
    ] {
        put(&mut body, v);
    }
    for bytes in [build_id, profile.banner.as_bytes()] {
        put(&mut body, bytes.len() as u64);
        body.extend_from_slice(bytes);
    }
    put(&mut body, profile.warnings.len() as u64);
    for warning in &profile.warnings {
        put(&mut body, warning.len() as u64);
        body.extend_from_slice(warning.as_bytes());
    }
    put(&mut body, sources.len() as u64);
    put(&mut body, btf.unwrap_or(NONE));
    for (at, bytes) in &sources {
        put(&mut body, *at);
        put(&mut body, bytes.len() as u64);
    }
    put(&mut body, symbols.len() as u64);
    put(&mut body, index.len() as u64);

    let header_len = CHECKSUM.end + body.len();
    let total = header_len
        + symbols.len()
        + index.len()
        + sources.iter().map(|(_, bytes)| bytes.len()).sum::<usize>();
    let mut header = MAGIC.to_vec();
    put(&mut header, header_len as u64);
    put(&mut header, total as u64);
    put(&mut header, checksum(&body, symbols, &index));
    header.extend_from_slice(&body);

    let mut content = blake3::Hasher::new();
    content.update(&body);
    for (_, bytes) in &sources {
        content.update_rayon(bytes);
    }
    let content = content.finalize().to_hex();
    let id = hex(build_id);
    let name = format!("{id}-{build_id_at:x}-{banner_at:x}-{}{SUFFIX}", &content[..16]);
    Some(Encoded {
        name,
        header,
        symbols,
        index,
        sources,
    })
}

/// The very bytes that were read: a live guest may show others by now, and those must not be taken for them.
fn source<'a>(made: &'a Made, image: &ImageBytes<'a>, range: &Range<u64>) -> Option<Cow<'a, [u8]>> {
    match &made.copied {
        Some((start, part)) => {
            let at = |v: u64| usize::try_from(v.checked_sub(*start)?).ok();
            part.get(at(range.start)?..at(range.end)?).map(Cow::Borrowed)
        }
        None => image.read(range.start, range.end.checked_sub(range.start)?),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// What the names of all files for a build begin with.
pub(super) fn prefix(build_id: &[u8]) -> String {
    format!("{}-", hex(build_id))
}

/// Whether a file name is one of ours.
pub(super) fn is_profile(name: &str) -> bool {
    name.ends_with(SUFFIX) && !name.starts_with('.')
}

/// The build-id in a name.
pub(super) fn build_of(name: &str) -> &str {
    name.split('-').next().unwrap_or(name)
}

/// What a name says about a build.
pub(super) fn known(name: &str) -> Option<Known> {
    let mut fields = name.strip_suffix(SUFFIX)?.split('-');
    let id = fields.next()?;
    let pairs = id
        .as_bytes()
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok());
    let build_id: Vec<u8> = pairs.collect::<Option<_>>()?;
    let mut number = || u64::from_str_radix(fields.next()?, 16).ok();
    let (build_id_at, banner_at) = (number()?, number()?);
    (8..=64).contains(&build_id.len()).then_some(Known {
        build_id,
        build_id_at,
        banner_at,
    })
}
