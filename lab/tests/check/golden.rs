//! Code held against trusted copies: one of our own making, and what the distribution ships.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use vmsight_analysis::baseline::{Source, Trusted, TrustedError};
use vmsight_analysis::{Baseline, Context, Evidence, Finding, checks, run};
use vmsight_arch::Gva;
use vmsight_lab::Spec;
use vmsight_lab::kernel::{Fetched, Kernel};

use super::{Live, expect, near, shows};

/// What a trusted copy shows and no rule does: a function that returns early.
pub(crate) fn copy(live: &Live) {
    let (baseline, notes) = Baseline::of(&live.context).unwrap_or_else(|e| panic!("{e}"));
    assert!(notes.is_empty(), "{notes:?}");
    let held = || Context::new(live.context.kernel().clone()).with_baseline(baseline.clone());
    let clean = run(&held(), &[&checks::GOLDEN], &|_| {}).remove(0);
    assert!(
        clean.findings.is_empty() && !clean.failed && clean.looked_at > 0,
        "{clean:#?}"
    );
    let place = live.symbol("kernel_halt").wrapping_add(32);
    live.guest
        .paused(|_| {
            let mut old = [0];
            live.context.space().read(place, &mut old).unwrap();
            live.context.space().write(place, &[0xc3]).unwrap();
            let found = run(&held().paused(), &[&checks::GOLDEN], &|_| {}).remove(0).findings;
            live.context.space().write(place, &old).unwrap();
            let finding = expect(&found, "golden", "kernel_halt+0x20", place);
            let is = |e: &Evidence| matches!(e, Evidence::Bytes { what, bytes, .. } if what == "bytes now" && *bytes == [0xc3]);
            assert!(finding.evidence.iter().any(is), "{finding:#?}");
            assert_eq!(found.len(), 1, "{found:#?}");
            Ok(())
        })
        .unwrap();
}

/// The same with what the distribution ships in the place of the copy: its files say what the kernel patches, and where.
pub(crate) fn files(live: &Live, kernel: Kernel) {
    let fetched = kernel.fetch().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let given = match kernel {
        Kernel::V6_1 => vec![package(live, &fetched, folder.path())],
        _ => vec![fetched.vmlinuz(), fetched.modules_folder()],
    };
    let trusted = Arc::new(read(live, &given).unwrap_or_else(|e| panic!("{e}")));
    let modules = live.context.modules();
    assert_eq!(trusted.module_files(), modules.len(), "{given:?}");
    let held = |paused: bool| {
        let context = Context::new(live.context.kernel().clone()).with_trusted(trusted.clone());
        let context = if paused { context.paused() } else { context };
        run(&context, &[&checks::GOLDEN], &|_| {}).remove(0)
    };
    let clean = held(false);
    let all = !clean.notes.iter().any(|note| note.contains("not compared"));
    assert!(
        clean.findings.is_empty() && all && clean.looked_at > 0,
        "{clean:#?}"
    );
    if kernel != Kernel::V6_1Cloud {
        tampered(live, &|| held(true).findings);
    } else {
        let other = Kernel::V6_1.fetch().unwrap().modules_folder();
        let error = read(live, &[other]).unwrap_err();
        let TrustedError::Other { there, guest, .. } = &error else {
            panic!("{error}")
        };
        let is = |id: &String| modules.iter().any(|module| module.build_id.as_ref() == Some(id));
        assert!(is(guest) && !is(there), "{error}");
    }
}

fn read(live: &Live, given: &[PathBuf]) -> Result<Trusted, TrustedError> {
    let sources = given.iter().map(|path| Source::open(path));
    Trusted::read(&live.context, sources.collect::<Result<_, _>>()?)
}

/// A package as Debian builds them, of the kernel and the modules that the guest has loaded.
fn package(live: &Live, fetched: &Fetched, folder: &Path) -> PathBuf {
    let root = folder.join("root");
    let modules = root.join("lib/modules").join(&fetched.release);
    for path in [root.join("boot"), root.join("DEBIAN"), modules.clone()] {
        fs::create_dir_all(path).unwrap();
    }
    fs::copy(
        fetched.vmlinuz(),
        root.join(format!("boot/vmlinuz-{}", fetched.release)),
    )
    .unwrap();
    let loaded: Vec<(&str, &str)> = live
        .context
        .modules()
        .iter()
        .map(|m| (m.name.as_str(), ""))
        .collect();
    for module in fetched.modules(&loaded).unwrap() {
        fs::copy(&module.path, modules.join(module.path.file_name().unwrap())).unwrap();
    }
    let control = "Package: linux-image-lab\nVersion: 1\nArchitecture: amd64\nMaintainer: lab <lab@localhost>\nDescription: lab\n";
    fs::write(root.join("DEBIAN/control"), control).unwrap();
    let package = folder.join("linux-image.deb");
    let built = Command::new("dpkg-deb")
        .args(["--root-owner-group", "-Zxz", "-z0", "--build"])
        .args([&root, &package])
        .output()
        .unwrap();
    assert!(built.status.success(), "{built:?}");
    package
}

/// What no rule sees: bytes within functions of the kernel and of a module, a call from where a function may be traced that leads to
/// the kernel's own code, a pointer in read-only data.
fn tampered(live: &Live, held: &dyn Fn() -> Vec<Finding>) {
    let of_ext4 = |name: &str| {
        let symbols = live.context.module_symbols().iter();
        let found = symbols.filter(|s| *s.module == *"ext4").find(|s| s.name == name);
        found.unwrap_or_else(|| panic!("no {name}")).address
    };
    let (function, _) = live.in_module();
    let other = of_ext4("ext4_sync_file");
    let begins_branch = |at: Gva| {
        let mut head = [0; 4];
        live.context.space().read(at, &mut head).unwrap();
        head == [0xf3, 0x0f, 0x1e, 0xfa]
    };
    let traced = other.wrapping_add(if begins_branch(other) { 4 } else { 0 });
    let operations = live
        .context
        .object("file_operations", of_ext4("ext4_file_operations"))
        .unwrap();
    let pointer = operations.member("read_iter").unwrap();
    let led_to = Gva(live.word(pointer));
    let to = live.symbol("kernel_halt");
    let inside = |at: Gva| {
        let mut old = [0];
        live.context.space().read(at, &mut old).unwrap();
        (at, vec![!old[0]])
    };
    let writes = [
        inside(live.symbol("kernel_halt").wrapping_add(32)),
        inside(function.wrapping_add(32)),
        (traced, near(0xe8, traced, to)),
        (pointer, to.0.to_le_bytes().to_vec()),
    ];
    let (found, old) = live
        .guest
        .paused(|_| {
            let space = live.context.space();
            let old = writes.each_ref().map(|(at, bytes)| {
                let mut old = vec![0; bytes.len()];
                space.read(*at, &mut old).unwrap();
                space.write(*at, bytes).unwrap();
                old
            });
            let found = held();
            for ((at, _), old) in writes.iter().zip(&old) {
                space.write(*at, old).unwrap();
            }
            Ok((found, old))
        })
        .unwrap();
    for ((at, new), old) in writes.iter().zip(&old) {
        // What is written may begin as what is expected.
        let within = |f: &&Finding| {
            f.address
                .is_some_and(|a| (at.0..at.0 + new.len() as u64).contains(&a.0))
        };
        let one = found.iter().find(within);
        let one = one.unwrap_or_else(|| panic!("nothing of {at}: {found:#?}"));
        let first = one.address.unwrap();
        let skipped = usize::try_from(first.0 - at.0).unwrap();
        assert_eq!(one.subject, live.context.name(first).unwrap());
        let has = |what: &str, bytes: &[u8]| {
            let is = |e: &Evidence| matches!(e, Evidence::Bytes { what: w, at: a, bytes: b } if w == what && *a == first && bytes.starts_with(b));
            assert!(one.evidence.iter().any(is), "{what} {bytes:x?}: {one:#?}");
        };
        has("bytes now", &new[skipped..]);
        // NOPs differ between kernels.
        if *at != traced {
            has("bytes then", &old[skipped..]);
        }
    }
    let of_pointer = found.iter().find(|f| f.address == Some(pointer)).unwrap();
    shows(of_pointer, "led to", led_to);
    shows(of_pointer, "leads to", to);
    assert_eq!(found.len(), writes.len(), "{found:#?}");
    assert!(held().is_empty());
}

#[test]
fn a_baseline_is_for_the_next_boot_too() {
    let boot = || Live::boot(&Spec::new(Kernel::V6_12).idle());
    let (baseline, notes) = Baseline::of(&boot().context).unwrap_or_else(|e| panic!("{e}"));
    assert!(notes.is_empty(), "{notes:?}");
    let next = boot();
    let context = Context::new(next.context.kernel().clone()).with_baseline(baseline);
    let outcome = run(&context, &[&checks::GOLDEN], &|_| {}).remove(0);
    assert!(
        outcome.findings.is_empty() && outcome.looked_at > 0,
        "{outcome:#?}"
    );
}
