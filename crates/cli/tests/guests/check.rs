//! Checks: what they print, and how they end.

use serde_json::Value;

use crate::support::{ends_with, objects, prepared, rows, text, utf8, vmsight};

fn json(args: &[&str], code: i32) -> Value {
    let out = vmsight(args);
    assert_eq!(out.status.code(), Some(code), "{args:?}: {}", text(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{args:?}: {e}"))
}

#[test]
fn a_clean_guest_a_planted_pointer_and_a_changed_byte() {
    let vm = prepared();
    let t = vm.target.as_str();
    let folder = tempfile::tempdir().unwrap();
    let golden = folder.path().join("web1.baseline");
    let golden = utf8(&golden);
    assert!(vmsight(&["baseline", "create", t, golden]).status.success());

    // Of this guest nothing is suspicious. What it has of what is only worth knowing, such as a process that is traced, does not
    // count for the exit code.
    let found = json(&["check", t, "--golden", golden, "-o", "json"], 0);
    let severities = found.as_array().unwrap().iter().map(|f| &f["severity"]);
    let mut other = severities.filter(|severity| **severity != "info");
    assert_eq!(other.next(), None, "{found:#}");
    let out = vmsight(&["check", t, "idt", "gdt"]);
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    assert!(out.stdout.is_empty(), "nothing was found: {}", text(&out.stdout));
    assert!(text(&out.stderr).contains(" 0 findings"), "{}", text(&out.stderr));
    assert!(
        objects(&vmsight(&["check", t, "idt", "-o", "json"]).stdout)
            .unwrap()
            .is_empty()
    );
    let sarif = json(&["check", t, "-o", "sarif", "-q"], 0);
    assert_eq!(sarif["version"], "2.1.0");
    let results = sarif["runs"][0]["results"].as_array().unwrap();
    assert!(results.iter().all(|r| r["level"] == "note"), "{results:#?}");
    assert!(
        sarif["runs"][0]["properties"]["lookedAt"]["text"]
            .as_u64()
            .unwrap()
            > 10_000
    );

    // A call that was removed long ago: nobody calls it.
    let slot = "sys_call_table+0x4e0";
    let write = |hex: &str| rows(&["write", "--write", t, slot, "--hex", hex]).remove(0);
    let before = write("00000000c0ffffff")["before"].as_str().unwrap().to_owned();
    let found = json(&["check", t, "syscalls", "-o", "json"], 1);
    let sarif = json(&["check", t, "syscalls", "rodata", "-o", "sarif"], 1);
    write(&before);
    let finding = &found[0];
    assert_eq!(
        (&finding["check"], &finding["severity"]),
        (&"syscalls".into(), &"critical".into())
    );
    assert_eq!(finding["subject"], "sys_call_table[156]");
    assert!(
        finding["certainty"].as_str().unwrap().contains("3 times"),
        "{finding}"
    );
    assert!(
        finding["evidence"][0]
            .as_str()
            .unwrap()
            .contains("0xffffffc000000000"),
        "{finding}"
    );
    let result = &sarif["runs"][0]["results"][0];
    assert_eq!(
        (&result["ruleId"], &result["level"]),
        (&"syscalls".into(), &"error".into())
    );
    let rule = &sarif["runs"][0]["tool"]["driver"]["rules"][result["ruleIndex"].as_u64().unwrap() as usize];
    assert_eq!(rule["id"], "syscalls");

    // What no rule sees: a function that returns at once.
    let write = |hex: &str| rows(&["write", "--write", t, "kernel_halt+0x20", "--hex", hex]).remove(0);
    let before = write("c3")["before"].as_str().unwrap().to_owned();
    assert_ne!(before, "c3", "the place is no RET already");
    let out = vmsight(&["check", t, "golden", "--golden", golden]);
    write(&before);
    assert_eq!(out.status.code(), Some(1), "{}", text(&out.stderr));
    let said = text(&out.stdout);
    assert!(
        said.contains("golden: kernel_halt+0x20 at 0x") && said.contains("bytes now"),
        "{said}"
    );
    assert_eq!(
        vmsight(&["check", t, "--golden", golden, "-q"]).status.code(),
        Some(0)
    );
}

#[test]
fn what_the_distribution_ships_is_a_trusted_copy() {
    let vm = prepared();
    let t = vm.target.as_str();
    let fetched = vmsight_lab::Kernel::V6_1Cloud.fetch().unwrap();
    let (kernel, modules) = (fetched.vmlinuz(), fetched.modules_folder());
    let (kernel, modules) = (utf8(&kernel), utf8(&modules));
    let check = |more: &[&str]| vmsight(&[&["check", t, "golden"], more].concat());
    let out = check(&["--golden", kernel, "--golden", modules]);
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    assert!(
        !text(&out.stderr).contains("not compared"),
        "{}",
        text(&out.stderr)
    );
    let out = check(&["--golden", modules]);
    let said = text(&out.stderr);
    assert!(said.contains("kernel's own code is not compared"), "{said}");
    let out = check(&["--golden", kernel]);
    let said = text(&out.stderr);
    assert!(
        said.contains("modules are not compared") && said.contains("overlay"),
        "{said}"
    );
    // Nothing of the guest's, and twice the same.
    let folder = tempfile::tempdir().unwrap();
    let out = check(&["--golden", utf8(folder.path())]);
    assert_eq!(out.status.code(), Some(2));
    assert!(
        text(&out.stderr).contains("holds neither"),
        "{}",
        text(&out.stderr)
    );
    let out = check(&["--golden", kernel, "--golden", kernel]);
    assert_eq!(out.status.code(), Some(2));
    assert!(
        text(&out.stderr).contains("and so has another"),
        "{}",
        text(&out.stderr)
    );
}

#[test]
fn what_is_asked_wrongly_is_said() {
    assert!(ends_with(2, &["check", "nothing", "sycalls"]).contains("syscalls"));
    assert!(ends_with(2, &["check", "nothing", "golden"]).contains("--golden"));
    assert!(ends_with(2, &["list", "-o", "sarif"]).contains("vmsight check"));
    assert!(ends_with(2, &["check", "nothing", "--golden", "/dev/null"]).contains("/dev/null"));
    let nothing = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    let said = ends_with(2, &["check", "nothing", "--golden", nothing]);
    assert!(said.contains("neither a baseline nor a kernel"), "{said}");
    let list = rows(&["check", "--list"]);
    assert!(list.iter().any(|row| row["name"] == "golden"));
    assert!(
        list.iter()
            .all(|row| !row["blind_spots"].as_array().unwrap().is_empty())
    );
    let out = vmsight(&["check", "--explain", "lsm"]);
    assert!(text(&out.stdout).contains("T1562.001"), "{}", text(&out.stdout));
}
