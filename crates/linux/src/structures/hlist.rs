//! Hash chains: `hlist_head` (include/linux/list.h), which ends in null, and `hlist_nulls_head` (include/linux/list_nulls.h), which
//! ends in an odd value. Both are singly linked as far as a reader is concerned.

use vmsight_arch::Gva;
use vmsight_memory::AddressSpace;

use super::{End, Seen, Walk};

/// The longest hash chain that is followed. The kernel's tables grow long before; a longer one is an attack or a mistake.
pub(crate) const MAX_CHAIN: usize = 1 << 16;

/// The nodes of the chain whose `hlist_head` (one pointer, `first`) lies at `head`.
pub(crate) fn walk(space: &AddressSpace, head: Gva) -> Walk {
    chain(space, head, |value| value == 0)
}

/// The nodes of the chain whose `hlist_nulls_head` lies at `head`. The end mark's upper bits say which chain it belongs to and are
/// not looked at: an element that moved between chains while we read leads to another end, not to a wrong element.
pub(crate) fn walk_nulls(space: &AddressSpace, head: Gva) -> Walk {
    chain(space, head, |value| value == 0 || value & 1 == 1)
}

/// A plain null-terminated chain whose first element is `first` and whose links lie `next_offset` bytes into each element.
pub(crate) fn walk_next(space: &AddressSpace, first: Gva, next_offset: u64, limit: usize) -> Walk {
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

fn chain(space: &AddressSpace, head: Gva, is_end: impl Fn(u64) -> bool) -> Walk {
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
        if !step(&mut out, &mut seen, at, MAX_CHAIN) {
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
