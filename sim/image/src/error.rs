//! What goes wrong when an image is made, run, and read.

use std::io;
use std::path::PathBuf;

use vmsight_sim_abi::Malformed;
use vmsight_sim_hypervisor::linux::NotBootable;

/// Why there is no image, or no run. The messages say what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The library was built without its programs.
    #[error("the program {program} is not part of this build, for it could not be built: {why}")]
    NotBuilt {
        /// Which.
        program: String,
        /// What the compiler said.
        why: String,
    },
    /// The kernel is none that the hypervisor can start.
    #[error("the kernel cannot be started: {}", not_bootable(*.0))]
    Kernel(NotBootable),
    /// The monitor is none.
    #[error("the monitor is no image of one: {0}")]
    Monitor(&'static str),
    /// The policy is none.
    #[error("this is no policy: {0:?}")]
    Policy(Malformed),
    /// GRUB's configuration has no way to say it.
    #[error("GRUB would not take this command line as it is, for it has one of \\n ' \" \\ $ ; {{ }}: {0}")]
    CommandLine(String),
    /// A program is not installed.
    #[error("{program} is not installed: it is in Debian's packages {packages}")]
    NotInstalled {
        /// The program, or the file that is missing.
        program: &'static str,
        /// What to install.
        packages: &'static str,
    },
    /// A program ended with an error.
    #[error("{program} failed: {output}")]
    Failed {
        /// Which.
        program: &'static str,
        /// What it said.
        output: String,
    },
    /// A file or process cannot be used.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// For `map_err`: what was tried with what.
pub(crate) fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
    let path = path.into();
    move |source| Error::Io { what, path, source }
}

fn not_bootable(why: NotBootable) -> String {
    match why {
        NotBootable::NoHeader => "it is no bzImage of Linux's boot protocol".to_owned(),
        NotBootable::TooOld(version) => format!(
            "its boot protocol is {}.{}, and 2.12 is the oldest that will do",
            version >> 8,
            version & 0xff
        ),
        NotBootable::No64BitEntry => "it has no 64-bit entry".to_owned(),
        NotBootable::CutShort => "it is shorter than its header says".to_owned(),
        NotBootable::CommandLine(most) => format!("its command line may have {most} bytes at most"),
    }
}
