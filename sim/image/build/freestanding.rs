//! Cargo as it is called for programs that run without an operating system. The build script uses it, and the test that lints
//! them.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What has no operating system needs neither position independence nor start files, and must not unwind. SHA-256 is made of
/// general instructions: asking the processor for better ones, by CPUID, would make the monitor leave the guest. There are no tables of
/// jumps: what a piece of code can reach is to be seen in it.
const FLAGS: &str = "-Crelocation-model=static -Ccode-model=small -Clink-arg=-nostartfiles -Clink-arg=-nodefaultlibs \
    -Clink-arg=-static -Clink-arg=-no-pie -Clink-arg=-Wl,--build-id=none -Clink-arg=-Wl,-z,max-page-size=4096 \
    -Cllvm-args=-min-jump-table-entries=1000 --cfg=sha2_backend=\"soft\"";
pub(crate) const TARGET: &str = "x86_64-unknown-linux-gnu";
const PROFILE: [&str; 4] = [
    "profile.release.panic=\"abort\"",
    "profile.release.lto=true",
    "profile.release.debug=false",
    "profile.release.strip=true",
];

/// A program of a package.
pub(crate) struct Source {
    pub(crate) package: &'static str,
    pub(crate) program: &'static str,
    /// Features beside `freestanding`.
    pub(crate) features: &'static str,
}

/// The top of the source tree.
pub(crate) fn workspace() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.ancestors().nth(2).unwrap_or(package).to_path_buf()
}

impl Source {
    /// Runs `cargo VERB` for it; what cargo said is the error.
    pub(crate) fn cargo(&self, verb: &str, target: &Path, rest: &[&str]) -> Result<(), String> {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
        let features = format!("freestanding,{}", self.features);
        let mut command = Command::new(cargo);
        command
            .args([verb, "--quiet", "--locked", "--release", "--target", TARGET])
            .args(["--features", features.trim_end_matches(',')])
            .args(["--package", self.package, "--bin", self.program])
            .arg("--target-dir")
            .arg(target);
        for setting in PROFILE {
            command.args(["--config", setting]);
        }
        // What the cargo that runs this says to its build scripts is not meant for another cargo.
        for variable in [
            "CARGO_ENCODED_RUSTFLAGS",
            "CARGO_BUILD_TARGET",
            "CARGO_BUILD_RUSTFLAGS",
            "RUSTC_WORKSPACE_WRAPPER",
            "CLIPPY_ARGS",
        ] {
            command.env_remove(variable);
        }
        let output = command
            .args(rest)
            .env("RUSTFLAGS", FLAGS)
            .current_dir(workspace())
            .stdin(Stdio::null())
            .output()
            .map_err(|error| format!("cargo {verb} of {} cannot be run: {error}", self.program))?;
        match output.status.success() {
            true => Ok(()),
            false => Err(format!(
                "cargo {verb} of {} failed:\n{}",
                self.program,
                String::from_utf8_lossy(&output.stderr)
            )),
        }
    }
}
