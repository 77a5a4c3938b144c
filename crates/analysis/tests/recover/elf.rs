//! Images of a dynamic program, a static one, a module and the kernel, held against the files that they were loaded from.

use std::fs;
use std::path::Path;

use object::elf::{FileHeader64, PF_X, PT_LOAD};
use object::read::elf::{FileHeader, ProgramHeader};
use object::{LittleEndian as LE, Object, ObjectSection, ObjectSymbol};
use vmsight_analysis::recover::elf::{ElfImage, Which, WrittenElf, images, write};
use vmsight_arch::Gva;
use vmsight_lab::Kernel as Version;
use vmsight_lab::truth::Process;
use vmsight_linux::Kernel;

use crate::support::{Forgery, Subject, subject};

fn process<'s>(subject: &'s Subject, name: &str) -> &'s Process {
    let found = subject
        .guest
        .truth()
        .processes
        .iter()
        .find(|p| p.task_comm() == name);
    found.unwrap_or_else(|| panic!("no {name}"))
}

fn written(kernel: &Kernel, images: &[ElfImage], into: &Path) -> Vec<(WrittenElf, Vec<u8>)> {
    let mut out = Vec::new();
    write(kernel, images, into, |done| {
        let bytes = match &done.output {
            Some(at) => fs::read(into.join(at)).unwrap(),
            None => Vec::new(),
        };
        out.push((done.clone(), bytes));
    })
    .unwrap();
    out
}

/// Where each segment lies in a file, its first address and its bytes; those that can be executed.
fn code(bytes: &[u8]) -> Vec<(u64, u64, &[u8])> {
    let header = FileHeader64::<LE>::parse(bytes).unwrap();
    let segments = header.program_headers(LE, bytes).unwrap().iter();
    let code = segments.filter(|s| s.p_type(LE) == PT_LOAD && s.p_flags(LE) & PF_X != 0);
    code.map(|s| (s.p_offset(LE), s.p_vaddr(LE), s.data(LE, bytes).unwrap()))
        .collect()
}

fn host(path: &str) -> Vec<u8> {
    let places = [path.to_owned(), format!("/usr{path}")];
    fs::read(places.iter().find(|place| Path::new(place).exists()).unwrap()).unwrap()
}

#[test]
fn programs_and_libraries_come_back_with_the_code_of_their_files_at_the_addresses_they_had() {
    let subject = subject();
    let (dynamic, bash) = (process(&subject, "sleep"), process(&subject, "bash"));
    for (how, kernel) in subject.both() {
        for (process, wanted) in [
            (
                dynamic,
                &[
                    ("program", "/bin/sleep", "/bin/sleep"),
                    (
                        "library",
                        "/lib/x86_64-linux-gnu/libc.so.6",
                        vmsight_lab::initramfs::LIBC,
                    ),
                    (
                        "library",
                        "/lib64/ld-linux-x86-64.so.2",
                        "/lib64/ld-linux-x86-64.so.2",
                    ),
                ][..],
            ),
            (bash, &[("program", "/bin/bash", "/bin/bash-static")][..]),
        ] {
            let pid = i32::try_from(process.pid).unwrap();
            let listing = images(&kernel, Which::Process(pid)).unwrap();
            assert_eq!(listing.warnings, [""; 0], "{how}");
            let folder = tempfile::tempdir().unwrap();
            let into = folder.path().join("out");
            let all = written(&kernel, &listing.rows, &into);
            assert_eq!(
                all.len(),
                wanted.len() + 1,
                "{how}: the images and the vdso: {all:#?}"
            );
            for (kind, path, file) in wanted {
                let (done, bytes) = all
                    .iter()
                    .find(|(done, _)| done.image.path.as_deref() == Some(path))
                    .unwrap_or_else(|| panic!("{how}: no {path}"));
                assert_eq!(done.image.kind, *kind, "{how}: {path}");
                assert_eq!(
                    (&done.failure, done.missing, &done.image.problems[..]),
                    (&None, 0, &[][..]),
                    "{how}: {path}"
                );
                let original = host(file);
                let (rebuilt, original) = (code(bytes), code(&original));
                assert_eq!(rebuilt.len(), original.len());
                for ((offset, address, code), (own_offset, _, own)) in rebuilt.iter().zip(&original) {
                    assert_eq!(offset, own_offset, "{how}: {path}");
                    assert!(code == own, "{how}: {path}: the code differs");
                    let map = process
                        .maps
                        .iter()
                        .find(|map| (map.start..map.end).contains(address));
                    assert_eq!(map.unwrap().path.to_string(), *path, "{how}");
                }
                let parsed = object::File::parse(&**bytes).unwrap();
                assert_eq!(Some(Gva(parsed.entry())), done.image.entry, "{how}: {path}");
                let text = parsed.section_by_name(".text").unwrap();
                assert!(text.data().unwrap() == rebuilt[0].2, "{how}: {path}");
            }
            // Hardly a program uses all of a library: the rest is in the page cache.
            assert!(all.iter().any(|(done, _)| done.from_cache > 0), "{how}");
            let (vdso, bytes) = all.iter().find(|(done, _)| done.image.kind == "vdso").unwrap();
            assert_eq!(vdso.missing, 0);
            assert_eq!(code(bytes)[0].1, vdso.image.start.0);
            let lines = fs::read_to_string(into.join("manifest.jsonl")).unwrap();
            assert_eq!(lines.lines().count(), all.len());
        }
        assert!(images(&kernel, Which::Process(i32::MAX)).is_err());
    }
}

#[test]
fn a_module_comes_back_with_its_sections_and_symbols() {
    let subject = subject();
    let kernel = subject.dumped();
    let listing = images(&kernel, Which::Module("dummy")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let all = written(&kernel, &listing.rows, folder.path());
    let [(done, bytes)] = &all[..] else {
        panic!("{all:?}");
    };
    assert_eq!((&done.failure, done.missing), (&None, 0), "{done:?}");
    let parsed = object::File::parse(&**bytes).unwrap();
    let truth = subject.guest.truth();
    let own = truth.modules.iter().find(|m| m.name == "dummy").unwrap();
    // Those of its start are gone; what each processor has is elsewhere.
    let there: Vec<_> = own
        .sections
        .iter()
        .filter(|(name, _)| !["init", "percpu", "tab"].iter().any(|part| name.contains(part)))
        .collect();
    assert!(there.len() > 10, "{there:?}");
    for (name, address) in there {
        let section = parsed.section_by_name(name);
        let section = section.unwrap_or_else(|| panic!("no section {name}"));
        assert_eq!(section.address(), *address, "{name}");
    }
    let text = parsed.section_by_name(".text").unwrap();
    let symbol = parsed.symbols().find(|s| s.name() == Ok("dummy_xmit")).unwrap();
    assert_eq!(symbol.section_index(), Some(text.index()));
    // The code is that of the file but where addresses were put in and the kernel chose among alternatives.
    let module = &Version::V6_12.fetch().unwrap().modules(&[("dummy", "")]).unwrap()[0];
    let file = module.read().unwrap();
    let file = object::File::parse(&*file).unwrap();
    let original = file.section_by_name(".text").unwrap();
    let mut patched = vec![false; original.size() as usize];
    for (offset, _) in original.relocations() {
        // With the byte before, which is a call's that function tracing takes out.
        let from = offset.saturating_sub(1) as usize;
        patched[from..offset as usize + 4].fill(true);
    }
    let (code, own) = (text.data().unwrap(), original.data().unwrap());
    let kept = patched.iter().filter(|patched| !**patched).count();
    let same = (0..own.len())
        .filter(|&n| !patched[n] && code[n] == own[n])
        .count();
    assert!(
        kept > 200 && same * 100 >= kept * 95,
        "{same} of {kept} bytes are as in the file"
    );
}

#[test]
fn the_kernel_comes_back_with_its_symbols() {
    let subject = subject();
    let kernel = subject.dumped();
    let listing = images(&kernel, Which::Kernel).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let all = written(&kernel, &listing.rows, folder.path());
    let (done, bytes) = &all[0];
    assert_eq!((&done.failure, done.missing), (&None, 0), "{done:?}");
    let parsed = object::File::parse(&**bytes).unwrap();
    let banner = parsed.symbols().find(|s| s.name() == Ok("linux_banner")).unwrap();
    assert_eq!(Gva(banner.address()), kernel.symbol("linux_banner").unwrap());
    let section = parsed.section_by_index(banner.section_index().unwrap()).unwrap();
    let text = section.data_range(banner.address(), 100).unwrap().unwrap();
    let release = format!("Linux version {} ", subject.guest.truth().system.release);
    assert!(text.starts_with(release.as_bytes()), "{text:?}");
}

#[test]
fn images_that_lie_write_nothing_elsewhere_and_fill_no_disk() {
    let subject = subject();
    let bash = process(&subject, "bash");
    let pid = i32::try_from(bash.pid).unwrap();
    let before = subject.dumped();
    let image = images(&before, Which::Process(pid)).unwrap().rows.remove(0);
    let header = |kernel: &Kernel| {
        let space = kernel.process_space(pid).unwrap().unwrap();
        space.translate(image.start).unwrap().gpa.0
    };
    let task = before
        .all_maps()
        .unwrap()
        .rows
        .into_iter()
        .find(|process| process.pid == pid)
        .unwrap()
        .task;
    // What is written over the first program header that is loaded, or the file header, and where.
    let huge = u64::MAX.to_le_bytes();
    let lies: [(u64, &[u8]); 5] = [
        (56, &[0xff, 0xff]),
        (32, &huge),
        (64 + 8, &huge),
        (64 + 16, &huge),
        (64 + 40, &huge),
    ];
    for (offset, bytes) in lies {
        let forged = Forgery::of(&subject);
        let at = header(&forged.kernel);
        let mut segments = vec![0; 16 * 56];
        let space = forged.kernel.process_space(pid).unwrap().unwrap();
        space.read(image.start.wrapping_add(64), &mut segments).unwrap();
        // Any segment that is loaded will do: the first in the table that is.
        let load = segments
            .chunks(56)
            .position(|s| s[..4] == PT_LOAD.to_le_bytes())
            .unwrap();
        let offset = if offset >= 64 {
            offset + load as u64 * 56
        } else {
            offset
        };
        forged.put_at(at + offset, bytes);
        forged.put(forged.member("task_struct", "comm", task), b"../../../escaped");
        let kernel = forged.forged();
        let rows = images(&kernel, Which::Process(pid)).unwrap().rows;
        let top = tempfile::tempdir().unwrap();
        let into = top.path().join("a/b/out");
        fs::create_dir_all(into.parent().unwrap()).unwrap();
        let all = written(&kernel, &rows, &into);
        let (done, bytes) = all.iter().find(|(done, _)| done.image.kind == "program").unwrap();
        let said = done.failure.is_some() || !done.image.problems.is_empty() || done.missing > 0;
        assert!(said && bytes.len() < 64 << 20, "{offset}: {done:?}");
        let here: Vec<_> = fs::read_dir(top.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(here, ["a"], "{offset}");
        let folders: Vec<_> = fs::read_dir(&into)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert!(folders.len() <= 2, "{folders:?}");
    }
}

/// Where an area ends with the last address there is, and where a file's offset and what lies behind it are no number any more.
#[test]
fn areas_and_offsets_at_the_end_of_all_numbers_end_too() {
    let subject = subject();
    let pid = i32::try_from(process(&subject, "bash").pid).unwrap();
    let forged = Forgery::of(&subject);
    let maps = forged.kernel.maps(pid).unwrap().rows;
    let anonymous = maps.iter().rfind(|map| map.path.is_none()).unwrap();
    let [start, end] =
        ["vm_start", "vm_end"].map(|member| forged.member("vm_area_struct", member, anonymous.vma));
    // As long as an ELF header.
    forged.put(start, &(u64::MAX - 63).to_le_bytes());
    forged.put(end, &u64::MAX.to_le_bytes());
    let later = maps.iter().filter(|map| map.inode != 0 && map.offset != 0);
    let mut moved = 0;
    for map in later {
        let offset = forged.member("vm_area_struct", "vm_pgoff", map.vma);
        forged.put(offset, &(u64::MAX >> 12).to_le_bytes());
        moved += 1;
    }
    assert!(moved >= 4, "{maps:?}");
    let kernel = forged.forged();
    let rows = images(&kernel, Which::Process(pid)).unwrap().rows;
    let folder = tempfile::tempdir().unwrap();
    let all = written(&kernel, &rows, folder.path());
    let (program, bytes) = all.iter().find(|(done, _)| done.image.kind == "program").unwrap();
    assert!(program.missing > 0 && bytes.len() < 64 << 20, "{program:?}");
}
