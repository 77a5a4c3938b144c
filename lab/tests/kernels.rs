//! Kernels that are hard to find or to know: with page-table isolation, with what an earlier boot has left in memory, and with a
//! symbol file in the place of what their own memory says.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;
use vmsight_lab::truth::{Truth, frame};
use vmsight_lab::{Format, Guest, Kernel, Spec, compare};
use vmsight_linux::AttachOptions;
use vmsight_memory::{GuestMemory, dump};
use vmsight_symbols::cache::Cache;
use vmsight_symbols::kernel::Hints;
use vmsight_symbols::{LocateError, Located, ProfileSource, export, locate, locate_with_file};
use vmsight_target::TargetSpec;

fn boot(kernel: Kernel, words: &[&str]) -> Guest {
    let mut spec = Spec::new(kernel);
    spec.kernel_args.extend(words.iter().map(|&w| w.to_owned()));
    Guest::boot(&spec).unwrap_or_else(|e| panic!("{e:?}"))
}

fn dumped(guest: &Guest, folder: &Path) -> GuestMemory {
    let file = folder.join(format!("{}.raw", guest.spec().kernel));
    guest.dump(Format::Raw, &file).unwrap_or_else(|e| panic!("{e:?}"));
    dump::open(&file, None).unwrap().memory
}

fn located(memory: &GuestMemory, thorough: bool) -> Located {
    let hints = Hints {
        thorough,
        ..Hints::default()
    };
    locate(memory, &hints, &Cache::disabled()).unwrap_or_else(|e| panic!("{e}"))
}

/// Page-table isolation is what CPUs with the Meltdown flaw run with; it takes the freed memory of init code out of the kernel's
/// own page tables, so that the image has holes of whole large pages.
fn isolated(kernel: Kernel) {
    let guest = boot(kernel, &["pti=on"]);
    let spec = TargetSpec::Qmp(guest.qmp_path().unwrap());
    let target = vmsight_target::attach(&spec, &vmsight_target::AttachOptions::default())
        .unwrap_or_else(|e| panic!("{e}"));
    let seen = vmsight_linux::Kernel::attach(target.memory.clone(), AttachOptions::default())
        .unwrap_or_else(|e| panic!("{e}"));
    let parts = &seen.image().parts;
    let hole = parts
        .windows(2)
        .map(|p| p[1].start - (p[0].start + p[0].len))
        .max()
        .unwrap();
    assert!(hole >= 2 << 20, "no large page is missing: {parts:?}");
    let differences = compare::all(&seen, guest.truth());
    assert!(differences.is_empty(), "{}", differences.join("\n"));

    // The monitor tells no LSTAR, but where the CPU goes at a page fault.
    let hints = Hints {
        thorough: true,
        ..Hints::with_registers(target.registers(None).unwrap())
    };
    let l = locate(&target.memory, &hints, &Cache::disabled()).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(l.image.text, seen.image().text);
    assert!(
        l.found.why.starts_with("CPU 0 enters the kernel"),
        "{}",
        l.found.why
    );
    assert!(l.profile.warnings.is_empty(), "{:?}", l.profile.warnings);
}

#[test]
fn page_table_isolation_6_12() {
    isolated(Kernel::V6_12);
}

#[test]
fn page_table_isolation_sid() {
    isolated(Kernel::Sid);
}

#[test]
fn a_symbol_file_serves_the_kernel_it_is_of_and_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let tables = [Kernel::V6_1, Kernel::V6_12].map(|kernel| {
        let guest = boot(kernel, &["vmsight.idle"]);
        let memory = dumped(&guest, folder.path());
        let own = located(&memory, false);
        let file = folder.path().join(format!("{kernel}.json.xz"));
        export::isf(&own.profile, File::create(&file).unwrap(), Some(export::XZ_LEVEL)).unwrap();
        let module = guest.truth().modules.first().map(|m| m.name.clone());
        (memory, own, file, module)
    });
    for (i, (memory, own, file, module)) in tables.iter().enumerate() {
        let with = locate_with_file(memory, &Hints::default(), file).unwrap();
        assert_eq!(
            with.profile.source,
            ProfileSource::File(file.display().to_string())
        );
        assert_eq!(
            (with.image.text, with.image.slide),
            (own.image.text, own.image.slide)
        );
        for name in ["init_task", "linux_banner", "init_top_pgt", "sys_call_table"] {
            assert_eq!(
                with.profile.symbols.address(name),
                own.profile.symbols.address(name),
                "{name}"
            );
        }
        for (structure, member) in [
            ("task_struct", "pid"),
            ("task_struct", "comm"),
            ("mm_struct", "pgd"),
        ] {
            assert_eq!(
                with.profile.types.member(structure, member).map(|f| f.offset),
                own.profile.types.member(structure, member).map(|f| f.offset),
                "{structure}.{member}"
            );
        }
        // The types of a module go on where those of the guest's own kernel end, not where the file's do.
        let kernel = |options| vmsight_linux::Kernel::attach(memory.clone(), options).unwrap();
        let (plain, given) = (
            kernel(AttachOptions::default()),
            kernel(AttachOptions {
                symbols: Some(file.clone()),
                ..AttachOptions::default()
            }),
        );
        let module = module.as_ref().expect("a module");
        let own = plain.module_types(module).unwrap();
        let types = given.module_types(module).unwrap();
        assert!(own.len() > 10);
        for t in own.iter() {
            assert_eq!(types.type_name(t.id()), own.type_name(t.id()));
        }
        assert!(!given.processes(Default::default()).unwrap().rows.is_empty());

        // The other kernel's table.
        let other = &tables[1 - i];
        let error = locate_with_file(memory, &Hints::default(), &other.2).unwrap_err();
        assert!(matches!(error, LocateError::WrongFile(_)), "{error}");
        let hex = |id: &Option<Vec<u8>>| -> String {
            id.as_deref()
                .unwrap()
                .iter()
                .map(|b| format!("{b:02x}"))
                .collect()
        };
        let shown = error.to_string();
        for id in [&tables[i].1.profile.build_id, &other.1.profile.build_id] {
            assert!(shown.contains(&hex(id)), "{shown}");
        }
    }
}

/// What the guest has said of itself since, once it has been quiet again for the `boots`th time.
fn truth_of_boot(guest: &Guest, boots: usize) -> Truth {
    let deadline = Instant::now() + Duration::from_secs(300);
    loop {
        let said = std::fs::read(guest.folder().join("truth.log")).unwrap();
        let ready = String::from_utf8_lossy(&said).matches(frame::READY).count();
        if ready >= boots {
            return serde_json::from_slice(&frame::unpack(&said).unwrap()).unwrap();
        }
        assert!(
            Instant::now() < deadline,
            "it does not come up again: {}",
            guest.console()
        );
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn after_a_reset_the_kernel_that_runs_is_chosen() {
    let guest = boot(Kernel::V6_1Cloud, &["vmsight.idle"]);
    let mut qmp = guest.qmp().unwrap();
    // The lab's guests end where they would reboot, unless told otherwise.
    qmp.execute("set-action", json!({ "reboot": "reset" })).unwrap();
    qmp.execute("system_reset", json!({})).unwrap();
    drop(qmp);
    let truth = truth_of_boot(&guest, 2);
    let text = |truth: &Truth| {
        let symbol = truth.kallsyms.samples.iter().find(|s| s.name == "_text");
        symbol.expect("_text is sampled").address
    };
    let (before, now) = (text(guest.truth()), text(&truth));
    let folder = tempfile::tempdir().unwrap();
    let memory = dumped(&guest, folder.path());
    for thorough in [false, true] {
        let l = located(&memory, thorough);
        eprintln!(
            "first boot at {before:#x}, second at {now:#x}; {} candidates, {} rejected: {}",
            l.found.candidates.len(),
            l.found.rejected.len(),
            l.found.why
        );
        assert_eq!(l.image.text.0, now, "{:?}", l.found);
        assert_eq!(l.profile.banner, truth.system.version.trim());
    }
    // What is listed is of this boot.
    let seen = vmsight_linux::Kernel::attach(memory, AttachOptions::default()).unwrap();
    let differences = compare::info::info(&seen, &truth).unwrap();
    assert!(differences.found.is_empty(), "{differences}");
}
