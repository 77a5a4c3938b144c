//! Private keys as programs keep them in memory and files: DER (PKCS#1, PKCS#8, SEC 1), the formats of OpenSSH, PEM around any
//! of them, and lines of TLS key logs.
//!
//! A search looks for what each form must contain, here a [`Lead`] and its place. What is there is then read as the form says,
//! and is a key only if the numbers prove it.

use base64ct::{Base64, Encoding};
use memchr::memmem;

use super::der::{self, INTEGER, OCTETS, Reader, SEQUENCE};
use super::material::{EcKey, Material, RsaKey, TlsSecret};

/// Bytes of the longest form that is looked at: an RSA key of 16,384 bits in PEM.
pub(super) const LONGEST: usize = 16 << 10;

/// In what form a key lay in memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Form {
    /// An AES key schedule whose words lie in order.
    Schedule,
    /// An AES key schedule whose words lie with their bytes reversed.
    ReversedSchedule,
    /// DER by PKCS#1 (RFC 8017, A.1.2).
    Pkcs1,
    /// DER by PKCS#8 (RFC 5958).
    Pkcs8,
    /// DER by SEC 1, C.4 (RFC 5915).
    Sec1,
    /// PEM text around one of these (RFC 7468), or around OpenSSH's own form.
    Pem,
    /// OpenSSH's form without PEM, as in its files and in what agents are told.
    OpenSsh,
    /// A line of a TLS key log.
    KeyLog,
    /// OpenSSH's form, encrypted as agents keep it between two uses.
    Shielded,
    /// Secrets of a TLS connection as OpenSSL keeps them.
    OpenSsl,
}

impl Form {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Form::Schedule => "key schedule",
            Form::ReversedSchedule => "key schedule, words reversed",
            Form::Pkcs1 => "PKCS#1 DER",
            Form::Pkcs8 => "PKCS#8 DER",
            Form::Sec1 => "SEC 1 DER",
            Form::Pem => "PEM",
            Form::OpenSsh => "OpenSSH",
            Form::KeyLog => "key log line",
            Form::Shielded => "OpenSSH, shielded",
            Form::OpenSsl => "OpenSSL connection",
        }
    }
}

/// Something that may be a key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Lead {
    /// DER of an RSA key, from the SEQUENCE on.
    Rsa,
    /// DER of a key of an elliptic curve, from the SEQUENCE on.
    Ec,
    /// DER of an Ed25519 key, from the SEQUENCE on.
    Ed25519,
    /// A PEM block, from its dashes on.
    Pem,
    /// OpenSSH's fields, from the length of the type's name on.
    OpenSsh,
    /// A line of a key log.
    KeyLog,
}

/// A key that was read and proven.
pub(super) struct Proven {
    pub(super) material: Material,
    pub(super) form: Form,
    /// Bytes that it takes.
    pub(super) len: usize,
}

const PEM: &[u8] = b"-----BEGIN ";
const PEM_END: &[u8] = b"-----END ";
/// The algorithm id-Ed25519 (RFC 8410), as the one of a PKCS#8 key, and the seed's two headers.
const ED25519: &[u8] = &[0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];
/// Bytes of a PKCS#8 Ed25519 key before [`ED25519`]: the SEQUENCE's header and the version.
const ED25519_BEFORE: usize = 5;
const SSH_TYPES: [&[u8]; 3] = [b"ssh-rsa", b"ssh-ed25519", b"ecdsa-sha2-nistp"];
/// One of these is in each of the types' names, at its beginning.
const SSH_WORDS: [&[u8]; 2] = [b"ssh-", b"ecdsa-sha2-nistp"];
/// What a line of a key log begins with (draft-ietf-tls-keylogfile).
const LABELS: [&[u8]; 6] = [
    b"CLIENT_RANDOM ",
    b"CLIENT_HANDSHAKE_TRAFFIC_SECRET ",
    b"SERVER_HANDSHAKE_TRAFFIC_SECRET ",
    b"CLIENT_TRAFFIC_SECRET_",
    b"SERVER_TRAFFIC_SECRET_",
    b"EXPORTER_SECRET ",
];
/// One of these is in each of the labels.
const LOG_WORDS: [&[u8]; 2] = [b"CLIENT_RANDOM ", b"_SECRET"];

/// What to search for, made once.
pub(super) struct Finders {
    /// The version and the next value's header, of RSA and of elliptic curves.
    version: memmem::Finder<'static>,
    ed25519: memmem::Finder<'static>,
    pem: memmem::Finder<'static>,
    ssh: [memmem::Finder<'static>; 2],
    log: [memmem::Finder<'static>; 2],
}

impl Finders {
    pub(super) fn new() -> Self {
        Self {
            version: memmem::Finder::new(b"\x02\x01"),
            ed25519: memmem::Finder::new(ED25519),
            pem: memmem::Finder::new(PEM),
            ssh: SSH_WORDS.map(memmem::Finder::new),
            log: LOG_WORDS.map(memmem::Finder::new),
        }
    }

    /// Everything in `bytes` that may be a key, by kinds.
    pub(super) fn leads(&self, bytes: &[u8], found: &mut dyn FnMut(usize, Lead)) {
        for at in self.version.find_iter(bytes) {
            // A modulus has at least 128 bytes; a private number as many as its curve.
            let lead = match bytes.get(at + 2..at + 5) {
                Some([0, INTEGER, 0x81 | 0x82]) => Lead::Rsa,
                Some([1, OCTETS, 0x20 | 0x30 | 0x42]) => Lead::Ec,
                _ => continue,
            };
            if let Some(start) = sequence_before(bytes, at) {
                found(start, lead);
            }
        }
        for at in self.ed25519.find_iter(bytes) {
            if let Some(start) = at.checked_sub(ED25519_BEFORE)
                && bytes.get(start) == Some(&SEQUENCE)
            {
                found(start, Lead::Ed25519);
            }
        }
        for at in self.pem.find_iter(bytes) {
            found(at, Lead::Pem);
        }
        for finder in &self.ssh {
            for at in finder.find_iter(bytes) {
                let Some(start) = at.checked_sub(4) else { continue };
                let rest = bytes.get(at..).unwrap_or_default();
                let Some(name) = SSH_TYPES.iter().find(|name| rest.starts_with(name)) else {
                    continue;
                };
                let length = bytes
                    .get(start..at)
                    .and_then(|b| b.try_into().ok())
                    .map(u32::from_be_bytes);
                // A curve's name goes on with its bits.
                let least = name.len() as u32;
                if length == Some(least) || (name.ends_with(b"nistp") && length == Some(least + 3)) {
                    found(start, Lead::OpenSsh);
                }
            }
        }
        for (finder, word) in self.log.iter().zip(LOG_WORDS) {
            for at in finder.find_iter(bytes) {
                let label = LABELS.iter().find_map(|label| {
                    let start = at.checked_sub(memmem::find(label, word)?)?;
                    bytes.get(start..)?.starts_with(label).then_some(start)
                });
                if let Some(start) = label {
                    found(start, Lead::KeyLog);
                }
            }
        }
    }
}

/// Where the SEQUENCE begins whose first value is at `at`.
fn sequence_before(bytes: &[u8], at: usize) -> Option<usize> {
    [4, 3, 2].into_iter().find_map(|header| {
        let start = at.checked_sub(header)?;
        let (_, found) = der::header(bytes.get(start..at)?, SEQUENCE)?;
        (found == header).then_some(start)
    })
}

impl Lead {
    /// Bytes that a key of this kind takes as far as its beginning tells, at most [`LONGEST`].
    pub(super) fn extent(self, bytes: &[u8]) -> usize {
        match self {
            Lead::Rsa | Lead::Ec | Lead::Ed25519 => {
                der::header(bytes, SEQUENCE).map_or(0, |(content, header)| content + header)
            }
            Lead::KeyLog => 256,
            // Their end shows when they are read.
            Lead::Pem | Lead::OpenSsh => LONGEST,
        }
    }

    /// The key that `bytes` begin with. What lies before them in memory, `before`, tells PKCS#8 from what is inside it.
    pub(super) fn prove(self, bytes: &[u8], before: &[u8]) -> Option<Proven> {
        match self {
            Lead::Rsa => rsa(bytes, before),
            Lead::Ec => ec(bytes, before),
            Lead::Ed25519 => ed25519(bytes),
            Lead::Pem => pem(bytes),
            Lead::OpenSsh => openssh(bytes),
            Lead::KeyLog => key_log(bytes),
        }
    }

    /// Whether the key may go on behind `bytes`, which end where the page does.
    pub(super) fn may_go_on(self, bytes: &[u8]) -> bool {
        match self {
            Lead::Pem => memmem::find(bytes, PEM_END).is_none() && armour(bytes).is_some(),
            Lead::OpenSsh => bytes.len() < LONGEST && matches!(fields(bytes), Err(NoKey::Cut)),
            Lead::KeyLog => bytes.len() < self.extent(bytes) && bytes.iter().all(|b| is_in_line(*b)),
            _ => bytes.len() < self.extent(bytes),
        }
    }
}

/// RSAPrivateKey (RFC 8017, A.1.2). The CRT's numbers follow from the others and are not needed.
fn rsa(bytes: &[u8], before: &[u8]) -> Option<Proven> {
    let mut all = Reader(bytes);
    let mut inner = Reader(all.value(SEQUENCE)?);
    if inner.value(INTEGER)? != [0] {
        return None;
    }
    let [n, e, d, p, q] = std::array::from_fn(|_| inner.unsigned());
    let key = RsaKey::proven(n?, e?, d?, p?, q?)?;
    Some(Proven {
        material: Material::Rsa(key),
        form: wrapped(before, Form::Pkcs1),
        len: bytes.len() - all.0.len(),
    })
}

/// ECPrivateKey (RFC 5915): with a public key, without which there is nothing to prove.
fn ec(bytes: &[u8], before: &[u8]) -> Option<Proven> {
    /// [0] with the curve's parameters, [1] with the public key.
    const PARAMETERS: u8 = 0xa0;
    const PUBLIC: u8 = 0xa1;
    const BITS: u8 = 0x03;
    let mut all = Reader(bytes);
    let mut inner = Reader(all.value(SEQUENCE)?);
    if inner.value(INTEGER)? != [1] {
        return None;
    }
    let secret = inner.value(OCTETS)?;
    if inner.0.first() == Some(&PARAMETERS) {
        inner.value(PARAMETERS)?;
    }
    let public = Reader(inner.value(PUBLIC)?).value(BITS)?;
    let key = EcKey::proven(secret, public.strip_prefix(&[0])?)?;
    Some(Proven {
        material: Material::Ec(key),
        form: wrapped(before, Form::Sec1),
        len: bytes.len() - all.0.len(),
    })
}

/// OneAsymmetricKey (RFC 5958) of an Ed25519 key (RFC 8410, 7), where it has its public key.
fn ed25519(bytes: &[u8]) -> Option<Proven> {
    /// [1] IMPLICIT BIT STRING.
    const PUBLIC: u8 = 0x81;
    let mut all = Reader(bytes);
    let mut inner = Reader(all.value(SEQUENCE)?);
    if inner.value(INTEGER)? != [1] {
        return None;
    }
    inner.value(SEQUENCE)?;
    let seed = Reader(inner.value(OCTETS)?).value(OCTETS)?;
    // Attributes may come between.
    const ATTRIBUTES: u8 = 0xa0;
    if inner.0.first() == Some(&ATTRIBUTES) {
        inner.value(ATTRIBUTES)?;
    }
    let public = inner.value(PUBLIC)?.strip_prefix(&[0])?;
    Some(Proven {
        material: Material::Ec(EcKey::proven_ed25519(seed, public)?),
        form: Form::Pkcs8,
        len: bytes.len() - all.0.len(),
    })
}

/// PKCS#8 where what lies before is an algorithm's name and an OCTET STRING's header, and else `plain`.
fn wrapped(before: &[u8], plain: Form) -> Form {
    const RSA: &[u8] = &[
        0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01, 0x05, 0x00,
    ];
    const EC: &[u8] = &[0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06];
    let within = (2..=4).any(|header| {
        let Some(split) = before.len().checked_sub(header) else {
            return false;
        };
        let (algorithm, octets) = before.split_at(split);
        der::header(octets, OCTETS).is_some_and(|(_, found)| found == header)
            && (algorithm.ends_with(RSA) || algorithm.windows(EC.len()).any(|w| w == EC))
    });
    if within { Form::Pkcs8 } else { plain }
}

/// The label of a PEM block and what comes after it, if the label is one of a private key.
fn armour(bytes: &[u8]) -> Option<(&str, &[u8])> {
    const LABELS: [&str; 4] = [
        "RSA PRIVATE KEY",
        "EC PRIVATE KEY",
        "PRIVATE KEY",
        "OPENSSH PRIVATE KEY",
    ];
    let rest = bytes.strip_prefix(PEM)?;
    LABELS.iter().find_map(|label| {
        let body = rest.strip_prefix(label.as_bytes())?.strip_prefix(b"-----")?;
        // What is not base64 up to here is no key, and what is encrypted has a header first.
        let text = body.get(..body.len().min(64)).unwrap_or_default();
        let plain = |b: &u8| b.is_ascii_alphanumeric() || b"+/=\r\n\\ \t-".contains(b);
        text.iter().all(plain).then_some((*label, body))
    })
}

fn pem(bytes: &[u8]) -> Option<Proven> {
    let bytes = bytes.get(..bytes.len().min(LONGEST)).unwrap_or_default();
    let (label, body) = armour(bytes)?;
    let text = body.get(..memmem::find(body, PEM_END)?)?;
    let mut base64 = Vec::with_capacity(text.len());
    let mut text = text.iter();
    while let Some(&byte) = text.next() {
        match byte {
            b'\r' | b'\n' | b' ' | b'\t' => {}
            // As JSON and YAML have the end of a line.
            b'\\' if matches!(text.next(), Some(b'n' | b'r')) => {}
            _ => base64.push(byte),
        }
    }
    let decoded = Base64::decode_vec(std::str::from_utf8(&base64).ok()?).ok()?;
    let proven = first_within(&decoded)?;
    let end = bytes.len() - body.len() + memmem::find(body, PEM_END)?;
    let len = (end + PEM_END.len() + label.len() + 5).min(bytes.len());
    Some(Proven {
        form: Form::Pem,
        len,
        ..proven
    })
}

/// The first key in what PEM decodes to.
fn first_within(decoded: &[u8]) -> Option<Proven> {
    let mut first = None;
    Finders::new().leads(decoded, &mut |at, lead| {
        if first.is_none() && lead != Lead::Pem {
            first = lead.prove(decoded.get(at..).unwrap_or_default(), &[]);
        }
    });
    first
}

/// Why OpenSSH's fields are no key.
enum NoKey {
    /// They end too early.
    Cut,
    /// They are something else.
    Other,
}

/// Strings and numbers with their length before them (RFC 4251, 5).
struct Ssh<'b>(&'b [u8]);

impl<'b> Ssh<'b> {
    fn string(&mut self) -> Result<&'b [u8], NoKey> {
        let (length, rest) = self.0.split_first_chunk::<4>().ok_or(NoKey::Cut)?;
        let length = u32::from_be_bytes(*length) as usize;
        if length > der::MAX_LENGTH {
            return Err(NoKey::Other);
        }
        let (string, rest) = rest.split_at_checked(length).ok_or(NoKey::Cut)?;
        self.0 = rest;
        Ok(string)
    }
}

/// A key as OpenSSH writes it for itself (PROTOCOL.key) and as clients hand it to an agent (draft-miller-ssh-agent, 3.2): the
/// type's name, and then the numbers. Public keys begin like it.
fn fields(bytes: &[u8]) -> Result<(Material, usize), NoKey> {
    let mut all = Ssh(bytes);
    let key = match all.string()? {
        b"ssh-rsa" => {
            let [n, e, d, _inverse, p, q] = [(); 6].map(|()| all.string());
            RsaKey::proven(n?, e?, d?, p?, q?).map(Material::Rsa)
        }
        b"ssh-ed25519" => {
            let (public, secret) = (all.string()?, all.string()?);
            if public.len() != 32 || secret.len() != 64 || !secret.ends_with(public) {
                return Err(NoKey::Other);
            }
            let seed = secret.get(..32).unwrap_or_default();
            EcKey::proven_ed25519(seed, public).map(Material::Ec)
        }
        name if name.starts_with(b"ecdsa-sha2-nistp") => {
            let (_curve, public, secret) = (all.string()?, all.string()?, all.string()?);
            let secret = secret.strip_prefix(&[0]).unwrap_or(secret);
            EcKey::proven(secret, public).map(Material::Ec)
        }
        _ => None,
    };
    let len = bytes.len() - all.0.len();
    key.map(|key| (key, len)).ok_or(NoKey::Other)
}

/// A key by its [`fields`], with nothing behind it but the numbers 1, 2, 3 and so on that fill a block.
pub(super) fn fields_with_padding(bytes: &[u8]) -> Option<Material> {
    let (material, len) = fields(bytes).ok()?;
    let mut padding = bytes.get(len..)?.iter().zip(1u8..);
    padding.all(|(byte, number)| *byte == number).then_some(material)
}

fn openssh(bytes: &[u8]) -> Option<Proven> {
    let (material, len) = fields(bytes).ok()?;
    Some(Proven {
        material,
        form: Form::OpenSsh,
        len,
    })
}

fn is_in_line(byte: u8) -> bool {
    byte == b' ' || byte == b'_' || byte.is_ascii_alphanumeric()
}

/// `LABEL random secret`, both in hexadecimal: 32 bytes, and 48 or what the session's hash has.
fn key_log(bytes: &[u8]) -> Option<Proven> {
    let end = bytes.iter().take(256).position(|b| !is_in_line(*b))?;
    let line = std::str::from_utf8(bytes.get(..end)?).ok()?;
    let mut words = line.split(' ');
    let (label, random, secret) = (words.next()?, words.next()?, words.next()?);
    let digits = |word: &str| word.bytes().all(|b| b.is_ascii_hexdigit());
    let secret_length: &[usize] = if label == "CLIENT_RANDOM" {
        &[96]
    } else {
        &[64, 96]
    };
    let is_line = words.next().is_none()
        && random.len() == 64
        && secret_length.contains(&secret.len())
        && digits(random)
        && digits(secret)
        // A buffer that was cleared by its digits is no session.
        && random.bytes().any(|b| b != b'0');
    is_line.then(|| Proven {
        material: Material::Tls(TlsSecret {
            label: label.to_owned(),
            random: random.to_owned(),
            secret: secret.to_owned(),
        }),
        form: Form::KeyLog,
        len: end,
    })
}
