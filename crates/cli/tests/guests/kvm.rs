//! A real KVM, stock kernel and stock QEMU: the program runs on the KVM host and looks into guests that run there.

use std::collections::BTreeSet;
use std::path::Path;

use vmsight_lab::{Kernel, nested};

use crate::support::{listed, number, objects};

/// Each command leaves its answer in a file of its own; the first that fails ends it.
const SCRIPT: &str = r#"
set -e
export XDG_CACHE_HOME=/tmp
ask() { name=$1; shift; vmsight "$@" >"/out/$name"; }
ask list list -o json
# Nobody prepared this one: the layout is deduced from its process and proven.
ask ps ps "pid:$PLAIN" -o json
ask lsmod lsmod "pid:$PLAIN" -o json
ask net net "pid:$PLAIN" -o json
ask lsof lsof "pid:$PLAIN" -o json
ask info info "pid:$PLAIN" -o json
# This one has a monitor.
ask regs regs qmp:/run/qmp -o json
ask paused ps qmp:/run/qmp --pause -o json
ask banner read qmp:/run/qmp linux_banner --as string
ask written write --write qmp:/run/qmp kptr_restrict --number 3 --width 4 -o json
ask after read asked kptr_restrict 4 --as u32 -o json
kill -0 "$PLAIN" && kill -0 "$ASKED"
"#;

#[test]
fn guests_of_a_stock_kvm() {
    let program = Path::new(env!("CARGO_BIN_EXE_vmsight"));
    let report = nested::run(Kernel::V6_12, &[program], SCRIPT).unwrap_or_else(|e| panic!("{e:?}"));
    assert_eq!(report.code, 0, "the script failed: {}", report.said());
    let rows = |name: &str| objects(&report.file(name).unwrap()).unwrap_or_else(|e| panic!("{name}: {e}"));

    let machines = rows("list");
    assert_eq!(machines.len(), 2, "{machines:?}");
    for vm in &machines {
        assert_eq!(
            (&vm["vmm"], &vm["accelerator"], &vm["vcpus"]),
            (&"qemu".into(), &"kvm".into(), &1.into()),
            "{vm:?}"
        );
        assert_eq!(number(&vm["memory_bytes"]), 512 << 20);
    }
    let names: BTreeSet<_> = machines.iter().map(|vm| vm["name"].as_str().unwrap()).collect();
    assert_eq!(names, BTreeSet::from(["asked", "plain"]));

    let truth = &report.truth;
    let said = truth.processes.iter().filter(|p| !p.is_transient());
    let said = said.map(|p| (u64::from(p.pid), p.task_comm())).collect();
    assert_eq!(listed(&rows("ps")), said);
    let modules: BTreeSet<_> = rows("lsmod")
        .iter()
        .map(|m| m["name"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(modules, truth.modules.iter().map(|m| m.name.clone()).collect());
    assert!(rows("net").len() > 20 && rows("lsof").len() > 200);
    assert_eq!(rows("info")[0]["release"], truth.system.release.to_string());

    let paging = rows("regs")
        .into_iter()
        .find(|row| row["register"] == "cr0")
        .expect("CR0");
    assert_eq!(number(&paging["value"]) >> 31 & 1, 1, "paging is on: {paging:?}");
    let idle = listed(&rows("paused"));
    assert_eq!(idle.get(&1).map(String::as_str), Some("init"), "{idle:?}");
    let banner = report.file("banner").unwrap();
    let banner = String::from_utf8_lossy(&banner);
    assert_eq!(
        banner.trim_end().trim_end_matches("\\n"),
        truth.system.version.trim_end()
    );
    assert_eq!(rows("written")[0]["after"], "03000000");
    assert_eq!(number(&rows("after")[0]["value"]), 3);
}
