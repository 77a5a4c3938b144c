//! The token table and its index: 256 strings and 256 ascending offsets, the one landmark that has never changed.

/// Bytes of the index.
pub(super) const INDEX_LEN: usize = 512;

/// The longest token believed; real ones stay below 40 bytes.
const LONGEST: usize = 255;

/// Tokens up to this long are copied whole, without a loop.
pub(super) const INLINE: usize = 32;

/// The tokens and where they lie.
#[derive(Clone, Debug)]
pub(super) struct Tokens {
    /// Offset of the token table in the section.
    pub(super) table: usize,
    /// Offset of the token index in the section.
    pub(super) index: usize,
    /// Start of each token's string in the section.
    pub(super) starts: [u32; 256],
    /// Length of each, without the NUL.
    pub(super) lens: [u16; 256],
    /// All of them are printable ASCII, as in every kernel that a compiler made.
    pub(super) plain: bool,
    /// The first bytes of each, zero-padded.
    pub(super) heads: Box<[[u8; INLINE]; 256]>,
}

/// All places in `bytes` that hold a token index with its table in front.
pub(super) fn find(bytes: &[u8]) -> impl Iterator<Item = Tokens> + '_ {
    bytes.chunks_exact(4).enumerate().filter_map(move |(i, chunk)| {
        // The index begins with offset 0 and ascends; no token is long.
        let v = u32::from_le_bytes(chunk.try_into().unwrap_or_default());
        let (first, second) = (v & 0xffff, v >> 16);
        if first != 0 || second == 0 || second as usize > LONGEST + 1 {
            return None;
        }
        at(bytes, i * 4)
    })
}

fn at(bytes: &[u8], index: usize) -> Option<Tokens> {
    let raw = bytes.get(index..index + INDEX_LEN)?;
    let mut offsets = [0_u16; 256];
    for (to, from) in offsets.iter_mut().zip(raw.chunks_exact(2)) {
        *to = u16::from_le_bytes([from[0], from[1]]);
    }
    if !offsets.is_sorted_by(|a, b| a < b) {
        return None;
    }
    // The table ends with the last token and its NUL, padded. How long that token is, only the table itself tells.
    let last = usize::from(offsets[255]);
    let longest = index.checked_sub(last + 1)? & !3;
    (0..=LONGEST / 4 + 2)
        .map_while(|k| longest.checked_sub(4 * k))
        .find_map(|table| tokens(bytes, table, index, &offsets))
}

fn tokens(bytes: &[u8], table: usize, index: usize, offsets: &[u16; 256]) -> Option<Tokens> {
    let all = bytes.get(table..index)?;
    let after_nul = |&o: &u16| o == 0 || all.get(usize::from(o) - 1) == Some(&0);
    if !offsets.iter().all(after_nul) {
        return None;
    }
    let mut found = Tokens {
        table,
        index,
        starts: [0; 256],
        lens: [0; 256],
        plain: true,
        heads: Box::new([[0; INLINE]; 256]),
    };
    for i in 0..256 {
        let start = usize::from(offsets[i]);
        let end = match offsets.get(i + 1) {
            Some(&next) => usize::from(next) - 1,
            None => start + all.get(start..)?.iter().position(|&b| b == 0)?,
        };
        let token = all.get(start..end)?;
        // One string per entry, in print; behind the last, only the padding.
        if token.len() > LONGEST || token.contains(&0) || token.iter().any(|b| b.is_ascii_control()) {
            return None;
        }
        let rest = all.get(end + 1..)?;
        if i == 255 && (rest.len() > 7 || rest.iter().any(|&b| b != 0)) {
            return None;
        }
        found.plain &= token.iter().all(u8::is_ascii_graphic);
        found.starts[i] = u32::try_from(table + start).ok()?;
        found.lens[i] = u16::try_from(token.len()).ok()?;
        let head = token.len().min(INLINE);
        found.heads[i][..head].copy_from_slice(&token[..head]);
    }
    // Digits and the letters of kinds are used by every kernel, so they stand for themselves.
    let itself = |b: u8| found.lens[usize::from(b)] == 1 && found.heads[usize::from(b)][0] == b;
    (b"0123456789tT".iter().filter(|&&b| itself(b)).count() >= 6).then_some(found)
}
