//! Mappings.

use vmsight_linux::{Kernel, Mapping};

use super::{Differences, spelt};
use crate::truth::Truth;

/// Compares `Kernel::maps` of every process with `/proc/PID/maps`.
pub fn maps(kernel: &Kernel, truth: &Truth) -> anyhow::Result<Differences> {
    let mut out = Differences::default();
    for said in truth.processes.iter().filter(|p| p.vm.is_some()) {
        let listing = kernel.maps(i32::try_from(said.pid)?)?;
        let at = |what: &str| format!("{what} of {} ({})", said.pid, said.task_comm());
        out.complaints(&at("mappings"), &listing.warnings);
        for row in &listing.rows {
            // What Linux itself cannot name: a path of more than a page.
            if row.path.as_ref().is_none_or(|p| p.len() < 4096) {
                out.complaints(&at("mapping"), &row.problems);
            }
        }
        out.same(at("number of mappings"), listing.rows.len(), said.maps.len());
        for (row, said) in listing.rows.iter().zip(&said.maps) {
            let place = format!("{} at {:#x}", at("mapping"), said.start);
            out.same(
                format!("{place}, bounds"),
                (row.start.0, row.end.0),
                (said.start, said.end),
            );
            out.same(format!("{place}, permissions"), &row.perms, &said.perms);
            out.same(format!("{place}, offset"), row.offset, said.offset);
            out.same(format!("{place}, device"), device(row), Some(said.dev));
            out.same(format!("{place}, inode"), row.inode, said.inode);
            out.same(
                format!("{place}, size"),
                row.size_kb,
                (said.end - said.start) / 1024,
            );
            // None of the files that the workload maps and that are there has such a name.
            let deleted = said.path.bytes().ends_with(b" (deleted)");
            out.same(format!("{place}, deleted"), row.deleted, deleted);
            let path = row.path.as_deref().unwrap_or_default().replace('\n', "\\012");
            out.same(format!("{place}, path"), path, spelt(&said.path));
        }
    }
    Ok(out)
}

fn device(row: &Mapping) -> Option<(u32, u32)> {
    let (major, minor) = row.device.split_once(':')?;
    let number = |text: &str| u32::from_str_radix(text, 16).ok();
    Some((number(major)?, number(minor)?))
}
