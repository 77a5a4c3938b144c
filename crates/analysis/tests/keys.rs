//! Keys that other programs made are found in each form, and what is no key is not.

use base64ct::{Base64, Encoding};
use vmsight_analysis::keys::{Form, Material, find_in};

/// File, kind, and the form that its PEM is around.
const KEYS: &[(&str, &str, Form)] = &[
    ("rsa-pkcs1.pem", "rsa-2048", Form::Pkcs1),
    ("rsa-pkcs8.pem", "rsa-3072", Form::Pkcs8),
    ("ec-p256-sec1.pem", "p-256", Form::Sec1),
    ("ec-secp384r1-pkcs8.pem", "p-384", Form::Pkcs8),
    ("ec-secp521r1-pkcs8.pem", "p-521", Form::Pkcs8),
    ("ec-secp256k1-pkcs8.pem", "secp256k1", Form::Pkcs8),
    ("openssh-rsa", "rsa-2048", Form::OpenSsh),
    ("openssh-ecdsa", "p-256", Form::OpenSsh),
    ("openssh-ed25519", "ed25519", Form::OpenSsh),
];

fn file(name: &str) -> String {
    let path = format!("{}/tests/keys/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn binary(pem: &str) -> Vec<u8> {
    let body: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
    Base64::decode_vec(&body).expect("a PEM file")
}

fn one(bytes: &[u8], what: &str) -> (usize, Form, Material) {
    let mut found = find_in(bytes);
    assert_eq!(found.len(), 1, "{what}: {found:?}");
    found.remove(0)
}

#[test]
fn every_form_is_found_as_text_and_as_bytes() {
    for (name, kind, form) in KEYS {
        let text = file(name);
        let in_text = one(format!("junk {text} junk").as_bytes(), name);
        assert_eq!(
            (in_text.0, in_text.1, in_text.2.kind().as_str()),
            (5, Form::Pem, *kind),
            "{name}"
        );
        let bytes = [&[0xaa; 4099][..], &binary(&text), &[0xaa; 100]].concat();
        let in_bytes = one(&bytes, name);
        assert_eq!((in_bytes.1, in_bytes.2), (*form, in_text.2.clone()), "{name}");
        // As configuration files have it.
        let in_json = one(serde_json::to_string(&text).unwrap().as_bytes(), name);
        assert_eq!(in_json.2, in_text.2, "{name}");
    }
}

#[test]
fn a_key_with_one_bit_changed_is_none() {
    for (name, ..) in KEYS {
        let good = binary(&file(name));
        // The first and the last number: of RSA the modulus and what proves it, of the others public and private parts.
        let (_, _, material) = one(&good, name);
        let secret: Vec<u8> = (0..material.secret().len() / 2)
            .map(|i| u8::from_str_radix(&material.secret()[i * 2..i * 2 + 2], 16).unwrap())
            .collect();
        let secret: &[u8] = secret.as_slice();
        let tail = &secret[secret.len() - 16..];
        let at = good
            .windows(16)
            .position(|w| w == tail)
            .expect("the secret lies in it");
        let mut bad = good.clone();
        bad[at] ^= 1;
        assert!(find_in(&bad).is_empty(), "{name}");
    }
}

#[test]
fn what_is_encrypted_or_public_is_no_key() {
    let encrypted = file("openssh-encrypted");
    assert!(find_in(encrypted.as_bytes()).is_empty());
    assert!(find_in(&binary(&encrypted)).is_empty());
    for text in [
        "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\nAAAA\n-----END RSA PRIVATE KEY-----\n",
        "-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n",
        "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA\n-----END PUBLIC KEY-----\n",
        "-----BEGIN RSA PRIVATE KEY-----\0-----BEGIN EC PRIVATE KEY-----\0",
    ] {
        assert!(find_in(text.as_bytes()).is_empty(), "{text}");
    }
}

#[test]
fn lines_of_key_logs_are_whole_or_none() {
    let random = "5f".repeat(32);
    let lines = [
        format!("CLIENT_RANDOM {random} {}", "a1".repeat(48)),
        format!("SERVER_TRAFFIC_SECRET_0 {random} {}", "a1".repeat(32)),
        format!("CLIENT_HANDSHAKE_TRAFFIC_SECRET {random} {}", "a1".repeat(48)),
        format!("EXPORTER_SECRET {random} {}", "a1".repeat(32)),
    ];
    let text = lines.join("\n") + "\n";
    let mut found: Vec<String> = find_in(text.as_bytes())
        .into_iter()
        .map(|(_, form, material)| match material {
            Material::Tls(secret) if form == Form::KeyLog => secret.line(),
            other => panic!("{other:?}"),
        })
        .collect();
    found.sort();
    let mut expected = lines.to_vec();
    expected.sort();
    assert_eq!(found, expected);
    for bad in [
        format!("CLIENT_RANDOM {random} {}\n", "a1".repeat(47)),
        format!("CLIENT_RANDOM {} {}\n", "x".repeat(64), "a1".repeat(48)),
        "CLIENT_RANDOM %s %s\n".to_owned(),
        format!("CLIENT_RANDOM {} {}\n", "0".repeat(64), "0".repeat(96)),
    ] {
        assert!(find_in(bad.as_bytes()).is_empty(), "{bad}");
    }
}

#[test]
fn secrets_do_not_show_where_nobody_asks() {
    let (_, _, key) = one(file("rsa-pkcs1.pem").as_bytes(), "a key");
    assert_eq!(format!("{key:?}"), "Material(rsa-2048)");
    assert_eq!(key.fingerprint().len(), 16);
    assert!(!key.secret().contains(&key.fingerprint()));
}
