//! What lies at which physical address.

use anyhow::Result;
use vmsight_linux::Kernel;

use super::Differences;
use crate::truth::Truth;

/// The ranges of memory against `/proc/iomem`.
pub fn resources(kernel: &Kernel, truth: &Truth) -> Result<Differences> {
    let mut out = Differences::default();
    let listing = kernel.resources()?;
    out.complaints("resources", &listing.warnings);
    let seen: Vec<_> = listing.rows.iter().filter(|row| row.space == "memory").collect();
    out.same("number of ranges", seen.len(), truth.system.iomem.len());
    for (row, said) in seen.into_iter().zip(&truth.system.iomem) {
        out.complaints("a range", &row.problems);
        let name = row.name.as_deref().unwrap_or_default();
        out.same(
            format_args!("range at {:#x}", said.start),
            (row.start, row.end, row.depth, name),
            (said.start, said.end, said.depth, said.name.as_str()),
        );
    }
    // Which ports a machine has nobody told the tests, but that the second serial port is one of them.
    let ports = listing.rows.iter().filter(|row| row.space == "port");
    let serial = ports.filter(|row| row.start == 0x2f8 && row.name.as_deref() == Some("serial"));
    out.same("second serial port", serial.count(), 1);
    Ok(out)
}
