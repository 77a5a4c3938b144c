//! The key schedule of TLS: what follows from a secret, by which it is proven.
//!
//! TLS 1.2 is RFC 5246, 5 and 6.3; TLS 1.3 is RFC 8446, 7.1, with HKDF (RFC 5869) under it.

use sha2::{Digest, Sha256, Sha384};

/// The hash of a cipher suite.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Hash {
    Sha256,
    Sha384,
}

impl Hash {
    pub(super) const ALL: [Self; 2] = [Self::Sha384, Self::Sha256];

    /// Bytes of a digest.
    pub(super) fn len(self) -> usize {
        match self {
            Self::Sha256 => 32,
            Self::Sha384 => 48,
        }
    }

    /// Bytes that are compressed at a time (FIPS 180-4).
    fn block(self) -> usize {
        match self {
            Self::Sha256 => 64,
            Self::Sha384 => 128,
        }
    }

    fn digest(self, parts: &[&[u8]]) -> Vec<u8> {
        fn of<D: Digest>(parts: &[&[u8]]) -> Vec<u8> {
            let mut digest = D::new();
            parts.iter().for_each(|part| digest.update(part));
            digest.finalize().to_vec()
        }
        match self {
            Self::Sha256 => of::<Sha256>(parts),
            Self::Sha384 => of::<Sha384>(parts),
        }
    }

    /// HMAC (RFC 2104) of the parts one after the other.
    fn hmac(self, key: &[u8], parts: &[&[u8]]) -> Vec<u8> {
        let mut padded = match key.len() > self.block() {
            true => self.digest(&[key]),
            false => key.to_vec(),
        };
        padded.resize(self.block(), 0);
        let with = |pad: u8| padded.iter().map(|byte| byte ^ pad).collect::<Vec<u8>>();
        let inside = with(0x36);
        let all: Vec<&[u8]> = std::iter::once(inside.as_slice())
            .chain(parts.iter().copied())
            .collect();
        self.digest(&[&with(0x5c), &self.digest(&all)])
    }

    /// The pseudo-random function of TLS 1.2: at least `len` bytes of it.
    pub(super) fn prf(self, secret: &[u8], label: &[u8], seed: &[u8], len: usize) -> Vec<u8> {
        let mut a = self.hmac(secret, &[label, seed]);
        let mut out = Vec::with_capacity(len + self.len());
        while out.len() < len {
            out.extend(self.hmac(secret, &[&a, label, seed]));
            a = self.hmac(secret, &[&a]);
        }
        out
    }

    /// HKDF-Expand-Label of TLS 1.3 for one digest's length: what it derives from a secret with a transcript's hash.
    pub(super) fn expand(self, secret: &[u8], label: &[u8], transcript: &[u8]) -> Vec<u8> {
        const PREFIX: &[u8] = b"tls13 ";
        let length = (self.len() as u16).to_be_bytes();
        let sizes = [(PREFIX.len() + label.len()) as u8, transcript.len() as u8];
        let [label_size, transcript_size] = sizes.map(|size| [size]);
        // No more than one digest: the first block of the expansion is all of it.
        let parts: [&[u8]; 7] = [
            &length,
            &label_size,
            PREFIX,
            label,
            &transcript_size,
            transcript,
            &[1],
        ];
        self.hmac(secret, &parts)
    }

    /// The master secret of TLS 1.3 that follows from a handshake's.
    pub(super) fn master(self, handshake: &[u8]) -> Vec<u8> {
        let salt = self.expand(handshake, b"derived", &self.digest(&[]));
        self.hmac(&salt, &[&vec![0; self.len()]])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::material::hex;

    fn bytes(text: &str) -> Vec<u8> {
        let digit = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
        (0..text.len()).step_by(2).map(digit).collect()
    }

    #[test]
    fn hmac_is_that_of_rfc_4231() {
        let of = |hash: Hash| hex(&hash.hmac(b"Jefe", &[b"what do ya want ", b"for nothing?"]));
        assert_eq!(
            of(Hash::Sha256),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        );
        assert_eq!(
            of(Hash::Sha384),
            "af45d2e376484031617f78d2b58a6b1b9c7ef464f5a01b47e42ec3736322445e8e2240ca5e69e2c78b3239ecfab21649"
        );
        let long = Hash::Sha256.hmac(
            &[0xaa; 131],
            &[b"Test Using Larger Than Block-Size Key - Hash Key First"],
        );
        assert_eq!(
            hex(&long),
            "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54"
        );
    }

    #[test]
    fn the_handshake_of_rfc_8448_comes_out_as_printed() {
        let handshake = bytes("1dc826e93606aa6fdc0aadc12f741b01046aa6b99f691ed221a9f0ca043fbeac");
        let master = "18df06843d13a08bf2a449844c5f8a478001bc4d4c627984d5a41da8d0402919";
        assert_eq!(hex(&Hash::Sha256.master(&handshake)), master);
        let hello = bytes("860c06edc07858ee8e78f0e7428c58edd6b43f2ca3e6e95f02ed063cf0e1cad8");
        assert_eq!(
            hex(&Hash::Sha256.expand(&handshake, b"c hs traffic", &hello)),
            "b3eddb126e067f35a780b3abf45e2d8f3b1a950738f52e9600746a0e27a55a21"
        );
    }

    #[test]
    fn the_function_of_tls_1_2_goes_on_as_long_as_asked() {
        // A vector that implementers of RFC 5246 have agreed on.
        let secret = bytes("9bbe436ba940f017b17652849a71db35");
        let seed = bytes("a0ba9f936cda311827a6f796ffd5198c");
        let out = Hash::Sha256.prf(&secret, b"test label", &seed, 100);
        assert_eq!(
            hex(&out[..64]),
            "e3f229ba727be17b8d122620557cd453c2aab21d07c3d495329b52d4e61edb5a\
             6b301791e90d35c9c9a46b4e14baf9af0fa022f7077def17abfd3797c0564bab"
        );
        assert_eq!(hex(&out[96..100]), "87347b66");
    }
}
