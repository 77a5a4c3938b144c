//! Hash tables of sockets: arrays of chains, most of them empty.

use vmsight_arch::Gva;

use super::MAX_SOCKETS;
use crate::Kernel;
use crate::budget::STEPS;
use crate::structures::hlist;
use crate::warnings::Warnings;

/// The largest number of chains that is believed: `thash_entries` and the machine's memory allow 2^19 for TCP.
const MAX_CHAINS: u64 = 1 << 24;

/// Chains of all tables together: each namespace may have tables of its own.
const MAX_ALL_CHAINS: u64 = 4 * STEPS as u64;

/// Sockets found in tables, in the tables' order.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) socks: Vec<Gva>,
    pub(super) warnings: Warnings,
    /// Chains that were looked at.
    chains: u64,
}

impl Found {
    /// Whether no more are to be looked for: all tables together are bounded as each is by itself.
    pub(super) fn is_full(&self) -> bool {
        self.socks.len() >= MAX_SOCKETS || self.chains >= MAX_ALL_CHAINS
    }

    /// Adds sockets.
    pub(super) fn add(&mut self, socks: impl IntoIterator<Item = Gva>) {
        self.socks.extend(socks);
        if self.socks.len() >= MAX_SOCKETS {
            self.warnings
                .add(format!("sockets: no more were looked for after {MAX_SOCKETS}"));
        }
    }

    /// Counts chains that are about to be looked at.
    pub(super) fn look(&mut self, chains: u64) {
        self.chains = self.chains.saturating_add(chains);
        if self.chains >= MAX_ALL_CHAINS {
            self.warnings.add(format!(
                "sockets: no more were looked for after {MAX_ALL_CHAINS} chains"
            ));
        }
    }
}

/// A hash table of chains, whose heads lie `stride` bytes apart.
pub(super) struct Table<'a> {
    pub(super) what: &'a str,
    pub(super) heads: Gva,
    pub(super) count: u64,
    pub(super) stride: u64,
    /// Offset in `struct sock` of the node that the chains link.
    pub(super) node: u64,
}

/// Adds the sockets in all chains of `table`.
///
/// Chains end in null or in an odd value (`hlist_nulls`), whichever the kernel uses: which table uses which has changed over the years.
pub(super) fn walk(kernel: &Kernel, table: &Table<'_>, found: &mut Found) {
    let space = kernel.space();
    let what = table.what;
    if table.heads.is_null() || table.stride < 8 || found.is_full() {
        return;
    }
    if table.count > MAX_CHAINS {
        found
            .warnings
            .add(format!("{what}: not read, it claims {} chains", table.count));
        return;
    }
    found.look(table.count);
    let stride = table.stride as usize;
    let per_read = (64 << 10) / stride.clamp(8, 64 << 10);
    let mut buffer = vec![0u8; per_read.max(1) * stride];
    let mut index = 0u64;
    let mut unreadable = 0usize;
    while index < table.count {
        let many = (table.count - index).min(per_read.max(1) as u64);
        let base = table.heads.wrapping_add(index.wrapping_mul(table.stride));
        let Some(bytes) = buffer.get_mut(..many as usize * stride) else {
            break;
        };
        if let Err(error) = space.read(base, bytes) {
            found
                .warnings
                .add(format!("{what}: chains cannot be read: {error}"));
            unreadable += 1;
            if unreadable > 16 {
                break;
            }
            index += many;
            continue;
        }
        for (nth, chunk) in bytes.chunks_exact(stride).enumerate() {
            let first = chunk
                .get(..8)
                .map_or(0, |b| u64::from_le_bytes(b.try_into().unwrap_or_default()));
            if first == 0 || first & 1 == 1 {
                continue;
            }
            chain(
                kernel,
                what,
                base.wrapping_add(nth as u64 * table.stride),
                table.node,
                found,
            );
            if found.socks.len() >= MAX_SOCKETS {
                return;
            }
        }
        index += many;
    }
}

/// Adds the sockets of one chain, whose head lies at `head`.
pub(super) fn chain(kernel: &Kernel, what: &str, head: Gva, node: u64, found: &mut Found) {
    if found.is_full() {
        return;
    }
    let walk = hlist::walk_nulls(kernel.space(), head, hlist::MAX_CHAIN);
    found.add(walk.items.iter().map(|at| at.wrapping_sub(node)));
    if let Some(warning) = walk.end.warning(what) {
        found.warnings.add(warning);
    }
}
