//! TLS sessions of OpenSSL, in the memory of the process that has them.
//!
//! A connection's structure (`SSL`; since 3.2 `SSL_CONNECTION`) begins with the protocol's version and pointers to its streams, and has
//! all of the following in it or one pointer away, in 1.1.1, 3.0 and later alike:
//! the server's random number and right behind it the client's; of TLS 1.3 the secrets, 64 bytes for each; of TLS 1.2 a
//! pointer to the session (`SSL_SESSION`), which has the master secret.
//!
//! Nothing is taken for a secret for lying where one would. The secrets of TLS 1.3 follow from each other, and those that are
//! kept prove that. What follows from a master secret of TLS 1.2 are the keys of the connection's ciphers: it is proven by the
//! AES schedule of such a key in the same process.

use vmsight_arch::Gva;

use super::follow::{Budget, Keys, Read, is_user_pointer};
use super::material::{TlsSecret, hex};
use super::schedule::Hash;

/// TLS 1.2 and 1.3, as versions in records and structures.
pub(super) const VERSIONS: [u64; 2] = [TLS_1_2, TLS_1_3];
const TLS_1_2: u64 = 0x0303;
const TLS_1_3: u64 = 0x0304;
/// Bytes of a connection's structure that are looked at: it has some 6 KiB in 3.0.
const EXTENT: usize = 8 << 10;
/// Bytes kept for a secret, whatever the hash (EVP_MAX_MD_SIZE).
const SLOT: usize = 64;
/// Bytes of a random number.
const RANDOM: usize = 32;
/// Bytes of a master secret of TLS 1.2.
const MASTER: usize = 48;
/// Where a session has its master secret: behind version, length, and the early secret.
const MASTER_AT: u64 = 16 + SLOT as u64;
/// Bytes that follow from a master secret and are looked through for a key: two MAC keys, keys and vectors, of any suite.
const EXPANDED: usize = 2 * (48 + 32 + 16);

/// A secret and where it lies. Those of a handshake are not kept, but follow from what is: they are said to lie there.
pub(super) type Placed = (Gva, usize, TlsSecret);

/// Whether the words behind a version may be a connection's: pointers to its method or streams. There may be fewer, at the end of a
/// page.
pub(super) fn may_be(after: &[u64]) -> bool {
    let mut after = after.iter();
    after.by_ref().take(2).all(|word| is_user_pointer(*word))
        && after
            .next()
            .is_none_or(|word| *word == 0 || is_user_pointer(*word))
}

/// The secrets of the connection whose version lies at `at`. `keys` are those of AES schedules in the same process. A string says
/// why secrets that are there cannot be told.
pub(super) fn secrets(
    read: &Read<'_>,
    at: Gva,
    keys: &Keys<'_>,
    budget: &Budget,
) -> Result<Vec<Placed>, String> {
    let bytes = read.up_to(at, EXTENT);
    let words: Vec<u64> = bytes
        .as_chunks::<8>()
        .0
        .iter()
        .map(|word| u64::from_le_bytes(*word))
        .collect();
    let Some((version, after)) = words.split_first() else {
        return Ok(Vec::new());
    };
    if !may_be(after) {
        return Ok(Vec::new());
    }
    match *version {
        TLS_1_2 => Ok(older(read, &words, &bytes, keys, budget).into_iter().collect()),
        TLS_1_3 => newer(at, &words, &bytes, budget),
        _ => Ok(Vec::new()),
    }
}

/// TLS 1.2.
fn older(read: &Read<'_>, words: &[u64], bytes: &[u8], keys: &Keys<'_>, budget: &Budget) -> Option<Placed> {
    if keys.is_empty() {
        return None;
    }
    words
        .iter()
        .filter(|word| is_user_pointer(**word))
        .find_map(|word| {
            let session = Gva(*word);
            let [version, length] = read.words(session)?;
            // The version is 32 bits, and nobody says what is between it and the length.
            if version & 0xffff_ffff != TLS_1_2 || length != MASTER as u64 {
                return None;
            }
            let place = session.wrapping_add(MASTER_AT);
            let master = read.bytes(place, MASTER)?;
            let both = randoms(bytes, words).find(|both| {
                Hash::ALL.into_iter().any(|hash| {
                    if !budget.spend() {
                        return false;
                    }
                    let expanded = hash.prf(&master, b"key expansion", both, EXPANDED);
                    let has = |len: usize| expanded.windows(len).step_by(4).any(|part| keys.contains(part));
                    [16, 24, 32].into_iter().any(has)
                })
            })?;
            let client = both.get(RANDOM..)?;
            Some((place, MASTER, secret("CLIENT_RANDOM", client, &master)))
        })
}

fn secret(label: &str, client: &[u8], secret: &[u8]) -> TlsSecret {
    TlsSecret {
        label: label.to_owned(),
        random: hex(client),
        secret: hex(secret),
    }
}

/// Where both random numbers may lie: 64 bytes that look like noise, between words that do not. (Before them is a number of flags or
/// the length of a MAC's key; behind them are small numbers or a pointer.)
fn randoms<'b>(bytes: &'b [u8], words: &'b [u64]) -> impl Iterator<Item = &'b [u8]> {
    const WORDS: usize = 2 * RANDOM / 8;
    /// Of 64 random bytes, 57 differ on average, and 40 all but always.
    const DIFFERENT: u32 = 40;
    words
        .windows(WORDS + 2)
        .enumerate()
        .filter_map(|(index, window)| {
            let (first, rest) = window.split_first()?;
            let (last, noise) = rest.split_last()?;
            let bounded = first >> 40 == 0 && last >> 48 == 0;
            let ends = noise.first()? >> 40 != 0 && noise.last()? >> 40 != 0;
            if !bounded || !ends {
                return None;
            }
            let both = bytes.get((index + 1) * 8..(index + 1 + WORDS) * 8)?;
            let mut seen = [0u64; 4];
            for byte in both {
                if let Some(word) = seen.get_mut(usize::from(byte >> 6)) {
                    *word |= 1 << (byte & 63);
                }
            }
            (seen.iter().map(|word| word.count_ones()).sum::<u32>() >= DIFFERENT).then_some(both)
        })
}

/// TLS 1.3: the slots from the handshake's secret on.
fn newer(at: Gva, words: &[u64], bytes: &[u8], budget: &Budget) -> Result<Vec<Placed>, String> {
    // They are arrays of bytes, behind a number of 32 bits.
    let found = (0..bytes.len()).step_by(4).find_map(|offset| {
        let slots = bytes.get(offset..)?.as_chunks::<SLOT>().0;
        Hash::ALL
            .into_iter()
            .find_map(|hash| Some((offset, Slots::proven(slots, hash, budget)?)))
    });
    let Some((offset, slots)) = found else {
        return Ok(Vec::new());
    };
    let place = |slot: usize| at.wrapping_add((offset + slot * SLOT) as u64);
    let before = words.get(..offset / 8).unwrap_or_default();
    let mut candidates = randoms(bytes, before);
    // What the transcript's hash was made of is gone, so that nothing but its place tells the client's random number.
    let (Some(both), None) = (candidates.next(), candidates.next()) else {
        return Err(format!(
            "the TLS 1.3 connection at {at} has secrets that prove themselves, but which random number is its client's could not be told"
        ));
    };
    let client = both.get(RANDOM..).unwrap_or_default();
    Ok(slots
        .secrets()
        .into_iter()
        .map(|(label, slot, bytes)| (place(slot), slots.hash.len(), secret(label, client, &bytes)))
        .collect())
}

/// The secrets of a connection of TLS 1.3, in the order in which they lie from the handshake's on.
struct Slots<'b> {
    hash: Hash,
    slots: &'b [[u8; SLOT]],
}

impl<'b> Slots<'b> {
    const HANDSHAKE: usize = 0;
    const MASTER: usize = 1;
    const CLIENT_FINISHED: usize = 3;
    const SERVER_FINISHED: usize = 4;
    /// Hashes of the transcript: up to the server's Finished, and up to the ServerHello.
    const TO_FINISHED: usize = 5;
    const TO_HELLO: usize = 6;
    const CLIENT_TRAFFIC: usize = 7;
    const SERVER_TRAFFIC: usize = 8;
    const EXPORTER: usize = 9;

    /// These slots, if the second secret follows from the first.
    fn proven(slots: &'b [[u8; SLOT]], hash: Hash, budget: &Budget) -> Option<Self> {
        let all = Self { hash, slots };
        let (handshake, master) = (all.get(Self::HANDSHAKE)?, all.get(Self::MASTER)?);
        (budget.spend() && hash.master(handshake) == master).then_some(all)
    }

    /// What a slot holds: as many bytes as the hash has, with nothing behind them.
    fn get(&self, slot: usize) -> Option<&'b [u8]> {
        let (value, rest) = self.slots.get(slot)?.split_at_checked(self.hash.len())?;
        let is_set = rest.iter().all(|byte| *byte == 0) && value.iter().any(|byte| *byte != 0);
        is_set.then_some(value)
    }

    /// What a key log has of them: label, the slot that it belongs to, and the secret. The transcript's hashes prove themselves by
    /// what was made with them.
    fn secrets(&self) -> Vec<(&'static str, usize, Vec<u8>)> {
        let mut out = Vec::new();
        if let (Some(from), Some(transcript)) = (self.get(Self::HANDSHAKE), self.get(Self::TO_HELLO)) {
            let [client, server] = [&b"c hs traffic"[..], b"s hs traffic"]
                .map(|label| self.hash.expand(from, label, transcript));
            let finished = |secret: &[u8], slot| {
                self.get(slot)
                    .is_some_and(|kept| self.hash.expand(secret, b"finished", &[]) == kept)
            };
            if finished(&client, Self::CLIENT_FINISHED) || finished(&server, Self::SERVER_FINISHED) {
                out.push(("CLIENT_HANDSHAKE_TRAFFIC_SECRET", Self::HANDSHAKE, client));
                out.push(("SERVER_HANDSHAKE_TRAFFIC_SECRET", Self::HANDSHAKE, server));
            }
        }
        if let (Some(from), Some(transcript)) = (self.get(Self::MASTER), self.get(Self::TO_FINISHED)) {
            let derived = [
                (
                    "CLIENT_TRAFFIC_SECRET_0",
                    &b"c ap traffic"[..],
                    Self::CLIENT_TRAFFIC,
                ),
                ("SERVER_TRAFFIC_SECRET_0", b"s ap traffic", Self::SERVER_TRAFFIC),
                ("EXPORTER_SECRET", b"exp master", Self::EXPORTER),
            ]
            .map(|(name, label, slot)| (name, slot, self.hash.expand(from, label, transcript)));
            // One may have been renewed since (KeyUpdate); the exporter's never is.
            if derived
                .iter()
                .any(|(_, slot, secret)| self.get(*slot) == Some(secret))
            {
                out.extend(derived);
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0x20_0000;
    const RANDOMS: usize = 0x158;
    const SECRETS: usize = 0x584;
    const SESSION: usize = 0x3000;

    fn noise(seed: u64, len: usize) -> Vec<u8> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut byte = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8 | 1
        };
        (0..len).map(|_| byte()).collect()
    }

    fn put(memory: &mut [u8], at: usize, bytes: &[u8]) {
        memory[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// A connection at the begin of memory.
    fn connection(version: u64) -> Vec<u8> {
        let mut memory = vec![0; 0x4000];
        for (index, word) in [version, BASE + 0x2800, BASE + 0x2900, BASE + 0x2900, 0]
            .into_iter()
            .enumerate()
        {
            put(&mut memory, index * 8, &word.to_le_bytes());
        }
        put(&mut memory, RANDOMS, &noise(1, 64));
        memory
    }

    fn newer(hash: Hash) -> (Vec<u8>, Vec<String>) {
        let mut memory = connection(TLS_1_3);
        let n = hash.len();
        let (handshake, to_finished, to_hello) = (noise(2, n), noise(3, n), noise(4, n));
        let master = hash.master(&handshake);
        let [client_hs, server_hs] =
            [&b"c hs traffic"[..], b"s hs traffic"].map(|label| hash.expand(&handshake, label, &to_hello));
        let [client, server, exporter] = [&b"c ap traffic"[..], b"s ap traffic", b"exp master"]
            .map(|label| hash.expand(&master, label, &to_finished));
        for (slot, value) in [
            (0, &handshake),
            (1, &master),
            (3, &hash.expand(&client_hs, b"finished", &[])),
            (4, &hash.expand(&server_hs, b"finished", &[])),
            (5, &to_finished),
            (6, &to_hello),
            (7, &client),
            (8, &server),
            (9, &exporter),
        ] {
            put(&mut memory, SECRETS + slot * SLOT, value);
        }
        let random = hex(&noise(1, 64)[32..]);
        let lines = [
            ("CLIENT_HANDSHAKE_TRAFFIC_SECRET", client_hs),
            ("SERVER_HANDSHAKE_TRAFFIC_SECRET", server_hs),
            ("CLIENT_TRAFFIC_SECRET_0", client),
            ("SERVER_TRAFFIC_SECRET_0", server),
            ("EXPORTER_SECRET", exporter),
        ];
        (
            memory,
            lines
                .iter()
                .map(|(label, secret)| format!("{label} {random} {}", hex(secret)))
                .collect(),
        )
    }

    fn older(hash: Hash) -> (Vec<u8>, Vec<u8>, String) {
        let mut memory = connection(TLS_1_2);
        let (both, master) = (noise(1, 64), noise(9, MASTER));
        put(&mut memory, 0x518, &(BASE + SESSION as u64).to_le_bytes());
        put(&mut memory, SESSION, &TLS_1_2.to_le_bytes());
        put(&mut memory, SESSION + 8, &48u64.to_le_bytes());
        put(&mut memory, SESSION + MASTER_AT as usize, &master);
        let key = hash.prf(&master, b"key expansion", &both, 128)[32..64].to_vec();
        (
            memory,
            key,
            format!("CLIENT_RANDOM {} {}", hex(&both[32..]), hex(&master)),
        )
    }

    fn lines(memory: &[u8], keys: &[&[u8]]) -> Result<Vec<String>, String> {
        let read = |gva: Gva, to: &mut [u8]| {
            let from = usize::try_from(gva.0.checked_sub(BASE)?).ok()?;
            to.copy_from_slice(memory.get(from..from.checked_add(to.len())?)?);
            Some(())
        };
        let keys = keys.iter().copied().collect();
        let found = secrets(&Read::of(&read), Gva(BASE), &keys, &Budget::default())?;
        Ok(found.iter().map(|(_, _, secret)| secret.line()).collect())
    }

    #[test]
    fn secrets_of_tls_1_3_prove_each_other() {
        for hash in Hash::ALL {
            let (memory, expected) = newer(hash);
            assert_eq!(lines(&memory, &[]).unwrap(), expected);
            // Without what proves a pair of them, that pair is not told.
            for (slots, left) in [(&[3, 4][..], 3), (&[7, 8, 9], 2), (&[0], 0), (&[1], 0)] {
                let mut memory = memory.clone();
                slots.iter().for_each(|slot| memory[SECRETS + slot * SLOT] ^= 2);
                assert_eq!(lines(&memory, &[]).unwrap().len(), left, "{slots:?}");
            }
            // Renewed: what the log has first is told all the same.
            let mut renewed = memory.clone();
            put(&mut renewed, SECRETS + 7 * SLOT, &noise(77, hash.len()));
            assert_eq!(lines(&renewed, &[]).unwrap(), expected);
        }
    }

    #[test]
    fn without_one_place_for_the_random_number_it_is_said_and_not_guessed() {
        let (mut memory, _) = newer(Hash::Sha256);
        put(&mut memory, 0x258, &noise(5, 64));
        assert!(lines(&memory, &[]).unwrap_err().contains("random number"));
        memory[0x258..0x298].fill(0);
        assert_eq!(lines(&memory, &[]).unwrap().len(), 5);
        memory[RANDOMS..RANDOMS + 64].fill(0);
        assert!(lines(&memory, &[]).is_err());
    }

    #[test]
    fn a_master_secret_of_tls_1_2_is_proven_by_a_key_that_follows_from_it() {
        for hash in Hash::ALL {
            let (memory, key, line) = older(hash);
            let other = noise(40, 32);
            assert_eq!(lines(&memory, &[&other, &key]).unwrap(), [line]);
            assert!(lines(&memory, &[&other]).unwrap().is_empty());
            assert!(lines(&memory, &[]).unwrap().is_empty());
            // A bit of a random number, of the secret, of its length; the pointer to it.
            for wrong in [RANDOMS + 5, SESSION + MASTER_AT as usize, SESSION + 8, 0x518, 8] {
                let mut memory = memory.clone();
                memory[wrong] ^= 4;
                assert!(lines(&memory, &[&key]).unwrap().is_empty(), "{wrong:#x}");
            }
        }
    }
}
