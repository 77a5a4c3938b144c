//! Takes the guest's account of itself out of /proc and /sys.

mod bpf;
mod diag;
mod files;
mod memory;
mod net;
mod process;
mod symbols;
mod system;

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Result, bail};
use vmsight_workload::{Process, Truth, perf};

/// The name of the extra processes, which get no entry of their own.
pub(crate) const SLEEPER: &str = "sleeper";

/// The whole account, taken when nothing starts or ends any more. `swap_out` is the process to send a SIGUSR1 after
/// everything else is done: it then pages out a part of its memory (see the role of that name).
pub(crate) fn truth(swap_out: Option<u32>, lacking: Vec<String>) -> Result<Truth> {
    for _ in 0..20 {
        let before = lasting_pids()?;
        let mut truth = once(&lacking)?;
        if before == lasting_pids()? {
            if let Some(pid) = swap_out {
                memory::page_out(&mut truth, pid)?;
            }
            return Ok(truth);
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    bail!("processes keep coming and going; no quiet moment in 20 tries")
}

fn once(lacking: &[String]) -> Result<Truth> {
    let (processes, sleepers) = process::all()?;
    let mut net = net::tables(&processes)?;
    net::ask_kernel(&mut net)?;
    Ok(Truth {
        system: system::system()?,
        net,
        vsock: diag::vsock_sockets().unwrap_or_default(),
        modules: system::modules()?,
        mounts: system::mounts(&processes)?,
        kmsg: system::kmsg()?,
        cgroups: system::cgroups()?,
        containers: system::containers()?,
        kallsyms: symbols::kallsyms()?,
        bpf: bpf::bpf()?,
        perf: files::bytes(perf::FILE).map_or(Ok(Vec::new()), |json| serde_json::from_slice(&json))?,
        lacking: lacking.to_vec(),
        processes,
        sleepers,
    })
}

/// All pids but those of the kernel's workers, which come and go as they like.
fn lasting_pids() -> Result<BTreeSet<u32>> {
    let mut pids = BTreeSet::new();
    for pid in files::numbers("/proc")? {
        let comm = files::bytes(format!("/proc/{pid}/comm")).unwrap_or_default();
        if !comm.starts_with(b"kworker/") {
            pids.insert(pid);
        }
    }
    Ok(pids)
}

/// One process for each namespace of a kind, the lowest pid for which `usable` holds.
fn one_per_namespace<'a>(
    processes: &'a [Process],
    kind: &str,
    usable: impl Fn(&Process) -> bool,
) -> Vec<(u64, &'a Process)> {
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for process in processes.iter().filter(|p| usable(p)) {
        if let Some(inode) = process.namespaces.get(kind)
            && seen.insert(*inode)
        {
            found.push((*inode, process));
        }
    }
    found
}
