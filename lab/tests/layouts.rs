//! Guests whose memory lies otherwise than in one piece, with nobody to ask where.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use vmsight_arch::{Gpa, Gva};
use vmsight_lab::{Guest, Kernel, Memory, Spec};
use vmsight_linux::AttachOptions as KernelOptions;
use vmsight_memory::{GuestMemory, Mapping, Region, ScanOptions};
use vmsight_target::{AttachOptions, Target, TargetError, TargetSpec};

fn prove(memory: &GuestMemory) -> Result<String, String> {
    vmsight_linux::Kernel::attach(memory.clone(), KernelOptions::default())
        .map_err(|e| e.to_string())?
        .confirm_memory_end()
        .map_err(|e| e.to_string())
}

fn attach(spec: &TargetSpec) -> Result<Target, TargetError> {
    let options = AttachOptions {
        prove: Some(&prove),
        ..Default::default()
    };
    vmsight_target::attach(spec, &options)
}

/// Three nodes of 512 MiB, the last given first: their host memory looks alike, and only one holds the kernel.
#[test]
fn equal_backends_are_told_apart_without_a_monitor() {
    let mut args = Vec::new();
    for id in ["c", "a", "b"] {
        args.extend([
            "-object".to_owned(),
            format!("memory-backend-ram,id={id},size=512M"),
        ]);
    }
    for id in ["a", "b", "c"] {
        args.extend(["-numa".to_owned(), format!("node,memdev={id}")]);
    }
    let spec = Spec {
        memory: Memory::Private,
        qemu_args: args,
        kernel_args: vec!["vmsight.idle".to_owned()],
        ..Spec::new(Kernel::V6_1)
    };
    let guest = Guest::boot(&spec.memory_mib(1536)).unwrap_or_else(|e| panic!("{e:?}"));
    let monitor = guest.qmp_path().unwrap();
    let told = attach(&TargetSpec::Qmp(monitor.clone())).unwrap_or_else(|e| panic!("{e}"));
    // The owner has the monitor now.
    let owner = guest.qmp().unwrap();
    let deduced = attach(&TargetSpec::Pid(guest.pid())).unwrap_or_else(|e| panic!("{e}"));
    let notes = deduced.notes.join("\n");
    assert!(
        notes.contains("deduced and then proven") && notes.contains("each piece"),
        "{notes}"
    );
    assert_eq!(deduced.memory.pieces().len(), 3, "{:?}", deduced.memory.pieces());

    // The same as QEMU says, in each piece: what was never touched is the same everywhere and tells nothing.
    for node in 0..3_u64 {
        let pages = (0..512 << 8).map(|page| Gpa((node << 29) + (page << 12)));
        let mut seen = 0;
        for page in pages.filter(|page| page.0 >= 1 << 20) {
            let (mut a, mut b) = ([0; 64], [0; 64]);
            told.memory.read(page, &mut a).unwrap();
            deduced.memory.read(page, &mut b).unwrap();
            if a == [0; 64] && b == [0; 64] {
                continue;
            }
            seen += usize::from(a == b);
            if seen == 100 {
                break;
            }
        }
        assert_eq!(seen, 100, "node {node}");
    }
    drop(owner);

    // The same kernel over memory in which the two pieces that do not hold it are exchanged: not believed.
    let kernel = vmsight_linux::Kernel::attach(deduced.memory.clone(), KernelOptions::default()).unwrap();
    let image = kernel
        .space()
        .translate(kernel.symbol("max_pfn").unwrap())
        .unwrap();
    let pieces = deduced.memory.pieces();
    let others: Vec<usize> = (0..3)
        .filter(|i| !pieces[*i].iter().any(|r| r.contains(image.gpa)))
        .collect();
    let over = |memory| vmsight_linux::Kernel::new(memory, kernel.image().clone(), kernel.profile().clone());
    let same = over(exchange(&deduced.memory, 0, 0)).confirm_memory_end();
    assert!(
        same.as_ref().is_ok_and(|how| how.contains("each piece")),
        "{same:?}"
    );
    let error = over(exchange(&deduced.memory, others[0], others[1]))
        .confirm_memory_end()
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("another piece of memory may belong there"),
        "{error}"
    );
}

/// A copy of the memory in which two of three pieces of 512 MiB have changed places.
fn exchange(memory: &GuestMemory, a: usize, b: usize) -> GuestMemory {
    let file = tempfile::tempfile().unwrap();
    write(memory, 1536 << 20, &file);
    let mut order = [0, 1, 2];
    order.swap(a, b);
    let mut builder = GuestMemory::builder();
    for (node, from) in (0_u64..).zip(order) {
        let piece = Mapping::live(&file, from << 29, 512 << 20, false).unwrap();
        builder = builder.mapped(Gpa(node << 29), 512 << 20, &piece, 0);
    }
    builder.build().unwrap()
}

/// Writes the first `len` bytes of memory into a file, each at its address; holes stay holes.
fn write(memory: &GuestMemory, len: u64, file: &File) {
    file.set_len(len).unwrap();
    let (mut scratch, empty) = (Vec::new(), vec![0; 1 << 16]);
    let options = ScanOptions {
        step: empty.len(),
        skip_untouched: true,
        within: Some(Region { start: Gpa(0), len }),
        ..ScanOptions::default()
    };
    for chunk in memory.chunks(&options) {
        let bytes = memory.chunk_bytes(&chunk, &mut scratch).unwrap();
        if bytes != &empty[..bytes.len()] {
            file.write_all_at(bytes, chunk.gpa.0).unwrap();
        }
    }
}

/// A file of memory as QEMU keeps it, whole and cut: memory above 4 GiB is where it belongs.
#[test]
fn a_raw_image_above_the_hole_is_laid_out_though_it_is_cut() {
    let spec = Spec {
        kernel_args: vec!["vmsight.idle".to_owned()],
        ..Spec::new(Kernel::V6_1)
    };
    let guest = Guest::boot(&spec.memory_mib(5120)).unwrap_or_else(|e| panic!("{e:?}"));
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    guest
        .paused(|_| {
            copy(&guest.memory_path().unwrap(), &image);
            Ok(())
        })
        .unwrap();
    drop(guest);
    let spec = format!("raw:{}", image.display()).parse().unwrap();
    let target = attach(&spec).unwrap();
    assert!(
        target.notes[0].contains("split at 0xc0000000"),
        "{:?}",
        target.notes
    );
    assert_eq!(target.memory.end(), Gpa(6 << 30));

    // The same in two pieces, as smaller VMMs have it: both have something of the kernel's, without NUMA's help.
    let file = File::open(&image).unwrap();
    let [low, high] =
        [(0, 3 << 30), (3 << 30, 2 << 30)].map(|(at, len)| Mapping::frozen(&file, at, len).unwrap());
    let two = GuestMemory::builder()
        .mapped(Gpa(0), low.len(), &low, 0)
        .mapped(Gpa(4 << 30), high.len(), &high, 0)
        .build()
        .unwrap();
    let proof = prove(&two);
    assert!(
        proof.as_ref().is_ok_and(|how| how.contains("each piece")),
        "{proof:?}"
    );

    // With the hole in it, and without its last 64 MiB.
    let flat = folder.path().join("flat");
    let end = (6 << 30) - CUT;
    write(&target.memory, end, &File::create(&flat).unwrap());
    let there = keeps_its_tables(&target.memory, end);
    let flat = attach(&format!("raw:{}", flat.display()).parse().unwrap()).unwrap();
    is_cut(&flat, there, "laid out flat", end);

    // Without the hole, and as much shorter.
    drop((target, two, low, high));
    let file = File::options().write(true).open(&image).unwrap();
    file.set_len((5 << 30) - CUT).unwrap();
    drop(file);
    is_cut(&attach(&spec).unwrap(), there, "split at 0xc0000000", end);
}

const CUT: u64 = 64 << 20;

/// Whether the kernel's image is mapped in its direct map by tables that lie below `end`: the kernel takes them from the
/// end of memory but where one page of 1 GiB does, so where KASLR put it decides whether they survive a cut.
fn keeps_its_tables(memory: &GuestMemory, end: u64) -> bool {
    let kernel = vmsight_linux::Kernel::attach(memory.clone(), KernelOptions::default()).unwrap();
    let read = |name| kernel.space().read_u64(kernel.symbol(name).unwrap()).unwrap();
    let image = kernel
        .space()
        .translate(kernel.symbol("_text").unwrap())
        .unwrap()
        .gpa;
    let direct = kernel
        .space()
        .translate(Gva(read("page_offset_base") + image.0))
        .unwrap();
    direct.steps.iter().all(|step| step.entry_gpa.0 < end)
}

fn is_cut(target: &Target, keeps_its_tables: bool, layout: &str, end: u64) {
    let note = &target.notes[0];
    if keeps_its_tables {
        assert!(
            note.contains(layout) && note.contains("the image is cut"),
            "{note}"
        );
        assert_eq!(target.memory.end(), Gpa(end));
    } else {
        assert!(note.contains("an image that was cut may have lost"), "{note}");
    }
}

fn copy(from: &Path, to: &Path) {
    let done = Command::new("cp")
        .args(["--sparse=always", "--"])
        .args([from, to])
        .status()
        .unwrap();
    assert!(done.success());
}
