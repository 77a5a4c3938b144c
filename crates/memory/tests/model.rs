//! Guest memory against an independent model of it: random slots, reads across slots and holes.

use proptest::prelude::*;
use std::collections::BTreeMap;
use vmsight_arch::Gpa;
use vmsight_memory::{BuildError, GuestMemory, MemoryError, ReadOp};

/// One byte per address: slow and obviously right.
type Model = BTreeMap<u64, u8>;

/// Slots of 1 to 300 bytes with gaps of 0 to 40 bytes, in random order.
fn parts() -> impl Strategy<Value = Vec<(Gpa, Vec<u8>)>> {
    prop::collection::vec((0u64..40, prop::collection::vec(any::<u8>(), 1..300)), 1..9).prop_flat_map(
        |gaps| {
            let mut at = 0x1000;
            let parts: Vec<_> = gaps
                .into_iter()
                .map(|(gap, bytes)| {
                    let start = at + gap;
                    at = start + bytes.len() as u64;
                    (Gpa(start), bytes)
                })
                .collect();
            Just(parts).prop_shuffle()
        },
    )
}

fn model(parts: &[(Gpa, Vec<u8>)]) -> Model {
    parts
        .iter()
        .flat_map(|(gpa, bytes)| bytes.iter().enumerate().map(|(i, &b)| (gpa.0 + i as u64, b)))
        .collect()
}

/// What a read must give: the bytes, or the first address without memory.
fn expect(model: &Model, gpa: u64, len: usize) -> Result<Vec<u8>, u64> {
    (0..len as u64)
        .map(|i| model.get(&(gpa + i)).copied().ok_or(gpa + i))
        .collect()
}

proptest! {
    #[test]
    fn reads_agree_with_the_model(parts in parts(), reads in prop::collection::vec((0xff0u64..0x1c00, 0usize..900), 1..40)) {
        let model = model(&parts);
        for memory in [GuestMemory::from_bytes(parts.clone()).unwrap(), GuestMemory::live_from_bytes(parts.clone()).unwrap()] {
            prop_assert_eq!(memory.size(), model.len() as u64);
            prop_assert_eq!(memory.end().0, model.last_key_value().unwrap().0 + 1);
            let mut buffers: Vec<Vec<u8>> = reads.iter().map(|&(_, len)| vec![0; len]).collect();
            for (&(gpa, len), buf) in reads.iter().zip(&mut buffers) {
                let result = memory.read(Gpa(gpa), buf);
                match expect(&model, gpa, len) {
                    Ok(bytes) => { prop_assert_eq!(result, Ok(())); prop_assert_eq!(&*buf, &bytes); }
                    Err(at) => prop_assert!(matches!(result, Err(MemoryError::Unbacked { gpa, nearest: Some(_) }) if gpa.0 == at), "{:#x}", at),
                }
                let word = expect(&model, gpa, 8).map(|b| u64::from_le_bytes(b.try_into().unwrap()));
                prop_assert_eq!(memory.read_u64(Gpa(gpa)).ok(), word.ok());
                let half = expect(&model, gpa, 4).map(|b| u32::from_le_bytes(b.try_into().unwrap()));
                prop_assert_eq!(memory.read_u32(Gpa(gpa)).ok(), half.ok());
                let quarter = expect(&model, gpa, 2).map(|b| u16::from_le_bytes(b.try_into().unwrap()));
                prop_assert_eq!(memory.read_u16(Gpa(gpa)).ok(), quarter.ok());
                prop_assert_eq!(memory.read_u8(Gpa(gpa)).ok(), model.get(&gpa).copied());
                if let Some(bytes) = memory.frozen(Gpa(gpa), len) {
                    prop_assert!(!memory.is_live());
                    prop_assert_eq!(Ok(bytes.to_vec()), expect(&model, gpa, len));
                }
            }
            let mut batch: Vec<Vec<u8>> = reads.iter().map(|&(_, len)| vec![0; len]).collect();
            let mut ops: Vec<_> = reads.iter().zip(&mut batch).map(|(&(gpa, _), buf)| ReadOp::new(Gpa(gpa), buf)).collect();
            memory.read_batch(&mut ops);
            for op in &ops {
                match expect(&model, op.gpa.0, op.buf.len()) {
                    Ok(bytes) => { prop_assert_eq!(&op.result, &Ok(())); prop_assert_eq!(&*op.buf, &bytes[..]); }
                    Err(at) => prop_assert!(matches!(op.result, Err(MemoryError::Unbacked { gpa, .. }) if gpa.0 == at), "{:#x}", at),
                }
            }
        }
    }

    #[test]
    fn writes_change_all_or_nothing(parts in parts(), gpa in 0xff0u64..0x1c00, data in prop::collection::vec(any::<u8>(), 0..700)) {
        let mut model = model(&parts);
        let memory = GuestMemory::live_from_bytes(parts).unwrap();
        let result = memory.write(Gpa(gpa), &data);
        match expect(&model, gpa, data.len()) {
            Ok(_) => { prop_assert_eq!(result, Ok(())); for (i, &b) in data.iter().enumerate() { model.insert(gpa + i as u64, b); } }
            Err(at) => prop_assert!(matches!(result, Err(MemoryError::Unbacked { gpa, .. }) if gpa.0 == at), "{:#x}", at),
        }
        for (&at, &byte) in &model {
            prop_assert_eq!(memory.read_u8(Gpa(at)), Ok(byte));
        }
    }
}

#[test]
fn the_error_of_a_hole_names_the_nearest_region() {
    let memory =
        GuestMemory::from_bytes(vec![(Gpa(0x1000), vec![0; 16]), (Gpa(0x2000), vec![0; 16])]).unwrap();
    for (at, nearest) in [
        (0u64, 0x1000),
        (0x1010, 0x1000),
        (0x1ff0, 0x2000),
        (0x9000, 0x2000),
        (u64::MAX, 0x2000),
    ] {
        let error = memory.read_u8(Gpa(at)).unwrap_err();
        assert!(
            matches!(error, MemoryError::Unbacked { gpa, nearest: Some(r) } if gpa.0 == at && r.start.0 == nearest),
            "{at:#x}: {error}"
        );
    }
    assert!(GuestMemory::builder().build().unwrap().read_u64(Gpa(0)).is_err());
    assert!(memory.read(Gpa(u64::MAX), &mut [0; 32]).is_err());
}

#[test]
fn a_dump_cannot_be_written() {
    let memory = GuestMemory::from_bytes(vec![(Gpa(0), vec![7; 16])]).unwrap();
    assert_eq!(
        memory.write(Gpa(3), &[1]),
        Err(MemoryError::ReadOnly { gpa: Gpa(3) })
    );
    assert!(!memory.is_writable() && !memory.is_live());
    assert_eq!(memory.read_u8(Gpa(3)), Ok(7));
}

#[test]
fn overlaps_and_impossible_ranges_are_refused() {
    let overlap = GuestMemory::from_bytes(vec![(Gpa(8), vec![0; 16]), (Gpa(0), vec![0; 9])]);
    assert!(matches!(overlap, Err(BuildError::Overlap { .. })));
    assert!(matches!(
        GuestMemory::from_bytes(vec![(Gpa(0), vec![])]),
        Err(BuildError::BadRange { .. })
    ));
    assert!(matches!(
        GuestMemory::from_bytes(vec![(Gpa(u64::MAX), vec![0; 2])]),
        Err(BuildError::BadRange { .. })
    ));
}

#[test]
fn many_threads_read_while_one_writes() {
    let memory = GuestMemory::live_from_bytes(vec![(Gpa(0), vec![0; 1 << 16])]).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let mut page = vec![0u8; 4096];
                for i in 0..20_000u64 {
                    // Aligned words are written whole, so they are never seen torn.
                    let word = memory.read_u64(Gpa((i * 4096 + 8) & 0xffff)).unwrap();
                    assert_eq!(word & 0xffff_ffff, word >> 32);
                    memory.read(Gpa((i * 4096) & 0xffff), &mut page).unwrap();
                }
            });
        }
        for i in 0..20_000u64 {
            memory
                .write(Gpa((i * 4096 + 8) & 0xffff), &((i << 32) | i).to_le_bytes())
                .unwrap();
        }
    });
}

#[test]
fn what_is_missing_is_told_from_what_never_was() {
    let region = |start, len| vmsight_memory::Region {
        start: Gpa(start),
        len,
    };
    let memory = GuestMemory::builder()
        .missing(region(0x3000, 0x1000))
        .missing(region(0x1000, 0x800))
        .missing(region(0x1400, 0x800))
        .missing(region(0x5000, 0))
        .build()
        .unwrap();
    assert_eq!(memory.missing(), [region(0x1000, 0xc00), region(0x3000, 0x1000)]);
    for (at, missing) in [
        (0xfff, false),
        (0x1000, true),
        (0x1bff, true),
        (0x1c00, false),
        (0x3fff, true),
        (0x5000, false),
    ] {
        let error = memory.read_u8(Gpa(at)).unwrap_err();
        assert_eq!(matches!(error, MemoryError::Missing { .. }), missing, "{at:#x}");
    }
}
