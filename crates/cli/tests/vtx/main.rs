//! Execution hooked in a stock guest under a stock QEMU and a stock KVM, on a processor with VT-x: Bochs emulates one, with debug
//! registers and the intercept of INT3 that QEMU's emulation of SVM lacks. The KVM host and its guest are Debian's 6.1.
//!
//! It is this binary once more, on that host, which has the guest work and holds what was told against the guest's own account:
//! [`inside`]. What it says comes over the host's serial port, and is all there is to see here.

#![allow(clippy::unwrap_used)]

mod inside;

use std::path::Path;
use std::time::Duration;

use vmsight_lab::cache::Lock;
use vmsight_lab::{Kernel, vtx};
use vmsight_sim_image::Machine;
use vmsight_sim_image::bochs::Hardware;
use vmsight_sim_image::rescue::write_plain;

/// What the host does: `vmsight launch` starts the guest, and the monitors come to it.
const SCRIPT: &str = r#"
set -e
export XDG_CACHE_HOME=/tmp RUST_BACKTRACE=0 VMSIGHT_AGENT_LIBRARY=/bin/libvmsight_agent.so
LAUNCH="vmsight launch --socket /run/agent/vm.sock --"
guest stock &
export VMSIGHT_TEST_QEMU=$!
vtx --exact inside::monitors --nocapture
kill -0 $VMSIGHT_TEST_QEMU
"#;

/// Three minutes are enough where nothing else runs.
const LIMIT: Duration = Duration::from_secs(1500);

#[test]
fn execution_is_hooked_in_a_stock_guest_under_kvm() {
    let folder = tempfile::tempdir().unwrap();
    let own = std::env::current_exe().unwrap();
    let driver = folder.path().join("vtx");
    std::fs::copy(&own, &driver).unwrap();
    let library = own.with_file_name("libvmsight_agent.so");
    let program = Path::new(env!("CARGO_BIN_EXE_vmsight"));
    let programs = [program, driver.as_path(), library.as_path()];
    let host = vtx::host(Kernel::V6_1Cloud, &programs, SCRIPT).unwrap_or_else(|e| panic!("{e:?}"));
    let disc = folder.path().join("host.iso");
    write_plain(&host.kernel, vtx::COMMAND_LINE, &host.initrd, &disc).unwrap_or_else(|e| panic!("{e}"));

    let _lock = Lock::wait("bochs").unwrap();
    let hardware = Hardware {
        memory: vtx::MEMORY,
        // With this test Bochs ends, too.
        through: ["setpriv", "--pdeathsig", "KILL", "--"].map(Into::into).to_vec(),
        ..Hardware::default()
    };
    let machine = Machine::boot(&disc, &hardware).unwrap_or_else(|e| panic!("{e}"));
    let mut console = Vec::new();
    let run = machine.watch(LIMIT, |news| {
        console.extend_from_slice(&news.console);
        let said = String::from_utf8_lossy(&console);
        vtx::code(&said).is_none() && !said.contains(vtx::PANIC)
    });
    let said = run.unwrap_or_else(|e| panic!("{e}")).serial;
    assert_eq!(vtx::code(&said), Some(0), "{said}");
    assert_eq!(said.matches("1 passed").count(), 1, "{said}");
    // What each part took shows with --nocapture.
    println!("{said}");
}
