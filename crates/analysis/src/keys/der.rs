//! DER (X.690), as little of it as private keys need: definite lengths, two levels of nesting at a time.

/// INTEGER.
pub(super) const INTEGER: u8 = 0x02;
/// OCTET STRING.
pub(super) const OCTETS: u8 = 0x04;
/// SEQUENCE.
pub(super) const SEQUENCE: u8 = 0x30;

/// No key is longer: an RSA key of 16,384 bits has 9,300 bytes.
pub(super) const MAX_LENGTH: usize = 12 << 10;

/// Values one after the other.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reader<'b>(pub(super) &'b [u8]);

impl<'b> Reader<'b> {
    /// The content of the next value, which must have this tag.
    pub(super) fn value(&mut self, tag: u8) -> Option<&'b [u8]> {
        let (length, header) = header(self.0, tag)?;
        let content = self.0.get(header..header.checked_add(length)?)?;
        self.0 = self.0.get(header + length..)?;
        Some(content)
    }

    /// The next value's bytes if it is an INTEGER that is not negative, without the zero that says so.
    pub(super) fn unsigned(&mut self) -> Option<&'b [u8]> {
        let bytes = self.value(INTEGER)?;
        match bytes {
            [0, rest @ ..] if rest.first().is_none_or(|b| b & 0x80 != 0) => Some(rest),
            [first, ..] if first & 0x80 == 0 && *first != 0 => Some(bytes),
            _ => None,
        }
    }
}

/// Length of the content and of what is before it, of a value with this tag; the content need not be there.
pub(super) fn header(bytes: &[u8], tag: u8) -> Option<(usize, usize)> {
    let (&first, rest) = bytes.split_first()?;
    if first != tag {
        return None;
    }
    let (length, header) = match *rest {
        [short, ..] if short < 0x80 => (short.into(), 2),
        [0x81, length, ..] if length >= 0x80 => (length.into(), 3),
        [0x82, high, low, ..] if high > 0 => (usize::from(high) << 8 | usize::from(low), 4),
        _ => return None,
    };
    (length <= MAX_LENGTH).then_some((length, header))
}

/// Writes one value.
#[cfg(test)]
pub(super) fn write(tag: u8, content: &[u8]) -> Vec<u8> {
    let mut out = vec![tag];
    match content.len() {
        short @ 0..0x80 => out.push(short as u8),
        long @ 0x80..0x100 => out.extend([0x81, long as u8]),
        long => out.extend([0x82, (long >> 8) as u8, long as u8]),
    }
    out.extend(content);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_shortest_form_of_a_length_and_a_number_is_taken() {
        assert_eq!(header(&[0x30, 0x7f], SEQUENCE), Some((0x7f, 2)));
        assert_eq!(header(&[0x30, 0x81, 0x80], SEQUENCE), Some((0x80, 3)));
        assert_eq!(header(&[0x30, 0x82, 1, 0], SEQUENCE), Some((0x100, 4)));
        for wrong in [
            &[0x30, 0x81, 0x7f][..],
            &[0x30, 0x82, 0, 0xff],
            &[0x30, 0x80],
            &[0x31, 0],
            &[0x30],
        ] {
            assert_eq!(header(wrong, SEQUENCE), None, "{wrong:?}");
        }
        let number = |content: &[u8]| Reader(&write(INTEGER, content)).unsigned().map(<[u8]>::to_vec);
        assert_eq!(number(&[0, 0x80]), Some(vec![0x80]));
        assert_eq!(number(&[0]), Some(vec![]));
        assert_eq!(number(&[1, 0]), Some(vec![1, 0]));
        assert_eq!(number(&[0x80]), None, "negative");
        assert_eq!(number(&[0, 1]), None, "not shortest");
        assert_eq!(number(&[]), None);
        assert_eq!(Reader(&[2, 2, 1]).unsigned(), None, "cut");
    }
}
