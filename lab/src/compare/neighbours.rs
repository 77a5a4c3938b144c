//! Neighbours of every network namespace.

use vmsight_linux::Kernel;

use super::Differences;
use crate::truth::Truth;

/// Compares `Kernel::neighbours` with rtnetlink's account in every namespace. What is being looked for comes and goes.
pub fn neighbours(kernel: &Kernel, truth: &Truth) -> anyhow::Result<Differences> {
    let mut out = Differences::default();
    let listing = kernel.neighbours()?;
    out.complaints("neighbours", &listing.warnings);
    for row in &listing.rows {
        out.complaints("a neighbour", &row.problems);
    }
    for namespace in &truth.net {
        let own = || {
            let rows = listing.rows.iter();
            rows.filter(|row| row.namespace.map(u64::from) == Some(namespace.inode))
        };
        for said in namespace.neighbours.iter().filter(|n| n.is_lasting()) {
            let what = format!("neighbour {} in namespace {}", said.ip, namespace.inode);
            let row = own().find(|row| {
                row.ip == Some(said.ip)
                    && row.index.and_then(|n| u32::try_from(n).ok()) == Some(said.interface)
            });
            let Some(row) = row else {
                out.differs(format!("{what}: vmsight does not see it"));
                continue;
            };
            let mac = row.mac.clone().unwrap_or_default();
            out.same(format!("hardware address of {what}"), mac, said.mac.clone());
            let state = match said.state {
                0x40 => "NOARP",
                0x80 => "PERMANENT",
                _ => "both",
            };
            out.same(format!("state of {what}"), row.state.as_str(), state);
        }
        let lasting = |state: &str| matches!(state, "NOARP" | "PERMANENT");
        let said = namespace.neighbours.iter().filter(|n| n.is_lasting()).count();
        let seen = own().filter(|row| lasting(&row.state)).count();
        out.same(
            format!("lasting neighbours in namespace {}", namespace.inode),
            seen,
            said,
        );
    }
    Ok(out)
}
