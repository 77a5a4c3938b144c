//! Control groups.

use std::collections::{BTreeMap, BTreeSet};

use vmsight_linux::{Cgroup, Kernel};

use super::{Differences, spelt};
use crate::truth::Truth;

/// Compares `Kernel::cgroups` with the directories of the unified hierarchy.
pub fn cgroups(kernel: &Kernel, truth: &Truth) -> anyhow::Result<Differences> {
    let mut out = Differences::default();
    let listing = kernel.cgroups()?;
    out.complaints("cgroups", &listing.warnings);
    for row in &listing.rows {
        out.complaints(&format!("cgroup {}", row.path), &row.problems);
    }
    let unified = || listing.rows.iter().filter(|r| r.hierarchy == 0);
    let seen: BTreeSet<String> = unified().map(|r| r.path.clone()).collect();
    out.same(
        "cgroups",
        seen,
        truth.cgroups.iter().map(|c| spelt(&c.path)).collect(),
    );
    let rows: BTreeMap<&str, &Cgroup> = unified().map(|r| (r.path.as_str(), r)).collect();
    for said in &truth.cgroups {
        let path = spelt(&said.path);
        let Some(row) = rows.get(path.as_str()) else {
            continue;
        };
        let at = |what: &str| format!("{what} of {path}");
        out.same(at("id"), row.id, Some(said.inode));
        // Kernel workers come and go; all of them are at the root.
        let tasks = row.tasks.unwrap_or(u64::MAX);
        let slack = if path == "/" { 16 } else { 0 };
        out.near(
            at("tasks"),
            tasks.abs_diff(said.threads) <= slack,
            tasks,
            said.threads,
        );
        // Of what is below a container's group it is the container too; the workload makes nothing there.
        let container = truth.containers.iter().find(|c| c.cgroup == said.path);
        out.same(at("container"), row.container.as_ref(), container.map(|c| &c.id));
        out.same(
            at("container's runtime"),
            row.container_runtime.as_ref(),
            container.map(|c| &c.runtime),
        );
    }
    out.same("controllers", unified().any(|r| !r.controllers.is_empty()), false);
    Ok(out)
}
