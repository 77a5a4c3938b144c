//! The filter of MSR accesses: the VMM's own with ours laid over it.

use std::collections::BTreeMap;

use kvm_bindings::{
    KVM_MSR_FILTER_DEFAULT_DENY, KVM_MSR_FILTER_MAX_BITMAP_SIZE, KVM_MSR_FILTER_MAX_RANGES,
    KVM_MSR_FILTER_READ, KVM_MSR_FILTER_WRITE,
};
use vmsight_hooks::Access;

/// The most ranges that KVM takes.
const MOST_RANGES: usize = KVM_MSR_FILTER_MAX_RANGES as usize;
/// The most MSRs of a range.
const MOST_MSRS: u32 = KVM_MSR_FILTER_MAX_BITMAP_SIZE * 8;

/// A range: the first that covers an access decides, with a bit for each MSR that says whether it is let through.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Range {
    /// KVM_MSR_FILTER_READ and _WRITE: what it decides on.
    pub(crate) flags: u32,
    pub(crate) base: u32,
    pub(crate) count: u32,
    pub(crate) bitmap: Vec<u8>,
}

/// A whole filter.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Filter {
    /// What is done with an access that no range covers.
    pub(crate) flags: u32,
    pub(crate) ranges: Vec<Range>,
}

impl Filter {
    /// Whether KVM lets an access of `kind` (one of the flags) through, or brings it out.
    pub(crate) fn lets_through(&self, index: u32, kind: u32) -> bool {
        for range in &self.ranges {
            let Some(offset) = index.checked_sub(range.base) else {
                continue;
            };
            if offset < range.count && range.flags & kind != 0 {
                let byte = range.bitmap.get((offset / 8) as usize).copied().unwrap_or(0);
                return byte >> (offset % 8) & 1 != 0;
            }
        }
        self.flags & KVM_MSR_FILTER_DEFAULT_DENY == 0
    }

    /// This filter, with these MSRs brought out too. `None` where KVM's ranges do not suffice.
    pub(crate) fn with(&self, watched: &BTreeMap<u32, Access>) -> Option<Filter> {
        let mut ranges = Vec::new();
        for (access, kind) in [
            (Access::READ, KVM_MSR_FILTER_READ),
            (Access::WRITE, KVM_MSR_FILTER_WRITE),
        ] {
            let mut left = watched
                .iter()
                .filter(|(_, a)| a.contains(access))
                .map(|(i, _)| *i)
                .peekable();
            while let Some(base) = left.next() {
                let mut group = vec![base];
                while let Some(next) = left.next_if(|next| next - base < MOST_MSRS) {
                    group.push(next);
                }
                let count = group.last().map_or(1, |last| last - base + 1);
                let mut bitmap = vec![0; count.div_ceil(8) as usize];
                for offset in 0..count {
                    // What lies between is decided as the VMM decided it.
                    let index = base + offset;
                    if !group.contains(&index)
                        && self.lets_through(index, kind)
                        && let Some(byte) = bitmap.get_mut((offset / 8) as usize)
                    {
                        *byte |= 1 << (offset % 8);
                    }
                }
                ranges.push(Range {
                    flags: kind,
                    base,
                    count,
                    bitmap,
                });
            }
        }
        ranges.extend(self.ranges.iter().cloned());
        (ranges.len() <= MOST_RANGES).then_some(Filter {
            flags: self.flags,
            ranges,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: u32 = KVM_MSR_FILTER_READ;
    const WRITE: u32 = KVM_MSR_FILTER_WRITE;
    const LSTAR: u32 = 0xc000_0082;

    /// As QEMU sets it: reads of one MSR come out.
    fn qemu() -> Filter {
        Filter {
            flags: 0,
            ranges: vec![Range {
                flags: READ | WRITE,
                base: 0x35,
                count: 1,
                bitmap: vec![0],
            }],
        }
    }

    fn watched(list: &[(u32, Access)]) -> BTreeMap<u32, Access> {
        list.iter().copied().collect()
    }

    #[test]
    fn the_vmms_own_ranges_stay() {
        let merged = qemu().with(&watched(&[(LSTAR, Access::WRITE)])).unwrap();
        assert!(!merged.lets_through(LSTAR, WRITE));
        assert!(merged.lets_through(LSTAR, READ));
        assert!(merged.lets_through(LSTAR - 1, WRITE) && merged.lets_through(LSTAR + 1, WRITE));
        assert!(!merged.lets_through(0x35, READ) && !merged.lets_through(0x35, WRITE));
        assert_eq!(qemu().with(&watched(&[])).unwrap(), qemu());
    }

    #[test]
    fn what_lies_between_two_watched_ones_is_decided_as_before() {
        let list = watched(&[(0x30, Access::READ), (0x3a, Access::READ | Access::WRITE)]);
        let merged = qemu().with(&list).unwrap();
        for index in 0x20..0x50 {
            let ours = index == 0x30 || index == 0x3a;
            assert_eq!(
                merged.lets_through(index, READ),
                !ours && index != 0x35,
                "{index:#x}"
            );
            assert_eq!(
                merged.lets_through(index, WRITE),
                index != 0x3a && index != 0x35,
                "{index:#x}"
            );
        }
        // A filter that lets nothing through but what it names.
        let strict = Filter {
            flags: KVM_MSR_FILTER_DEFAULT_DENY,
            ranges: vec![Range {
                flags: READ | WRITE,
                base: 0x31,
                count: 3,
                bitmap: vec![0b101],
            }],
        };
        let merged = strict.with(&list).unwrap();
        for index in 0x20..0x50 {
            let read = strict.lets_through(index, READ) && index != 0x30 && index != 0x3a;
            assert_eq!(merged.lets_through(index, READ), read, "{index:#x}");
        }
    }

    #[test]
    fn more_ranges_than_kvm_takes_are_refused() {
        let far = |n: u32| (0..n).map(|i| (i * 0x10_0000, Access::READ)).collect();
        assert!(qemu().with(&far(15)).is_some());
        assert!(qemu().with(&far(16)).is_none());
        let both = watched(&[(u32::MAX, Access::all()), (0, Access::all())]);
        assert_eq!(Filter::default().with(&both).unwrap().ranges.len(), 4);
    }
}
