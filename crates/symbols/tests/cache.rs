//! The profile cache: hits, and everything that must not be one.

#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

mod support;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use support::guest::{DATA, Kernel, MIB, Ram};
use vmsight_memory::GuestMemory;
use vmsight_symbols::cache::{Cache, CacheError};
use vmsight_symbols::kernel::{Hints, find};
use vmsight_symbols::{Located, Profile, ProfileSource, locate, recall};

/// A guest that runs `k`.
fn guest(k: &Kernel) -> Ram {
    let mut ram = Ram::new(48);
    ram.install(k);
    ram.trampoline(k, 0x9_8000);
    ram
}

/// The same build, elsewhere.
fn kernel() -> Kernel {
    Kernel::new(32 * MIB, 0x1280_0000)
}

fn elsewhere() -> Kernel {
    Kernel {
        direct_map: 0xffff_8888_8000_0000,
        ..Kernel::new(20 * MIB, 0x60_0000)
    }
}

fn located(memory: &GuestMemory, cache: &Cache) -> Located {
    let mut l = locate(memory, &Hints::default(), cache).unwrap();
    l.saving = None;
    l
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    all.sort();
    all
}

/// A cache with the profile of [`kernel`] in it.
fn filled() -> (tempfile::TempDir, PathBuf, Cache) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vmsight").join("profiles");
    let cache = Cache::open(&path).unwrap();
    let l = located(&guest(&kernel()).frozen(), &cache);
    assert_eq!(l.profile.source, ProfileSource::Memory);
    assert_eq!(files(&path).len(), 1);
    (dir, path, cache)
}

fn same(a: &Profile, b: &Profile) {
    assert_eq!(a.symbols, b.symbols);
    assert_eq!(a.types.btf().as_slice(), b.types.btf().as_slice());
    assert_eq!(a.types.index_bytes(), b.types.index_bytes());
    assert_eq!(
        (&a.build_id, &a.banner, &a.release, a.text_start, &a.warnings),
        (&b.build_id, &b.banner, &b.release, b.text_start, &b.warnings)
    );
}

#[test]
fn the_same_build_is_a_hit_wherever_it_lies() {
    let (_dir, path, cache) = filled();
    let first = located(&guest(&kernel()).frozen(), &Cache::disabled());
    for k in [kernel(), elsewhere()] {
        for memory in [guest(&k).frozen(), guest(&k).live()] {
            let l = located(&memory, &cache);
            assert_eq!(l.profile.source, ProfileSource::Cache);
            same(&l.profile, &first.profile);
            assert_eq!(l.image.slide, k.text - 0xffff_ffff_8100_0000);
            assert_eq!(l.image.dtb, k.dtb());
            assert_eq!(l.profile.types.member("task_struct", "pid").unwrap().offset, 40);
            assert_eq!(
                l.profile.symbols.nearest(0xffff_ffff_8100_0000).unwrap().0.name,
                "_stext"
            );
        }
    }
    assert_eq!(files(&path).len(), 1);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
    assert_eq!(
        fs::metadata(&files(&path)[0]).unwrap().permissions().mode() & 0o777,
        0o600
    );
}

#[test]
fn what_is_recalled_is_what_would_be_found() {
    let (_dir, path, cache) = filled();
    for k in [kernel(), elsewhere()] {
        for memory in [guest(&k).frozen(), guest(&k).live()] {
            let (l, found) = (recall(&memory, &cache).unwrap(), located(&memory, &cache));
            assert_eq!(l.profile.source, ProfileSource::Cache);
            same(&l.profile, &found.profile);
            assert_eq!(l.image, found.image);
            assert_eq!(l.found, found.found);
        }
    }
    // Another's tables, an empty cache, a kernel that would have to be searched for: nothing is recalled, read or kept.
    let mut forged = guest(&kernel());
    let start = (kernel().phys + 2 * MIB + 0x4000 + 0x1400) as usize;
    forged.0[start] ^= 1;
    assert!(recall(&forged.frozen(), &cache).is_none());
    assert!(recall(&guest(&kernel()).frozen(), &Cache::disabled()).is_none());
    let mut hidden = Ram::new(48);
    hidden.install(&kernel());
    assert!(recall(&hidden.frozen(), &cache).is_none());
    assert_eq!(
        located(&hidden.frozen(), &cache).profile.source,
        ProfileSource::Cache
    );
    assert_eq!(files(&path).len(), 1);
}

#[test]
fn every_layout_can_be_cached() {
    for (name, layout) in support::tables::LAYOUTS {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(&dir.path().join("p")).unwrap();
        let mut k = Kernel { layout, ..kernel() };
        k.percpu = !matches!(
            layout.addresses,
            support::tables::Addresses::BaseRelative | support::tables::Addresses::PlaceRelative
        );
        let read = located(&guest(&k).frozen(), &cache).profile;
        let k = Kernel {
            direct_map: 0xffff_8888_8000_0000,
            phys: 20 * MIB,
            text: k.text + 0x400_0000,
            ..k
        };
        let l = located(&guest(&k).frozen(), &cache);
        if layout.addresses == support::tables::Addresses::Absolute {
            // KASLR moves every address, so the sources differ: read anew, and right.
            assert_eq!(l.profile.source, ProfileSource::Memory, "{name}");
        } else {
            assert_eq!(l.profile.source, ProfileSource::Cache, "{name}");
        }
        same(&l.profile, &read);
    }
}

#[test]
fn a_forged_guest_gets_and_leaves_nothing_false() {
    let (_dir, path, cache) = filled();
    // The same build-id and banner, one symbol more: a rootkit's table.
    let forged = Kernel {
        extra: Some(("sys_evil".to_owned(), 0x8880)),
        ..kernel()
    };
    let l = located(&guest(&forged).frozen(), &cache);
    assert_eq!(
        l.profile.source,
        ProfileSource::Memory,
        "the honest guest's profile is not for this one"
    );
    assert!(l.profile.symbols.address("sys_evil").is_some());
    assert_eq!(files(&path).len(), 2);
    // And the other way round, in a cache that only the forger has filled.
    let dir = tempfile::tempdir().unwrap();
    let fresh = Cache::open(&dir.path().join("p")).unwrap();
    located(&guest(&forged).frozen(), &fresh);
    let l = located(&guest(&kernel()).frozen(), &fresh);
    assert_eq!(l.profile.source, ProfileSource::Memory);
    assert_eq!(l.profile.symbols.address("sys_evil"), None);
    // Both are in it now, and each guest has its own.
    for (k, evil) in [(kernel(), false), (forged, true)] {
        let l = located(&guest(&k).frozen(), &fresh);
        assert_eq!(l.profile.source, ProfileSource::Cache);
        assert_eq!(l.profile.symbols.address("sys_evil").is_some(), evil);
    }
}

#[test]
fn any_source_byte_that_differs_is_a_miss() {
    let (_dir, _, cache) = filled();
    let honest = guest(&kernel());
    let k = kernel();
    // In the types, in the build-id's neighbourhood nothing, in the banner, in the tables.
    for offset in [2 * MIB + MIB + 30, 2 * MIB + 0x340 + 20, 2 * MIB + 0x4000 + 0x900] {
        let mut ram = Ram(honest.0.clone());
        ram.0[(k.phys + offset) as usize] ^= 1;
        let memory = ram.frozen();
        let found = find(&memory, &Hints::default()).unwrap();
        assert!(cache.load(&memory, found.image()).is_none(), "offset {offset:#x}");
    }
    // Linked elsewhere, or so it says.
    let memory = guest(&Kernel {
        preferred: 0x200_0000,
        ..k.clone()
    })
    .frozen();
    let found = find(&memory, &Hints::default()).unwrap();
    assert!(cache.load(&memory, found.image()).is_none());
    // What is no source may differ.
    let mut ram = Ram(honest.0.clone());
    ram.0[(k.phys + DATA + 0x3_0000) as usize] ^= 1;
    let memory = ram.frozen();
    let found = find(&memory, &Hints::default()).unwrap();
    assert!(cache.load(&memory, found.image()).is_some());
}

#[test]
fn a_guest_that_changes_its_tables_while_they_are_read_poisons_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(&dir.path().join("p")).unwrap();
    // It shows forged tables to be read, and the true ones by the time the file is written.
    let forged = guest(&Kernel {
        extra: Some(("sys_evil".to_owned(), 0x8880)),
        ..kernel()
    });
    let honest = guest(&kernel());
    let memory = vmsight_memory::GuestMemory::builder()
        .mapped(
            vmsight_arch::Gpa(0),
            forged.0.len() as u64,
            &vmsight_memory::Mapping::of_bytes(
                &forged.0,
                vmsight_memory::MappingKind::Live { writable: true },
            )
            .unwrap(),
            0,
        )
        .build()
        .unwrap();
    let l = locate(&memory, &Hints::default(), &cache).unwrap();
    assert!(l.profile.symbols.address("sys_evil").is_some());
    memory.write(vmsight_arch::Gpa(0), &honest.0).unwrap();
    drop(l);
    assert_eq!(files(&dir.path().join("p")).len(), 1);
    let l = located(&honest.frozen(), &cache);
    assert_eq!(l.profile.source, ProfileSource::Memory);
    assert_eq!(l.profile.symbols.address("sys_evil"), None);
}

#[test]
fn damaged_files_are_not_used_and_replaced() {
    let (_dir, path, cache) = filled();
    let file = files(&path)[0].clone();
    let whole = fs::read(&file).unwrap();
    let memory = guest(&kernel()).frozen();
    let found = find(&memory, &Hints::default()).unwrap();
    let image = found.image();
    assert!(cache.load(&memory, image).is_some());
    for len in [0, 7, 40, 60, 200, whole.len() / 2, whole.len() - 1] {
        fs::write(&file, &whole[..len]).unwrap();
        assert!(cache.load(&memory, image).is_none(), "cut to {len}");
    }
    fs::write(&file, [whole.as_slice(), b"x"].concat()).unwrap();
    assert!(cache.load(&memory, image).is_none());
    // Every part of the file counts.
    for at in (0..whole.len()).step_by(whole.len() / 331) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x40;
        fs::write(&file, &bytes).unwrap();
        assert!(cache.load(&memory, image).is_none(), "byte {at}");
    }
    // A read goes on without it, and puts it right.
    assert_eq!(located(&memory, &cache).profile.source, ProfileSource::Memory);
    assert_eq!(fs::read(&file).unwrap(), whole);
    assert_eq!(located(&memory, &cache).profile.source, ProfileSource::Cache);
}

#[test]
fn links_and_files_that_others_can_write_are_refused() {
    let (dir, path, cache) = filled();
    let file = files(&path)[0].clone();
    let memory = guest(&kernel()).frozen();
    let found = find(&memory, &Hints::default()).unwrap();
    let image = found.image();

    fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).unwrap();
    assert!(cache.load(&memory, image).is_none());
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    assert!(cache.load(&memory, image).is_some());

    let moved = dir.path().join("moved");
    fs::rename(&file, &moved).unwrap();
    symlink(&moved, &file).unwrap();
    assert!(
        cache.load(&memory, image).is_none(),
        "a link, even to a good file"
    );
    // Writing replaces the link and leaves alone what it led to.
    let before = fs::read(&moved).unwrap();
    assert_eq!(located(&memory, &cache).profile.source, ProfileSource::Memory);
    assert!(fs::symlink_metadata(&file).unwrap().is_file());
    assert_eq!(fs::read(&moved).unwrap(), before);

    fs::remove_file(&file).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &file,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    assert!(cache.load(&memory, image).is_none(), "a pipe must not hold us up");

    let error = |path: &Path| Cache::open(path).unwrap_err();
    let linked = dir.path().join("linked");
    symlink(&path, &linked).unwrap();
    assert!(matches!(error(&linked), CacheError::Io { .. }));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
    let e = error(&path);
    assert!(
        matches!(e, CacheError::Unsafe { .. }) && e.to_string().contains("others may write"),
        "{e}"
    );
    assert!(
        matches!(error(&moved), CacheError::Io { .. }),
        "a file is no directory"
    );
}

#[test]
fn a_cache_of_another_user_is_refused() {
    if !rustix::process::geteuid().is_root() {
        // Only root can give a directory away. Then the owner of /proc/1 is somebody else's.
        assert!(matches!(
            Cache::open(Path::new("/proc/1")),
            Err(CacheError::Unsafe { .. })
        ));
        return;
    }
    let (_dir, path, cache) = filled();
    let (uid, gid) = (
        Some(rustix::fs::Uid::from_raw(65534)),
        Some(rustix::fs::Gid::from_raw(65534)),
    );
    rustix::fs::chown(&files(&path)[0], uid, gid).unwrap();
    let memory = guest(&kernel()).frozen();
    let found = find(&memory, &Hints::default()).unwrap();
    assert!(
        cache.load(&memory, found.image()).is_none(),
        "somebody else's file"
    );
    rustix::fs::chown(&path, uid, gid).unwrap();
    let e = Cache::open(&path).unwrap_err();
    assert!(e.to_string().contains("belongs to user 65534"), "{e}");
}

#[test]
fn writers_at_the_same_time_do_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p");
    let ram = guest(&kernel());
    std::thread::scope(|s| {
        for _ in 0..8 {
            s.spawn(|| {
                let cache = Cache::open(&path).unwrap();
                let memory = ram.frozen();
                for _ in 0..3 {
                    let l = located(&memory, &cache);
                    assert!(l.profile.symbols.address("init_task").is_some());
                }
            });
        }
    });
    assert_eq!(files(&path).len(), 1, "one file, and no temporary ones");
    let l = located(&ram.frozen(), &Cache::open(&path).unwrap());
    assert_eq!(l.profile.source, ProfileSource::Cache);
}

#[test]
fn what_was_used_least_goes_first() {
    let (_dir, path, cache) = filled();
    let first = files(&path)[0].clone();
    let set_age = |path: &Path, hours: u64| {
        let file = fs::File::options().write(true).open(path).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(3600 * hours))
            .unwrap();
    };
    set_age(&first, 500);
    // 63 others, all younger, and a temporary file that somebody left behind.
    for i in 0..63_u32 {
        let other = path.join(format!("{i:040x}-10-20-0123456789abcdef.profile"));
        fs::write(&other, b"old").unwrap();
        set_age(&other, 400 - u64::from(i));
    }
    let left = path.join(".new-4711-0");
    fs::write(&left, b"half").unwrap();
    set_age(&left, 2);
    // A hit makes it young again.
    let memory = guest(&kernel()).frozen();
    assert_eq!(located(&memory, &cache).profile.source, ProfileSource::Cache);
    let other = Kernel {
        build_id: (50..70).collect(),
        ..kernel()
    };
    assert_eq!(
        located(&guest(&other).frozen(), &cache).profile.source,
        ProfileSource::Memory
    );
    let now = files(&path);
    assert_eq!(now.len(), 64);
    assert!(now.contains(&first), "it has just been used");
    assert!(
        !path
            .join(format!("{:040x}-10-20-0123456789abcdef.profile", 0))
            .exists(),
        "the oldest"
    );
    assert!(!left.exists());
}

#[test]
fn a_guest_that_forges_again_and_again_keeps_few_files() {
    let (_dir, path, cache) = filled();
    for i in 0..7 {
        let forged = Kernel {
            extra: Some((format!("forged_{i}"), 0x8880)),
            ..kernel()
        };
        located(&guest(&forged).frozen(), &cache);
    }
    assert_eq!(files(&path).len(), 4);
}

#[test]
fn a_disabled_cache_keeps_nothing() {
    let cache = Cache::disabled();
    let memory = guest(&kernel()).frozen();
    for _ in 0..2 {
        let l = locate(&memory, &Hints::default(), &cache).unwrap();
        assert!(l.saving.is_none());
        assert_eq!(l.profile.source, ProfileSource::Memory);
    }
}

/// What a kernel lacks by its configuration it always lacks.
#[test]
fn kernels_that_lack_something_are_kept_and_say_so_again() {
    let without_types = Kernel {
        with_btf: false,
        ..kernel()
    };
    let functions_only = Kernel {
        exports: Some(12),
        many_types: true,
        ..kernel()
    };
    let neither = Kernel {
        exports: Some(8),
        ..without_types.clone()
    };
    for k in [without_types, functions_only, neither] {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(&dir.path().join("p")).unwrap();
        let read = located(&guest(&k).frozen(), &cache).profile;
        assert!(!read.warnings.is_empty());
        for memory in [guest(&k).frozen(), guest(&k).live()] {
            let l = located(&memory, &cache);
            assert_eq!(l.profile.source, ProfileSource::Cache, "{:?}", read.warnings);
            same(&l.profile, &read);
        }
        if k.exports.is_some() {
            // The exports are what the profile was made from, like all else.
            let mut ram = guest(&k);
            let text = b"exported_100\0";
            let at = ram.0.windows(text.len()).position(|w| w == text).unwrap();
            ram.0[at + 9] = b'9';
            let l = located(&ram.frozen(), &cache);
            assert_eq!(l.profile.source, ProfileSource::Memory);
            assert!(l.profile.symbols.address("exported_900").is_some());
        }
        if !k.with_btf {
            // A guest of the same build that has types does not lose them.
            let more = Kernel {
                with_btf: true,
                many_types: true,
                exports: Some(12),
                ..k.clone()
            };
            let l = located(&guest(&more).frozen(), &cache);
            assert!(l.profile.has_types());
        }
    }
}

/// The seed of the fuzz target `cache_file`; with VMSIGHT_WRITE_SEEDS set it is written anew.
#[test]
fn the_fuzz_seed_is_a_file_that_serves() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p");
    let cache = Cache::open(&path).unwrap();
    let k = Kernel {
        symbols: 24,
        ..Kernel::new(16 * MIB, 0)
    };
    located(&guest(&k).frozen(), &cache);
    let bytes = fs::read(&files(&path)[0]).unwrap();
    assert!(bytes.len() < 16 << 10, "{} bytes", bytes.len());
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds/cache_file");
    let seed = folder.join("small");
    if std::env::var_os("VMSIGHT_WRITE_SEEDS").is_some() {
        fs::create_dir_all(&folder).unwrap();
        fs::write(&seed, &bytes).unwrap();
    }
    assert_eq!(
        fs::read(&seed).unwrap(),
        bytes,
        "{} is not what the tests write",
        seed.display()
    );
}

/// Nothing in such a file ties it to a guest, so it would serve any of the build-id in its name.
#[test]
fn a_file_without_sources_serves_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p");
    let cache = Cache::open(&path).unwrap();
    let k = Kernel {
        with_btf: false,
        ..kernel()
    };
    let memory = guest(&k).frozen();
    located(&memory, &cache);
    let file = files(&path)[0].clone();
    let whole = fs::read(&file).unwrap();
    let found = find(&memory, &Hints::default()).unwrap();
    assert!(cache.load(&memory, found.image()).is_some());

    let number = |at: usize| u64::from_le_bytes(whole[at..at + 8].try_into().unwrap()) as usize;
    let header_len = number(8);
    let derived = number(header_len - 16) + number(header_len - 8);
    // Facts, build-id, banner and warnings; then come the sources.
    let mut at = 32 + 5 * 8;
    for _ in 0..2 {
        at += 8 + number(at);
    }
    let warnings = number(at);
    at += 8;
    for _ in 0..warnings {
        at += 8 + number(at);
    }
    let sources = number(at);
    assert!(sources >= 6);
    let rewritten = |kept: &[usize]| {
        let mut body = whole[32..at].to_vec();
        body.extend((kept.len() as u64).to_le_bytes());
        body.extend(u64::MAX.to_le_bytes());
        let mut bytes = Vec::new();
        let mut from = header_len + derived;
        for i in 0..sources {
            let entry = at + 16 + i * 16;
            let len = number(entry + 8);
            if kept.contains(&i) {
                body.extend(&whole[entry..entry + 16]);
                bytes.extend(&whole[from..from + len]);
            }
            from += len;
        }
        body.extend(&whole[header_len - 16..header_len]);
        let made = &whole[header_len..header_len + derived];
        let mut out = whole[..8].to_vec();
        out.extend((32 + body.len() as u64).to_le_bytes());
        out.extend(((32 + body.len() + made.len() + bytes.len()) as u64).to_le_bytes());
        out.extend(u64::from(crc32fast::hash(&[&body, made].concat())).to_le_bytes());
        [&out, &body, made, &bytes].concat()
    };
    let loads = |kept: &[usize]| {
        fs::write(&file, rewritten(kept)).unwrap();
        cache.load(&memory, found.image()).is_some()
    };
    let all: Vec<usize> = (0..sources).collect();
    assert!(loads(&all), "what this test writes is a file");
    assert!(!loads(&[]));
    // Build-id and banner alone do not make symbols either, nor do tables a kernel.
    assert!(!loads(&all[sources - 2..]));
    assert!(!loads(&all[..sources - 2]));
}

#[test]
fn damaged_profiles_are_not_kept() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(&dir.path().join("p")).unwrap();
    let mut ram = guest(&kernel());
    // A smeared page in the middle of the names.
    let start = (kernel().phys + 2 * MIB + 0x4000 + 0x1400) as usize;
    ram.0[start..start + 0x100].fill(0);
    let l = located(&ram.frozen(), &cache);
    assert!(
        l.profile.warnings.iter().any(|w| w.contains("damaged")),
        "{:?}",
        l.profile.warnings
    );
    assert!(files(&dir.path().join("p")).is_empty());
}
