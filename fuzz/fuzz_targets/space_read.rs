//! Virtual reads over tables of any bytes that are rewritten between the reads: whatever is remembered, each read gives
//! what a walk made at that moment gives.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmsight_arch::paging::{Granule, PagingMode, walk};
use vmsight_arch::{Dtb, Gpa, Gva};
use vmsight_memory::{AddressSpace, GuestMemory, GvaReadOp};

/// The most memory that is made: tables reach no further than the input, and a few pages make every shape.
const PAGES: usize = 16;

/// What a space must read: page by page, each by a walk of its own, the bytes straight from memory.
fn expect(memory: &GuestMemory, mode: PagingMode, dtb: Dtb, gva: Gva, len: usize) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(len);
    while out.len() < len {
        let at = gva.checked_add(out.len() as u64)?;
        let page = walk(mode, memory, dtb, at).ok()?;
        let left = 0x1000 - at.page_offset();
        let mut part = vec![0; left.min(len - out.len())];
        memory.read(page.gpa, &mut part).ok()?;
        out.append(&mut part);
    }
    Some(out)
}

fuzz_target!(|data: &[u8]| {
    let Some((&[kind, slots, ref root @ ..], rest)) = data.split_first_chunk::<4>() else {
        return;
    };
    let root = u16::from_le_bytes(*root);
    let Some((&[count], rest)) = rest.split_first_chunk::<1>() else {
        return;
    };
    let (script, image) = rest.split_at(rest.len().min(usize::from(count) * 12));
    let mode = match kind % 8 {
        0 => PagingMode::X86_32 { pse: true },
        1 => PagingMode::X86Pae,
        2 | 3 => PagingMode::X86Level4,
        4 => PagingMode::X86Level5,
        5 => PagingMode::Arm64 {
            granule: Granule::K4,
            va_bits: 48,
            lpa2: false,
        },
        6 => PagingMode::Arm64 {
            granule: Granule::K4,
            va_bits: 16 + slots / 8,
            lpa2: slots & 4 != 0,
        },
        _ => PagingMode::Arm64 {
            granule: Granule::K64,
            va_bits: 16 + slots / 8,
            lpa2: false,
        },
    };
    let mut bytes = image[..image.len().min(PAGES << 12)].to_vec();
    bytes.resize(bytes.len().next_multiple_of(0x1000).max(0x1000), 0);
    // In two pieces, so that tables and pages meet the edge of a slot.
    let half = (bytes.len() / 2).max(1);
    let high = bytes.split_off(half);
    let mut parts = vec![(Gpa(0), bytes)];
    if !high.is_empty() {
        parts.push((Gpa(half as u64), high));
    }
    let live = kind & 8 != 0;
    let memory = if live {
        GuestMemory::live_from_bytes(parts)
    } else {
        GuestMemory::from_bytes(parts)
    };
    let memory = memory.expect("parts that do not overlap");
    let dtb = Dtb(u64::from(root) & 0xffe0);
    let space = AddressSpace::with_slots(memory.clone(), mode, dtb, slots % 3);

    // Twelve bytes a step: what to do, and an address that is made canonical now and then.
    for step in script.chunks_exact(12) {
        let value = u64::from_le_bytes(step[..8].try_into().expect("eight bytes"));
        let len = usize::from(u16::from_le_bytes([step[8], step[9]])) % 0x2100;
        let gva = match step[10] % 4 {
            0 => Gva(value),
            1 => Gva(value & 0xffff_ffff),
            2 => Gva(((value << 16) as i64 >> 16) as u64),
            // Near each other, so that what is remembered is met again.
            _ => Gva(value & 0x3f_ffff),
        };
        let want = |len| expect(&memory, mode, dtb, gva, len);
        match step[11] % 6 {
            0 => assert_eq!(
                space.read_u64(gva).ok().map(|v| v.to_le_bytes().to_vec()),
                want(8)
            ),
            1 => assert_eq!(
                space.read_u16(gva).ok().map(|v| v.to_le_bytes().to_vec()),
                want(2)
            ),
            2 => {
                let mut buf = vec![0; len];
                assert_eq!(space.read(gva, &mut buf).ok().map(|()| buf), want(len));
            }
            3 => {
                let (mut one, mut two) = (vec![0; len], vec![0; 8]);
                let mut ops = [
                    GvaReadOp::new(gva, &mut one),
                    GvaReadOp::new(Gva(value), &mut two),
                ];
                space.read_batch(&mut ops);
                let fine = ops[0].result.is_ok();
                assert_eq!(fine.then_some(one), want(len));
            }
            4 => {
                let mut buf = vec![0; len];
                let mut end = 0;
                for (range, result) in space.read_partial(gva, &mut buf) {
                    assert_eq!(range.start, end);
                    end = range.end;
                    if result.is_ok() {
                        let at = gva.wrapping_add(range.start as u64);
                        assert_eq!(
                            expect(&memory, mode, dtb, at, range.len()).as_deref(),
                            Some(&buf[range])
                        );
                    }
                }
                assert_eq!(end, len);
            }
            // The guest writes: mostly into its tables.
            _ => {
                let at = Gpa(u64::from(u16::from_le_bytes([step[8], step[9]])) & !7);
                let _ = memory.write(at, &value.to_le_bytes());
            }
        }
    }
});
