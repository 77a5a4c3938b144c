//! One paused guest, dumped by QEMU in every form it has, and by makedumpfile out of our ELF core of it: all are read as the same
//! memory, in which the guest is what it says of itself.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde_json::json;
use vmsight_arch::Gpa;
use vmsight_lab::{Format, Guest, Kernel, Machine, Spec, compare};
use vmsight_linux::AttachOptions;
use vmsight_memory::dump::write::{Contents, OutFormat, find_vmcoreinfo, write};
use vmsight_memory::dump::{self, Dump, DumpFormat};

const PAGE: usize = 4096;

/// The guest is in the dump as it says; `but` begins what may differ.
fn agree(what: &str, dump: &Dump, guest: &Guest, but: Option<&str>) {
    let kernel = vmsight_linux::Kernel::attach(dump.memory.clone(), AttachOptions::default())
        .unwrap_or_else(|e| panic!("{what}: {e}"));
    let mut differences = compare::all(&kernel, guest.truth());
    differences.retain(|difference| !but.is_some_and(|but| difference.starts_with(but)));
    assert!(
        differences.is_empty(),
        "{what}: {} differences\n{}",
        differences.len(),
        differences.join("\n")
    );
}

/// Every page of the guest's RAM, which begins at address 0, is the same in both.
fn same_memory(what: &str, dump: &Dump, reference: &Dump) {
    let mut pages = [vec![0; PAGE], vec![0; PAGE]];
    for region in reference.memory.regions().iter().filter(|r| r.start == Gpa(0)) {
        for at in (0..region.len).step_by(PAGE) {
            let [ours, theirs] = &mut pages;
            dump.memory
                .read(Gpa(at), ours)
                .unwrap_or_else(|e| panic!("{what}: {e}"));
            reference.memory.read(Gpa(at), theirs).unwrap();
            assert!(ours == theirs, "{what}: the page at {at:#x} differs");
        }
    }
}

fn open(path: &Path) -> Dump {
    dump::open(path, None).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Our ELF core of a dump.
fn elf_core_of(dump: &Dump, path: &Path) {
    let info = find_vmcoreinfo(&dump.memory, &AtomicBool::new(false)).expect("Linux keeps it ready");
    let contents = Contents {
        memory: &dump.memory,
        registers: &dump.registers,
        vmcoreinfo: Some(&info.text),
    };
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .unwrap();
    write(&contents, OutFormat::Elf, &file, &AtomicBool::new(false), &|_| {}).unwrap();
}

fn makedumpfile(args: &[&str], from: &Path, to: &Path) {
    let out = Command::new("makedumpfile")
        .args(args)
        .arg(from)
        .arg(to)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "makedumpfile {args:?}: {said}");
}

#[test]
fn every_dump_of_one_moment_shows_the_same_guest() {
    let spec = Spec {
        machine: Machine::Q35,
        vcpus: 2,
        ..Spec::new(Kernel::V6_12)
    };
    let guest = Guest::boot(&spec).unwrap_or_else(|e| panic!("{e:?}"));
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| -> PathBuf { folder.path().join(name) };
    let mut kdumps = Vec::new();
    guest
        .paused(|qmp| {
            guest.dump_paused(qmp, Format::Elf, &at("qemu.elf"))?;
            let capable = qmp.execute("query-dump-guest-memory-capability", json!({}))?;
            for packing in ["zlib", "lzo", "snappy"] {
                let format = format!("kdump-{packing}");
                // Debian builds QEMU without lzo and snappy.
                if capable["formats"]
                    .as_array()
                    .is_some_and(|all| all.contains(&json!(format)))
                {
                    let file = at(&format);
                    let protocol = format!("file:{}", file.display());
                    let arguments = json!({ "paging": false, "protocol": protocol, "format": format });
                    qmp.execute("dump-guest-memory", arguments)?;
                    kdumps.push(file);
                }
            }
            // To a file: the guest stays where it is, paused.
            let uri = format!("exec:cat > {}", at("stream").display());
            qmp.execute("migrate", json!({ "uri": uri }))?;
            loop {
                let status = qmp.execute("query-migrate", json!({}))?;
                match status["status"].as_str() {
                    Some("completed") => return Ok(()),
                    Some("failed") => anyhow::bail!("{status}"),
                    _ => std::thread::sleep(Duration::from_millis(100)),
                }
            }
        })
        .unwrap_or_else(|e| panic!("{e:?}"));

    let reference = open(&at("qemu.elf"));
    assert_eq!(reference.registers.len(), 2);
    assert!(!kdumps.is_empty());
    for file in &kdumps {
        let dump = open(file);
        assert_eq!(
            (dump.format, dump.notes.len()),
            (DumpFormat::Kdump, 0),
            "{:?}",
            dump.notes
        );
        // Its notes say what those of the ELF core do.
        assert_eq!(dump.registers, reference.registers);
        same_memory("QEMU's kdump", &dump, &reference);
        agree("QEMU's kdump", &dump, &guest, None);
    }
    let stream = open(&at("stream"));
    assert_eq!(
        (stream.format, stream.notes.len()),
        (DumpFormat::Migration, 0),
        "{:?}",
        stream.notes
    );
    same_memory("the migration stream", &stream, &reference);
    agree("the migration stream", &stream, &guest, None);
    std::fs::remove_file(at("stream")).unwrap();

    // makedumpfile accepts it, and packs it.
    elf_core_of(&reference, &at("ours.elf"));
    same_memory("our ELF core", &open(&at("ours.elf")), &reference);
    for (name, args) in [("zlib", &["-c", "-d", "0"][..]), ("lzo", &["-l", "-d", "0"])] {
        makedumpfile(args, &at("ours.elf"), &at(name));
        let dump = open(&at(name));
        assert!(dump.notes.is_empty(), "{name}: {:?}", dump.notes);
        assert_eq!(dump.registers, reference.registers, "{name}");
        assert!(
            dump.vmcoreinfo
                .as_ref()
                .is_some_and(|info| info.starts_with("OSRELEASE=6.12"))
        );
        same_memory(name, &dump, &reference);
    }
    // Free pages left out: nothing that the guest says of itself is in them.
    makedumpfile(&["-c", "-d", "16"], &at("ours.elf"), &at("filtered"));
    let dump = open(&at("filtered"));
    let said = dump.notes.first().map_or("", String::as_str);
    assert!(
        said.contains("were left out when the dump was written (dump level 16)"),
        "{:?}",
        dump.notes
    );
    let missing: u64 = dump.memory.missing().iter().map(|region| region.len).sum();
    assert!(
        missing > 64 << 20 && missing + dump.memory.size() >= 510 << 20,
        "{missing:#x}"
    );
    for gap in dump.memory.missing() {
        assert!(
            dump.memory.read_u8(gap.start).is_err(),
            "what is not there is not made up"
        );
    }
    // How much memory there is, is told by what is there.
    agree(
        "makedumpfile's, filtered",
        &dump,
        &guest,
        Some("info: memory_physical_kb"),
    );
}
