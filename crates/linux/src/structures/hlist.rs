//! Hash chains: `hlist_head` (include/linux/list.h), which ends in null, and `hlist_nulls_head` (include/linux/list_nulls.h), which
//! ends in an odd value. Both are singly linked as far as a reader is concerned.

use vmsight_arch::Gva;
use vmsight_memory::AddressSpace;

use super::{End, Seen, Walk};

/// The longest hash chain that is followed. The kernel's tables grow long before; a longer one is an attack or a mistake.
pub const MAX_CHAIN: usize = 1 << 16;

/// The nodes of the chain whose `hlist_head` (one pointer, `first`) lies at `head`. At most `limit`, and never more than [`MAX_CHAIN`].
///
/// A hostile guest makes every chain of a table as long as it may be: who walks many takes `limit` from what is left for all of them.
pub fn walk(space: &AddressSpace, head: Gva, limit: usize) -> Walk {
    chain(space, head, limit, |value| value == 0)
}

/// The nodes of the chain whose `hlist_nulls_head` lies at `head`. The end mark's upper bits say which chain it belongs to and are
/// not looked at: an element that moved between chains while we read leads to another end, not to a wrong element. `limit` as in [`walk`].
pub fn walk_nulls(space: &AddressSpace, head: Gva, limit: usize) -> Walk {
    chain(space, head, limit, |value| value == 0 || value & 1 == 1)
}

/// A plain null-terminated chain whose first element is `first` and whose links lie `next_offset` bytes into each element.
pub fn walk_next(space: &AddressSpace, first: Gva, next_offset: u64, limit: usize) -> Walk {
    let mut out = Walk::new();
    let mut seen = Seen::default();
    let mut at = first;
    while !at.is_null() {
        if !step(&mut out, &mut seen, at, limit) {
            break;
        }
        match space.read_u64(at.wrapping_add(next_offset)) {
            Ok(next) => at = Gva(next),
            Err(error) => {
                out.items.pop();
                out.end = End::Unreadable { at, error };
                break;
            }
        }
    }
    out
}

fn chain(space: &AddressSpace, head: Gva, limit: usize, is_end: impl Fn(u64) -> bool) -> Walk {
    let limit = limit.min(MAX_CHAIN);
    let mut out = Walk::new();
    let mut seen = Seen::default();
    let mut at = head;
    loop {
        // The head and every node start with the pointer to the next node.
        let next = match space.read_u64(at) {
            Ok(next) => next,
            Err(error) => {
                if at != head {
                    out.items.pop();
                }
                out.end = End::Unreadable { at, error };
                break;
            }
        };
        if is_end(next) {
            break;
        }
        at = Gva(next);
        if !step(&mut out, &mut seen, at, limit) {
            break;
        }
    }
    out
}

fn step(out: &mut Walk, seen: &mut Seen, at: Gva, limit: usize) -> bool {
    if out.items.len() >= limit {
        out.end = End::Bound { limit };
        return false;
    }
    if !seen.insert(at) {
        out.end = End::Cycle { at };
        return false;
    }
    out.items.push(at);
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::structures::testing::space;

    const HEAD: Gva = Gva(0x3000);

    #[test]
    fn chains_end_in_null_or_in_an_odd_word() {
        let memory = space(&[(0x3000, 0x4000), (0x4000, 0x5000), (0x5000, 0)]);
        let out = walk(&memory, HEAD, MAX_CHAIN);
        assert_eq!(out.items, [Gva(0x4000), Gva(0x5000)]);
        assert!(out.end.is_complete());
        let memory = space(&[(0x3000, 0x4000), (0x4000, 0x5000), (0x5000, 77)]);
        let out = walk_nulls(&memory, HEAD, MAX_CHAIN);
        assert_eq!(out.items, [Gva(0x4000), Gva(0x5000)]);
        assert!(out.end.is_complete());
        let out = walk_nulls(&space(&[(0x3000, 1)]), HEAD, MAX_CHAIN);
        assert!(out.items.is_empty() && out.end.is_complete());
        let out = walk_next(&space(&[(0x4008, 0x5000)]), Gva(0x4000), 8, 10);
        assert_eq!(out.items, [Gva(0x4000), Gva(0x5000)]);
    }

    #[test]
    fn circles_are_cut_and_each_node_comes_once() {
        // 40 nodes, more than are searched one by one, the last of which leads back into the middle.
        let nodes: Vec<u64> = (0..40).map(|n| 0x4000 + n * 64).collect();
        let mut words: Vec<(u64, u64)> = nodes.windows(2).map(|pair| (pair[0], pair[1])).collect();
        words.push((0x3000, nodes[0]));
        words.push((nodes[39], nodes[20]));
        let memory = space(&words);
        for out in [
            walk(&memory, HEAD, MAX_CHAIN),
            walk_nulls(&memory, HEAD, MAX_CHAIN),
        ] {
            assert_eq!(out.items.len(), 40);
            assert!(matches!(out.end, End::Cycle { at } if at.0 == nodes[20]));
        }
        let out = walk(&space(&[(0x3000, 0x4000), (0x4000, 0x4000)]), HEAD, MAX_CHAIN);
        assert_eq!(out.items, [Gva(0x4000)]);
        assert!(matches!(out.end, End::Cycle { .. }));
    }

    #[test]
    fn an_unreadable_node_ends_the_chain_and_is_not_in_it() {
        let out = walk(
            &space(&[(0x3000, 0x4000), (0x4000, 0xffff_8000_0000_0000)]),
            HEAD,
            MAX_CHAIN,
        );
        assert_eq!(out.items, [Gva(0x4000)]);
        assert!(matches!(out.end, End::Unreadable { .. }));
        let out = walk_next(&space(&[(0x4008, 0x5000), (0x5008, 0x6000)]), Gva(0x4000), 8, 2);
        assert!(matches!(out.end, End::Bound { limit: 2 }));
    }
}
