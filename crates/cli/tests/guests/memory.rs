//! Reading by every kind of address, registers, symbols from a file.

use vmsight_lab::Format;

use crate::support::{Dump, ends_with, number, prepared, rows, text, unprepared, utf8, vmsight};

#[test]
fn one_place_by_symbol_address_page_tables_and_physical_address() {
    let vm = prepared();
    let t = vm.target.as_str();
    let read = |args: &[&str]| text(&vmsight(&[&["read", t], args].concat()).stdout);
    let banner = read(&["linux_banner", "--as", "string"]);
    let said = &vm.guest.truth().system.version;
    assert_eq!(banner.trim_end().trim_end_matches("\\n"), said.trim_end());

    let symbol = &rows(&["symbols", t, "linux_banner", "--no-modules"])[0];
    let gva = symbol["address"].as_str().unwrap().to_owned();
    assert_eq!(read(&[&gva, "--as", "string"]), banner);
    let at = rows(&["symbols", t, "--at", &format!("{gva}+0x8")]);
    assert_eq!(at[0]["symbol"], "linux_banner+0x8");

    let walk = rows(&["translate", t, "linux_banner"]);
    let gpa = walk
        .iter()
        .find_map(|row| row.get("gpa").filter(|v| v.is_string()))
        .expect("a physical address");
    let mut qmp = vm.guest.qmp().unwrap();
    let theirs = qmp.human(&format!("gva2gpa {gva}")).unwrap();
    assert_eq!(theirs.trim(), format!("gpa: {}", gpa.as_str().unwrap()));
    drop(qmp);
    assert_eq!(
        read(&[&format!("phys:{}", gpa.as_str().unwrap()), "--as", "string"]),
        banner
    );

    // The page tables in use map the kernel too, whoever runs (kernel page-table isolation is off under TCG).
    let cr3 = rows(&["regs", t, "cr3"]);
    let cr3 = cr3[0]["value"].as_str().unwrap();
    assert_eq!(read(&["linux_banner", "--as", "string", "--dtb", cr3]), banner);
}

#[test]
fn user_memory_of_a_process() {
    let vm = unprepared();
    let shell = vm
        .guest
        .truth()
        .named("backup-agent")
        .expect("it is part of the workload");
    let pid = shell.pid.to_string();
    let stack = rows(&["maps", &vm.target, "--pid", &pid])
        .into_iter()
        .find(|row| row.values().any(|v| v == "[stack]"))
        .expect("it has a stack");
    let start = stack["start"].as_str().unwrap().to_owned();
    let length = (number(&stack["end"]) - number(&stack["start"])).to_string();
    let out = vmsight(&[
        "read", &vm.target, &start, &length, "--pid", &pid, "--as", "bytes",
    ]);
    // The lower pages of a stack were never touched: that is said, and the rest is there.
    assert!(matches!(out.status.code(), Some(0 | 1)), "{}", text(&out.stderr));
    let bytes = text(&out.stdout);
    assert!(
        bytes.contains("backup-agent\0--all\0"),
        "its arguments are on its stack"
    );
    let found = rows(&[
        "strings",
        &vm.target,
        "--pid",
        &pid,
        "--grep",
        "backup-agent",
        "-q",
    ]);
    assert!(!found.is_empty());
}

#[test]
fn typed_reads() {
    let vm = unprepared();
    let members = rows(&[
        "read",
        &vm.target,
        "init_task",
        "--type",
        "task_struct",
        "--fields",
        "comm,pid,cred.uid.val",
    ]);
    let value = |name: &str| &members.iter().find(|row| row["member"] == name).unwrap()["value"];
    assert_eq!(
        (value("comm"), value("pid"), value("cred.uid.val")),
        (&"swapper/0".into(), &0.into(), &0.into()),
        "{members:?}"
    );
    let err = ends_with(1, &["read", &vm.target, "init_task", "--type", "task_strct"]);
    assert!(err.contains("task_struct"), "a likely name is offered: {err}");
    let err = ends_with(2, &["read", &vm.target, "init_tsk", "8"]);
    assert!(err.contains("init_task"), "a likely name is offered: {err}");
}

#[test]
fn registers_are_those_of_the_monitor() {
    let vm = prepared();
    let said = vm.guest.qmp().unwrap().human("info registers").unwrap();
    let value = |name: &str| {
        let at = said.find(&format!("{name}=")).unwrap() + name.len() + 1;
        u64::from_str_radix(said[at..].split_whitespace().next().unwrap(), 16).unwrap()
    };
    let shown = rows(&["regs", &vm.target]);
    for name in ["CR0", "CR4", "EFER"] {
        let ours = shown.iter().find(|row| row["register"] == name.to_lowercase());
        assert_eq!(number(&ours.unwrap()["value"]), value(name), "{name}");
    }
    let nothing = unprepared();
    let err = ends_with(2, &["regs", &nothing.target]);
    assert!(
        err.contains("QMP") || err.contains("gdb"),
        "it says what would help: {err}"
    );
}

#[test]
fn symbols_from_a_file_made_of_a_dump() {
    let vm = prepared();
    let dump = Dump::of(&vm.guest, Format::Raw);
    let folder = tempfile::tempdir().unwrap();
    let table = folder.path().join("kernel.json.xz");
    assert!(
        vmsight(&["symbols", "export", dump.target(), "--isf", utf8(&table)])
            .status
            .success()
    );
    // Wrong for another kernel, and the answer shows both.
    let other = unprepared();
    let err = ends_with(2, &["ps", &other.target, "--symbols", utf8(&table)]);
    assert!(
        err.contains("belongs to another kernel") && err.contains("looking for the kernel"),
        "{err}"
    );
    let ids = err
        .split(|c: char| !c.is_ascii_hexdigit())
        .filter(|word| word.len() == 40)
        .count();
    assert_eq!(ids, 2, "both build-ids are shown: {err}");
    // Right for the running guest: everything the profile out of memory shows, it shows.
    let with_file = rows(&["ps", &vm.target, "--symbols", utf8(&table)]);
    let without = rows(&["ps", &vm.target, "--no-cache"]);
    assert_eq!(
        crate::support::listed(&with_file),
        crate::support::listed(&without)
    );
}

#[test]
fn a_thorough_search_asks_the_processors() {
    let vm = prepared();
    let shown = |args: &[&str]| rows(&[&["info", vm.target.as_str()], args].concat()).remove(0);
    let (first, thorough) = (shown(&[]), shown(&["--thorough"]));
    assert_eq!(first["release"], thorough["release"]);
    assert_eq!(first["text"], thorough["text"]);
    let why =
        |row: &serde_json::Map<String, serde_json::Value>| row["chosen_by"].as_str().unwrap().to_owned();
    assert!(
        why(&thorough).contains("LSTAR") || why(&thorough).contains("CR3"),
        "{:?}",
        why(&thorough)
    );
    assert_eq!(thorough["other_kernels"], serde_json::json!([]));
    // The monitor is held: what runs cannot be asked, and that is said.
    let _owner = vm.guest.qmp().unwrap();
    let target = format!("pid:{}", vm.guest.pid());
    let out = vmsight(&["info", &target, "--thorough", "--timeout", "0.5", "-o", "json"]);
    assert!(
        text(&out.stderr).contains("no registers"),
        "{}",
        text(&out.stderr)
    );
}
