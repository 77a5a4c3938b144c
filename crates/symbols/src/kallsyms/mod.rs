//! The kernel's own symbol table (kallsyms), read out of a guest's memory.
//!
//! Facts about the format are from `scripts/kallsyms.c` and `kernel/kallsyms.c` of Linux 5.10 to 7.0. A build leaves, in
//! `.rodata`, each part aligned to 8 bytes (4 in 7.2):
//!
//! | part | form |
//! |---|---|
//! | num_syms | `u32` |
//! | names | per symbol: length (7 bits, and 7 more if bit 7 is set: Linux 6.1), then that many token numbers |
//! | markers | `u32` offset into names of every 256th symbol |
//! | seqs_of_names | 3 bytes each (6.2; since 6.4 at the end); order by name, not needed here |
//! | token_table | 256 strings, NUL-terminated; the first character of a symbol is its kind |
//! | token_index | 256 × `u16`, offset of each token |
//! | offsets | `i32` each: see [`Encoding`]; or `addresses`, `u64` each |
//! | relative_base | `u64`, relocated by KASLR; gone in 7.0 |
//!
//! Until 6.3 offsets and relative_base come before num_syms; since 6.4 they follow token_index. Nothing here asks for the
//! version: the tables are found by what they must look like, and the way addresses are kept is decided by trying which one
//! gives a sorted table that lies in the image and puts `_text` where the page tables put it.

mod addresses;
mod expand;
pub mod exports;
mod names;
mod tokens;

use std::ops::Range;

use crate::table::SymbolTable;

pub use addresses::Encoding;

/// A piece of the kernel image: its bytes, and where the guest maps the first of them.
#[derive(Clone, Copy, Debug)]
pub struct Section<'a> {
    /// The bytes.
    pub bytes: &'a [u8],
    /// Run-time address of the first.
    pub address: u64,
}

/// What is known of the image that the tables belong to: run-time addresses out of the page tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// From `_text` to the end of the mapping.
    pub span: Range<u64>,
    /// Run-time minus link-time address, modulo 2^64.
    pub slide: u64,
}

/// A decoded symbol table, and what it was made from.
#[derive(Clone, Debug)]
pub struct Kallsyms {
    /// The symbols, by link-time address.
    pub symbols: SymbolTable,
    /// How the addresses were kept.
    pub encoding: Encoding,
    /// The bytes of the section that all this depends on, in order of the table above where a part is there:
    /// two guests in which these hold the same have the same symbols. The relative base, which KASLR changes, is left out.
    pub sources: Vec<Range<usize>>,
    /// Where in the section the relative base lies, for encodings that have one.
    pub relative_base_at: Option<usize>,
    /// Its link-time value, 0 where there is none.
    pub relative_base: u64,
    /// How many blocks of 256 symbols were inconsistent (smeared or missing memory) and were left out.
    pub damaged_blocks: usize,
}

/// Why no symbols could be read.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum KallsymsError {
    /// Nothing in the section looks like the table of tokens.
    #[error("no kallsyms token table in {searched} bytes of the kernel's read-only data")]
    NoTokens {
        /// Bytes that were looked through.
        searched: usize,
    },
    /// Tokens, but no names that go with them.
    #[error("kallsyms tokens are at {tokens:#x}, but no consistent table of names belongs to them")]
    NoNames {
        /// Run-time address of the token table.
        tokens: u64,
    },
    /// Every block of names contradicts the markers.
    #[error("all {blocks} blocks of kallsyms names contradict their markers: memory is damaged or forged")]
    Damaged {
        /// How many blocks.
        blocks: usize,
    },
    /// No way to read addresses fits the image.
    #[error("kallsyms has {names} names, but no encoding of their addresses fits the image; tried {tried}")]
    NoAddresses {
        /// How many names.
        names: usize,
        /// What was tried, and why each failed.
        tried: String,
    },
}

/// Token tables that are tried. A kernel has one; more are somebody's joke.
const MAX_TABLES: usize = 4;

/// Names that are stepped over, in all, in search of the right ones. A kernel needs some thousands.
const MAX_STEPS: usize = 1 << 25;

/// Finds the tables in `section` and decodes them all.
///
/// # Errors
/// If a table is not there or contradicts the others or the image. Single damaged blocks are left out and counted.
pub fn decode(section: Section<'_>, image: &Image) -> Result<Kallsyms, KallsymsError> {
    let mut error = KallsymsError::NoTokens {
        searched: section.bytes.len(),
    };
    let mut budget = MAX_STEPS;
    for tokens in tokens::find(section.bytes).take(MAX_TABLES) {
        match decode_with(section, image, &tokens, &mut budget) {
            Ok(found) => return Ok(found),
            // The one that got furthest says most.
            Err(e) if rank(&e) > rank(&error) => error = e,
            Err(_) => {}
        }
    }
    Err(error)
}

fn decode_with(
    section: Section<'_>,
    image: &Image,
    tokens: &tokens::Tokens,
    budget: &mut usize,
) -> Result<Kallsyms, KallsymsError> {
    let address = section.address.wrapping_add(tokens.table as u64);
    let names =
        names::find(section.bytes, tokens, budget).ok_or(KallsymsError::NoNames { tokens: address })?;
    let decoded = expand::decode(section.bytes, tokens, &names);
    if decoded.blocks() == 0 {
        return Err(KallsymsError::Damaged {
            blocks: names.blocks(),
        });
    }
    let found = addresses::find(section, image, tokens, &names, &decoded)?;
    let mut sources = vec![
        names.count_at..names.count_at + 4,
        names.names.clone(),
        names.markers.clone(),
        tokens.table..tokens.index,
        tokens.index..tokens.index + tokens::INDEX_LEN,
        found.source.clone(),
    ];
    sources.sort_by_key(|r| r.start);
    Ok(Kallsyms {
        encoding: found.encoding,
        sources,
        relative_base_at: found.relative_base_at,
        relative_base: found.relative_base.map_or(0, |b| b.wrapping_sub(image.slide)),
        damaged_blocks: names.blocks() - decoded.blocks(),
        symbols: decoded.into_table(found.addresses, image.slide),
    })
}

fn rank(error: &KallsymsError) -> u8 {
    match error {
        KallsymsError::NoTokens { .. } => 0,
        KallsymsError::NoNames { .. } => 1,
        KallsymsError::Damaged { .. } => 2,
        KallsymsError::NoAddresses { .. } => 3,
    }
}

fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    crate::types::bytes::word(bytes, at)
}

fn read_u64(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_le_bytes(bytes.try_into().ok()?))
}

fn align8(value: usize) -> usize {
    value.saturating_add(7) & !7
}
