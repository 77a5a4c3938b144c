//! Expanding the names, in parallel: the bulk of the work, so nothing is allocated per symbol.

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use super::names::{BLOCK, Names, kinds, length};
use super::tokens::{INLINE, Tokens};
use crate::table::{MAX_NAME, NamePart, SymbolTable, SymbolTableBuilder, assemble, hash, is_absolute};

/// Bytes that an expanded name may have in the mean of the whole table: it bounds what a forged one can make us allocate. Kernels
/// have some 22, but those of a single block may have 100 and more where code in Rust lies, whose names hold whole paths.
const MEAN_BYTES: usize = 128;

/// Where one name is expanded: room for the kind, the name, and what copying whole tokens writes behind it.
type Scratch = [u8; MAX_NAME + 1 + INLINE];

/// Expanded names. A block that contradicts the markers has none.
pub(super) struct Decoded {
    parts: Vec<NamePart>,
    /// The blocks whose names are in `parts`, ascending.
    blocks: Vec<u32>,
    /// Symbols in the kernel's table.
    count: usize,
}

/// Expands all names.
pub(super) fn decode(bytes: &[u8], tokens: &Tokens, names: &Names) -> Decoded {
    let kinds = kinds(tokens);
    let budget = AtomicUsize::new(names.blocks() * BLOCK * MEAN_BYTES);
    // Enough tasks to keep every thread busy, few enough that joining them costs nothing.
    let per_task = names.blocks().div_ceil(4 * rayon::current_num_threads()).max(16);
    let tasks: Vec<Expander<'_>> = (0..names.blocks().div_ceil(per_task))
        .into_par_iter()
        .map(|task| {
            let first = task * per_task;
            let blocks = first..(first + per_task).min(names.blocks());
            let mut expander = Expander {
                bytes,
                tokens,
                kinds: &kinds,
                budget: &budget,
                part: NamePart::with_capacity(blocks.len() * BLOCK),
                blocks: Vec::with_capacity(blocks.len()),
            };
            let mut scratch = [0; MAX_NAME + 1 + INLINE];
            for block in blocks {
                expander.block(names, block, &mut scratch);
            }
            expander
        })
        .collect();
    let blocks = tasks.iter().flat_map(|t| t.blocks.iter().copied()).collect();
    Decoded {
        parts: tasks.into_iter().map(|t| t.part).collect(),
        blocks,
        count: names.count,
    }
}

struct Expander<'a> {
    bytes: &'a [u8],
    tokens: &'a Tokens,
    kinds: &'a [bool; 256],
    /// Bytes of names that are left, for all tasks together.
    budget: &'a AtomicUsize,
    part: NamePart,
    blocks: Vec<u32>,
}

impl Expander<'_> {
    /// Adds the names of one block, or none of them if the block does not end where it should.
    fn block(&mut self, names: &Names, block: usize, scratch: &mut Scratch) {
        let before = self.part.mark();
        let whole = self.names_of(names, block, scratch).is_some();
        let used = self.part.bytes_since(before);
        let spend = |left: usize| left.checked_sub(used);
        if whole
            && self
                .budget
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, spend)
                .is_ok()
        {
            self.blocks.push(block as u32);
        } else {
            self.part.cut(before);
        }
    }

    fn names_of(&mut self, names: &Names, block: usize, scratch: &mut Scratch) -> Option<()> {
        let range = names.block(self.bytes, block)?;
        let bytes = self.bytes.get(..range.end)?;
        let mut at = range.start;
        for _ in 0..BLOCK.min(names.count - block * BLOCK) {
            let (first, len) = length(bytes, at)?;
            at = first + len;
            self.name(bytes.get(first..at)?, scratch)?;
        }
        // The padding behind the last block is all that may be left.
        let last = block + 1 == names.blocks();
        (at == range.end || last && range.end - at < 8).then_some(())
    }

    /// Expands one name. The first character is the kind, the rest the name.
    #[inline]
    fn name(&mut self, numbers: &[u8], space: &mut Scratch) -> Option<()> {
        if !self.kinds[usize::from(*numbers.first()?)] {
            return None;
        }
        let mut used = 0;
        for &number in numbers {
            let number = usize::from(number);
            let len = usize::from(self.tokens.lens[number]);
            if len <= INLINE && used <= MAX_NAME {
                space[used..used + INLINE].copy_from_slice(&self.tokens.heads[number]);
                used += len;
            } else {
                let from = self.tokens.starts[number] as usize;
                let token = self.bytes.get(from..from + len)?;
                let room = (MAX_NAME + 1).saturating_sub(used);
                let token = &token[..token.len().min(room)];
                space[used..used + token.len()].copy_from_slice(token);
                used += token.len();
            }
        }
        let (&kind, name) = space[..used.min(MAX_NAME + 1)].split_first()?;
        if self.tokens.plain {
            self.part.push(name, kind, hash(name));
        } else {
            let name = escape(name);
            self.part.push(&name, kind, hash(&name));
        }
        Some(())
    }
}

impl Decoded {
    /// How many names there are.
    pub(super) fn len(&self) -> usize {
        self.parts.iter().map(NamePart::len).sum()
    }

    /// How many blocks of names were good.
    pub(super) fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// The number that each name has in the kernel's table, ascending.
    pub(super) fn numbers(&self) -> impl Iterator<Item = usize> + '_ {
        self.blocks.iter().flat_map(|&b| {
            let start = b as usize * BLOCK;
            start..(start + BLOCK).min(self.count)
        })
    }

    /// The number, in the kernel's table, of the first symbol with this name.
    pub(super) fn number_of(&self, name: &str) -> Option<usize> {
        let mut before = 0;
        for part in &self.parts {
            if let Some(i) = part.position(name) {
                return self.numbers().nth(before + i);
            }
            before += part.len();
        }
        None
    }

    /// With the run-time addresses of the names, the finished table of link-time addresses.
    pub(super) fn into_table(self, mut addresses: Vec<u64>, slide: u64) -> SymbolTable {
        for a in &mut addresses {
            if !is_absolute(*a) {
                *a = a.wrapping_sub(slide);
            }
        }
        if addresses.is_sorted() && addresses.len() == self.len() {
            return assemble(&addresses, &self.parts);
        }
        let mut builder = SymbolTableBuilder::new();
        let names = self.parts.iter().flat_map(NamePart::iter);
        for ((name, kind), address) in names.zip(addresses) {
            builder.push(name, address, kind);
        }
        builder.finish()
    }
}

/// Names that no compiler makes, in print: a guest's table may hold anything.
fn escape(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    for &b in name.iter().take(MAX_NAME / 4) {
        if b.is_ascii_graphic() {
            out.push(b);
        } else {
            out.extend_from_slice(format!("\\x{b:02x}").as_bytes());
        }
    }
    out
}
