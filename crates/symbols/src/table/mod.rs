//! The symbol table: names and link-time addresses, compact, and loadable from a file without unpacking.

mod build;

use std::fmt;
use std::ops::Range;

use crate::types::bytes::{Bytes, word};

pub use build::SymbolTableBuilder;
pub(crate) use build::{NamePart, assemble, hash};

/// One symbol of a [`SymbolTable`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Symbol<'a> {
    /// Its name, as the kernel's own table spells it.
    pub name: &'a str,
    /// Its link-time address (before KASLR); for absolute symbols, such as per-CPU offsets, the value itself.
    pub address: u64,
    /// The letter that nm(1) and /proc/kallsyms show: `T` text, `d` local data, `B` bss, `A` absolute, … .
    pub kind: u8,
}

impl Symbol<'_> {
    /// Whether the address is a value that lies in no image: the offset of a per-CPU variable, which x86-64 links from zero on
    /// until Linux 6.14. KASLR does not move it, and nothing is to be read there.
    pub fn is_absolute(&self) -> bool {
        is_absolute(self.address)
    }
}

/// All symbols of one kernel build, sorted by link-time address.
///
/// One block of bytes holds everything (see the layout in this module's source), so that cloning is cheap, and a
/// table in a memory-mapped cache file is used where it lies. Lookups allocate nothing. The block may come from a
/// damaged file: every access is checked, and an inconsistent entry reads as an empty name.
#[derive(Clone)]
pub struct SymbolTable {
    bytes: Bytes,
    layout: Layout,
}

/// Where the parts of a table lie in its block, in this order, without gaps; all integers little-endian.
///
/// | part | size |
/// |---|---|
/// | header: magic, count, buckets, bytes of names | 16 |
/// | link-time addresses, ascending | 8 × count |
/// | start of each name, and the end of the last | 4 × (count + 1) |
/// | start of each hash bucket in `order`, and the end of the last | 4 × (buckets + 1) |
/// | order: symbol numbers, sorted by bucket, ascending in each | 4 × count |
/// | kinds | count |
/// | names, without separators | the rest |
#[derive(Clone, Debug)]
struct Layout {
    count: usize,
    buckets: usize,
    addresses: usize,
    starts: usize,
    bucket_starts: usize,
    order: usize,
    kinds: usize,
    names: Range<usize>,
}

const HEADER: usize = 16;
const MAGIC: u32 = 0x3153_4d56; // "VMS1"

/// More symbols than any kernel has (an allyesconfig build has about 600,000): a guard against a lying guest or file.
pub const MAX_SYMBOLS: usize = 1 << 20;

/// The longest name that is kept. KSYM_NAME_LEN is 128, and 512 since Linux 6.1.
pub const MAX_NAME: usize = 1023;

/// Why a block of bytes is no symbol table.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TableError {
    /// Not even a header, or not ours.
    #[error("not a symbol table: the header is missing or of another version")]
    Header,
    /// The header asks for more or fewer bytes than there are.
    #[error("symbol table damaged: {need} bytes by its header, {have} present")]
    Size {
        /// Bytes that the header asks for.
        need: u64,
        /// Bytes that are there.
        have: u64,
    },
}

impl Layout {
    /// Lays the parts out; `None` where the counts pass the caps.
    fn new(count: usize, buckets: usize, names: usize) -> Option<Self> {
        if count > MAX_SYMBOLS
            || !buckets.is_power_of_two()
            || buckets > MAX_SYMBOLS
            || names > u32::MAX as usize
        {
            return None;
        }
        let addresses = HEADER;
        let starts = addresses + 8 * count;
        let bucket_starts = starts + 4 * (count + 1);
        let order = bucket_starts + 4 * (buckets + 1);
        let kinds = order + 4 * count;
        let first = kinds + count;
        let names = first..first.checked_add(names)?;
        Some(Self {
            count,
            buckets,
            addresses,
            starts,
            bucket_starts,
            order,
            kinds,
            names,
        })
    }
}

impl SymbolTable {
    /// A table in a block of bytes that [`SymbolTable::as_bytes`] gave, for instance in a mapped file.
    ///
    /// # Errors
    /// If the header is not one, or does not fit the size of the block. What is behind it is checked at each access.
    pub fn from_bytes(bytes: Bytes) -> Result<Self, TableError> {
        let all = bytes.as_slice();
        let field = |at| word(all, at).ok_or(TableError::Header);
        if field(0)? != MAGIC {
            return Err(TableError::Header);
        }
        let layout = Layout::new(field(4)? as usize, field(8)? as usize, field(12)? as usize)
            .ok_or(TableError::Header)?;
        if layout.names.end != all.len() {
            return Err(TableError::Size {
                need: layout.names.end as u64,
                have: all.len() as u64,
            });
        }
        Ok(Self { bytes, layout })
    }

    /// The block that holds the whole table.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.as_slice()
    }

    /// A table without symbols.
    pub fn empty() -> Self {
        SymbolTableBuilder::new().finish()
    }

    /// How many symbols there are.
    pub fn len(&self) -> usize {
        self.layout.count
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.layout.count == 0
    }

    /// The link-time address of the first symbol of this name.
    pub fn address(&self, name: &str) -> Option<u64> {
        self.find(name).next().map(|s| s.address)
    }

    /// The link-time addresses of all symbols of this name, ascending: local names are often used more than once.
    pub fn addresses<'a>(&'a self, name: &'a str) -> impl Iterator<Item = u64> + 'a {
        self.find(name).map(|s| s.address)
    }

    /// All symbols of this name, by ascending address.
    pub fn find<'a>(&'a self, name: &'a str) -> impl Iterator<Item = Symbol<'a>> + 'a {
        let bytes = self.as_bytes();
        let bucket = hash(name.as_bytes()) as usize & (self.layout.buckets - 1);
        let at = |i: usize| word(bytes, self.layout.bucket_starts + 4 * i).unwrap_or(0) as usize;
        let range = at(bucket)..at(bucket + 1).min(self.layout.count);
        range
            .filter_map(move |i| word(bytes, self.layout.order + 4 * i))
            .filter(move |&i| self.name_bytes(bytes, i as usize) == name.as_bytes())
            .filter_map(|i| self.get(i as usize))
    }

    /// The symbol with the greatest address that is not above `address`, and how far above it `address` lies. Where
    /// several share that address: the first, which is the one that the kernel itself would show.
    ///
    /// `None` for what lies in no image: below the first symbol, between the absolute ones and the image, and
    /// at or past `_end` (unless a symbol stands at that very address).
    pub fn nearest(&self, address: u64) -> Option<(Symbol<'_>, u64)> {
        let after = self.partition(|a| a <= address);
        let found = self.address_at(after.checked_sub(1)?)?;
        let offset = address - found.min(address);
        if offset != 0 && (is_absolute(found) || self.address("_end").is_some_and(|end| address >= end)) {
            return None;
        }
        let first = self.partition(|a| a < found);
        Some((self.get(first)?, offset))
    }

    /// The first symbol above `address`; with that of a function or a table, where it ends at the latest.
    pub fn after(&self, address: u64) -> Option<Symbol<'_>> {
        self.get(self.partition(|a| a <= address))
    }

    /// The symbol number `index`, counted by ascending address.
    pub fn get(&self, index: usize) -> Option<Symbol<'_>> {
        let bytes = self.as_bytes();
        let address = self.address_at(index)?;
        let kind = *bytes.get(self.layout.kinds + index)?;
        let name = std::str::from_utf8(self.name_bytes(bytes, index)).unwrap_or("");
        Some(Symbol { name, address, kind })
    }

    /// All symbols by ascending address; of those with the same address, in the order of the kernel's table.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Symbol<'_>> + '_ {
        let none = Symbol {
            name: "",
            address: 0,
            kind: b'?',
        };
        (0..self.len()).map(move |i| self.get(i).unwrap_or(none))
    }

    /// The symbols whose addresses lie in `range`, ascending.
    pub fn range(&self, range: Range<u64>) -> impl Iterator<Item = Symbol<'_>> + '_ {
        let first = self.partition(|a| a < range.start);
        let last = self.partition(|a| a < range.end).max(first);
        (first..last).filter_map(|i| self.get(i))
    }

    fn address_at(&self, index: usize) -> Option<u64> {
        if index >= self.layout.count {
            return None;
        }
        let at = self.layout.addresses + 8 * index;
        let bytes = self.as_bytes().get(at..at + 8)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    }

    fn name_bytes<'a>(&self, bytes: &'a [u8], index: usize) -> &'a [u8] {
        if index >= self.layout.count {
            return &[];
        }
        let at = |i: usize| word(bytes, self.layout.starts + 4 * i).map(|v| v as usize);
        let (Some(start), Some(end)) = (at(index), at(index + 1)) else {
            return &[];
        };
        bytes
            .get(self.layout.names.clone())
            .and_then(|names| names.get(start..end))
            .unwrap_or(&[])
    }

    /// How many symbols come before the first for whose address `below` is false.
    fn partition(&self, below: impl Fn(u64) -> bool) -> usize {
        let (mut low, mut high) = (0, self.layout.count);
        while low < high {
            let middle = low + (high - low) / 2;
            if self.address_at(middle).is_some_and(&below) {
                low = middle + 1
            } else {
                high = middle
            }
        }
        low
    }
}

/// Whether an address is no address in a kernel image but a value: x86's per-CPU offsets before Linux 6.15. Images lie in the
/// upper half of the address space, whatever the architecture.
pub(crate) fn is_absolute(address: u64) -> bool {
    address < 1 << 47
}

impl Default for SymbolTable {
    fn default() -> Self {
        Self::empty()
    }
}

impl fmt::Debug for SymbolTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SymbolTable({} symbols)", self.len())
    }
}

impl PartialEq for SymbolTable {
    fn eq(&self, other: &Self) -> bool {
        self.as_bytes() == other.as_bytes()
    }
}

impl<'a> FromIterator<Symbol<'a>> for SymbolTable {
    fn from_iter<I: IntoIterator<Item = Symbol<'a>>>(symbols: I) -> Self {
        symbols.into_iter().map(|s| (s.name, s.address, s.kind)).collect()
    }
}

impl<'a> FromIterator<(&'a str, u64, u8)> for SymbolTable {
    fn from_iter<I: IntoIterator<Item = (&'a str, u64, u8)>>(symbols: I) -> Self {
        let mut builder = SymbolTableBuilder::new();
        for (name, address, kind) in symbols {
            builder.push(name, address, kind);
        }
        builder.finish()
    }
}
