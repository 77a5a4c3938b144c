//! Page tables made of any bytes: walks and listings end, in bounds, and agree with each other.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmsight_arch::paging::{Granule, PagingMode, TableMemory, mappings, walk};
use vmsight_arch::{Dtb, Gpa, Gva};

/// Eight pages of the input, repeated over the low 64 KiB; nothing above.
struct Tables<'d>(&'d [u8]);

impl Tables<'_> {
    fn bytes<const N: usize>(&self, gpa: Gpa) -> Option<[u8; N]> {
        if gpa.0 >= 1 << 16 || self.0.is_empty() {
            return None;
        }
        let mut out = [0; N];
        for (i, byte) in out.iter_mut().enumerate() {
            *byte = self.0[(gpa.0 as usize + i) % self.0.len()];
        }
        Some(out)
    }
}

impl TableMemory for Tables<'_> {
    fn entry_u64(&self, gpa: Gpa) -> Option<u64> {
        self.bytes(gpa).map(u64::from_le_bytes)
    }
    fn entry_u32(&self, gpa: Gpa) -> Option<u32> {
        self.bytes(gpa).map(u32::from_le_bytes)
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((head, tables)) = data.split_at_checked(17) else {
        return;
    };
    let mode = match head[0] % 8 {
        0 => PagingMode::X86_32 { pse: false },
        1 => PagingMode::X86_32 { pse: true },
        2 => PagingMode::X86Pae,
        3 => PagingMode::X86Level4,
        4 => PagingMode::X86Level5,
        n => PagingMode::Arm64 {
            granule: [Granule::K4, Granule::K16, Granule::K64][usize::from(n) - 5],
            va_bits: 16 + head[0] / 8,
            lpa2: false,
        },
    };
    let gva = Gva(u64::from_le_bytes(head[1..9].try_into().expect("eight bytes")));
    let dtb = Dtb(u64::from_le_bytes(head[9..17].try_into().expect("eight bytes")) & 0xf000);
    let memory = Tables(&tables[..tables.len().min(8 << 12)]);
    let result = walk(mode, &memory, dtb, gva);
    assert_eq!(
        result,
        walk(mode, &memory, dtb, gva),
        "a walk depends on nothing but memory"
    );
    if let Ok(t) = &result {
        assert!(t.steps.len() <= 5);
    }
    // At most this many tables, however they point at each other, and every page listed walks to the same place.
    for mapping in mappings(mode, &memory, dtb, Gva(0)..=Gva(u64::MAX), 64)
        .take(512)
        .flatten()
    {
        let again = walk(mode, &memory, dtb, mapping.gva).expect("a page that is listed can be walked to");
        assert_eq!(again.gpa, mapping.translation.gpa);
    }
});
