//! Finding kernels in memory that the tests have put together: every strategy, decoys, several kernels, hostile tables.

#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

mod support;

use proptest::prelude::*;
use support::guest::{DATA, EARLY_TOP, Kernel, LINK, MIB, Ram, exported};
use vmsight_arch::paging;
use vmsight_arch::{Gpa, Gva};
use vmsight_memory::GuestMemory;
use vmsight_symbols::kernel::{FindError, Found, Hints, find};
use vmsight_symbols::{LocateError, Profile, cache::Cache, locate, locate_with_file};

const TRAMPOLINE: u64 = 0x9_8000;

fn hints(registers: Vec<vmsight_arch::Registers>) -> Hints {
    Hints::with_registers(registers)
}

#[track_caller]
fn check(found: &Found, k: &Kernel) {
    let image = found.image();
    assert_eq!(image.text, Gva(k.text));
    assert_eq!(image.phys, Gpa(k.phys));
    assert_eq!(image.len, k.len());
    assert_eq!(image.slide, k.text - LINK);
    assert_eq!(image.dtb, k.dtb(), "{:?}", image.evidence);
    assert_eq!(image.mode, k.mode());
    assert_eq!(image.direct_map, Some(Gva(k.direct_map)));
    assert_eq!(image.banner, k.banner());
    assert_eq!(image.release(), k.release);
    assert_eq!(
        image.build_id.as_deref(),
        Some(k.build_id.as_slice()),
        "the kernel's, not the vDSO's"
    );
    assert!(image.evidence.len() >= 3);
}

fn kernels() -> [Kernel; 4] {
    [
        Kernel::new(32 * MIB, 0x1280_0000),
        // Without KASLR: level4_kernel_pgt looks like a top-level table.
        Kernel::new(16 * MIB, 0),
        Kernel::new(32 * MIB, 0x1280_0000).five_levels(),
        Kernel::new(16 * MIB, 0).five_levels(),
    ]
}

#[test]
fn by_the_trampoline_page() {
    for k in kernels() {
        let mut ram = Ram::new(64);
        ram.install(&k);
        ram.trampoline(&k, TRAMPOLINE);
        for memory in [ram.frozen(), ram.live()] {
            let asked = Hints {
                registers: Some(Box::new(|| panic!("nobody needs registers"))),
                thorough: false,
            };
            let found = find(&memory, &asked).unwrap();
            check(&found, &k);
            assert_eq!(found.candidates.len(), 1);
        }
    }
}

#[test]
fn by_registers_in_kernel_and_process() {
    for k in kernels() {
        let mut ram = Ram::new(64);
        ram.install(&k);
        let process = 50 * MIB;
        ram.process(&k, process);
        // The user's half under page-table isolation: the next page, with a third-level table that is not the kernel's.
        ram.entry(process + 0x1000, 511, (52 * MIB) | 0x67);
        ram.entry(52 * MIB, 511, (52 * MIB + 0x1000) | 0x67);
        let memory = ram.from(MIB);
        for root in [k.dtb().0, process, process | 0x1234 & 0xfff, process + 0x1000] {
            check(&find(&memory, &hints(vec![k.registers(root)])).unwrap(), &k);
        }
    }
}

#[test]
fn by_a_scan_of_all_memory() {
    for k in kernels() {
        let mut ram = Ram::new(64);
        ram.install(&k);
        // Low memory is missing, and nobody knows the registers.
        let found = find(&ram.from(MIB), &Hints::default()).unwrap();
        check(&found, &k);
        assert!(
            found.image().evidence[0].contains("all of memory"),
            "{:?}",
            found.image().evidence
        );
    }
}

#[test]
fn tables_of_processes_inside_the_image_are_not_the_kernels() {
    for k in kernels() {
        let mut ram = Ram::new(64);
        ram.install(&k);
        ram.trampoline(&k, TRAMPOLINE);
        // Memory of init code that was given back now holds the top-level table of a process, in front and behind.
        ram.process(&k, k.phys + DATA + 0x1000);
        ram.process(&k, k.phys + EARLY_TOP + 0x3000);
        // What is left of early_top_pgt, moved to the front: leads to the kernel and maps no memory.
        let last = ram.read(k.phys + EARLY_TOP + 0xff8);
        ram.entry(k.phys + DATA + 0x2000, 511, last);
        check(&find(&ram.frozen(), &Hints::default()).unwrap(), &k);
    }
}

#[test]
fn every_translation_of_the_found_table_leads_home() {
    for k in kernels() {
        let mut ram = Ram::new(64);
        ram.install(&k);
        ram.trampoline(&k, TRAMPOLINE);
        let memory = ram.frozen();
        let found = find(&memory, &Hints::default()).unwrap();
        let image = found.image();
        for offset in (0..image.len).step_by(0x1_1000) {
            let t = paging::walk(image.mode, &memory, image.dtb, Gva(image.text.0 + offset)).unwrap();
            assert_eq!(t.gpa, Gpa(image.phys.0 + offset));
            let part = image
                .parts
                .iter()
                .find(|p| (p.start..p.start + p.len).contains(&offset))
                .unwrap();
            assert_eq!((part.write, part.execute), (t.access.write, t.access.execute));
        }
    }
}

/// Under page-table isolation the kernel unmaps the memory of its init code, and the image goes on behind the hole.
#[test]
fn init_memory_that_is_unmapped_does_not_end_the_image() {
    for mut k in kernels() {
        k.isolated = true;
        let mut ram = Ram::new(64);
        ram.install(&k);
        ram.trampoline(&k, TRAMPOLINE);
        let memory = ram.frozen();
        let found = find(&memory, &Hints::default()).unwrap();
        check(&found, &k);
        assert!(
            found
                .image()
                .parts
                .iter()
                .all(|p| p.start + p.len <= 8 * MIB || p.start >= 10 * MIB),
            "the hole is no part: {:?}",
            found.image().parts
        );
        let profile = Profile::from_memory(&memory, found.image()).unwrap();
        assert_eq!(profile.symbols.address("_end"), Some(LINK + 12 * MIB));
    }
}

/// A guest that fills its image with pages that look like top-level tables is refused soon.
#[test]
fn endless_top_level_tables_are_not_all_tried() {
    let k = Kernel::new(16 * MIB, 0x1280_0000);
    let mut ram = Ram::new(64);
    ram.install(&k);
    ram.trampoline(&k, TRAMPOLINE);
    // No direct map in the true one, so that none will do.
    (256..511).for_each(|i| ram.entry(k.dtb().0, i, 0));
    let last = ram.read(k.dtb().0 + 0xff8);
    for page in (k.phys..k.phys + 2 * MIB)
        .chain(k.phys + 5 * MIB..k.phys + 8 * MIB)
        .step_by(0x1000)
    {
        ram.entry(page, 511, last);
    }
    let FindError::NotFound { tried } = find(&ram.frozen(), &Hints::default()).unwrap_err();
    assert!(
        tried.contains("more than 1024 pages lead to level3_kernel_pgt"),
        "{tried}"
    );
}

fn two_kernels() -> (Kernel, Kernel, Ram) {
    let dead = Kernel {
        clock: 1_600_000_000,
        release: "5.10.0-dead".to_owned(),
        ..Kernel::new(16 * MIB, 0x200_0000)
    };
    let live = Kernel {
        clock: 1_700_000_000,
        release: "6.1.0-live".to_owned(),
        ..Kernel::new(40 * MIB, 0x1280_0000)
    };
    let mut ram = Ram::new(64);
    ram.install(&dead);
    ram.install(&live);
    (dead, live, ram)
}

#[test]
fn of_two_kernels_cr3_tells_which_runs() {
    let (dead, live, ram) = two_kernels();
    let mut thorough = hints(vec![live.registers(live.dtb().0)]);
    thorough.thorough = true;
    let found = find(&ram.frozen(), &thorough).unwrap();
    assert_eq!(found.candidates.len(), 2);
    check(&found, &live);
    assert!(found.why.contains("CR3"), "{}", found.why);
    // Even against its clock.
    let mut thorough = hints(vec![dead.registers(dead.dtb().0)]);
    thorough.thorough = true;
    check(&find(&ram.frozen(), &thorough).unwrap(), &dead);
}

/// What a CPU's registers say is not in the guest's hands: a decoy has the trampoline page, a later clock and, if need be, CR3.
#[test]
fn a_decoy_does_not_stand_against_where_the_cpus_go() {
    let (decoy, live, mut ram) = two_kernels();
    let decoy = Kernel {
        clock: 1_900_000_000,
        ..decoy
    };
    ram.install(&decoy);
    ram.trampoline(&decoy, TRAMPOLINE);
    let idt = ram.interrupts(&live, live.text + 0x2000);
    let memory = ram.frozen();

    // Not asked to be thorough, the trampoline is believed.
    check(&find(&memory, &Hints::default()).unwrap(), &decoy);

    let by = |change: &dyn Fn(&mut vmsight_arch::Registers)| {
        let mut registers = live.registers(live.dtb().0);
        change(&mut registers);
        let mut thorough = hints(vec![registers]);
        thorough.thorough = true;
        find(&memory, &thorough).unwrap()
    };
    let found = by(&|r| r.lstar = Some(live.text + 0x80));
    check(&found, &live);
    assert!(found.why.contains("LSTAR"), "{}", found.why);
    assert!(found.warnings.is_empty(), "{:?}", found.warnings);
    let found = by(&|r| r.idt.base = Gva(idt));
    check(&found, &live);
    assert!(found.why.contains("page-fault gate"), "{}", found.why);
    // An entry that the CPU's own tables do not map into the image proves nothing.
    let found = by(&|r| r.lstar = Some(decoy.text + 0x80));
    check(&found, &live);
    assert!(found.why.contains("CR3"), "{}", found.why);

    // Two CPUs in two kernels cannot be.
    let mut one = live.registers(live.dtb().0);
    one.lstar = Some(live.text + 0x80);
    let mut other = decoy.registers(decoy.dtb().0);
    other.lstar = Some(decoy.text + 0x80);
    other.vcpu = 1;
    let found = find(&memory, &hints_thorough(vec![one, other])).unwrap();
    check(&found, &live);
    assert!(found.warnings[0].contains("CPU 1 enters"), "{:?}", found.warnings);
}

fn hints_thorough(registers: Vec<vmsight_arch::Registers>) -> Hints {
    Hints {
        thorough: true,
        ..hints(registers)
    }
}

#[test]
fn doubts_about_the_choice_are_said() {
    // A decoy alone can be proven, and the CPU is elsewhere.
    let decoy = Kernel::new(32 * MIB, 0x1280_0000);
    let mut ram = Ram::new(64);
    ram.install(&decoy);
    ram.trampoline(&decoy, TRAMPOLINE);
    let elsewhere = vec![decoy.registers(60 * MIB)];
    let found = find(&ram.frozen(), &hints_thorough(elsewhere.clone())).unwrap();
    check(&found, &decoy);
    assert!(found.warnings[0].contains("decoy"), "{:?}", found.warnings);
    // It gets to whoever reads the profile.
    let l = locate(&ram.frozen(), &hints_thorough(elsewhere), &Cache::disabled()).unwrap();
    assert_eq!(l.profile.warnings, found.warnings);
    // With its own registers there is none.
    let own = vec![decoy.registers(decoy.dtb().0)];
    let found = find(&ram.frozen(), &hints_thorough(own)).unwrap();
    assert!(
        found.warnings.is_empty() && found.why.contains("CR3"),
        "{found:?}"
    );

    // Two, and nothing but the guest's word to choose by.
    let (_, live, ram) = two_kernels();
    let l = locate(&ram.from(MIB), &Hints::default(), &Cache::disabled()).unwrap();
    assert_eq!(l.image.text, Gva(live.text));
    assert!(
        l.profile.warnings[0].contains("2 kernels are in memory"),
        "{:?}",
        l.profile.warnings
    );
}

#[test]
fn where_nothing_can_be_read_of_the_chosen_kernel_another_is_tried() {
    let (dead, live, mut ram) = two_kernels();
    ram.trampoline(&live, TRAMPOLINE);
    ram.wipe_kallsyms(&live);
    // The trampoline leads to the one without symbols, and only a search of all memory to the other.
    let l = locate(&ram.frozen(), &Hints::default(), &Cache::disabled()).unwrap();
    assert_eq!((l.image.text, l.found.candidates.len()), (Gva(dead.text), 2));
    assert_eq!(l.found.image().text, Gva(dead.text));
    let said = l.profile.warnings.join("; ");
    assert!(
        said.contains("kernel 6.1.0-live at")
            && said.contains("instead 5.10.0-dead")
            && said.contains("kallsyms"),
        "{said}"
    );
    // Where nothing can be read of any, the reason is that of the chosen one.
    ram.wipe_kallsyms(&dead);
    let error = locate(&ram.frozen(), &Hints::default(), &Cache::disabled()).unwrap_err();
    assert!(error.to_string().contains("6.1.0-live"), "{error}");
}

#[test]
fn without_its_symbol_table_a_kernel_has_what_it_exports_and_its_types() {
    let k = Kernel {
        exports: Some(12),
        many_types: true,
        ..Kernel::new(32 * MIB, 0x1280_0000)
    };
    let mut ram = Ram::new(64);
    ram.install(&k);
    ram.trampoline(&k, TRAMPOLINE);
    ram.wipe_kallsyms(&k);
    for memory in [ram.frozen(), ram.live()] {
        let l = locate(&memory, &Hints::default(), &Cache::disabled()).unwrap();
        let at = |name: &str| l.profile.symbols.address(name).map(|a| l.image.runtime(a));
        assert_eq!(at("init_task"), Some(Gva(k.text + DATA + 0x2_0000)));
        assert_eq!(at("_text"), Some(Gva(k.text)));
        assert_eq!(at("this_cpu_off"), Some(Gva(0x30000)));
        assert!(at("linux_banner").is_some());
        // By their magic, for no symbol says where they are.
        assert_eq!(l.profile.types.member("task_struct", "pid").unwrap().offset, 40);
        assert!(
            l.profile.warnings[0].contains("only the 205 symbols that it exports"),
            "{:?}",
            l.profile.warnings
        );
    }
}

#[test]
fn types_are_found_by_their_magic_where_no_symbol_says_where() {
    for (many_types, with_btf) in [(true, true), (false, true), (true, false)] {
        let k = Kernel {
            exports: Some(12),
            many_types,
            with_btf,
            ..Kernel::new(32 * MIB, 0x1280_0000)
        };
        let mut ram = Ram::new(64);
        ram.install(&k);
        ram.trampoline(&k, TRAMPOLINE);
        let l = locate(&ram.frozen(), &Hints::default(), &Cache::disabled()).unwrap();
        // A few bytes that look like types are test data, not a kernel's.
        assert_eq!(l.profile.has_types(), many_types && with_btf);
        let said = l.profile.warnings.iter().any(|w| w.contains("no BTF"));
        assert_eq!(said, !(many_types && with_btf), "{:?}", l.profile.warnings);
        // What symbol tables for others are matched by.
        let banner = l.profile.symbols.address("linux_banner").unwrap();
        let mut text = vec![0; k.banner().len()];
        let memory = ram.frozen();
        memory.read(Gpa(k.phys + (banner - LINK)), &mut text).unwrap();
        assert_eq!(String::from_utf8(text).unwrap(), k.banner());
    }
}

/// Symbols of a file are tied to the guest by `_text`; without it, and without the guest's own, they could be anywhere.
#[test]
fn a_symbol_file_that_cannot_be_tied_to_the_guest_is_refused() {
    let k = Kernel::new(32 * MIB, 0x1280_0000);
    let mut ram = Ram::new(64);
    ram.install(&k);
    ram.trampoline(&k, TRAMPOLINE);
    let folder = tempfile::tempdir().unwrap();
    let map = |name: &str, base: u64, with_text: bool| {
        let path = folder.path().join(name);
        let lines = k.symbol_list().into_iter().filter_map(|s| {
            let start = matches!(s.name.as_str(), "_text" | "_stext" | "startup_64");
            let address = if s.address < 1 << 47 {
                s.address
            } else {
                s.address - k.text + base
            };
            let line = format!("{address:016x} {} {}\n", char::from(s.kind), s.name);
            (with_text || !start).then_some(line)
        });
        std::fs::write(&path, lines.collect::<String>()).unwrap();
        path
    };
    let with = |ram: &Ram, file: &std::path::Path| locate_with_file(&ram.frozen(), &Hints::default(), file);
    let (linked, booted) = (LINK, LINK + 0x700_0000);
    // Copied from another boot of this kernel, where KASLR had put it elsewhere.
    for (name, base) in [("System.map", linked), ("kallsyms", booted)] {
        let l = with(&ram, &map(name, base, true)).unwrap();
        let task = l.profile.symbols.address("init_task").unwrap();
        assert_eq!(l.image.runtime(task), Gva(k.text + DATA + 0x2_0000), "{name}");
        assert_eq!(l.image.runtime(0x1fbc0), Gva(0x1fbc0));
        assert!(l.profile.warnings.is_empty(), "{:?}", l.profile.warnings);
    }
    let cut = map("cut", linked, false);
    // The guest's own symbols say that those of the file are where they should be.
    with(&ram, &cut).unwrap();
    let moved = with(&ram, &map("moved", booted, false)).unwrap_err();
    assert!(matches!(moved, LocateError::WrongFile(_)), "{moved}");
    ram.wipe_kallsyms(&k);
    let error = with(&ram, &cut).unwrap_err();
    assert!(matches!(error, LocateError::NoText { .. }), "{error}");
    assert!(error.to_string().contains("neither _text nor _stext"), "{error}");
    let l = with(&ram, &map("kallsyms", booted, true)).unwrap();
    let task = l.profile.symbols.address("init_task").unwrap();
    assert_eq!(l.image.runtime(task), Gva(k.text + DATA + 0x2_0000));
}

#[test]
fn of_two_kernels_the_clock_tells_which_runs() {
    let (_, live, ram) = two_kernels();
    let found = find(&ram.from(MIB), &Hints::default()).unwrap();
    assert_eq!(found.candidates.len(), 2);
    check(&found, &live);
    assert!(
        found.why.contains("clock") && found.why.contains("100000000 s behind"),
        "{}",
        found.why
    );
}

#[test]
fn of_two_kernels_without_clocks_the_trampoline_tells() {
    for live_first in [true, false] {
        let (a, b, _) = two_kernels();
        let (mut dead, mut live) = if live_first { (b, a) } else { (a, b) };
        dead.clock = 0;
        live.clock = 0;
        let mut ram = Ram::new(64);
        ram.install(&dead);
        ram.install(&live);
        ram.trampoline(&live, TRAMPOLINE);
        let found = find(
            &ram.frozen(),
            &Hints {
                thorough: true,
                ..Hints::default()
            },
        )
        .unwrap();
        assert_eq!(found.candidates.len(), 2);
        check(&found, &live);
        assert!(found.why.contains("trampoline"), "{}", found.why);
    }
}

#[test]
fn two_trampolines_are_a_doubt_that_registers_settle() {
    let (dead, live, mut ram) = two_kernels();
    ram.trampoline(&dead, 0x9_0000);
    ram.trampoline(&live, TRAMPOLINE);
    let found = find(&ram.frozen(), &hints(vec![live.registers(live.dtb().0)])).unwrap();
    assert_eq!(found.candidates.len(), 2);
    check(&found, &live);
}

#[test]
fn what_only_looks_like_a_kernel_is_refused_with_the_reason() {
    let k = Kernel::new(32 * MIB, 0x1280_0000);
    let mut ram = Ram::new(64);
    ram.install(&k);
    ram.trampoline(&k, TRAMPOLINE);
    let whole = ram.0.clone();
    let level3 = k.phys + DATA + 0x7000;
    let level2 = level3 + 0x1000;

    let error = |ram: &Ram| match find(&ram.frozen(), &Hints::default()) {
        Err(FindError::NotFound { tried }) => tried,
        Ok(found) => panic!("found {:?}", found.image()),
    };
    // The tables of an image elsewhere.
    let first = (k.text - 0xffff_ffff_8000_0000) / (2 * MIB);
    (0..4).for_each(|i| ram.entry(level2, first + i, (2 * MIB * i) | 0x1e3));
    let tried = error(&ram);
    assert!(tried.contains("lies outside the image"), "{tried}");
    assert!(tried.contains("a banner \"Linux version 6.1.0-test"), "{tried}");

    // No direct map.
    ram.0.clone_from(&whole);
    (256..511).for_each(|i| ram.entry(k.dtb().0, i, 0));
    let tried = error(&ram);
    assert!(tried.contains("no direct map"), "{tried}");

    // Everything but a banner.
    ram.0.clone_from(&whole);
    ram.put(k.phys + 2 * MIB, &[0; 0x2000]);
    let tried = error(&ram);
    assert!(tried.contains("no Linux banner"), "{tried}");

    // Nothing at all.
    let tried = error(&Ram::new(8));
    assert!(
        tried.contains("trampoline") && tried.contains("no registers") && tried.contains("all of memory"),
        "{tried}"
    );
    let nothing = GuestMemory::from_bytes(vec![]).unwrap();
    assert!(find(&nothing, &Hints::default()).is_err());
}

#[test]
fn a_thousand_decoys_are_not_all_tried() {
    let mut ram = Ram::new(64);
    for i in 0..4000 {
        let page = 8 * MIB + i * 0x1000;
        ram.entry(page, 510, (page + 0x1000) | 0x63);
        ram.entry(page, 511, (page + 0x2000) | 0x67);
    }
    let start = std::time::Instant::now();
    let error = find(&ram.frozen(), &Hints::default()).unwrap_err().to_string();
    assert!(error.contains("too many") || error.len() < 4000, "{error}");
    assert!(start.elapsed().as_secs() < 60);
}

#[test]
fn profile_and_location_out_of_memory() {
    for mut k in kernels() {
        // Linked for another address than most: the boot loader's header tells.
        if k.levels == 4 {
            k.preferred = 0x20_0000;
        }
        let mut ram = Ram::new(64);
        ram.install(&k);
        ram.trampoline(&k, TRAMPOLINE);
        for memory in [ram.frozen(), ram.live()] {
            let l = locate(&memory, &Hints::default(), &Cache::disabled()).unwrap();
            let link = 0xffff_ffff_8000_0000 + k.preferred;
            assert_eq!(l.profile.text_start, link);
            assert_eq!(l.image.slide, k.text.wrapping_sub(link));
            assert_eq!(l.profile.symbols.address("_text"), Some(link));
            assert_eq!(
                l.image.runtime(l.profile.symbols.address("init_task").unwrap()),
                Gva(k.text + DATA + 0x2_0000)
            );
            assert_eq!(
                l.profile.symbols.address("current_task"),
                Some(0x1fbc0),
                "absolute values stay"
            );
            assert_eq!(
                (l.image.runtime(0x1fbc0), l.image.link_time(Gva(0x1fbc0))),
                (Gva(0x1fbc0), 0x1fbc0),
                "and KASLR moves none"
            );
            let current = l.profile.symbols.find("current_task").next().unwrap();
            assert!(current.is_absolute());
            assert!(!l.profile.symbols.find("_text").next().unwrap().is_absolute());
            assert_eq!(l.profile.types.member("task_struct", "pid").unwrap().offset, 40);
            assert_eq!(l.profile.banner, k.banner());
            assert!(l.profile.warnings.is_empty(), "{:?}", l.profile.warnings);
            assert!(l.image.evidence.iter().any(|e| e.contains("init_top_pgt agrees")));
        }
    }
}

#[test]
fn a_kernel_without_types_says_so() {
    let k = Kernel {
        with_btf: false,
        ..Kernel::new(32 * MIB, 0x1280_0000)
    };
    let mut ram = Ram::new(64);
    ram.install(&k);
    ram.trampoline(&k, TRAMPOLINE);
    let memory = ram.frozen();
    let found = find(&memory, &Hints::default()).unwrap();
    let p = Profile::from_memory(&memory, found.image()).unwrap();
    assert!(!p.has_types());
    assert!(
        p.warnings.iter().any(|w| w.contains("no BTF")),
        "{:?}",
        p.warnings
    );
}

#[test]
fn a_kernel_without_data_symbols_has_those_that_it_exports() {
    for stride in [12, 8] {
        let k = Kernel {
            exports: Some(stride),
            with_btf: false,
            ..Kernel::new(32 * MIB, 0x1280_0000)
        };
        let mut ram = Ram::new(64);
        ram.install(&k);
        ram.trampoline(&k, TRAMPOLINE);
        let l = locate(&ram.frozen(), &Hints::default(), &Cache::disabled()).unwrap();
        let symbols = &l.profile.symbols;
        assert_eq!(symbols.address("_end"), None, "no data symbols of its own");
        for (name, address) in exported(&k) {
            let link = if address < 1 << 47 {
                address
            } else {
                address - 0x1280_0000
            };
            assert_eq!(symbols.address(&name), Some(link), "{name}");
        }
        assert_eq!(symbols.address("_text"), Some(LINK));
        assert!(
            l.profile.warnings[0].contains("205 that it exports"),
            "{:?}",
            l.profile.warnings
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    /// Whatever a guest writes into its page tables: no panic, no endless search, and what is found is mapped as claimed.
    #[test]
    fn forged_page_tables(
        five in any::<bool>(),
        writes in prop::collection::vec((0_u64..10, 0_u64..512, prop_oneof![
            any::<u64>(),
            (0_u64..64 * MIB / 0x1000).prop_map(|p| p << 12 | 0x63),
            (0_u64..64 * MIB / 0x1000).prop_map(|p| p << 12 | 0xe3),
        ]), 1..12),
    ) {
        let mut k = Kernel { symbols: 60, ..Kernel::new(16 * MIB, 0x1280_0000) };
        if five {
            k = k.five_levels();
        }
        let mut ram = Ram::new(32);
        ram.install(&k);
        ram.trampoline(&k, TRAMPOLINE);
        for (page, index, value) in writes {
            ram.entry(k.phys + DATA + 0x4000 + page * 0x1000, index, value);
        }
        let memory = ram.frozen();
        let hints = Hints { thorough: true, ..hints(vec![k.registers(k.dtb().0)]) };
        if let Ok(found) = find(&memory, &hints) {
            for image in &found.candidates {
                let t = paging::walk(image.mode, &memory, image.dtb, image.text);
                prop_assert_eq!(t.map(|t| t.gpa), Ok(image.phys));
                let _ = Profile::from_memory(&memory, image);
            }
        }
    }
}
