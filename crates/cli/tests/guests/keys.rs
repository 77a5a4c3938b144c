//! Keys and patterns in a guest that really keeps them: in a process's memory, in the kernel's crypto API, in a keyring.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;

use serde_json::{Map, Value};
use vmsight_lab::orders::Ended;
use vmsight_lab::{Format, Guest, Kernel, Spec, Work};

use crate::support::{Dump, number, rows, text, utf8, vmsight};

/// Of the `user` key in the user's keyring.
const PASSPHRASE: &str = "correct horse battery staple 4711";
/// Of the kernel's crypto API.
const AES: [u8; 32] = *b"\x91\x5a a key of the kernel's own!!\x0e\xc4";

fn file(name: &str) -> Vec<u8> {
    let path = format!("{}/../analysis/tests/keys/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn der(pem: &str) -> Vec<u8> {
    let pem = String::from_utf8(file(pem)).unwrap();
    let body: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
    // Four letters are three bytes; what stands for nothing is cut.
    let letters = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let value = |b: &u8| letters.iter().position(|l| l == b).unwrap_or(0) as u32;
    let padding = body.bytes().filter(|b| *b == b'=').count();
    let quads = body
        .as_bytes()
        .chunks(4)
        .map(|quad| quad.iter().fold(0, |n, b| n << 6 | value(b)));
    let mut bytes: Vec<u8> = quads.flat_map(|n| n.to_be_bytes()[1..].to_vec()).collect();
    bytes.truncate(bytes.len() - padding);
    bytes
}

fn log_line() -> String {
    format!("CLIENT_RANDOM {} {}", "5f".repeat(32), "a1".repeat(48))
}

/// What the process keeps: kind and form as they are found, the bytes, and the offset in a page.
fn planted() -> Vec<(&'static str, &'static str, Vec<u8>, u64)> {
    vec![
        ("rsa-2048", "PKCS#1 DER", der("rsa-pkcs1.pem"), 0x100),
        // These go on in pages that are no neighbours.
        ("rsa-3072", "PEM", file("rsa-pkcs8.pem"), 3000),
        ("ed25519", "OpenSSH", der("openssh-ed25519"), 3950),
        ("aes-256", "key schedule", file("aes-256.schedule"), 4000),
        ("p-384", "PKCS#8 DER", der("ec-secp384r1-pkcs8.pem"), 8),
        ("p-256", "PEM", file("ec-p256-sec1.pem"), 1),
        (
            "tls",
            "key log line",
            format!("{}\n", log_line()).into_bytes(),
            77,
        ),
        // No key: it is encrypted.
        ("", "", file("openssh-encrypted"), 0),
    ]
}

fn load(guest: &Guest, name: &str) {
    let account = guest
        .order(Work::Load {
            name: name.into(),
            parameters: String::new(),
            from_memory: false,
        })
        .unwrap_or_else(|e| panic!("{name}: {e:#}"));
    assert_eq!(account.returned, Some(0), "{name}");
}

fn get<'r>(row: &'r Map<String, Value>, key: &str) -> &'r str {
    row[key].as_str().unwrap_or("")
}

/// Kind, form and secret of the keys that `pid` has.
fn of_process(found: &[Map<String, Value>], pid: u64) -> BTreeSet<(String, String, String)> {
    found
        .iter()
        .filter(|row| {
            let others = row["shared_with"].as_array().unwrap();
            row["pid"].as_u64() == Some(pid) || others.iter().any(|other| other.as_u64() == Some(pid))
        })
        .map(|row| {
            (
                get(row, "kind").into(),
                get(row, "form").into(),
                get(row, "secret").into(),
            )
        })
        .collect()
}

/// Keys that every such guest has: those that the kernel tests its ciphers with, the public one that its modules are signed
/// with, and in the file of the program `openssl` those that it measures its speed with.
fn is_of_nobody(row: &Map<String, Value>) -> bool {
    get(row, "form") == "keyring" || get(row, "place") == "kernel image" || get(row, "owner") == "page cache"
}

#[test]
fn everything_that_a_guest_keeps_is_found_with_its_owner_and_nothing_else() {
    let spec = Spec::new(Kernel::V6_1).idle().orders().programs();
    let guest = Guest::boot(&spec).unwrap_or_else(|e| panic!("{e:?}"));
    let target = format!("qmp:{}", guest.qmp_path().unwrap().display());
    let secrets = |target: &str| {
        let out = vmsight(&["recover", "keys", target, "--show-secrets", "-o", "json"]);
        assert!(out.status.code().is_some_and(|c| c < 2), "{}", text(&out.stderr));
        crate::support::objects(&out.stdout).unwrap()
    };
    let before = secrets(&target);
    assert!(
        before.iter().all(is_of_nobody),
        "an idle guest has no keys: {before:?}"
    );

    for module in ["af_alg", "algif_skcipher", "cryptd", "crypto_simd", "aesni_intel"] {
        load(&guest, module);
    }
    let planted = planted();
    let held = guest
        .prepare(Work::Keep {
            memory: planted
                .iter()
                .map(|(_, _, bytes, at)| (bytes.as_slice().into(), *at))
                .collect(),
            aes: AES.as_slice().into(),
            key: Some(("user".into(), "vmsight:disk".into(), PASSPHRASE.into())),
        })
        .unwrap_or_else(|e| panic!("{e:#}"));
    let pid = u64::from(held.pid());

    let found = secrets(&target);
    live(&found, &planted, pid, &held.addresses());
    masked(&target, &found);
    log(&target);

    let dump = Dump::of(&guest, Format::Elf);
    let in_dump = secrets(dump.target());
    assert_eq!(of_process(&in_dump, pid), of_process(&found, pid));
    kernel_has(&in_dump);
    let physical = rows(&["recover", "keys", dump.target(), "--physical", "--show-secrets"]);
    assert!(
        physical
            .iter()
            .any(|row| get(row, "kind") == "rsa-2048" && get(row, "owner") == "unknown")
    );

    patterns(&target, dump.target(), pid);

    held.go().unwrap();
    let after = secrets(&target);
    assert!(of_process(&after, pid).is_empty(), "it is gone: {after:?}");
    volume(&guest, &target);
}

/// An encrypted disk's key is told whole, and not shown unasked.
fn volume(guest: &Guest, target: &str) {
    // Two keys of 256 bits.
    const KEY: &str = "5e0c41f7a9d3826b1f74e05d98ac36b2c7193ad05b8ef246609d7cf1e8b3a54d\
                       93f7280b6dc14ea5e2b95073fd1a86c44b6e0f9d37a2c815d07e61b4a95c2f38";
    for module in ["dm_mod", "dm_crypt", "xts"] {
        load(guest, module);
    }
    let script = format!(
        "dd if=/dev/zero of=/tmp/disk bs=4096 count=64 && losetup /dev/loop0 /tmp/disk && \
         dmsetup create secrets --noudevsync --noudevrules --table '0 512 crypt aes-xts-plain64 {KEY} 0 /dev/loop0 0'"
    );
    // The shell finds the applets of the program that it is.
    let account = guest
        .order(Work::Exec {
            path: "/bin/busybox".into(),
            argv: ["sh", "-c", &format!("/bin/busybox --install -s /tmp; {script}")]
                .map(Into::into)
                .to_vec(),
            envp: vec!["PATH=/tmp:/usr/bin".into()],
        })
        .unwrap_or_else(|e| panic!("{e:#}"));
    assert_eq!(account.ended, Some(Ended::Exited(0)), "{account:?}");
    let found = rows(&["recover", "keys", target, "--show-secrets"]);
    let row = found.iter().find(|row| get(row, "form") == "dm-crypt");
    let row = row.unwrap_or_else(|| panic!("{found:#?}"));
    assert_eq!(
        ["kind", "owner", "place", "secret"].map(|key| get(row, key)),
        ["aes-xts-plain64", "kernel", "volume secrets", KEY]
    );
    assert_eq!(
        (&row["secret_bytes"], &row["problems"]),
        (&Value::from(64), &Value::from(Vec::<Value>::new()))
    );
    masked(target, std::slice::from_ref(row));
}

fn live(
    found: &[Map<String, Value>],
    planted: &[(&'static str, &'static str, Vec<u8>, u64)],
    pid: u64,
    addresses: &[u64],
) {
    for ((kind, form, ..), address) in planted
        .iter()
        .zip(addresses)
        .filter(|((kind, ..), _)| !kind.is_empty())
    {
        // What is found in OpenSSH's file begins behind its public part.
        let is_here = |at: u64| at.wrapping_sub(*address) < 512;
        let row = found
            .iter()
            .find(|row| row["pid"] == pid && row["gva"].is_string() && is_here(number(&row["gva"])));
        let row = row.unwrap_or_else(|| panic!("{kind} as {form} of {pid} at {address:#x}: {found:#?}"));
        assert_eq!((get(row, "kind"), get(row, "form")), (*kind, *form));
        assert_eq!(
            (get(row, "owner"), get(row, "place")),
            ("process", "anonymous memory")
        );
    }
    kernel_has(found);
    // What else there is are copies of the same, on the way there.
    let mut known: BTreeSet<&str> = found
        .iter()
        .filter(|row| row["pid"] == pid && get(row, "owner") == "process")
        .map(|row| get(row, "secret"))
        .collect();
    assert_eq!(known.len(), planted.len() - 1, "{known:?}");
    let aes = hex(&AES);
    known.insert(&aes);
    for row in found.iter().filter(|row| !is_of_nobody(row)) {
        assert!(known.contains(get(row, "secret")), "nobody has this: {row:?}");
    }
}

fn kernel_has(found: &[Map<String, Value>]) {
    let of_kernel = |row: &&Map<String, Value>| get(row, "owner") == "kernel";
    let aes = hex(&AES);
    let schedule = found
        .iter()
        .filter(of_kernel)
        .find(|row| get(row, "secret") == aes);
    let schedule = schedule.unwrap_or_else(|| panic!("the crypto API's key: {found:#?}"));
    assert_eq!(
        (get(schedule, "kind"), get(schedule, "form")),
        ("aes-256", "key schedule")
    );
    assert!(get(schedule, "transform").contains("cbc(aes)"), "{schedule:?}");
    let key = found
        .iter()
        .find(|row| row["description"] == "vmsight:disk")
        .expect("the user's key");
    assert_eq!(
        (get(key, "kind"), get(key, "form"), get(key, "owner")),
        ("user", "keyring", "kernel")
    );
    assert_eq!(
        (get(key, "secret"), &key["uid"]),
        (hex(PASSPHRASE.as_bytes()).as_str(), &Value::from(0))
    );
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn masked(target: &str, found: &[Map<String, Value>]) {
    for form in ["table", "json", "csv"] {
        let out = vmsight(&["recover", "keys", target, "-o", form, "--columns", "all"]);
        let shown = text(&out.stdout);
        assert!(shown.contains("aes-256"), "{shown}");
        for row in found.iter().filter(|row| row["secret"].is_string()) {
            assert!(!shown.contains(get(row, "secret")), "{form}: {row:?}");
        }
    }
}

fn log(target: &str) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys.log");
    assert!(
        vmsight(&["recover", "keys", target, "--keylog", utf8(&path)])
            .status
            .success()
    );
    assert_eq!(
        std::fs::read_to_string(&path).unwrap(),
        format!("{}\n", log_line())
    );
    assert_eq!(
        std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );
}

/// The rows of `vmsight scan`, and whether any rule matched as its exit code says.
fn scan(target: &str, rules: &[&str], more: &[&str]) -> Vec<Map<String, Value>> {
    let args = [&["scan", target, "-o", "json", "--yara"], rules, more].concat();
    let out = vmsight(&args);
    let found = crate::support::objects(&out.stdout).unwrap_or_else(|e| panic!("{args:?}: {e}"));
    let code = i32::from(!found.is_empty());
    assert_eq!(out.status.code(), Some(code), "{args:?}: {}", text(&out.stderr));
    found
}

fn patterns(target: &str, dump: &str, pid: u64) {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, rules: &str| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, rules).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let passphrase = write(
        "passphrase.yar",
        &format!(
            "rule planted : secret {{ meta: author = \"lab\" strings: $text = \"{PASSPHRASE}\" condition: $text }}\n\
             rule module {{ strings: $file = \"vermagic=6.1\" $loaded = \"cbc-aes-aesni\" \
             $kernel = \"Linux version 6.1\" condition: any of them }}"
        ),
    );
    // Its strings lie in pages that are no neighbours: in no piece of physical memory are they together.
    let rules = "rule planted { strings: $a = /-----BEGIN PRIVATE KEY-----[A-Za-z0-9+\\/\\n=]+-----END PRIVATE KEY-----/ \
                 $b = \"CLIENT_RANDOM 5f5f\" $c = \"-----BEGIN EC PRIVATE KEY-----\" condition: all of them }";
    write("more/keys.yara", rules);
    write("more/notes.txt", "no rules at all");
    let more = folder.path().join("more");
    let more = more.to_str().unwrap();
    let nothing = write(
        "nothing.yar",
        "rule r { strings: $a = { 7f 31 33 37 de ad c0 de } condition: $a }",
    );
    let id = pid.to_string();
    for target in [target, dump] {
        let all = scan(target, &[&passphrase, more], &[]);
        let owner = |row: &&Map<String, Value>, rule: &str, owner: &str| {
            get(row, "rule") == rule && get(row, "owner") == owner
        };
        // There are copies on the way there, too.
        let payload = all
            .iter()
            .find(|row| owner(row, "planted", "kernel") && get(row, "place").starts_with("slab"));
        let payload = payload.unwrap_or_else(|| panic!("the key's payload: {all:#?}"));
        assert_eq!(
            (get(payload, "pattern"), &payload["length"]),
            ("$text", &PASSPHRASE.len().into())
        );
        assert!(get(payload, "context").contains(PASSPHRASE));
        assert_eq!(get(payload, "matched"), hex(PASSPHRASE.as_bytes()));
        assert_eq!(
            (&payload["tags"][0], &payload["meta"][0]),
            (&"secret".into(), &"author=lab".into())
        );
        assert!(
            all.iter().any(|row| owner(&row, "module", "page cache")),
            "{all:#?}"
        );

        let kernel = scan(target, &[&passphrase], &["--kernel"]);
        assert!(
            kernel.iter().all(|row| get(row, "owner") == "kernel"),
            "{kernel:#?}"
        );
        let places = |row: &Map<String, Value>| (number(&row["gva"]), number(&row["gpa"]));
        assert!(kernel.iter().any(|row| places(row) == places(payload)));
        for (pattern, place) in [("$loaded", "module area"), ("$kernel", "kernel image")] {
            let is_there = |row: &&Map<String, Value>| get(row, "pattern") == pattern;
            let mut found = kernel.iter().filter(is_there);
            assert!(
                found.any(|row| get(row, "place") == place),
                "{pattern}: {kernel:#?}"
            );
        }

        let whole = scan(target, &[&passphrase, more], &["--pid", &id]);
        assert!(
            whole
                .iter()
                .all(|row| get(row, "owner") == "process" && row["pid"] == pid)
        );
        // Whoever sent it there has it, too.
        let pem = whole.iter().find(|row| {
            let names = (get(row, "rule"), get(row, "pattern"), get(row, "place"));
            names == ("planted", "$a", "anonymous memory")
        });
        let pem = pem.unwrap_or_else(|| panic!("the PEM text: {whole:#?}"));
        assert_eq!(pem["length"], file("rsa-pkcs8.pem").len() as u64 - 1);
        assert!(get(pem, "before").len() <= 32 && get(pem, "rules_file").ends_with("more/keys.yara"));
        let of_all = scan(target, &[more], &["--processes", "-q"]);
        assert!(
            of_all
                .iter()
                .any(|row| get(row, "pattern") == "$a" && row["pid"] == pid)
        );
        assert!(scan(target, &[&nothing], &["--processes", "-q"]).is_empty());
    }
    let physical = scan(dump, &[&passphrase], &["--physical", "--limit", "1", "-q"]);
    assert_eq!((physical.len(), get(&physical[0], "owner")), (1, "unknown"));
    assert!(scan(dump, &[&nothing], &["--physical"]).is_empty());

    let wrong = write(
        "wrong.yar",
        "rule a { condition: true }\nrule r { condition: $x }",
    );
    let err = crate::support::ends_with(2, &["scan", dump, "--yara", &wrong]);
    assert!(
        err.contains("compiling the rules") && err.contains("wrong.yar:2:"),
        "{err}"
    );
    let err = crate::support::ends_with(2, &["scan", dump, "--yara", &nothing, "--pid", "4194303"]);
    assert!(err.contains("4194303"), "{err}");
    let empty = folder.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    let err = crate::support::ends_with(2, &["scan", dump, "--yara", empty.to_str().unwrap()]);
    assert!(err.contains("no .yar"), "{err}");
}
