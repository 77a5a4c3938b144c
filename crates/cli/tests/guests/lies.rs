//! A real guest's dump in which an attacker has changed what is nasty to read: the program ends, prints nothing that a
//! terminal acts on, shows everything that is still true, and marks what is not.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;

use serde_json::{Map, Value};
use vmsight_arch::Gva;
use vmsight_lab::Format;
use vmsight_linux::{AttachOptions, Kernel};
use vmsight_memory::dump;

use crate::support::{Dump, harmless, listed, objects, prepared, processes, text, vmsight};

/// A dump whose bytes can be replaced for a while.
struct Forgery {
    dump: Dump,
    kernel: Kernel,
    tasks: BTreeMap<String, Gva>,
    honest: BTreeMap<u64, String>,
}

impl Forgery {
    fn new() -> Forgery {
        let vm = prepared();
        let dump = Dump::of(&vm.guest, Format::Raw);
        let memory = dump::open(&dump.path, None).unwrap().memory;
        let kernel = Kernel::attach(memory, AttachOptions::default()).unwrap_or_else(|e| panic!("{e}"));
        let listing = kernel.processes(vmsight_linux::ProcessFields::empty()).unwrap();
        let tasks = listing
            .rows
            .iter()
            .map(|row| (row.name.to_string(), row.task))
            .collect();
        Forgery {
            honest: processes(&vm.guest),
            dump,
            kernel,
            tasks,
        }
    }

    fn task(&self, name: &str) -> Gva {
        *self
            .tasks
            .get(name)
            .unwrap_or_else(|| panic!("no process {name}"))
    }

    fn member(&self, at: Gva, structure: &str, path: &str) -> Gva {
        at.wrapping_add(self.kernel.offset(structure, path).unwrap())
    }

    fn pointer(&self, at: Gva) -> Gva {
        Gva(self.kernel.space().read_u64(at).unwrap())
    }

    /// Replaces bytes, runs `vmsight ARGS` on the dump, puts the bytes back. A raw dump lies flat: offset is address.
    fn told(&self, lies: &[(Gva, &[u8])], args: &[&str]) -> (Vec<Map<String, Value>>, String) {
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(&self.dump.path)
            .unwrap();
        let truth: Vec<(u64, Vec<u8>)> = lies
            .iter()
            .map(|(at, lie)| {
                let offset = self.kernel.space().translate(*at).unwrap().gpa.0;
                let mut truth = vec![0; lie.len()];
                file.read_exact_at(&mut truth, offset).unwrap();
                (offset, truth)
            })
            .collect();
        for ((_, lie), (offset, _)) in lies.iter().zip(&truth) {
            file.write_all_at(lie, *offset).unwrap();
        }
        let args = [&args[..1], &[self.dump.target()], &args[1..]].concat();
        let [json, table] =
            [&["-o", "json"][..], &["--columns", "all"]].map(|form| vmsight(&[&args[..], form].concat()));
        for (offset, truth) in truth {
            file.write_all_at(&truth, offset).unwrap();
        }
        for out in [&json, &table] {
            let err = text(&out.stderr);
            assert_eq!(out.status.code(), Some(0), "{args:?}: {err}");
            assert!(!err.contains("panicked"), "{err}");
            for printed in [&out.stdout, &out.stderr] {
                harmless(&format!("{args:?}"), printed);
            }
        }
        (objects(&json.stdout).unwrap(), text(&json.stderr))
    }

    /// Everybody but these is shown as ever.
    fn all_but(&self, names: &[&str], rows: &[Map<String, Value>]) {
        let keep = |all: BTreeMap<u64, String>| -> BTreeMap<u64, String> {
            all.into_iter()
                .filter(|(_, name)| !names.contains(&name.as_str()))
                .collect()
        };
        let shown = listed(rows);
        for (pid, name) in keep(self.honest.clone()) {
            assert_eq!(shown.get(&pid), Some(&name), "pid {pid}");
        }
    }
}

fn row<'a>(rows: &'a [Map<String, Value>], key: &str, value: &Value) -> &'a Map<String, Value> {
    rows.iter()
        .find(|row| &row[key] == value)
        .unwrap_or_else(|| panic!("no row with {key} {value}"))
}

fn marked(row: &Map<String, Value>) -> bool {
    row.get("problems")
        .and_then(Value::as_array)
        .is_some_and(|p| !p.is_empty())
}

#[test]
fn a_process_list_of_a_guest_that_lies() {
    let guest = Forgery::new();
    let pid = |name: &str| {
        let (pid, _) = guest.honest.iter().find(|(_, n)| *n == name).unwrap();
        Value::from(*pid)
    };

    // A name that would set the window's title, clear the screen and begin a control sequence in one byte.
    let comm = guest.member(guest.task("web-frontend"), "task_struct", "comm");
    let (rows, _) = guest.told(&[(comm, b"\x1b]0;x\x07\x1b[2J\x9b1m\0")], &["ps"]);
    guest.all_but(&["web-frontend"], &rows);
    let name = row(&rows, "pid", &pid("web-frontend"))["name"].as_str().unwrap();
    assert!(
        name.contains("\u{1b}]0;x\u{7}"),
        "the name is there to be read: {name:?}"
    );

    // Arguments of 2^63 bytes.
    let mm = guest.pointer(guest.member(guest.task("backup-agent"), "task_struct", "mm"));
    let end = guest.member(mm, "mm_struct", "arg_end");
    let (rows, _) = guest.told(&[(end, &(1u64 << 63).to_le_bytes())], &["ps"]);
    guest.all_but(&[], &rows);
    assert!(marked(row(&rows, "pid", &pid("backup-agent"))));

    // Page tables that lead into themselves at every level.
    let mm = guest.pointer(guest.member(guest.task("low-priority"), "task_struct", "mm"));
    let pgd = guest.pointer(guest.member(mm, "mm_struct", "pgd"));
    let itself = guest.kernel.space().translate(pgd).unwrap().gpa.0 | 0x67;
    let tables: Vec<u8> = itself.to_le_bytes().repeat(256);
    let (rows, _) = guest.told(&[(pgd, &tables)], &["ps"]);
    guest.all_but(&[], &rows);
    let (rows, _) = guest.told(&[(pgd, &tables)], &["maps"]);
    assert!(!rows.is_empty());

    // A list that goes round in a circle of one, and one whose next entry is nowhere. Who comes after is lost; that is said.
    let next = guest.member(guest.task("realtime"), "task_struct", "tasks.next");
    let itself = guest.member(guest.task("realtime"), "task_struct", "tasks");
    for lie in [itself.0, 0x4141_4141_4141_4141] {
        let (rows, err) = guest.told(&[(next, &lie.to_le_bytes())], &["ps"]);
        assert!(!err.is_empty(), "a list that is cut is said to be");
        let before: Vec<u64> = guest
            .honest
            .keys()
            .copied()
            .take_while(|p| pid("realtime") != *p)
            .collect();
        let shown = listed(&rows);
        assert!(before.len() > 10 && before.iter().all(|pid| shown.contains_key(pid)));
    }
}

#[test]
fn modules_and_sockets_of_a_guest_that_lies() {
    let guest = Forgery::new();
    // The list of modules leads into itself behind the first.
    let modules = guest.kernel.symbol("modules").unwrap();
    let first = guest.pointer(modules);
    let (rows, err) = guest.told(&[(first, &first.0.to_le_bytes())], &["lsmod"]);
    assert_eq!(rows.len(), 1);
    assert!(!err.is_empty(), "a list that is cut is said to be");
    // A descriptor table that is said to hold 2^31 files.
    let files = guest.pointer(guest.member(guest.task("web-frontend"), "task_struct", "files"));
    let table = guest.pointer(guest.member(files, "files_struct", "fdt"));
    let max = guest.member(table, "fdtable", "max_fds");
    let (rows, _) = guest.told(
        &[(max, &0x7fff_ffffu32.to_le_bytes())],
        &["lsof", "--descriptors"],
    );
    assert!(rows.len() > 50);
    // All of its files at once: a table of pointers to nowhere.
    let fds = guest.member(table, "fdtable", "fd");
    guest.told(&[(fds, &0x4141_4141_4141_4141u64.to_le_bytes())], &["lsof"]);
    guest.told(&[(fds, &0x4141_4141_4141_4141u64.to_le_bytes())], &["net"]);
}
