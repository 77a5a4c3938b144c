//! Reads against a map of pages.

use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::prelude::*;
use vmsight_arch::Gva;
use vmsight_memory::{AddressSpace, GvaReadOp, ReadCause};

use crate::image::{Guest, Image};

const SIZE: u64 = 0x60_0000;
const TABLES: u64 = 200;
/// A kernel-half address in the middle of nowhere, near the end of a 1 GiB stretch.
const BASE: u64 = 0xffff_9000_3fc0_0000;

/// Small pages by number after `BASE`, and what they lead to; and the place of one large page.
#[derive(Clone, Debug)]
struct Layout {
    pages: BTreeMap<u64, u64>,
    large: Option<u64>,
}

fn layout() -> impl Strategy<Value = Layout> {
    // Three clusters: about the start, the end of the 1 GiB stretch (page 1024), and far away.
    let page = prop_oneof![0u64..24, 1012u64..1036, 300_000u64..300_012];
    // Some lead past the end of memory.
    let gpa = prop_oneof![9 => 0..(SIZE / 0x1000 - TABLES), 1 => Just(SIZE / 0x1000 + 5)];
    (vec((page, gpa), 0..60), prop::option::of(0u64..2)).prop_map(|(pages, large)| Layout {
        pages: pages.into_iter().collect(),
        large: large.map(|n| 2 + n),
    })
}

impl Layout {
    fn image(&self) -> Image {
        let mut image = Image::new(SIZE, TABLES);
        if let Some(at) = self.large {
            image.map_large(BASE + at * 0x20_0000, 0x20_0000);
        }
        for (&page, &gpa) in &self.pages {
            image.map(BASE + page * 0x1000, gpa * 0x1000);
        }
        image
    }

    fn byte(&self, image: &Image, gva: u64) -> Option<u8> {
        let off = gva.wrapping_sub(BASE);
        if let Some(at) = self.large
            && off / 0x20_0000 == at
        {
            return Some(image.bytes[(0x20_0000 + off % 0x20_0000) as usize]);
        }
        let gpa = self.pages.get(&(off / 0x1000))? * 0x1000 + off % 0x1000;
        image.bytes.get(gpa as usize).copied()
    }

    /// The bytes, or the first address that is missing.
    fn expect(&self, image: &Image, gva: u64, len: usize) -> Result<Vec<u8>, u64> {
        (gva..gva + len as u64)
            .map(|at| self.byte(image, at).ok_or(at))
            .collect()
    }
}

fn reads() -> impl Strategy<Value = Vec<(u64, usize)>> {
    let at = prop_oneof![
        0u64..0x1_9000,
        0x3f_4000u64..0x40_c000,
        0x40_0000u64..0x80_2000,
        300_000 * 0x1000u64..300_012 * 0x1000
    ];
    let len = prop_oneof![Just(8usize), 0usize..64, 0usize..0x3000];
    vec((at, len), 1..40)
}

fn check(
    layout: &Layout,
    image: &Image,
    space: &AddressSpace,
    reads: &[(u64, usize)],
) -> Result<(), TestCaseError> {
    let mut batch: Vec<(u64, Vec<u8>)> = Vec::new();
    for &(at, len) in reads {
        let gva = BASE + at;
        let want = layout.expect(image, gva, len);
        let mut buf = vec![0xee; len];
        let got = space.read(Gva(gva), &mut buf);
        match &want {
            Ok(bytes) => {
                prop_assert_eq!(&got, &Ok(()), "{:#x}", gva);
                prop_assert_eq!(&buf, bytes, "{:#x}", gva);
            }
            Err(first) => {
                let error = got.unwrap_err();
                // The page of the first missing byte, or that byte.
                prop_assert_eq!(error.gva.0.max(gva), *first, "{:?}", error);
                let beyond = layout.pages.contains_key(&((first - BASE) / 0x1000));
                prop_assert_eq!(matches!(error.cause, ReadCause::Memory(_)), beyond, "{:?}", error);
                prop_assert!(!error.to_string().is_empty());
            }
        }
        let word = |n: usize| {
            layout.expect(image, gva, n).ok().map(|mut b| {
                b.resize(8, 0);
                u64::from_le_bytes(b.try_into().unwrap())
            })
        };
        prop_assert_eq!(space.read_u64(Gva(gva)).ok(), word(8));
        prop_assert_eq!(space.read_u32(Gva(gva)).ok().map(u64::from), word(4));
        prop_assert_eq!(space.read_u16(Gva(gva)).ok().map(u64::from), word(2));
        prop_assert_eq!(space.read_u8(Gva(gva)).ok().map(u64::from), word(1));

        let mut partial = vec![0xee; len];
        let mut end = 0;
        for (range, result) in space.read_partial(Gva(gva), &mut partial) {
            prop_assert_eq!(range.start, end, "ranges cover the buffer");
            prop_assert!(range.end > range.start);
            end = range.end;
            for i in range {
                let want = layout.byte(image, gva + i as u64);
                prop_assert_eq!(want.is_some(), result.is_ok(), "{:#x}", gva + i as u64);
                prop_assert_eq!(partial[i], want.unwrap_or(0));
            }
        }
        prop_assert_eq!(end, len);
        batch.push((gva, vec![0xee; len]));
    }
    let mut ops: Vec<_> = batch
        .iter_mut()
        .map(|(gva, buf)| GvaReadOp::new(Gva(*gva), buf))
        .collect();
    space.read_batch(&mut ops);
    for op in ops {
        match layout.expect(image, op.gva.0, op.buf.len()) {
            Ok(bytes) => {
                prop_assert_eq!(&op.result, &Ok(()));
                prop_assert_eq!(&*op.buf, &bytes[..]);
            }
            Err(first) => prop_assert_eq!(op.result.unwrap_err().gva.0.max(op.gva.0), first),
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn reads_agree_with_the_model_over_every_kind_of_memory(layout in layout(), reads in reads()) {
        let image = layout.image();
        for guest in Guest::all(&image) {
            for space in [guest.space(), guest.small_space()] {
                // Cold, then warm.
                for _ in 0..2 {
                    check(&layout, &image, &space, &reads)
                        .map_err(|e| TestCaseError::fail(format!("{}: {e}", guest.kind)))?;
                }
            }
        }
    }
}

#[test]
fn other_modes_read_through_their_own_tables() {
    use vmsight_arch::paging::{Granule, PagingMode};
    use vmsight_arch::{Dtb, Gpa};
    use vmsight_memory::GuestMemory;
    let arm = |granule, va_bits, lpa2| PagingMode::Arm64 {
        granule,
        va_bits,
        lpa2,
    };
    // A chain of tables 64 KiB apart, index 0 at each level, to the page at 0xf_0000 (page 0 of its table).
    for (mode, levels) in [
        (PagingMode::X86_32 { pse: true }, 2),
        (PagingMode::X86Pae, 3),
        (PagingMode::X86Level5, 5),
        (arm(Granule::K4, 48, false), 4),
        (arm(Granule::K4, 52, true), 5),
        (arm(Granule::K16, 47, false), 3),
        (arm(Granule::K64, 48, false), 3),
    ] {
        let mut bytes = vec![0u8; 0x12_0000];
        let (table, page) = match mode {
            PagingMode::Arm64 { .. } => (3u64, 0x403u64),
            PagingMode::X86Pae => (1, 1),
            _ => (3, 3),
        };
        for level in 0..levels {
            let at = 0x1_0000 * (level + 1);
            let value = if level + 1 == levels {
                0xf_0000 | page
            } else {
                (at as u64 + 0x1_0000) | table
            };
            bytes[at..at + 4].copy_from_slice(&(value as u32).to_le_bytes());
        }
        bytes[0xf_0ff8..0xf_1000].copy_from_slice(b"the page");
        for memory in [
            GuestMemory::from_bytes(vec![(Gpa(0), bytes.clone())]).unwrap(),
            GuestMemory::live_from_bytes(vec![(Gpa(0), bytes.clone())]).unwrap(),
        ] {
            let space = AddressSpace::new(memory, mode, Dtb(0x1_0000));
            for _ in 0..3 {
                assert_eq!(
                    space.read_u64(Gva(0xff8)).unwrap().to_le_bytes(),
                    *b"the page",
                    "{mode:?}"
                );
            }
            let size = 1 << mode.span_shift(1);
            assert!(space.read_u64(Gva(size)).is_err(), "{mode:?}");
            let mut both = [0u8; 16];
            let parts = space.read_partial(Gva(size - 8), &mut both);
            assert_eq!(parts.len(), 2, "{mode:?}");
        }
    }
}
