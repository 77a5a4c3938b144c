//! The programs that run without an operating system.

use std::ffi::OsString;
use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use object::{Object, ObjectSegment};
use vmsight_lab::cache::{self, Lock};

/// One of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// The hypervisor: an ELF file that GRUB loads.
    Hypervisor,
    /// The hypervisor without the view of the gate: VMFUNC leads into the monitor's view, where the guest's own page tables
    /// are used. A control: attacks succeed.
    TwoViews,
    /// The same, but that page tables of the monitor's are used whatever CR3 says.
    TwoViewsApt,
    /// The hypervisor with a gate that leaves the guest's page tables in use. A control likewise.
    GuestTables,
    /// The monitor: a flat image.
    Monitor,
    /// The monitor with a handler that does not end, for one argument.
    EndlessMonitor,
    /// The guest that attacks it: a bzImage.
    Trial,
    /// The first program of a Linux guest, which counts what it does: an ELF file.
    Witness,
}

/// What has no operating system needs neither position independence nor start files, and must not unwind. SHA-256 is made of
/// general instructions: asking the processor for better ones, by CPUID, would make the monitor leave the guest. There are no tables of
/// jumps: what a piece of code can reach is to be seen in it.
const FLAGS: &str = "-Crelocation-model=static -Ccode-model=small -Clink-arg=-nostartfiles -Clink-arg=-nodefaultlibs \
    -Clink-arg=-static -Clink-arg=-no-pie -Clink-arg=-Wl,--build-id=none -Clink-arg=-Wl,-z,max-page-size=4096 \
    -Cllvm-args=-min-jump-table-entries=1000 --cfg=sha2_backend=\"soft\"";
const TARGET: &str = "x86_64-unknown-linux-gnu";
const PROFILE: [&str; 4] = [
    "profile.release.panic=\"abort\"",
    "profile.release.lto=true",
    "profile.release.debug=false",
    "profile.release.strip=true",
];

impl Program {
    fn features(self) -> &'static str {
        match self {
            Self::TwoViews => "freestanding,two-views",
            Self::TwoViewsApt => "freestanding,two-views-apt",
            Self::GuestTables => "freestanding,guest-tables",
            Self::EndlessMonitor => "freestanding,endless",
            _ => "freestanding",
        }
    }

    fn package_and_name(self) -> (&'static str, &'static str) {
        match self {
            Self::Hypervisor | Self::TwoViews | Self::TwoViewsApt | Self::GuestTables => {
                ("vmsight-sim-hypervisor", "vmsight-hypervisor")
            }
            Self::Monitor | Self::EndlessMonitor => ("vmsight-sim-monitor", "vmsight-monitor"),
            Self::Trial => ("vmsight-sim-trial", "vmsight-trial"),
            Self::Witness => ("vmsight-sim-witness", "vmsight-witness"),
        }
    }

    /// Lints it as it is built.
    pub fn lint(self) -> Result<()> {
        let _lock = Lock::wait("sim-programs")?;
        self.cargo("clippy", &["--quiet"])
    }

    fn cargo(self, verb: &str, options: &[&str]) -> Result<()> {
        let (package, name) = self.package_and_name();
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
        let mut command = Command::new(cargo);
        command.arg(verb).args(options);
        command.args([
            "--locked",
            "--release",
            "--features",
            self.features(),
            "--target",
            TARGET,
        ]);
        command.args(["--package", package, "--bin", name]);
        for setting in PROFILE {
            command.args(["--config", setting]);
        }
        command
            .arg("--target-dir")
            .arg(cache::workspace().join("target/sim"));
        if verb == "clippy" {
            command.args(["--", "-D", "warnings"]);
        }
        let output = command
            .env("RUSTFLAGS", FLAGS)
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env_remove("CARGO_BUILD_TARGET")
            .current_dir(cache::workspace())
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("run cargo {verb} for {name}"))?;
        if !output.status.success() {
            bail!(
                "cargo {verb} of {name} failed:\n{}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(())
    }

    /// Builds it, in a target folder of its own: what GRUB loads, an ELF file for the hypervisor, and for the others what of
    /// it is loaded into memory.
    pub fn bytes(self) -> Result<Vec<u8>> {
        // Variants of the hypervisor have one name.
        let _lock = Lock::wait("sim-programs")?;
        self.cargo("build", &["--quiet"])?;
        let (package, name) = self.package_and_name();
        let folder = cache::workspace().join("target/sim").join(TARGET).join("release");
        let path = folder.join(name);
        let bytes = fs::read(&path).with_context(|| format!("read {}, of {package}", path.display()))?;
        match self {
            Self::Monitor | Self::EndlessMonitor | Self::Trial => {
                flat(&bytes).with_context(|| format!("flatten {}", path.display()))
            }
            _ => Ok(bytes),
        }
    }
}

/// What an ELF file loads, from its lowest address on.
fn flat(bytes: &[u8]) -> Result<Vec<u8>> {
    /// No program of ours is longer.
    const MOST: u64 = 16 << 20;
    let file = object::File::parse(bytes)?;
    let base = file
        .segments()
        .map(|s| s.address())
        .min()
        .context("it loads nothing")?;
    let mut image = Vec::new();
    for segment in file.segments() {
        let data = segment.data()?;
        let start = segment.address() - base;
        let end = start.saturating_add(data.len() as u64);
        if end > MOST {
            bail!("it loads {end} bytes");
        }
        let (start, end) = (start as usize, end as usize);
        if image.len() < end {
            image.resize(end, 0);
        }
        if let Some(slot) = image.get_mut(start..end) {
            slot.copy_from_slice(data);
        }
    }
    Ok(image)
}
