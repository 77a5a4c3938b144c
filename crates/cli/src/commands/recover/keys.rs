//! `vmsight recover keys`: cryptographic keys in a guest's memory.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;
use vmsight_analysis::frames::{Holder, Owner};
use vmsight_analysis::keys::{self, KernelKey, Material, Owned, VolumeKey};
use vmsight_arch::Gva;
use vmsight_linux::listing::address;

use crate::{
    Outcome,
    args::Global,
    output::{Progress, Row, Sheet},
    session::Session,
};

/// Cryptographic keys, each proven by its own mathematics.
#[derive(Args, Debug)]
#[command(after_help = "\
What is found: AES key schedules of 128, 192 and 256 bits (of the kernel's crypto API with the transform they belong to);
private keys of RSA, P-256, P-384, P-521, secp256k1 and Ed25519 in PKCS#1, PKCS#8, SEC 1 and OpenSSH's form, as DER or PEM;
lines of TLS key logs; the keys in the kernel's keyrings (keyrings(7)); the keys of dm-crypt's volumes (LUKS); the keys that an
ssh-agent has shielded (since OpenSSH 8.1); and the secrets of OpenSSL's connections, TLS 1.2 and 1.3.
A schedule must expand from its key to the last bit; of an RSA key n = p\u{b7}q and e\u{b7}d \u{2261} 1; of the others the public
point must be the private number's. A volume's key is proven by the schedules that the crypto API has of it. Secrets of TLS 1.3
must follow from each other; what follows from a master secret of TLS 1.2 must be the key of a schedule in the same process. The
client's random number beside those of 1.3 is known by its place alone. Lines of key logs have nothing to prove: they are what
they look like. A key that lies in pages of a process that are no neighbours is put together by its page tables.

Keys in the kernel's image are those that its own tests of its ciphers use (crypto/testmgr.h).

What cannot be seen: schedules that do not lie on a multiple of 4 bytes, that were transformed (bit-sliced, vector-permuted,
those for decryption alone), or that begin in the last 32 to 48 bytes of a page and go on elsewhere; keys that are
encrypted under a passphrase; numbers without a form around them, such as those of OpenSSL while it computes; Ed25519 and elliptic
keys without their public key; TLS sessions of other libraries of which nobody kept a log, those of OpenSSL that have ended, and
its TLS 1.2 with ChaCha20; hardware's keys; what is swapped out. With --physical no kernel is looked for: owners, keyrings, volumes,
agents and connections are then not told.

Secrets are not shown without --show-secrets. The fingerprint tells two places of one key from two keys.
Exit codes: 0 keys were found; 1 none; 2 error.")]
pub(crate) struct Cmd {
    /// What to look into
    target: String,
    /// Show the secrets: keys, private exponents and numbers, payloads, in hexadecimal
    #[arg(long)]
    show_secrets: bool,
    /// Write the TLS secrets to FILE, as Wireshark reads them
    #[arg(long, value_name = "FILE")]
    keylog: Option<PathBuf>,
    /// Search physical memory only: needs no kernel, and tells no owners
    #[arg(long)]
    physical: bool,
}

#[derive(Serialize)]
struct KeyRow {
    kind: String,
    form: &'static str,
    owner: &'static str,
    pid: Option<i32>,
    name: Option<String>,
    place: Option<String>,
    #[serde(serialize_with = "address::hex_opt")]
    gpa: Option<u64>,
    #[serde(serialize_with = "address::gva_opt")]
    gva: Option<Gva>,
    /// Other processes that have the same page.
    shared_with: Vec<i32>,
    transform: Option<String>,
    description: Option<String>,
    serial: Option<i32>,
    uid: Option<u32>,
    secret_bytes: Option<usize>,
    fingerprint: Option<String>,
    public: Option<String>,
    secret: Option<String>,
    problems: Vec<String>,
}

impl Row for KeyRow {
    const COLUMNS: &'static [&'static str] = &[
        "kind",
        "form",
        "owner",
        "pid",
        "name",
        "place",
        "gpa",
        "gva",
        "shared_with",
        "transform",
        "description",
        "serial",
        "uid",
        "secret_bytes",
        "fingerprint",
        "public",
        "secret",
        "problems",
    ];
}

const COLUMNS: &[&str] = &[
    "kind",
    "form",
    "owner",
    "pid",
    "name",
    "place",
    "gpa",
    "gva",
    "fingerprint",
];
const WITH_SECRETS: &[&str] = &[
    "kind", "form", "owner", "pid", "name", "place", "gpa", "gva", "secret",
];

impl Cmd {
    /// Whether it writes a file.
    pub(super) fn writes(&self) -> bool {
        self.keylog.is_some()
    }

    pub(crate) fn run(&self, global: &Global) -> Result<Outcome> {
        let session = match self.physical {
            true => Session::without_kernel(global, &self.target)?,
            false => Session::open(global, &self.target)
                .context("finding whose the keys are needs the kernel; --physical searches without")?,
        };
        let progress = Progress::bytes(global.quiet, "searching for keys", session.memory().size());
        let found = keys::search(session.memory(), &AtomicBool::new(false), &|bytes| {
            progress.advance(bytes)
        });
        drop(progress);
        let cut_short = found.stopped;
        let mut rows = Vec::new();
        let (found, mut warnings) = match self.physical {
            true => {
                let notes = found.notes.clone();
                (found.hits.into_iter().map(unowned).collect(), notes)
            }
            false => keys::owned(session.kernel()?, found),
        };
        if cut_short {
            warnings.push("the search ended early: the VM is gone".to_owned());
        }
        rows.extend(found.iter().map(|key| self.row(key)));
        if !self.physical {
            match keys::kernel_keys(session.kernel()?) {
                Ok(listing) => {
                    rows.extend(listing.rows.into_iter().map(|key| self.kernel_row(key)));
                    warnings.extend(listing.warnings);
                }
                Err(error) => warnings.push(format!("the kernel's keyrings: {error}")),
            }
            match keys::volume_keys(session.kernel()?, &found) {
                Ok(listing) => {
                    rows.extend(listing.rows.into_iter().map(|key| self.volume_row(key)));
                    warnings.extend(listing.warnings);
                }
                Err(error) => warnings.push(format!("dm-crypt's volumes: {error}")),
            }
        }
        if let Some(path) = &self.keylog {
            self.write_log(path, &found)?;
        }
        let columns = if self.show_secrets { WITH_SECRETS } else { COLUMNS };
        session.print(&Sheet::new(columns, &rows, warnings))?;
        Ok(match rows.is_empty() {
            true => Outcome::Nothing,
            false => Outcome::Fine,
        })
    }

    fn row(&self, key: &Owned) -> KeyRow {
        let first = key.holders.first();
        let material = &key.hit.material;
        let secret = material.secret();
        KeyRow {
            kind: material.kind(),
            form: key.hit.form.name(),
            owner: first.map_or(Owner::Unknown, |h| h.owner).name(),
            pid: first.and_then(|h| h.pid),
            name: first.and_then(|h| h.name.clone()),
            place: key
                .transform
                .clone()
                .or_else(|| first.and_then(|h| h.place.clone())),
            gpa: Some(key.hit.gpa.0),
            gva: first.and_then(|h| h.gva),
            shared_with: Holder::shared_with(&key.holders),
            transform: key.transform.clone(),
            description: match material {
                Material::Tls(secret) => Some(secret.label().to_owned()),
                _ => None,
            },
            serial: None,
            uid: None,
            secret_bytes: Some(secret.len() / 2),
            fingerprint: Some(material.fingerprint()),
            public: material.public(),
            secret: self.show_secrets.then_some(secret),
            problems: Vec::new(),
        }
    }

    fn kernel_row(&self, key: KernelKey) -> KeyRow {
        KeyRow {
            kind: key.kind,
            form: "keyring",
            owner: Owner::Kernel.name(),
            pid: None,
            name: None,
            place: Some(key.description.clone()),
            gpa: None,
            gva: key.at.or(Some(key.address)),
            shared_with: Vec::new(),
            transform: None,
            description: Some(key.description),
            serial: Some(key.serial),
            uid: Some(key.uid),
            secret_bytes: key.payload.as_ref().map(Vec::len),
            // A password is short: what its digest is would tell it.
            fingerprint: None,
            public: None,
            secret: key
                .payload
                .filter(|_| self.show_secrets)
                .map(|payload| payload.iter().map(|byte| format!("{byte:02x}")).collect()),
            problems: key.problems,
        }
    }

    fn volume_row(&self, key: VolumeKey) -> KeyRow {
        KeyRow {
            kind: key.cipher,
            form: "dm-crypt",
            owner: Owner::Kernel.name(),
            pid: None,
            name: None,
            place: Some(format!("volume {}", key.name)),
            // Where its first schedule lies: the table's own copy may be wiped.
            gpa: key.schedules.first().map(|gpa| gpa.0),
            gva: Some(key.address),
            shared_with: Vec::new(),
            transform: None,
            description: key.from,
            serial: None,
            uid: None,
            secret_bytes: usize::try_from(key.bytes).ok(),
            fingerprint: key.key.clone().map(|key| Material::Aes(key).fingerprint()),
            public: None,
            secret: key
                .key
                .filter(|_| self.show_secrets)
                .map(|key| Material::Aes(key).secret()),
            problems: key.problems,
        }
    }

    /// Each line once.
    fn write_log(&self, path: &Path, found: &[Owned]) -> Result<()> {
        let lines: BTreeSet<String> = found
            .iter()
            .filter_map(|key| match &key.hit.material {
                Material::Tls(secret) => Some(secret.line()),
                _ => None,
            })
            .collect();
        // For its owner's eyes only, as temporary files are.
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or_else(|| Path::new("."));
        let write = || -> std::io::Result<()> {
            let mut file = tempfile::NamedTempFile::new_in(folder)?;
            lines.iter().try_for_each(|line| writeln!(file, "{line}"))?;
            file.as_file().sync_all()?;
            file.persist(path)?;
            Ok(())
        };
        write().with_context(|| format!("writing {}", path.display()))
    }
}

/// A key of which nobody was asked whose it is.
fn unowned(hit: keys::Hit) -> Owned {
    Owned {
        hit,
        holders: Vec::<Holder>::new(),
        transform: None,
        transform_at: None,
    }
}
