//! `struct rb_root` and `rb_root_cached` (include/linux/rbtree_types.h): red-black trees, walked in order.

use vmsight_arch::Gva;
use vmsight_memory::AddressSpace;

use super::{End, Seen, Walk};

/// A red-black tree of n nodes is at most 2·log2(n+1) deep: 128 is deeper than any that fits a 64-bit machine.
const MAX_DEPTH: usize = 128;

// struct rb_node { unsigned long __rb_parent_color; struct rb_node *rb_right; struct rb_node *rb_left; }: the layout has not changed
// since 2012 and macros of the kernel's own assembly-free code rely on its order, so the offsets are taken as given.
const RIGHT: u64 = 8;

/// The `rb_node`s of the tree whose `rb_root` (one pointer) lies at `root`, leftmost first. At most `limit` nodes.
pub fn walk(space: &AddressSpace, root: Gva, limit: usize) -> Walk {
    match space.read_u64(root) {
        Ok(top) => walk_from(space, Gva(top), limit),
        Err(error) => Walk {
            items: Vec::new(),
            end: End::Unreadable { at: root, error },
        },
    }
}

/// Like [`walk`], from the topmost node itself; null is the empty tree.
pub fn walk_from(space: &AddressSpace, top: Gva, limit: usize) -> Walk {
    let mut out = Walk::new();
    let mut seen = Seen::default();
    // Nodes whose left half is being walked, with their right child: in order, each is emitted when its left half is done.
    let mut pending: Vec<(Gva, Gva)> = Vec::new();
    let mut at = top;
    loop {
        while !at.is_null() {
            if pending.len() >= MAX_DEPTH {
                out.end = End::Broken {
                    at,
                    reason: "deeper than a red-black tree can be",
                };
                return out;
            }
            if !seen.insert(at) {
                out.end = End::Cycle { at };
                return out;
            }
            let mut bytes = [0u8; 16];
            if let Err(error) = space.read(at.wrapping_add(RIGHT), &mut bytes) {
                out.end = End::Unreadable { at, error };
                return out;
            }
            let both = u128::from_le_bytes(bytes);
            pending.push((at, Gva(both as u64)));
            at = Gva((both >> 64) as u64);
        }
        let Some((node, right)) = pending.pop() else {
            return out;
        };
        if out.items.len() >= limit {
            out.end = End::Bound { limit };
            return out;
        }
        out.items.push(node);
        at = right;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::structures::testing::space;

    const ROOT: Gva = Gva(0x3000);

    /// A node's words: right child, left child.
    fn node(at: u64, left: u64, right: u64) -> [(u64, u64); 2] {
        [(at + 8, right), (at + 16, left)]
    }

    #[test]
    fn nodes_come_in_order() {
        let mut words = vec![(0x3000, 0x4000)];
        words.extend(node(0x4000, 0x5000, 0x6000));
        words.extend(node(0x5000, 0, 0x7000));
        words.extend(node(0x6000, 0x8000, 0));
        let out = walk(&space(&words), ROOT, 100);
        assert_eq!(out.items, [0x5000, 0x7000, 0x4000, 0x8000, 0x6000].map(Gva));
        assert!(out.end.is_complete());
        assert!(walk(&space(&[]), ROOT, 100).items.is_empty());
    }

    #[test]
    fn trees_that_lie_are_cut() {
        // A child that is its own grandparent, on either side.
        for words in [node(0x4000, 0x4000, 0), node(0x4000, 0, 0x4000)] {
            let mut words = words.to_vec();
            words.push((0x3000, 0x4000));
            assert!(matches!(
                walk(&space(&words), ROOT, 100).end,
                End::Cycle { at: Gva(0x4000) }
            ));
        }
        // Deeper than a balanced tree of any size.
        let mut words = vec![(0x3000, 0x4000)];
        for step in 0..300 {
            words.extend(node(0x4000 + step * 32, 0x4000 + (step + 1) * 32, 0));
        }
        assert!(matches!(walk(&space(&words), ROOT, 1000).end, End::Broken { .. }));
        // A long chain to the right is no deeper for the walk, but bounded.
        let mut words = vec![(0x3000, 0x4000)];
        for step in 0..300 {
            words.extend(node(0x4000 + step * 32, 0, 0x4000 + (step + 1) * 32));
        }
        let out = walk(&space(&words), ROOT, 200);
        assert_eq!(out.items.len(), 200);
        assert!(matches!(out.end, End::Bound { limit: 200 }));
    }
}
