//! `struct maple_tree` (include/linux/maple_tree.h): ranges of indices to pointers. Holds a process's mappings since 6.1.

use std::sync::Arc;

use vmsight_arch::Gva;

use super::{End, Seen, Walk};
use crate::layout::{Field, Place, layout};
use crate::{Kernel, LinuxError};

layout! {
    /// `struct maple_tree`.
    pub(crate) struct MapleTreeLayout = "maple_tree" {
        root: Field<u64> = "ma_root",
    }
}

layout! {
    /// `struct maple_range_64`: leaves and inner nodes without gap tracking.
    pub(crate) struct MapleRange64 = "maple_range_64" {
        pivot: Place = "pivot",
        slot: Place = "slot",
    }
}

layout! {
    /// `struct maple_arange_64`: inner nodes with gap tracking.
    pub(crate) struct MapleArange64 = "maple_arange_64" {
        pivot: Place = "pivot",
        slot: Place = "slot",
    }
}

/// Nodes are 256-byte aligned and the low byte of a pointer to one holds its type (`MAPLE_NODE_MASK`).
const NODE_MASK: u64 = 255;
/// `MAPLE_NODE_TYPE_SHIFT` and `_MASK`.
const TYPE_SHIFT: u64 = 3;
const TYPE_MASK: u64 = 15;
/// Deeper than any tree of 10-way nodes over 64-bit indices (`MAPLE_HEIGHT_MAX` is 31).
const MAX_DEPTH: usize = 31;

/// `enum maple_type`: the values are part of the format since 6.1; later kernels only append.
const LEAF_64: u64 = 1;
const RANGE_64: u64 = 2;
const ARANGE_64: u64 = 3;

/// One entry: the first and last index it stands for, and the pointer stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// First index.
    pub(crate) first: u64,
    /// Last index, inclusive.
    pub(crate) last: u64,
    /// What is stored.
    pub(crate) value: Gva,
}

struct Shape {
    pivot: u64,
    slot: u64,
    slots: usize,
    pivots: usize,
    leaf: bool,
}

/// `xa_is_node` for the root of a maple tree: an internal entry above the first page (`mte_mk_root` sets `MAPLE_ROOT_NODE`, 2).
fn is_node(entry: u64) -> bool {
    entry & 3 == 2 && entry > 4096
}

/// The same for the slots of inner nodes, which lack the root's mark: type and `MAPLE_ENODE_NULL` (4) are all that is added to the
/// address (`mt_mk_node`, lib/maple_tree.c).
fn is_child(entry: u64) -> bool {
    entry & 3 == 0 && entry > 4096
}

/// The entries of the tree at `tree`, by rising index, empty ranges left out. At most `limit`, out of not many more nodes: an honest
/// node is never without entries.
pub(crate) fn walk(kernel: &Kernel, tree: Gva, limit: usize) -> Result<Walk<Entry>, LinuxError> {
    let layout: Arc<MapleTreeLayout> = kernel.layout()?;
    let range: Arc<MapleRange64> = kernel.layout()?;
    let arange: Arc<MapleArange64> = kernel.layout()?;
    let shape = |kind: u64| {
        let (pivot, slot, leaf) = match kind {
            LEAF_64 => (range.pivot, range.slot, true),
            RANGE_64 => (range.pivot, range.slot, false),
            ARANGE_64 => (arange.pivot, arange.slot, false),
            _ => return None,
        };
        let inside = |place: Place| place.offset() + place.size() <= NODE_MASK + 1;
        (inside(pivot) && inside(slot)).then(|| Shape {
            pivot: pivot.offset(),
            slot: slot.offset(),
            slots: (slot.size() / 8) as usize,
            pivots: (pivot.size() / 8) as usize,
            leaf,
        })
    };

    let root = layout
        .root
        .read(kernel.space(), tree)
        .map_err(LinuxError::read("a maple tree's root", tree))?;
    let mut out = Walk::<Entry>::new();
    if root == 0 {
        return Ok(out);
    }
    if !is_node(root) {
        // A tree of one entry keeps it in the root, and it stands for index 0.
        if root & 3 != 2 {
            out.items.push(Entry {
                first: 0,
                last: 0,
                value: Gva(root),
            });
        }
        return Ok(out);
    }

    let mut seen = Seen::default();
    let mut nodes = 0usize;
    let mut stack = vec![(root, 0u64, u64::MAX, 0usize)];
    while let Some((encoded, min, max, depth)) = stack.pop() {
        let at = Gva(encoded & !NODE_MASK);
        let Some(shape) = shape((encoded >> TYPE_SHIFT) & TYPE_MASK) else {
            out.end = End::Broken {
                at,
                reason: "a maple node of unknown type",
            };
            break;
        };
        nodes += 1;
        if nodes > limit.saturating_mul(2).saturating_add(64) {
            out.end = End::Bound { limit };
            break;
        }
        if depth > MAX_DEPTH {
            out.end = End::Broken {
                at,
                reason: "deeper than a maple tree can be",
            };
            break;
        }
        if !seen.insert(at) {
            out.end = End::Cycle { at };
            break;
        }
        let mut node = [0u8; 256];
        if let Err(error) = kernel.space().read(at, &mut node) {
            out.end = End::Unreadable { at, error };
            break;
        }
        let word = |offset: u64, index: usize| {
            let from = offset as usize + index * 8;
            node.get(from..from + 8)
                .map_or(0, |b| u64::from_le_bytes(b.try_into().unwrap_or_default()))
        };
        let mut below = Vec::new();
        let mut first = min;
        for index in 0..shape.slots {
            // The last slot has no pivot of its own, and a zero pivot past the first ends the node: both reach to the node's end.
            let mut last = if index < shape.pivots {
                word(shape.pivot, index)
            } else {
                max
            };
            if last == 0 && index > 0 {
                last = max;
            }
            if last < first || last > max {
                out.end = End::Broken {
                    at,
                    reason: "a maple node's pivots do not rise",
                };
                return Ok(out);
            }
            let value = word(shape.slot, index);
            if value != 0 {
                if shape.leaf {
                    // Internal entries (XA_ZERO_ENTRY while a fork copies the tree) stand for no mapping.
                    if value & 3 != 2 {
                        if out.items.len() >= limit {
                            out.end = End::Bound { limit };
                            return Ok(out);
                        }
                        out.items.push(Entry {
                            first,
                            last,
                            value: Gva(value),
                        });
                    }
                } else if is_child(value) {
                    below.push((value, first, last, depth + 1));
                } else {
                    out.end = End::Broken {
                        at,
                        reason: "an inner maple node holds something that is no node",
                    };
                    return Ok(out);
                }
            }
            if last >= max {
                break;
            }
            first = last + 1;
        }
        stack.extend(below.into_iter().rev());
    }
    Ok(out)
}
