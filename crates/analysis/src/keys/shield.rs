//! Private keys that OpenSSH keeps shielded: since 8.1 an agent, and a server, has each encrypted between two uses, under a key
//! that is the digest of 16 KiB of random numbers kept elsewhere in the same process (sshkey.c, sshkey_shield_private).
//!
//! `struct sshkey` ends in four words: where the encrypted key lies, its length, where the random numbers lie, their length.

use aes::Aes256;
use aes::cipher::{BlockCipherEncrypt, KeyInit};
use sha2::{Digest, Sha512};
use vmsight_arch::Gva;

use super::follow::{Read, is_user_pointer};
use super::material::Material;
use super::private;

/// Bytes of random numbers (SSHKEY_SHIELD_PREKEY_LEN).
pub(super) const PREKEY: u64 = 16 << 10;
/// A block of AES, to which a key is padded.
const BLOCK: usize = 16;
/// Bytes of the longest key: as long as other forms may be.
const LONGEST: u64 = 12 << 10;
/// Bytes from the first of the four words to the last.
pub(super) const BEFORE: u64 = 24;

/// Whether the three words before one of [`PREKEY`] may be those of a shielded key.
pub(super) fn may_be(words: [u64; 3]) -> bool {
    let [private, length, prekey] = words;
    is_user_pointer(private)
        && is_user_pointer(prekey)
        && (1..=LONGEST / BLOCK as u64).contains(&(length / BLOCK as u64))
        && length.is_multiple_of(BLOCK as u64)
}

/// The key whose four words begin at `at`: where its encrypted form lies, how long that is, and the key, which its own
/// mathematics proves.
pub(super) fn key(read: &Read<'_>, at: Gva) -> Option<(Gva, usize, Material)> {
    let words: [u64; 4] = read.words(at)?;
    let [private, length, prekey, prekey_length] = words;
    if !may_be([private, length, prekey]) || prekey_length != PREKEY {
        return None;
    }
    let mut bytes = read.bytes(Gva(private), length as usize)?;
    let random = read.bytes(Gva(prekey), PREKEY as usize)?;
    unshield(&random, &mut bytes)?;
    let material = private::fields_with_padding(&bytes)?;
    Some((Gva(private), bytes.len(), material))
}

/// AES-256 in counter mode: key and first counter are the beginning of the digest.
fn unshield(random: &[u8], bytes: &mut [u8]) -> Option<()> {
    let digest = Sha512::digest(random);
    let (key, rest) = digest.split_first_chunk::<32>()?;
    let (first, _) = rest.split_first_chunk::<BLOCK>()?;
    let cipher = Aes256::new(key.into());
    let mut counter = u128::from_be_bytes(*first);
    for block in bytes.chunks_mut(BLOCK) {
        let mut pad = counter.to_be_bytes().into();
        cipher.encrypt_block(&mut pad);
        for (byte, pad) in block.iter_mut().zip(pad) {
            *byte ^= pad;
        }
        counter = counter.wrapping_add(1);
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use base64ct::{Base64, Encoding};

    use super::*;

    /// A process with a shielded key: memory from 0x10000 on, and where the four words lie.
    fn process() -> (Vec<u8>, Gva) {
        let text = include_str!("../../tests/keys/openssh-ed25519");
        let body: String = text.lines().filter(|line| !line.starts_with('-')).collect();
        let file = Base64::decode_vec(&body).unwrap();
        let name = b"\0\0\0\x0bssh-ed25519";
        let at = file.windows(name.len()).rposition(|w| w == name).unwrap();
        // Type, public and secret part; what follows is the comment.
        let mut key = file[at..at + 15 + 36 + 68].to_vec();
        let padding = BLOCK - key.len() % BLOCK;
        key.extend((1..=padding).map(|n| n as u8));
        let random: Vec<u8> = (0..PREKEY).map(|n| (n * 7 % 251) as u8).collect();
        unshield(&random, &mut key).unwrap();
        let mut memory = vec![0; 0x10000];
        memory[0x100..0x100 + key.len()].copy_from_slice(&key);
        memory[0x1000..0x5000].copy_from_slice(&random);
        for (index, word) in [0x10100, key.len() as u64, 0x11000, PREKEY]
            .into_iter()
            .enumerate()
        {
            memory[0x8000 + index * 8..][..8].copy_from_slice(&word.to_le_bytes());
        }
        (memory, Gva(0x18000))
    }

    fn found(memory: &[u8], at: Gva) -> Option<(Gva, usize, Material)> {
        key(
            &Read::of(&|gva, to| {
                let from = usize::try_from(gva.0).ok()?.checked_sub(0x10000)?;
                to.copy_from_slice(memory.get(from..from.checked_add(to.len())?)?);
                Some(())
            }),
            at,
        )
    }

    #[test]
    fn a_shielded_key_comes_out_and_no_other() {
        let (memory, at) = process();
        let (place, length, material) = found(&memory, at).unwrap();
        assert_eq!((place, length), (Gva(0x10100), 128));
        assert_eq!(material.kind(), "ed25519");
        // The key, what it is encrypted with, and each of the words.
        for wrong in [0x130, 0x1000, 0x4fff, 0x8000, 0x8008, 0x8011, 0x8018] {
            let mut memory = memory.clone();
            memory[wrong] ^= 0x10;
            assert!(found(&memory, at).is_none(), "{wrong:#x}");
        }
        for words in [
            [0, 32, 0x11000],
            [0x10100, 0, 0x11000],
            [0x10100, 33, 0x11000],
            [0x10100, 1 << 20, 0x11000],
        ] {
            assert!(!may_be(words), "{words:x?}");
        }
    }
}
