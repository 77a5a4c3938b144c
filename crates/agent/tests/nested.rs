//! The same tiny VMM under the lab's KVM host: another kernel, and a KVM with a processor to run the guest's code on. That
//! processor is emulated, and the emulation knows neither hardware breakpoints nor an intercept of INT3 in a guest: execution is
//! not hooked here, but on a stock guest in Bochs (`crates/cli/tests/vtx`).

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use vmsight_lab::nested;

/// The tests that need it.
const SCRIPT: &str = "
set -e
export VMSIGHT_AGENT_LIBRARY=/bin/libvmsight_agent.so RUST_BACKTRACE=0 VMSIGHT_TEST_NO_INT3=1
for test in memory_ msr_writes hooks_come_and_go stepped_through what_the_vmm_does; do
    vmm $test --test-threads=1 --nocapture
done
";

/// What cargo built beside this test. The tiny VMM's name has a number behind it; the newest one is meant.
fn built(name: &str, ends: &str) -> PathBuf {
    let folder = std::env::current_exe().unwrap();
    let entries = folder.parent().unwrap().read_dir().unwrap();
    let named = entries.map(|entry| entry.unwrap().path()).filter(|path| {
        let file = path.file_name().unwrap().to_str().unwrap();
        file.strip_prefix(name)
            .is_some_and(|rest| rest.ends_with(ends) && (!ends.is_empty() || !rest.contains('.')))
    });
    named
        .max_by_key(|path| path.metadata().unwrap().modified().unwrap())
        .unwrap_or_else(|| panic!("{name} is not built"))
}

#[test]
fn hooks_on_a_processor() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("vmm");
    std::fs::copy(built("vmm-", ""), &program).unwrap();
    let agent = built("libvmsight_agent", ".so");
    let (code, said) =
        nested::run_alone(None, &[&program, &agent], SCRIPT).unwrap_or_else(|e| panic!("{e:?}"));
    assert_eq!(code, 0, "{said}");
    assert!(said.matches("test result: ok").count() == 5, "{said}");
}
