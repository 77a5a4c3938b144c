//! Tables that no kernel would write: nothing panics, nothing runs on, and what is listed is what a walk finds.

use proptest::collection::vec;
use proptest::prelude::*;
use vmsight_arch::paging::{PagingMode, TableMemory, mappings, resolve, walk};
use vmsight_arch::{Dtb, Gpa, Gva};

use crate::writer::MODES;

/// A few pages of arbitrary bytes.
#[derive(Clone)]
struct Garbage(Vec<u8>);

impl std::fmt::Debug for Garbage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl TableMemory for Garbage {
    fn entry_u64(&self, gpa: Gpa) -> Option<u64> {
        let at = usize::try_from(gpa.0).ok()?;
        Some(u64::from_le_bytes(
            self.0.get(at..at.checked_add(8)?)?.try_into().unwrap(),
        ))
    }

    fn entry_u32(&self, gpa: Gpa) -> Option<u32> {
        let at = usize::try_from(gpa.0).ok()?;
        Some(u32::from_le_bytes(
            self.0.get(at..at.checked_add(4)?)?.try_into().unwrap(),
        ))
    }
}

const PAGES: u64 = 24;

/// Entries of which most lead somewhere in the same few pages, so that walks go deep and round in circles.
fn garbage() -> impl Strategy<Value = Garbage> {
    (any::<u64>(), vec((0..PAGES * 512, any::<u64>()), 0..40)).prop_map(|(seed, wild)| {
        let mut state = seed | 1;
        let mut words: Vec<u64> = (0..PAGES * 512)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                let r = state.wrapping_mul(0x2545_f491_4f6c_dd1d);
                // A table or page of ours, an absent one, or anything.
                match r >> 60 {
                    0..8 => ((r >> 8) % PAGES) << 12 | (r & 0xf67) | 3,
                    8..12 => ((r >> 8) % PAGES) << 12 | 3,
                    12..15 => r & !1,
                    _ => r,
                }
            })
            .collect();
        for (at, value) in wild {
            words[at as usize] = value;
        }
        Garbage(words.iter().flat_map(|w| w.to_le_bytes()).collect())
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn corrupt_tables_end_in_an_answer(
        mode in 0..MODES.len(),
        memory in garbage(),
        root in prop_oneof![(0..PAGES).prop_map(|p| p << 12), any::<u64>()],
        addresses in vec(any::<u64>(), 32),
        range in any::<(u64, u64)>(),
        limit in 0u64..300,
    ) {
        let mode = MODES[mode].mode;
        for gva in addresses {
            // Canonical addresses are rare among all: try both halves too.
            for gva in [gva, gva >> 20, gva | 0xffff_8000_0000_0000, gva & 0xffff_ffff] {
                let full = walk(mode, &memory, Dtb(root), Gva(gva));
                let quick = resolve(mode, &memory, Dtb(root), Gva(gva));
                prop_assert_eq!(quick.map(|r| (r.gpa, r.page_shift)), full.ok().map(|t| (t.gpa, t.page_shift)));
                if let Err(fault) = full {
                    prop_assert!(!fault.to_string().is_empty());
                }
            }
        }
        let (start, end) = (range.0.min(range.1), range.0.max(range.1));
        let mut pages = 0u64;
        let mut last = None;
        let mut list = mappings(mode, &memory, Dtb(root), Gva(start)..=Gva(end), limit);
        for item in list.by_ref() {
            let Ok(m) = item else { continue };
            pages += 1;
            prop_assert!(last < Some(m.gva), "in order");
            last = Some(m.gva);
            prop_assert_eq!(walk(mode, &memory, Dtb(root), m.gva), Ok(m.translation));
        }
        prop_assert!(list.tables() <= limit.max(1));
        prop_assert!(pages <= limit.max(1) * 8192);
    }

    #[test]
    fn any_mode_and_any_bytes(
        granule in 0..3u8,
        va_bits in any::<u8>(),
        lpa2 in any::<bool>(),
        bytes in vec(any::<u8>(), 0..4096),
        root in 0..4096u64,
        gva in any::<u64>(),
    ) {
        use vmsight_arch::paging::Granule::{K4, K16, K64};
        let mode = PagingMode::Arm64 { granule: [K4, K16, K64][usize::from(granule)], va_bits, lpa2 };
        let memory = Garbage(bytes);
        let _ = walk(mode, &memory, Dtb(root), Gva(gva));
        prop_assert!(mappings(mode, &memory, Dtb(root), Gva(0)..=Gva(u64::MAX), 50).count() <= 50 * 8192);
    }
}
