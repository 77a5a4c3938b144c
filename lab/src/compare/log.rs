//! The kernel's log.

use std::collections::BTreeMap;

use vmsight_linux::Kernel;

use super::{Differences, spelt};
use crate::truth::Truth;

/// Compares `Kernel::kmsg` with `/dev/kmsg`. Records that came after the guest's account are passed over.
pub fn kmsg(kernel: &Kernel, truth: &Truth) -> anyhow::Result<Differences> {
    let mut out = Differences::default();
    let listing = kernel.kmsg()?;
    out.complaints("kernel log", &listing.warnings);
    let rows: BTreeMap<u64, _> = listing.rows.iter().map(|r| (r.seq, r)).collect();
    let sorted = listing
        .rows
        .windows(2)
        .all(|w| matches!(w, [a, b] if a.seq < b.seq));
    out.same("the log is in order", sorted, true);
    for said in &truth.kmsg {
        let at = |what: &str| format!("{what} of record {}", said.seq);
        let Some(row) = rows.get(&said.seq) else {
            out.differs(at("nothing"));
            continue;
        };
        out.complaints(&at("row"), &row.problems);
        out.same(at("time"), row.time_us, said.time_us);
        out.same(at("level"), row.level, said.level);
        out.same(at("facility"), u32::from(row.facility), said.facility);
        out.same(at("text"), row.text.clone(), Some(spelt(&said.text)));
        let mut dict = Vec::new();
        dict.extend(row.subsystem.as_ref().map(|s| format!("SUBSYSTEM={s}")));
        dict.extend(row.device.as_ref().map(|d| format!("DEVICE={d}")));
        out.same(
            at("dictionary"),
            dict,
            said.dict.iter().map(spelt).collect::<Vec<_>>(),
        );
    }
    Ok(out)
}
