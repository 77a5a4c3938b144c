//! Pages that a guest's system keeps behind entries that are not present.

use vmsight_arch::paging::Absent;
use vmsight_arch::{Dtb, Gpa, Gva};
use vmsight_memory::GvaReadOp;

use crate::image::{Guest, Image};

const AT: u64 = 0x7fff_0000_0000;

#[test]
fn a_page_without_rights_is_read_written_and_listed() {
    let mut image = Image::new(0x10_0000, 16);
    image.map(AT, 0x3000);
    let entry = image.entry(AT + 0x1000, 1).unwrap();
    image.put(entry, !0x5000 & 0x000f_ffff_ffff_f000 | 0x120);
    image.map(AT + 0x2000, 0x4000);
    let word = |gpa: usize| u64::from_le_bytes(image.bytes[gpa..gpa + 8].try_into().unwrap());
    for guest in Guest::all(&image) {
        let kernel = guest.space();
        assert!(kernel.read_u64(Gva(AT + 0x1000)).is_err(), "{}", guest.kind);
        let space = kernel.with_absent(Dtb(guest.root), Absent::Linux);
        // More than once: what is remembered must not get in the way.
        for _ in 0..4 {
            assert_eq!(
                space.read_u64(Gva(AT + 0x1008)).unwrap(),
                word(0x5008),
                "{}",
                guest.kind
            );
            let mut across = [0; 0x3000];
            space.read(Gva(AT), &mut across).unwrap();
            assert_eq!(across[0x1000..0x2000], image.bytes[0x5000..0x6000]);
            assert_eq!(across[0x2000..], image.bytes[0x4000..0x5000]);
            let (mut a, mut b) = ([0; 8], [0; 8]);
            let mut ops = [
                GvaReadOp::new(Gva(AT + 0x1010), &mut a),
                GvaReadOp::new(Gva(AT + 0x2010), &mut b),
            ];
            space.read_batch(&mut ops);
            assert!(ops.iter().all(|op| op.result.is_ok()), "{}", guest.kind);
            assert_eq!(
                (u64::from_le_bytes(a), u64::from_le_bytes(b)),
                (word(0x5010), word(0x4010))
            );
        }
        assert_eq!(space.translate(Gva(AT + 0x1234)).unwrap().gpa, Gpa(0x5234));
        let pages: Vec<u64> = space
            .mappings(Gva(AT)..=Gva(AT + 0xffff), 100)
            .map(|page| page.unwrap().translation.gpa.0)
            .collect();
        assert_eq!(pages, [0x3000, 0x5000, 0x4000], "{}", guest.kind);
    }
}
