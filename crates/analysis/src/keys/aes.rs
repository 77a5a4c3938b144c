//! AES key schedules (FIPS 197, 5.2): every word follows from the ones before, so a schedule proves itself.
//!
//! A search looks at each word of memory. What it looks for first are three words that are the exclusive or of two others, at
//! the distances of the three key sizes: arithmetic without a table, that a compiler makes vector instructions of. Only what
//! passes is expanded.

/// Words of the longest schedule, that of a key of 256 bits.
const LONGEST: usize = 60;
/// Words looked at together.
const BLOCK: usize = 64;
/// Words after a block that its last word's test needs.
const AHEAD: usize = 12;
/// Words derived from the key that must be there before a schedule is believed to go on elsewhere: 128 bits.
const ENOUGH: usize = 4;

/// A key size and how its words lie in memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub(super) struct Schedule {
    /// Words of the key: 4, 6 or 8.
    pub(super) key_words: usize,
    /// Whether each word lies with its bytes reversed, as in libraries written in C that compute with words on a
    /// little-endian machine. Processor instructions, and the kernel, have the bytes in order.
    pub(super) reversed: bool,
}

impl Schedule {
    /// Bytes of the schedule: of all round keys.
    pub(super) fn len(self) -> usize {
        self.words() * 4
    }

    fn words(self) -> usize {
        (self.key_words + 7) * 4
    }

    /// The key of the schedule that `bytes` begin with, if they do.
    pub(super) fn key(self, bytes: &[u8]) -> Option<Vec<u8>> {
        (self.holds(bytes) == self.words()).then(|| {
            let words = bytes.get(..self.key_words * 4).unwrap_or_default();
            let (words, _) = words.as_chunks::<4>();
            words
                .iter()
                .flat_map(|word| match self.reversed {
                    true => u32::from_ne_bytes(*word).swap_bytes().to_ne_bytes(),
                    false => *word,
                })
                .collect()
        })
    }

    /// Whether `bytes` are the beginning of a schedule, and so much of it that it is no chance.
    pub(super) fn begins(self, bytes: &[u8]) -> bool {
        let there = (bytes.len() / 4).min(self.words());
        there >= self.key_words + ENOUGH && self.holds(bytes) == there
    }

    /// How many words from the first on are as a schedule has them.
    fn holds(self, bytes: &[u8]) -> usize {
        let mut words = [0u32; LONGEST];
        let mut count = 0;
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<4>().0).take(self.words()) {
            *word = match self.reversed {
                true => u32::from_be_bytes(*bytes),
                false => u32::from_le_bytes(*bytes),
            };
            count += 1;
        }
        let word = |at: usize| words.get(at).copied().unwrap_or(0);
        for at in self.key_words..count {
            let before = word(at - 1);
            let mixed = match at % self.key_words {
                // Read as little-endian, the first byte of a word is its lowest: RotWord rotates to the right.
                0 => substitute(before.rotate_right(8)) ^ round_constant(at / self.key_words),
                4 if self.key_words == 8 => substitute(before),
                _ => before,
            };
            if word(at) != word(at - self.key_words) ^ mixed {
                return at;
            }
        }
        count
    }
}

/// The three key sizes, in both orders.
pub(super) const SCHEDULES: [Schedule; 6] = {
    const fn of(key_words: usize, reversed: bool) -> Schedule {
        Schedule { key_words, reversed }
    }
    [
        of(4, false),
        of(6, false),
        of(8, false),
        of(4, true),
        of(6, true),
        of(8, true),
    ]
};

/// Offsets in `bytes`, multiples of 4, at which a schedule may begin, with the words of its key. There may be none.
pub(super) fn candidates(bytes: &[u8], found: &mut dyn FnMut(usize, usize)) {
    let (words, _) = bytes.as_chunks::<4>();
    let mut block = [0u32; BLOCK + AHEAD];
    for first in (0..words.len()).step_by(BLOCK) {
        let rest = words.get(first..).unwrap_or_default();
        if let Some(full) = rest.first_chunk::<{ BLOCK + AHEAD }>() {
            for (word, bytes) in block.iter_mut().zip(full) {
                *word = u32::from_le_bytes(*bytes);
            }
        } else {
            block.fill(0);
            for (word, bytes) in block.iter_mut().zip(rest) {
                *word = u32::from_le_bytes(*bytes);
            }
        }
        if may_hold::<4>(&block) {
            each::<4>(&block, first, found);
        }
        if may_hold::<6>(&block) {
            each::<6>(&block, first, found);
        }
        if may_hold::<8>(&block) {
            each::<8>(&block, first, found);
        }
    }
}

/// Whether the word at `i` may be the first of a schedule: the three words after the first one derived are the exclusive or
/// of their neighbour and the word a key's length before. Zeros would pass, and are no schedule: the first word derived
/// from zeros is none.
#[inline(always)]
fn passes<const K: usize>(w: &[u32; BLOCK + AHEAD], i: usize) -> bool {
    let differs = (w[i + K + 1] ^ w[i + K] ^ w[i + 1])
        | (w[i + K + 2] ^ w[i + K + 1] ^ w[i + 2])
        | (w[i + K + 3] ^ w[i + K + 2] ^ w[i + 3]);
    (differs == 0) & ((w[i] | w[i + K - 1] | w[i + K]) != 0)
}

#[inline(always)]
fn may_hold<const K: usize>(w: &[u32; BLOCK + AHEAD]) -> bool {
    let mut any = 0u32;
    for i in 0..BLOCK {
        any |= u32::from(passes::<K>(w, i));
    }
    any != 0
}

#[cold]
fn each<const K: usize>(w: &[u32; BLOCK + AHEAD], first: usize, found: &mut dyn FnMut(usize, usize)) {
    for i in 0..BLOCK {
        if passes::<K>(w, i) {
            found((first + i) * 4, K);
        }
    }
}

fn substitute(word: u32) -> u32 {
    u32::from_le_bytes(word.to_le_bytes().map(|byte| S_BOX[usize::from(byte)]))
}

/// x^(n−1) in the field.
fn round_constant(n: usize) -> u32 {
    let mut value = 1u8;
    for _ in 1..n {
        value = double(value);
    }
    value.into()
}

/// Multiplication by x in GF(2^8) modulo x^8+x^4+x^3+x+1 (FIPS 197, 4.2.1).
const fn double(a: u8) -> u8 {
    (a << 1) ^ (0x1b * (a >> 7))
}

/// FIPS 197, 5.1.1: the inverse in the field, and an affine transformation. 3 generates the field, so the inverse of 3^n is
/// 3^(255−n).
const S_BOX: [u8; 256] = {
    let mut powers = [0u8; 256];
    let mut value = 1u8;
    let mut n = 0;
    while n < 256 {
        powers[n] = value;
        value ^= double(value);
        n += 1;
    }
    let mut table = [0u8; 256];
    table[0] = 0x63;
    let mut n = 0;
    while n < 255 {
        let i = powers[255 - n];
        let mixed = i ^ i.rotate_left(1) ^ i.rotate_left(2) ^ i.rotate_left(3) ^ i.rotate_left(4);
        table[powers[n] as usize] = mixed ^ 0x63;
        n += 1;
    }
    table
};

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The schedule of a key.
    pub(crate) fn expand(key: &[u8], reversed: bool) -> Vec<u8> {
        let schedule = Schedule {
            key_words: key.len() / 4,
            reversed: false,
        };
        let mut bytes = key.to_vec();
        while bytes.len() < schedule.len() {
            // The one next word that holds, found byte by byte from the definition.
            let at = bytes.len() / 4;
            let word = |i: usize| -> [u8; 4] { bytes[i * 4..i * 4 + 4].try_into().unwrap() };
            let mut t = word(at - 1);
            if at.is_multiple_of(schedule.key_words) {
                t.rotate_left(1);
                t = t.map(|b| S_BOX[usize::from(b)]);
                t[0] ^= round_constant(at / schedule.key_words) as u8;
            } else if schedule.key_words == 8 && at % 8 == 4 {
                t = t.map(|b| S_BOX[usize::from(b)]);
            }
            let before = word(at - schedule.key_words);
            bytes.extend(t.iter().zip(before).map(|(a, b)| a ^ b));
        }
        if reversed {
            bytes.chunks_mut(4).for_each(<[u8]>::reverse);
        }
        bytes
    }

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
        let two = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        digits.chunks(2).map(two).collect()
    }

    /// Key, and the last word of its expansion: FIPS 197, appendix A.
    const VECTORS: [(&str, &str); 3] = [
        ("2b7e151628aed2a6abf7158809cf4f3c", "b6630ca6"),
        ("8e73b0f7da0e6452c810f32b809079e562f8ead2522c6b7b", "01002202"),
        (
            "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4",
            "706c631e",
        ),
    ];

    #[test]
    fn the_standards_examples_expand_as_printed() {
        for (key, last) in VECTORS {
            let schedule = expand(&hex(key), false);
            assert_eq!(schedule[schedule.len() - 4..], hex(last));
        }
        assert_eq!(S_BOX[0x53], 0xed, "FIPS 197, 5.1.1");
    }

    #[test]
    fn schedules_are_found_wherever_they_lie_and_nothing_else() {
        for (key, _) in VECTORS {
            for reversed in [false, true] {
                for at in [0usize, 4, 252, 256, 1020] {
                    let mut memory = vec![0u8; 2048];
                    let schedule = expand(&hex(key), reversed);
                    memory[at..at + schedule.len()].copy_from_slice(&schedule);
                    let mut found = Vec::new();
                    candidates(&memory, &mut |at, words| {
                        for s in SCHEDULES.iter().filter(|s| s.key_words == words) {
                            found.extend(s.key(&memory[at..]).map(|key| (at, s.reversed, key)));
                        }
                    });
                    assert_eq!(found, [(at, reversed, hex(key))], "{key} at {at}");
                    memory[at + schedule.len() - 1] ^= 1;
                    candidates(&memory, &mut |at, _| {
                        assert!(SCHEDULES.iter().all(|s| s.key(&memory[at..]).is_none()));
                    });
                }
            }
        }
    }

    #[test]
    fn zeros_and_patterns_are_no_schedules() {
        for pattern in [
            vec![0u8; 4096],
            vec![0xff; 4096],
            (0..4096).map(|i| i as u8).collect(),
        ] {
            candidates(&pattern, &mut |at, _| {
                assert!(SCHEDULES.iter().all(|s| !s.begins(&pattern[at..])), "{at}");
            });
        }
    }

    #[test]
    fn the_beginning_alone_is_known_by_128_bits() {
        let s = SCHEDULES[2];
        let schedule = expand(&hex(VECTORS[2].0), false);
        assert!(!s.begins(&schedule[..44]));
        assert!(s.begins(&schedule[..48]));
        assert!(s.key(&schedule[..48]).is_none());
        let mut wrong = schedule[..64].to_vec();
        wrong[60] ^= 1;
        assert!(!s.begins(&wrong));
    }
}
