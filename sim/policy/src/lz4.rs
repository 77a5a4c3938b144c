//! LZ4 as kernels are packed with it: the legacy frame (doc/lz4_Frame_format.md of LZ4), which is blocks with their lengths
//! before them, each on its own (doc/lz4_Block_format.md).

/// A block unpacks to no more.
const BLOCK: usize = 8 << 20;
/// Matches are longer than this by what their token says.
const MIN_MATCH: usize = 4;
/// A length of four bits that says: there is more of it.
const MORE: usize = 15;

/// Unpacks what follows the magic, up to `most` bytes. `None` if it is damaged or longer.
pub(crate) fn unpack(mut blocks: &[u8], most: u64) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    // The kernel's length follows, in four bytes.
    while blocks.len() > 4 {
        let length = take_u32(&mut blocks)? as usize;
        let packed = take(&mut blocks, length)?;
        block(packed, &mut out)?;
        if out.len() as u64 > most {
            return None;
        }
    }
    Some(out)
}

fn block(mut packed: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let start = out.len();
    loop {
        let [token] = *take(&mut packed, 1)? else {
            return None;
        };
        let literals = length(usize::from(token >> 4), &mut packed)?;
        out.extend_from_slice(take(&mut packed, literals)?);
        // The last sequence is literals alone.
        if packed.is_empty() {
            return (out.len() - start <= BLOCK).then_some(());
        }
        let offset = match *take(&mut packed, 2)? {
            [low, high] => usize::from(u16::from_le_bytes([low, high])),
            _ => return None,
        };
        let count = length(usize::from(token & 15), &mut packed)? + MIN_MATCH;
        let from = out
            .len()
            .checked_sub(offset)
            .filter(|&from| from >= start && offset != 0)?;
        if out.len() - start + count > BLOCK {
            return None;
        }
        // A match may reach into what it makes itself.
        for at in from..from + count {
            out.push(*out.get(at)?);
        }
    }
}

fn length(short: usize, packed: &mut &[u8]) -> Option<usize> {
    let mut length = short;
    if short == MORE {
        loop {
            let [more] = *take(packed, 1)? else { return None };
            length += usize::from(more);
            if more != u8::MAX {
                break;
            }
        }
    }
    Some(length)
}

fn take<'a>(bytes: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (first, rest) = bytes.split_at_checked(length)?;
    *bytes = rest;
    Some(first)
}

fn take_u32(bytes: &mut &[u8]) -> Option<u32> {
    Some(u32::from_le_bytes(take(bytes, 4)?.try_into().ok()?))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A frame of one block of literals alone.
    pub(crate) fn packed(text: &[u8]) -> Vec<u8> {
        let mut block = vec![0xf0];
        let mut rest = text.len() - MORE;
        while rest >= 255 {
            block.push(255);
            rest -= 255;
        }
        block.push(rest as u8);
        block.extend(text);
        let length = (block.len() as u32).to_le_bytes();
        [&[0x02, 0x21, 0x4c, 0x18], length.as_slice(), &block].concat()
    }

    /// A block, and the length that follows the last.
    fn one(block: &[u8]) -> Option<Vec<u8>> {
        let length = (block.len() as u32).to_le_bytes();
        unpack(&[length.as_slice(), block, &[0; 4]].concat(), 1 << 20)
    }

    #[test]
    fn matches_are_copied_from_before_and_from_themselves() {
        // "abc", five of three before; "de", nine of one before; and "." at the end.
        let block = [0x31, b'a', b'b', b'c', 3, 0, 0x25, b'd', b'e', 1, 0, 0x10, b'.'];
        assert_eq!(one(&block).unwrap(), b"abcabcabdeeeeeeeeee.");
        // A long match: 15 + 255 + 2 + 4.
        let block = [0x1f, b'x', 1, 0, 255, 2, 0x10, b'y'];
        let text = one(&block).unwrap();
        assert_eq!((text.len(), text.last()), (1 + 276 + 1, Some(&b'y')));
    }

    #[test]
    fn what_is_damaged_is_refused() {
        for block in [
            [].as_slice(),
            &[0x40, b'a'],
            // Before the begin, nowhere, cut short.
            &[0x10, b'a', 2, 0, 0x10, b'b'],
            &[0x10, b'a', 0, 0, 0x10, b'b'],
            &[0x10, b'a', 1],
            &[0x1f, b'a', 1, 0, 255],
        ] {
            assert_eq!(one(block), None, "{block:?}");
        }
        // Longer than a block may be: 33,000 times 255.
        let bomb = [
            &[0x1f, b'a', 1, 0],
            vec![255; 33_000].as_slice(),
            &[0, 0x10, b'b'],
        ]
        .concat();
        assert_eq!(one(&bomb), None);
        assert_eq!(unpack(&[9, 0, 0, 0, 0x10], 1 << 20), None);
        // No longer than is allowed.
        let frame = packed(&[7; 100]);
        assert_eq!(unpack(&frame[4..], 99), None);
        assert_eq!(unpack(&frame[4..], 100), Some(vec![7; 100]));
    }
}
