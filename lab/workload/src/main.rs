//! What runs inside a lab guest: as `/init` it sets the guest up and starts the workload; under any other name it
//! plays that part of the workload (see [`roles`]); as `collector` it writes the guest's account of itself; as
//! `orders` it does what tests order (see [`serve`]).
//!
//! One static binary, many names: each process of the workload has a name, a path and arguments of its own, as in a
//! real system, and none of them has to say what it is there for.

mod collect;
mod init;
mod machine;
mod modules;
mod play;
mod roles;
mod serve;
mod sys;
mod watch;

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let exe = std::env::current_exe().unwrap_or_else(|_| Path::new("/init").to_path_buf());
    let name = exe
        .file_name()
        .and_then(|n| n.to_str())
        .unwrap_or_default()
        .to_owned();
    let outcome = match name.as_str() {
        "init" => init::run(),
        "collector" => play::collect(),
        // Somebody has started it outside a guest.
        _ if !in_a_guest() => {
            eprintln!("vmsight-workload: this runs inside lab guests only");
            return ExitCode::from(2);
        }
        "orders" => serve::run(),
        "witness" => serve::witness(),
        role => roles::perform(role),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vmsight-workload: {name}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether this is a lab guest: its kernel command line says so.
fn in_a_guest() -> bool {
    std::fs::read_to_string("/proc/cmdline")
        .is_ok_and(|line| line.split_ascii_whitespace().any(|word| word == "vmsight.lab"))
}
