//! The header of a BTF blob and the pass that finds where each type lies.

use std::ops::Range;

use super::bytes::word;
use super::error::TypesError;
use super::kind::Kind;

/// Where the sections of a blob lie, in bytes from its start.
#[derive(Clone, Debug)]
pub(crate) struct Header {
    pub(crate) types: Range<usize>,
    pub(crate) strings: Range<usize>,
    layout: Range<usize>,
}

const MAGIC: u16 = 0xeb9f;

impl Header {
    pub(crate) fn parse(btf: &[u8]) -> Result<Self, TypesError> {
        let short = TypesError::TooShort { len: btf.len() };
        if btf.len() < 24 {
            return Err(short);
        }
        let field = |at| word(btf, at).ok_or(short.clone());
        let first = field(0)?;
        let magic = first as u16;
        if magic.swap_bytes() == MAGIC {
            return Err(TypesError::BigEndian);
        }
        if magic != MAGIC {
            return Err(TypesError::Magic { found: magic });
        }
        let version = (first >> 16) as u8;
        if version != 1 {
            return Err(TypesError::Version { found: version });
        }
        let header = field(4)?;
        if header < 24 {
            return Err(TypesError::Section {
                section: "header",
                start: 0,
                end: u64::from(header),
                len: btf.len(),
            });
        }
        let section = |section, offset: u32, length: u32| {
            let start = u64::from(header) + u64::from(offset);
            let end = start + u64::from(length);
            if end > btf.len() as u64 {
                return Err(TypesError::Section {
                    section,
                    start,
                    end,
                    len: btf.len(),
                });
            }
            // Both fit: they are at most the length of a slice.
            Ok(start as usize..end as usize)
        };
        let types = section("type", field(8)?, field(12)?)?;
        let strings = section("string", field(16)?, field(20)?)?;
        // Linux 7.1 appends a table that says how long each kind's records are.
        let layout = if header >= 32 {
            section("layout", field(24)?, field(28)?)?
        } else {
            0..0
        };
        Ok(Self {
            types,
            strings,
            layout,
        })
    }

    /// Bytes after the 12-byte record of a kind this crate does not know: (once, per element).
    fn unknown_tail(&self, btf: &[u8], kind: u8) -> Option<(usize, usize)> {
        let table = btf.get(self.layout.clone())?;
        let at = usize::from(kind) * 4;
        let entry = table.get(at..at + 4)?;
        Some((usize::from(entry[0]), usize::from(entry[1])))
    }
}

/// What one pass over the type section gives.
#[derive(Debug, Default)]
pub(crate) struct Pass {
    /// Offset of each type's record, from the start of the type section.
    pub(crate) offsets: Vec<u32>,
    /// Some enumeration is marked as signed, so the mark can be trusted where it is missing
    /// (pahole before 1.24 never set it).
    pub(crate) signed_enums: bool,
    /// Size of `unsigned long`, which is that of a pointer in every Linux ABI.
    pub(crate) long_size: Option<u8>,
}

/// Finds every type's record. Linear in the size of the section; nothing is followed.
pub(crate) fn pass(btf: &[u8], header: &Header, first_id: u32) -> Result<Pass, TypesError> {
    let types = btf.get(header.types.clone()).unwrap_or(&[]);
    let strings = btf.get(header.strings.clone()).unwrap_or(&[]);
    // The mean record of a kernel has about 26 bytes.
    let mut out = Pass {
        offsets: Vec::with_capacity(types.len() / 24),
        ..Pass::default()
    };
    let mut at = 0usize;
    while at < types.len() {
        let id = u32::try_from(out.offsets.len())
            .ok()
            .and_then(|n| n.checked_add(first_id))
            .ok_or(TypesError::TooMany)?;
        let Some(record) = types.get(at..at + 12) else {
            return Err(TypesError::Cut { id, kind: 0, vlen: 0 });
        };
        let info = word(record, 4).unwrap_or(0);
        let (raw, vlen) = (raw_kind(info), vlen(info));
        let kind = Kind::from_raw(raw);
        let Some((once, each)) = kind.tail().or_else(|| header.unknown_tail(btf, raw)) else {
            return Err(TypesError::UnknownKind { id, kind: raw });
        };
        // 12 + 255 + 2^24 * 255 fits 64 bits.
        let len = 12 + once as u64 + vlen as u64 * each as u64;
        if len > (types.len() - at) as u64 {
            return Err(TypesError::Cut { id, kind: raw, vlen });
        }
        if kind == Kind::Enum && info >> 31 == 1 {
            out.signed_enums = true;
        }
        if kind == Kind::Int && out.long_size.is_none() {
            let name = word(record, 0).map(|o| string(strings, o)).unwrap_or(&[]);
            if matches!(name, b"long unsigned int" | b"unsigned long") {
                out.long_size = word(record, 8).and_then(|size| u8::try_from(size).ok());
            }
        }
        out.offsets.push(at as u32);
        at += len as usize;
    }
    out.offsets.shrink_to_fit();
    Ok(out)
}

/// The kind's number. Seven bits since Linux 7.1; the upper two were zero before.
#[inline]
pub(crate) fn raw_kind(info: u32) -> u8 {
    (info >> 24 & 0x7f) as u8
}

/// The number of elements. 24 bits since Linux 7.1; the upper eight were zero before.
#[inline]
pub(crate) fn vlen(info: u32) -> u32 {
    info & 0xff_ffff
}

/// Bytes of a string that are looked at: no name in a kernel has more (KSYM_NAME_LEN is 512 since Linux 6.1, and the kernel's own
/// BTF verifier demands that names are shorter). A guest that overwrites the NULs between strings makes each as long as all
/// that follow; without the bound, to read every name once would take the square of the section's size.
pub(crate) const MAX_STRING: usize = 512;

/// The string at `offset` of a string section, up to its NUL, the section's end or [`MAX_STRING`] bytes; empty where there is none.
#[inline]
pub(crate) fn string(strings: &[u8], offset: u32) -> &[u8] {
    let Some(rest) = strings.get(offset as usize..) else {
        return &[];
    };
    let rest = rest.get(..MAX_STRING).unwrap_or(rest);
    let len = memchr::memchr(0, rest).unwrap_or(rest.len());
    rest.get(..len).unwrap_or(&[])
}
