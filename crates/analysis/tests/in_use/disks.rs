//! Volumes of dm-crypt.

use vmsight_analysis::keys::Material;
use vmsight_lab::{Guest, Work};

use crate::support::{SUBJECT, load, shell};

/// Name, cipher, and key.
const VOLUMES: [(&str, &str, &str); 3] = [
    (
        "two-times-128",
        "aes-xts-plain64",
        "7a1f5c9e0b2d48f6c3e1a5970d8b6f24e95ac07713b86d2f41c8f0369e7bd513",
    ),
    (
        "two-times-256",
        "aes-xts-plain64",
        "c05e8a17f3b94d62a8e7150cdb3f96428d71ea05b6c29f3874e05dc1a92b863f\
         5b0e93d7461fa82c70e5c9b18d34fa6297d0c853ea1b746f39c286d50fb7e41a",
    ),
    (
        "chained",
        "aes-cbc-essiv:sha256",
        "0d9b62f7e8314ac5507fce19b6a2d84370f5183ce6db92a7481e05bfca6d3972",
    ),
];
/// Volumes that have their keys from a keyring, and what the keys are called there: several, for their transforms lie side by side in
/// the kernel's memory, and each has to be told from its neighbours.
const FROM_KEYRING: [(&str, &str, &str, &str); 3] = [
    (
        "from-keyring",
        "aes-xts-plain64",
        "vmsight:disk",
        "4fd2a6309bc871e5d80f6b3a24c97e158ab3f0d96217ce54017be98fd3526ca9",
    ),
    (
        "from-keyring-too",
        "aes-xts-plain64",
        "vmsight:other",
        "91b7e03c5da8642f17c3f98e0b7526da4ce1379f82d05b6ae4186fc2937da50b",
    ),
    (
        "from-keyring-as-well",
        "aes-xts-plain64",
        "vmsight:third",
        "2c68f15ab39d047ee65b8213cfa97d40b81e4693fa572dc0683b9ef5d1074ca2",
    ),
];

fn bytes(hex: &str) -> Vec<u8> {
    let digit = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
    (0..hex.len()).step_by(2).map(digit).collect()
}

pub(crate) fn make(guest: &Guest) {
    for module in [
        "dm_mod",
        "dm_crypt",
        "cryptd",
        "crypto_simd",
        "aesni_intel",
        "xts",
        "authenc",
        "essiv",
    ] {
        load(guest, module);
    }
    let from_keyring = FROM_KEYRING.map(|(name, cipher, description, key)| {
        guest
            .order(Work::Keep {
                memory: Vec::new(),
                aes: "".into(),
                key: Some(("logon".into(), description.into(), bytes(key).as_slice().into())),
            })
            .unwrap_or_else(|e| panic!("{e:#}"));
        (name, cipher, format!(":{}:logon:{description}", key.len() / 2))
    });
    let from_keyring = from_keyring
        .iter()
        .map(|(name, cipher, key)| (*name, *cipher, key.as_str()));
    let tables = VOLUMES
        .into_iter()
        .chain(from_keyring)
        .enumerate()
        .map(|(index, (name, cipher, key))| {
            let start = 512 * index;
            format!(
                "dmsetup create {name} --noudevsync --noudevrules \\
                     --table '0 512 crypt {cipher} {key} 0 /dev/loop0 {start}'\n"
            )
        });
    let disk = "dd if=/dev/zero of=disk bs=262144 count=6 2>/dev/null; losetup /dev/loop0 disk\n";
    shell(guest, &[disk, &tables.collect::<String>()].concat());
}

#[test]
fn each_volumes_key_is_whole_and_its_schedules_prove_it() {
    let subject = &*SUBJECT;
    let volumes = &subject.volumes;
    assert_eq!(volumes.warnings, [""; 0]);
    let beside = VOLUMES.map(|(name, cipher, key)| (name, cipher, None, key));
    let from_keyring = FROM_KEYRING.map(|(name, cipher, from, key)| (name, cipher, Some(from), key));
    for (name, cipher, from, key) in beside.into_iter().chain(from_keyring) {
        let volume = volumes.rows.iter().find(|volume| volume.name == name);
        let volume = volume.unwrap_or_else(|| panic!("{name}: {volumes:?}"));
        let key = bytes(key);
        assert_eq!(
            (volume.cipher.as_str(), volume.bytes, volume.problems.len()),
            (cipher, key.len() as u64, 0),
            "{volume:?}"
        );
        assert_eq!(volume.key.as_deref(), Some(key.as_slice()), "{volume:?}");
        // The schedules are of the key's halves, and whose they are is told.
        let schedules = volume.schedules.iter().map(|place| {
            let found = subject
                .found
                .iter()
                .find(|owned| owned.hit.gpa == *place)
                .unwrap();
            assert!(found.transform.as_ref().unwrap().contains("aes"), "{found:?}");
            match &found.hit.material {
                Material::Aes(key) => key.clone(),
                other => panic!("{other:?}"),
            }
        });
        assert_eq!(schedules.collect::<Vec<_>>().concat(), key, "{name}");
        let from = from.map(|description| format!("logon:{description}"));
        assert_eq!(volume.from, from, "{volume:?}");
    }
    assert_eq!(volumes.rows.len(), VOLUMES.len() + FROM_KEYRING.len());
}
