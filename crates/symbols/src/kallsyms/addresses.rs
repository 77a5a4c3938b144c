//! The addresses: every way in which kernels have kept them is tried, and the one that fits the image is taken.

use std::ops::Range;

use super::expand::Decoded;
use super::names::Names;
use super::tokens::{INDEX_LEN, Tokens};
use super::{Image, KallsymsError, Section, align8, read_u32, read_u64};
use crate::table::is_absolute;

/// How a kernel keeps the addresses of its symbols.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Encoding {
    /// A `u64` each (CONFIG_KALLSYMS_BASE_RELATIVE off, until 6.10).
    Absolute,
    /// An `u32` each, to be added to the relative base.
    BaseRelative,
    /// An `i32` each: from 0 up the value itself (x86 per-CPU offsets), below 0 relative base − 1 − it (until 6.14).
    AbsolutePercpu,
    /// An `i32` each, to be added to the place where it lies (7.0).
    PlaceRelative,
}

impl Encoding {
    const ALL: [Self; 4] = [
        Self::AbsolutePercpu,
        Self::BaseRelative,
        Self::PlaceRelative,
        Self::Absolute,
    ];

    fn has_base(self) -> bool {
        matches!(self, Self::BaseRelative | Self::AbsolutePercpu)
    }

    fn entry_len(self) -> usize {
        if self == Self::Absolute { 8 } else { 4 }
    }
}

/// The addresses of the symbols that were decoded.
pub(super) struct Found {
    pub(super) encoding: Encoding,
    pub(super) addresses: Vec<u64>,
    pub(super) source: Range<usize>,
    pub(super) relative_base_at: Option<usize>,
    pub(super) relative_base: Option<u64>,
}

/// Absolute values are offsets in the per-CPU area, which is far smaller than this.
const ABSOLUTE_MAX: u64 = 64 << 20;

/// Finds the addresses of the names in `decoded`.
pub(super) fn find(
    section: Section<'_>,
    image: &Image,
    tokens: &Tokens,
    names: &Names,
    decoded: &Decoded,
) -> Result<Found, KallsymsError> {
    let mut tried = String::new();
    // `_text` begins the image. The other two stand there in every kernel on x86, and in most elsewhere.
    let anchor = ["_text", "_stext", "startup_64"]
        .into_iter()
        .find_map(|n| Some((n, decoded.number_of(n)?)));
    for (place, table) in [("after the tokens", After), ("before the count", Before)] {
        for encoding in Encoding::ALL {
            let found = table
                .source(encoding, tokens, names)
                .ok_or_else(|| "no room".to_owned());
            match found
                .and_then(|(source, base)| attempt(section, image, encoding, source, base, anchor, decoded))
            {
                Ok(found) => return Ok(found),
                Err(why) => tried.push_str(&format!("{encoding:?} {place} ({why}); ")),
            }
        }
    }
    let tried = tried.trim_end_matches("; ").to_owned();
    Err(KallsymsError::NoAddresses {
        names: names.count,
        tried,
    })
}

/// Where the addresses lie.
#[derive(Clone, Copy)]
enum Place {
    /// Since 6.4.
    After,
    /// Until 6.3.
    Before,
}
use Place::{After, Before};

impl Place {
    /// The range of the entries, and the offset of the relative base.
    fn source(
        self,
        encoding: Encoding,
        tokens: &Tokens,
        names: &Names,
    ) -> Option<(Range<usize>, Option<usize>)> {
        let len = encoding.entry_len() * names.count;
        match self {
            After => {
                let start = tokens.index + INDEX_LEN;
                let base = encoding.has_base().then_some(start + align8(len));
                Some((start..start + len, base))
            }
            Before => {
                let base = encoding.has_base().then(|| names.count_at.checked_sub(8));
                let end = base.unwrap_or(Some(names.count_at))?;
                let start = end.checked_sub(align8(len))?;
                Some((start..start + len, base.flatten()))
            }
        }
    }
}

/// The entries of one table, read in one way.
struct Reader<'a> {
    encoding: Encoding,
    bytes: &'a [u8],
    /// Run-time address of the first entry.
    start: u64,
    base: Option<u64>,
}

impl<'a> Reader<'a> {
    fn new(
        section: Section<'a>,
        encoding: Encoding,
        source: &Range<usize>,
        base: Option<usize>,
    ) -> Option<Self> {
        let base = match base {
            Some(at) => Some(read_u64(section.bytes, at)?),
            None => None,
        };
        let bytes = section.bytes.get(source.clone())?;
        Some(Self {
            encoding,
            bytes,
            start: section.address.wrapping_add(source.start as u64),
            base,
        })
    }

    #[inline]
    fn address(&self, i: usize) -> Option<u64> {
        if self.encoding == Encoding::Absolute {
            return read_u64(self.bytes, 8 * i);
        }
        let value = read_u32(self.bytes, 4 * i)?;
        let signed = i64::from(value as i32) as u64;
        let base = self.base.unwrap_or(0);
        Some(match self.encoding {
            Encoding::BaseRelative => base.wrapping_add(u64::from(value)),
            Encoding::PlaceRelative => self.start.wrapping_add(4 * i as u64).wrapping_add(signed),
            _ if (value as i32) < 0 => base.wrapping_sub(1).wrapping_sub(signed),
            _ => signed,
        })
    }
}

/// Reads one table in one way, and checks that these can be the addresses of this image's symbols.
fn attempt(
    section: Section<'_>,
    image: &Image,
    encoding: Encoding,
    source: Range<usize>,
    base: Option<usize>,
    anchor: Option<(&str, usize)>,
    decoded: &Decoded,
) -> Result<Found, String> {
    let reader = Reader::new(section, encoding, &source, base).ok_or("cut off")?;
    if let Some((name, number)) = anchor {
        let at = reader.address(number).ok_or("cut off")?;
        // `_stext` follows `_text` within the first page or two.
        let slack = if name == "_text" { 0 } else { 0x2000 };
        if is_absolute(at) || at.wrapping_sub(image.span.start) > slack {
            return Err(format!(
                "{name} would be at {at:#x}, not at {:#x}",
                image.span.start
            ));
        }
    }
    let mut addresses = Vec::with_capacity(decoded.len());
    for number in decoded.numbers() {
        addresses.push(reader.address(number).ok_or("cut off")?);
    }
    // The kernel itself searches the table by halving, so it is sorted. Single pages may be smeared.
    let unsorted = addresses.windows(2).filter(|pair| pair[0] > pair[1]).count();
    if unsorted > addresses.len() / 100 {
        return Err(format!("not sorted at {unsorted} places"));
    }
    let absolute = addresses.iter().filter(|&&a| a < ABSOLUTE_MAX).count();
    let inside = addresses
        .iter()
        .filter(|&&a| a >= image.span.start && a <= image.span.end)
        .count();
    // Symbols outside are rare: some kernels have a few below _text, or fixed mappings such as the vsyscall page.
    let outside = addresses.len() - absolute - inside;
    if outside > addresses.len() / 50 || absolute > inside {
        return Err(format!(
            "{outside} outside the image, {absolute} absolute, {inside} inside"
        ));
    }
    if anchor.is_none() && (outside > 0 || unsorted > 0) {
        return Err("no known symbol to test, and not wholly inside the image".to_owned());
    }
    Ok(Found {
        encoding,
        addresses,
        source,
        relative_base_at: base,
        relative_base: reader.base,
    })
}
