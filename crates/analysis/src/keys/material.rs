//! Private keys, each proven by its own mathematics: there is no way to make one that was not checked.

use std::fmt;

use num_bigint::BigUint;

/// The largest number of an RSA key, bytes.
const MAX_NUMBER: usize = 2048;
/// The smallest modulus that is taken for a key, bits. Smaller ones can be made up by chance, and factored by anybody.
const MIN_MODULUS: u64 = 512;

/// A private RSA key: n = p·q, and e·d ≡ 1 modulo p−1 and q−1.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct RsaKey {
    n: Vec<u8>,
    e: Vec<u8>,
    d: Vec<u8>,
}

impl RsaKey {
    /// Numbers are big-endian.
    pub(super) fn proven(n: &[u8], e: &[u8], d: &[u8], p: &[u8], q: &[u8]) -> Option<Self> {
        if [n, e, d, p, q].iter().any(|number| number.len() > MAX_NUMBER) {
            return None;
        }
        let one = BigUint::from(1u8);
        let [modulus, public, private, first, second] = [n, e, d, p, q].map(BigUint::from_bytes_be);
        if modulus.bits() < MIN_MODULUS || public <= one || first <= one || second <= one {
            return None;
        }
        if &first * &second != modulus {
            return None;
        }
        let inverse = |prime: BigUint| {
            let order = prime - &one;
            order > one && (&public * &private) % &order == one
        };
        (inverse(first) && inverse(second)).then(|| Self {
            n: n.to_vec(),
            e: e.to_vec(),
            d: d.to_vec(),
        })
    }

    /// Bits of the modulus.
    pub fn bits(&self) -> u64 {
        BigUint::from_bytes_be(&self.n).bits()
    }

    /// The modulus, big-endian.
    pub fn modulus(&self) -> &[u8] {
        &self.n
    }

    /// The public exponent, big-endian.
    pub fn exponent(&self) -> &[u8] {
        &self.e
    }
}

/// A curve whose points are computed with here.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Curve {
    /// NIST P-256, secp256r1.
    P256,
    /// NIST P-384.
    P384,
    /// NIST P-521.
    P521,
    /// secp256k1, of Bitcoin and its like.
    K256,
    /// Edwards 25519.
    Ed25519,
}

impl Curve {
    /// Its usual name.
    pub fn name(self) -> &'static str {
        match self {
            Curve::P256 => "p-256",
            Curve::P384 => "p-384",
            Curve::P521 => "p-521",
            Curve::K256 => "secp256k1",
            Curve::Ed25519 => "ed25519",
        }
    }

    /// Bytes of a private key.
    fn scalar(self) -> usize {
        match self {
            Curve::P256 | Curve::K256 | Curve::Ed25519 => 32,
            Curve::P384 => 48,
            Curve::P521 => 66,
        }
    }
}

/// A private key of an elliptic curve: the public point lies on the curve and is the base point times the private number.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct EcKey {
    curve: Curve,
    secret: Vec<u8>,
    public: Vec<u8>,
}

impl EcKey {
    /// Of a curve in Weierstrass's form. `secret` is big-endian, `public` as in SEC 1, 2.3.3. The curve is whichever fits.
    pub(super) fn proven(secret: &[u8], public: &[u8]) -> Option<Self> {
        use p256::elliptic_curve::sec1::ToSec1Point;
        /// Short ones have lost their leading zeros.
        fn padded(curve: Curve, secret: &[u8]) -> Option<Vec<u8>> {
            let zeros = curve.scalar().checked_sub(secret.len())?;
            Some([&vec![0; zeros], secret].concat())
        }
        macro_rules! fits {
            ($name:ident, $curve:expr) => {
                padded($curve, secret).is_some_and(|secret| {
                    // The point first: that it lies on the curve is told fast, and rules out all but everything.
                    let Ok(public) = $name::PublicKey::from_sec1_bytes(public) else {
                        return false;
                    };
                    let secret = $name::SecretKey::from_slice(&secret);
                    secret.is_ok_and(|s| s.public_key().to_sec1_point(false) == public.to_sec1_point(false))
                })
            };
        }
        let size = match *public.first()? {
            2 | 3 => public.len() - 1,
            4 => (public.len() - 1) / 2,
            _ => return None,
        };
        let curve = match size {
            32 if fits!(p256, Curve::P256) => Curve::P256,
            32 if fits!(k256, Curve::K256) => Curve::K256,
            48 if fits!(p384, Curve::P384) => Curve::P384,
            66 if fits!(p521, Curve::P521) => Curve::P521,
            _ => return None,
        };
        Some(Self {
            curve,
            secret: padded(curve, secret)?,
            public: public.to_vec(),
        })
    }

    /// An Ed25519 key: the public key is what RFC 8032, 5.1.5 makes of the seed.
    pub(super) fn proven_ed25519(seed: &[u8], public: &[u8]) -> Option<Self> {
        let key = ed25519_dalek::SigningKey::from_bytes(seed.try_into().ok()?);
        (key.verifying_key().as_bytes() == public).then(|| Self {
            curve: Curve::Ed25519,
            secret: seed.to_vec(),
            public: public.to_vec(),
        })
    }

    /// Its curve.
    pub fn curve(&self) -> Curve {
        self.curve
    }

    /// The public key, encoded as the curve's standard says.
    pub fn public(&self) -> &[u8] {
        &self.public
    }
}

/// A line of a key log: what TLS libraries write for debugging, by the format that NSS began.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct TlsSecret {
    pub(super) label: String,
    pub(super) random: String,
    pub(super) secret: String,
}

impl TlsSecret {
    /// What the secret is of: `CLIENT_RANDOM` for a master secret up to TLS 1.2, …
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The client's random number of the session, in hexadecimal.
    pub fn random(&self) -> &str {
        &self.random
    }

    /// The line, secret included.
    pub fn line(&self) -> String {
        format!("{} {} {}", self.label, self.random, self.secret)
    }
}

/// A secret that was found. None shows itself when printed for debugging.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum Material {
    /// The key of an AES schedule.
    Aes(Vec<u8>),
    /// An RSA key.
    Rsa(RsaKey),
    /// A key of an elliptic curve.
    Ec(EcKey),
    /// A secret of a TLS session.
    Tls(TlsSecret),
}

impl Material {
    /// What kind of key: `aes-256`, `rsa-2048`, `p-256`, `ed25519`, `tls`.
    pub fn kind(&self) -> String {
        match self {
            Material::Aes(key) => format!("aes-{}", key.len() * 8),
            Material::Rsa(key) => format!("rsa-{}", key.bits()),
            Material::Ec(key) => key.curve.name().to_owned(),
            Material::Tls(_) => "tls".to_owned(),
        }
    }

    /// What everybody may know of it: modulus, public point, or the session it belongs to. In hexadecimal.
    pub fn public(&self) -> Option<String> {
        match self {
            Material::Aes(_) => None,
            Material::Rsa(key) => Some(hex(&key.n)),
            Material::Ec(key) => Some(hex(&key.public)),
            Material::Tls(secret) => Some(secret.random.clone()),
        }
    }

    /// The secret itself, in hexadecimal: the key, an RSA key's private exponent, the private number or seed.
    pub fn secret(&self) -> String {
        match self {
            Material::Aes(key) => hex(key),
            Material::Rsa(key) => hex(&key.d),
            Material::Ec(key) => hex(&key.secret),
            Material::Tls(secret) => secret.secret.clone(),
        }
    }

    /// What tells two places of one key from two keys, and the key to nobody: the beginning of a digest (SHA-256) of the public
    /// part, or of the secret where there is none.
    pub fn fingerprint(&self) -> String {
        use sha2::Digest;
        let text = self.public().filter(|_| !matches!(self, Material::Tls(_)));
        let digest = sha2::Sha256::digest(text.unwrap_or_else(|| self.secret()).as_bytes());
        hex(digest.get(..8).unwrap_or_default())
    }
}

impl fmt::Debug for Material {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Material({})", self.kind())
    }
}

/// Lower-case hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
