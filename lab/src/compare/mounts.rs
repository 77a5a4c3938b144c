//! Mounts.

use std::collections::BTreeMap;

use vmsight_linux::Kernel;

use super::{Differences, spelt};
use crate::truth::Truth;

/// Compares `Kernel::mounts` with `/proc/PID/mountinfo` of every mount namespace.
pub fn mounts(kernel: &Kernel, truth: &Truth) -> anyhow::Result<Differences> {
    let mut out = Differences::default();
    let listing = kernel.mounts()?;
    out.complaints("mounts", &listing.warnings);
    for namespace in &truth.mounts {
        let at = |what: &str| format!("{what} of namespace {}", namespace.inode);
        let rows: Vec<_> = listing
            .rows
            .iter()
            .filter(|r| u64::from(r.namespace) == namespace.inode && !r.unreachable)
            .collect();
        let seen: Vec<i64> = rows.iter().map(|r| i64::from(r.mount_id)).collect();
        let said: Vec<i64> = namespace.mounts.iter().map(|m| m.id).collect();
        out.same(at("mounts"), seen, said);
        let by_id: BTreeMap<i64, _> = rows.iter().map(|r| (i64::from(r.mount_id), r)).collect();
        for said in &namespace.mounts {
            let Some(row) = by_id.get(&said.id) else { continue };
            let at = |what: &str| format!("{what} of mount {} of namespace {}", said.id, namespace.inode);
            out.complaints(&at("row"), &row.problems);
            out.same(at("parent"), row.parent_id.map(i64::from), Some(said.parent));
            out.same(
                at("device"),
                row.device.clone(),
                Some(format!("{}:{}", said.dev.0, said.dev.1)),
            );
            out.same(at("root"), row.root.clone(), Some(spelt(&said.root)));
            out.same(
                at("mount point"),
                row.mount_point.clone(),
                Some(spelt(&said.mount_point)),
            );
            out.same(at("options"), row.options.as_ref(), Some(&said.options));
            out.same(at("propagation"), &row.propagation, &said.propagation);
            out.same(at("type"), row.fs_type.clone(), Some(spelt(&said.fstype)));
            out.same(at("source"), row.source.clone(), Some(spelt(&said.source)));
            let (seen, said) = (
                row.super_options.clone().unwrap_or_default(),
                spelt(&said.super_options),
            );
            if row.super_options_known {
                out.same(at("filesystem options"), seen, said);
            } else {
                let said: Vec<&str> = said.split(',').collect();
                let unknown: Vec<&str> = seen.split(',').filter(|o| !said.contains(o)).collect();
                out.same(at("filesystem options"), unknown, Vec::<&str>::new());
            }
        }
    }
    Ok(out)
}
