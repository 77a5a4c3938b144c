//! What only a graphics card has: the console in front in VGA's text mode, and VESA's framebuffer. Of guests that run, of what
//! QEMU's `dump-guest-memory` makes of them, which has the card's memory, and of plain images, which have not.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod picture;
mod text;

use std::path::Path;

use vmsight_analysis::recover::DeviceMemory;
use vmsight_lab::orders::Ended;
use vmsight_lab::{Format, Guest, Kernel as Version, Spec, Work};
use vmsight_linux::{AttachOptions, Kernel};
use vmsight_memory::{GuestMemory, dump};
use vmsight_target::{Target, TargetSpec};

/// A guest with a card of QEMU's that is VGA and VESA.
fn boot(version: Version, words: &[&str]) -> Guest {
    let mut spec = Spec::new(version).idle().orders();
    spec.qemu_args.extend(["-device", "VGA"].map(str::to_owned));
    spec.kernel_args.extend(words.iter().map(|&word| word.to_owned()));
    Guest::boot(&spec).unwrap_or_else(|e| panic!("{e:?}"))
}

/// Has the guest's shell do something, and gives what it prints.
fn shell(guest: &Guest, script: &str) -> String {
    let account = guest
        .order(Work::Exec {
            path: "/bin/busybox".into(),
            argv: vec![
                "sh".into(),
                "-c".into(),
                format!("set -e; exec 2>&1 </dev/null; cd /tmp\n{script}")
                    .as_str()
                    .into(),
            ],
            envp: vec!["PATH=/usr/bin:/bin".into()],
        })
        .unwrap_or_else(|e| panic!("{script}: {e:#}"));
    let output = String::from_utf8_lossy(account.output.bytes()).into_owned();
    assert_eq!(account.ended, Some(Ended::Exited(0)), "{script}: {output}");
    output
}

fn target(guest: &Guest) -> Target {
    let spec = TargetSpec::Qmp(guest.qmp_path().unwrap());
    let options = vmsight_target::AttachOptions {
        write: true,
        ..Default::default()
    };
    vmsight_target::attach(&spec, &options).unwrap_or_else(|e| panic!("{e}"))
}

fn kernel(memory: GuestMemory) -> Kernel {
    Kernel::attach(memory, AttachOptions::default()).unwrap_or_else(|e| panic!("{e}"))
}

/// A target's own.
fn devices(target: &Target) -> DeviceMemory<'_> {
    DeviceMemory::new(|| target.device_memory().map_err(|e| e.to_string()))
}

/// The kernel of a dump, and what is asked for its devices, which nobody does.
fn dumped(guest: &Guest, format: Format, path: &Path) -> (Kernel, DeviceMemory<'static>) {
    guest.dump(format, path).unwrap_or_else(|e| panic!("{e:?}"));
    let kernel = kernel(dump::open(path, None).unwrap().memory);
    (
        kernel,
        DeviceMemory::new(|| panic!("a dump's devices are in the dump")),
    )
}
