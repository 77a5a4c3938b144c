//! `struct list_head`: circular, doubly linked (include/linux/list.h).

use std::sync::mpsc::{self, Sender};
use std::thread::{self, ScopedJoinHandle};

use rustc_hash::FxHashMap;
use vmsight_arch::Gva;
use vmsight_memory::{AddressSpace, ReadError};

use super::{End, Walk};

/// The walk of one list.
#[derive(Clone, Debug)]
pub struct ListWalk {
    /// Addresses of the `list_head`s in the elements, the head's own left out, and how the walk ended.
    pub walk: Walk,
    /// How many elements' `prev` did not name the element that led to them. In a list at rest there are none: either the list was
    /// changed while it was read, or its links were tampered with.
    pub uneven: usize,
}

/// Follows `next` from `head` until it comes back to `head`. At most `limit` elements.
///
/// A cycle that leaves the head out needs an element with two predecessors, and `prev` can name only one of them. So elements are
/// remembered only from the first disagreement on: an honest list pays nothing for the detection.
pub fn walk(space: &AddressSpace, head: Gva, limit: usize) -> ListWalk {
    walk_links(head, limit, |at| links(space, at), |_| None).0
}

/// [`walk`] of a list that may have very many elements.
///
/// Each element is known only when the one before it was read, so that nearly all of the time is waiting: for memory, and where a dump is
/// mapped for the first time, for the system. A long list is therefore followed from its other end as well, by another thread, until the
/// two meet.
pub(crate) fn walk_long(space: &AddressSpace, head: Gva, limit: usize) -> ListWalk {
    thread::scope(|scope| {
        let (send, marks) = mpsc::channel();
        let (mut count, mut send, mut other) = (0usize, Some(send), None);
        let read = |at| {
            count += 1;
            if count == LONG && is_worth_two(space) {
                other = send.take().and_then(|marks| {
                    let walk = move || from_behind(head, limit, |at| links(space, at), &marks);
                    // Without the thread, it takes longer and is as right.
                    thread::Builder::new().spawn_scoped(scope, walk).ok()
                });
            }
            links(space, at)
        };
        let mut numbers = FxHashMap::default();
        let known = |at: Gva| {
            numbers.extend(marks.try_iter());
            numbers.get(&at.0).copied()
        };
        let (mut out, met) = walk_links(head, limit, read, known);
        // Nobody waits for the other any more.
        drop(marks);
        let Some(number) = met else { return out };
        match other.map(ScopedJoinHandle::join) {
            Some(Ok(behind)) => out.walk.items.extend(behind.iter().take(number).rev()),
            // Nobody is left who knows the rest.
            Some(Err(_)) | None => return walk(space, head, limit),
        }
        out
    })
}

/// From so many elements on a thread costs less than it saves.
const LONG: usize = 512;

/// Whether two threads are faster: what one has asked for of memory that must be asked for, another must ask for again.
fn is_worth_two(space: &AddressSpace) -> bool {
    space.memory().is_all_mapped() && thread::available_parallelism().is_ok_and(|n| n.get() > 1)
}

/// Elements from one mark to the next.
const MARK: usize = 32;

/// The elements from the last one on, each of which names the one before it here as the one behind it. So they are different ones:
/// whoever follows `next` from any of them comes to `head`, each with another number of steps.
///
/// Every [`MARK`]th goes to `marks`, with its number from the end, 1 for the last. The walk is over when nobody takes them any more.
fn from_behind(
    head: Gva,
    limit: usize,
    links: impl Fn(Gva) -> Result<(Gva, Gva), ReadError>,
    marks: &Sender<(u64, usize)>,
) -> Vec<Gva> {
    let mut out = Vec::new();
    let (mut behind, mut at) = match links(head) {
        Ok((_, last)) => (head, last),
        Err(_) => return out,
    };
    while at != head && out.len() < limit {
        let before = match links(at) {
            Ok((next, prev)) if next == behind => prev,
            _ => break,
        };
        out.push(at);
        if out.len() % MARK == 0 && marks.send((at.0, out.len())).is_err() {
            break;
        }
        (behind, at) = (at, before);
    }
    out
}

/// `next` and `prev` of the `list_head` at `at`.
fn links(space: &AddressSpace, at: Gva) -> Result<(Gva, Gva), ReadError> {
    let mut bytes = [0u8; 16];
    space.read(at, &mut bytes)?;
    let both = u128::from_le_bytes(bytes);
    Ok((Gva(both as u64), Gva((both >> 64) as u64)))
}

/// The walk, by `links`. It ends before an element of which `known` says that so many from it on are known to end the list: then their
/// number is returned, too.
fn walk_links(
    head: Gva,
    limit: usize,
    mut links: impl FnMut(Gva) -> Result<(Gva, Gva), ReadError>,
    mut known: impl FnMut(Gva) -> Option<usize>,
) -> (ListWalk, Option<usize>) {
    let mut out = ListWalk {
        walk: Walk::new(),
        uneven: 0,
    };
    let mut seen: Option<rustc_hash::FxHashSet<u64>> = None;
    let mut from = head;
    let mut at = match links(head) {
        Ok((next, _)) => next,
        Err(error) => {
            out.walk.end = End::Unreadable { at: head, error };
            return (out, None);
        }
    };
    while at != head {
        if out.walk.items.len() >= limit {
            out.walk.end = End::Bound { limit };
            break;
        }
        if at.is_null() {
            out.walk.end = End::Broken {
                at: from,
                reason: "its next pointer is null",
            };
            break;
        }
        let (next, prev) = match links(at) {
            Ok(both) => both,
            Err(error) => {
                out.walk.end = End::Unreadable { at, error };
                break;
            }
        };
        if prev != from {
            out.uneven += 1;
            seen.get_or_insert_with(|| out.walk.items.iter().map(|g: &Gva| g.0).collect());
        }
        // Where nothing is uneven, what was found from either end makes one list.
        if out.uneven == 0
            && let Some(number) = known(at).filter(|number| out.walk.items.len() + number <= limit)
        {
            return (out, Some(number));
        }
        if let Some(seen) = &mut seen
            && !seen.insert(at.0)
        {
            out.walk.end = End::Cycle { at };
            break;
        }
        out.walk.items.push(at);
        from = at;
        at = next;
    }
    (out, None)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn run(list: &[(u64, u64, u64)], limit: usize) -> ListWalk {
        let map: HashMap<u64, (u64, u64)> = list.iter().map(|&(at, next, prev)| (at, (next, prev))).collect();
        let links = |at: Gva| {
            let (next, prev) = map.get(&at.0).copied().unwrap_or((0, 0));
            Ok((Gva(next), Gva(prev)))
        };
        walk_links(Gva(1), limit, links, |_| None).0
    }

    #[test]
    fn an_honest_list_is_complete() {
        let out = run(&[(1, 10, 30), (10, 20, 1), (20, 30, 10), (30, 1, 20)], 100);
        assert_eq!(out.walk.items, [Gva(10), Gva(20), Gva(30)]);
        assert!(out.walk.end.is_complete());
        assert_eq!(out.uneven, 0);
        assert!(run(&[(1, 1, 1)], 100).walk.items.is_empty());
    }

    #[test]
    fn a_cycle_past_the_head_is_found_and_no_element_comes_twice() {
        // 30 leads back to 20, whose prev still says 10.
        let out = run(&[(1, 10, 30), (10, 20, 1), (20, 30, 10), (30, 20, 20)], 1000);
        assert_eq!(out.walk.items, [Gva(10), Gva(20), Gva(30)]);
        assert!(matches!(out.walk.end, End::Cycle { at: Gva(20) }));
        // An element that points at itself, whichever way its prev was set.
        let out = run(&[(1, 10, 10), (10, 10, 10)], 1000);
        assert_eq!(out.walk.items, [Gva(10)]);
        assert!(matches!(out.walk.end, End::Cycle { at: Gva(10) }));
        let out = run(&[(1, 10, 10), (10, 10, 1)], 1000);
        assert_eq!(out.walk.items, [Gva(10)]);
        assert!(matches!(out.walk.end, End::Cycle { at: Gva(10) }));
    }

    #[test]
    fn an_endless_list_is_cut_and_a_null_link_is_named() {
        let links = |at: Gva| Ok((at.wrapping_add(1), at.wrapping_sub(1)));
        let endless = walk_links(Gva(1), 50, links, |_| None).0;
        assert_eq!(endless.walk.items.len(), 50);
        assert!(matches!(endless.walk.end, End::Bound { limit: 50 }));
        let out = run(&[(1, 10, 30), (10, 0, 1)], 100);
        assert_eq!(out.walk.items, [Gva(10)]);
        assert!(matches!(out.walk.end, End::Broken { at: Gva(10), .. }));
    }
}
