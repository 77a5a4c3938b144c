//! Hash tables of sockets: arrays of chains, most of them empty.

use vmsight_arch::Gva;

use super::MAX_SOCKETS;
use crate::Kernel;
use crate::structures::hlist;

/// The largest number of chains that is believed: `thash_entries` and the machine's memory allow 2^19 for TCP.
const MAX_CHAINS: u64 = 1 << 24;

/// Sockets found in tables, in the tables' order.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) socks: Vec<Gva>,
    pub(super) warnings: Vec<String>,
}

impl Found {
    fn warn(&mut self, warning: String) {
        if self.warnings.len() < 64 && !self.warnings.contains(&warning) {
            self.warnings.push(warning);
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
    if table.heads.is_null() || table.stride < 8 {
        return;
    }
    if table.count > MAX_CHAINS {
        found.warn(format!("{what}: not read, it claims {} chains", table.count));
        return;
    }
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
            found.warn(format!("{what}: chains cannot be read: {error}"));
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
                found.warn(format!("{what}: cut after {MAX_SOCKETS} sockets"));
                return;
            }
        }
        index += many;
    }
}

/// Adds the sockets of one chain, whose head lies at `head`.
pub(super) fn chain(kernel: &Kernel, what: &str, head: Gva, node: u64, found: &mut Found) {
    let walk = hlist::walk_nulls(kernel.space(), head);
    found
        .socks
        .extend(walk.items.iter().map(|at| at.wrapping_sub(node)));
    if let Some(warning) = walk.end.warning(what) {
        found.warn(warning);
    }
}
