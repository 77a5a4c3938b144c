//! Strings and writes across pages.

use vmsight_arch::Gva;
use vmsight_memory::{GvaReadOp, ReadCause};

use crate::image::{Guest, Image};

const AT: u64 = 0xffff_8880_0000_0000;

/// Four pages in a row, in memory in the opposite order; then a hole.
fn image(text: &[u8], at: u64) -> Image {
    let mut image = Image::new(0x10_0000, 16);
    for page in 0..4u64 {
        image.map(AT + page * 0x1000, 0x4000 - page * 0x1000);
    }
    for (i, &b) in text.iter().enumerate() {
        let off = at + i as u64;
        let gpa = 0x4000 - (off & !0xfff) + (off & 0xfff);
        image.bytes[gpa as usize] = b;
    }
    image
}

#[test]
fn a_string_crosses_as_many_pages_as_it_likes() {
    let mut text: Vec<u8> = (0..0x2345u32).map(|i| (i % 255 + 1) as u8).collect();
    text.push(0);
    let image = image(&text, 0xff3);
    text.pop();
    for guest in Guest::all(&image) {
        let space = guest.space();
        for _ in 0..2 {
            let read = |at, max| space.read_cstr(Gva(AT + at), max);
            assert_eq!(read(0xff3, usize::MAX).unwrap(), text, "{}", guest.kind);
            assert_eq!(read(0xff3, 0x2000).unwrap(), text[..0x2000]);
            assert_eq!(read(0xff3, 13).unwrap(), text[..13], "ends with the page");
            assert_eq!(read(0xff3, 0).unwrap(), b"");
            assert_eq!(read(0xff3 + 0x2345, 10).unwrap(), b"", "at the zero byte");
        }
    }
}

#[test]
fn a_string_that_runs_into_a_hole_says_where() {
    let image = image(&[b'x'; 0x100], 0x3f00);
    for guest in Guest::all(&image) {
        let error = guest.space().read_cstr(Gva(AT + 0x3f00), 0x1000).unwrap_err();
        assert_eq!(error.gva, Gva(AT + 0x4000), "{}", guest.kind);
        assert!(!error.is_paged_out());
        // But not if it need not go there.
        assert_eq!(
            guest.space().read_cstr(Gva(AT + 0x3f00), 0x100).unwrap(),
            [b'x'; 0x100]
        );
    }
}

#[test]
fn a_page_put_elsewhere_is_told_from_one_that_never_was() {
    let mut image = image(b"", 0);
    let at = image.entry(AT + 0x5000, 1).unwrap();
    // A swap entry: not present, not zero.
    image.put(at, 0x1234_5600);
    for guest in Guest::all(&image) {
        let space = guest.space();
        assert!(
            space.read_u64(Gva(AT + 0x5000)).unwrap_err().is_paged_out(),
            "{}",
            guest.kind
        );
        assert!(!space.read_u64(Gva(AT + 0x6000)).unwrap_err().is_paged_out());
    }
}

#[test]
fn the_end_of_the_address_space_is_an_end() {
    let mut image = Image::new(0x10_0000, 16);
    image.map(0xffff_ffff_ffff_f000, 0x3000);
    // If addresses wrapped round, this page would follow.
    image.map(0, 0x4000);
    for guest in Guest::all(&image) {
        let space = guest.space();
        let mut buf = [0; 32];
        assert_eq!(
            space.read_u64(Gva(u64::MAX - 7)).unwrap(),
            image.u64(0x3ff8),
            "{}",
            guest.kind
        );
        let error = space.read(Gva(u64::MAX - 15), &mut buf).unwrap_err();
        assert!(matches!(error.cause, ReadCause::Fault(_)), "{error}");
        let mut ops = [GvaReadOp::new(Gva(u64::MAX - 15), &mut buf)];
        space.read_batch(&mut ops);
        assert!(ops[0].result.is_err());
        let parts = space.read_partial(Gva(u64::MAX - 15), &mut buf);
        assert_eq!(
            parts
                .iter()
                .map(|(r, result)| (r.clone(), result.is_ok()))
                .collect::<Vec<_>>(),
            [(0..16, true), (16..32, false)]
        );
    }
}

#[test]
fn a_large_hole_is_one_piece() {
    let image = image(b"", 0);
    for guest in Guest::all(&image) {
        let mut buf = vec![1; 64 << 20];
        let parts = guest.space().read_partial(Gva(AT), &mut buf);
        // Four pages, the rest of their table page by page, then nothing up to the end of the 1 GiB.
        assert_eq!(parts[0], (0..0x4000, Ok(())), "{}", guest.kind);
        assert_eq!(parts.len(), 1 + 508 + 31, "{}", guest.kind);
        assert_eq!(parts.last().unwrap().0.end, buf.len());
        assert!(buf[0x4000..].iter().all(|&b| b == 0));
    }
}

#[test]
fn writes_cross_pages_or_change_nothing() {
    let image = image(b"", 0);
    for guest in [Guest::live(&image), Guest::process(&image)] {
        let space = guest.space();
        let data: Vec<u8> = (0..0x1800u32).map(|i| (i % 251) as u8).collect();
        let mut back = vec![0; data.len()];
        space.write(Gva(AT + 0x900), &data).unwrap();
        space.read(Gva(AT + 0x900), &mut back).unwrap();
        assert_eq!(back, data, "{}", guest.kind);

        let before = space.read_u64(Gva(AT + 0x3ff8)).unwrap();
        let error = space.write(Gva(AT + 0x3ff8), &[0xff; 16]).unwrap_err();
        assert_eq!(error.gva, Gva(AT + 0x4000));
        assert_eq!(
            space.read_u64(Gva(AT + 0x3ff8)).unwrap(),
            before,
            "nothing was written"
        );
    }
    for guest in [Guest::frozen(&image), Guest::asked(&image)] {
        let error = guest.space().write(Gva(AT), &[1]).unwrap_err();
        assert!(matches!(error.cause, ReadCause::Memory(_)), "a dump: {error}");
    }
}
