//! The symbols that the kernel exports to modules (`__ksymtab`), for kernels whose kallsyms has no data symbols
//! (CONFIG_KALLSYMS_ALL off): `init_task`, `init_net`, `__per_cpu_offset`, `phys_base` are among them.
//!
//! An entry is two or three `i32`: value, name and namespace, each to be added to the place where it lies
//! (include/linux/export-internal.h, CONFIG_HAVE_ARCH_PREL32_RELOCATIONS; namespaces since 5.4). The table is found from the
//! string of a name that every kernel exports.

use std::ops::Range;

use memchr::memmem;

use super::{Image, Section};
use crate::table::{MAX_NAME, is_absolute};

/// One exported symbol.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Export {
    /// Its name.
    pub name: String,
    /// Its run-time address, or its value where it is absolute.
    pub address: u64,
}

/// Names that kernels of every configuration export.
const ANCHORS: [&[u8]; 6] = [
    b"\0init_task\0",
    b"\0init_net\0",
    b"\0phys_base\0",
    b"\0page_offset_base\0",
    b"\0jiffies\0",
    b"\0__per_cpu_offset\0",
];

/// More than twice what any kernel exports.
const MAX_EXPORTS: usize = 1 << 16;

/// Words that lead to the name of an anchor and are tried as part of a table.
const MAX_TRIES: usize = 64;

/// No per-CPU offset is above.
const ABSOLUTE_MAX: u64 = 64 << 20;

/// What a kernel exports.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Exports {
    /// The symbols, in the order of the table.
    pub symbols: Vec<Export>,
    /// The bytes of the section that they were made from: the table, and what lies between the first and the last of its strings.
    pub sources: Vec<Range<usize>>,
}

/// All exports in `section`, which must hold `__ksymtab` and its strings; empty where none are found.
pub fn find(section: Section<'_>, image: &Image) -> Exports {
    let strings: Vec<usize> = ANCHORS
        .iter()
        .filter_map(|a| memmem::find(section.bytes, a))
        .map(|at| at + 1)
        .collect();
    let (Some(&low), Some(&high)) = (strings.iter().min(), strings.iter().max()) else {
        return Exports::default();
    };
    let mut best = Exports::default();
    let mut tries = 0;
    for (i, word) in section.bytes.chunks_exact(4).enumerate() {
        let at = 4 * i;
        let value = i32::from_le_bytes(word.try_into().unwrap_or_default());
        let target = at.wrapping_add_signed(value as isize);
        if target < low || target > high || !strings.contains(&target) || at < 4 {
            continue;
        }
        tries += 1;
        if tries > MAX_TRIES {
            break;
        }
        for stride in [12, 8] {
            let table = Table {
                section,
                image,
                stride,
            };
            let found = table.around(at - 4);
            if found.symbols.len() > best.symbols.len() {
                best = found;
            }
        }
        // A handful would be chance.
        if best.symbols.len() >= 100 {
            break;
        }
    }
    best
}

struct Table<'a> {
    section: Section<'a>,
    image: &'a Image,
    stride: usize,
}

impl Table<'_> {
    /// The entries before and after the one at `at`, as far as they are entries.
    fn around(&self, at: usize) -> Exports {
        let before = (1..MAX_EXPORTS).map_while(|k| self.entry(at.checked_sub(k.checked_mul(self.stride)?)?));
        let mut all: Vec<(Export, Range<usize>)> = before.collect();
        all.reverse();
        let first = at.saturating_sub(all.len() * self.stride);
        all.extend((0..MAX_EXPORTS).map_while(|k| self.entry(at.checked_add(k.checked_mul(self.stride)?)?)));
        let table = first..first + all.len() * self.stride;
        let low = all.iter().map(|(_, name)| name.start).min();
        let high = all.iter().map(|(_, name)| name.end).max();
        let strings = low.zip(high).map(|(low, high)| low..high);
        Exports {
            symbols: all.into_iter().map(|(export, _)| export).collect(),
            sources: std::iter::once(table).chain(strings).collect(),
        }
    }

    /// The entry at `at`, and where its name lies, the NUL included.
    fn entry(&self, at: usize) -> Option<(Export, Range<usize>)> {
        let relative = |at: usize| {
            let value = crate::types::bytes::word(self.section.bytes, at)? as i32;
            Some((at as u64).wrapping_add_signed(i64::from(value)))
        };
        let address = self.section.address.wrapping_add(relative(at)?);
        let inside = address >= self.image.span.start && address <= self.image.span.end;
        let absolute = is_absolute(address) && address < ABSOLUTE_MAX;
        if !inside && !absolute {
            return None;
        }
        let name_at = usize::try_from(relative(at + 4)?).ok()?;
        let rest = self.section.bytes.get(name_at..)?;
        let rest = rest.get(..rest.len().min(MAX_NAME + 1))?;
        let end = memchr::memchr(0, rest)?;
        let name = rest.get(..end)?;
        // The linker lets a name that another ends with share its bytes, so what stands before it says nothing.
        let plain = name
            .first()
            .is_some_and(|b| b.is_ascii_alphabetic() || *b == b'_')
            && name
                .iter()
                .all(|b| b.is_ascii_alphanumeric() || b"_.$".contains(b));
        let name = plain.then(|| String::from_utf8_lossy(name).into_owned())?;
        Some((Export { name, address }, name_at..name_at + end + 1))
    }
}
