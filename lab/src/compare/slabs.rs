//! The caches of the kernel's allocator.

use anyhow::Result;
use vmsight_linux::Kernel;

use super::Differences;
use crate::truth::Truth;

/// The caches against `/proc/slabinfo`: what each is like, one by one; and how full they are of most, for a guest that runs always fills some
/// and empties others.
pub fn slabs(kernel: &Kernel, truth: &Truth) -> Result<Differences> {
    let mut out = Differences::default();
    let listing = kernel.slab_caches()?;
    out.complaints("slabs", &listing.warnings);
    out.same("number of caches", listing.rows.len(), truth.system.slabs.len());
    let mut alike = 0;
    for said in &truth.system.slabs {
        let seen = listing
            .rows
            .iter()
            .find(|row| row.name.as_deref() == Some(&*said.name.lossy()));
        let Some(seen) = seen else {
            out.differs(format!("cache {:?}: vmsight sees no such cache", said.name));
            continue;
        };
        out.complaints("a cache", &seen.problems);
        out.same(
            format_args!("cache {:?}", said.name),
            (seen.size, seen.objects_per_slab, seen.pages_per_slab),
            (said.size, said.objects_per_slab, said.pages_per_slab),
        );
        let counts = (seen.active, seen.objects, seen.slabs);
        alike += usize::from(counts == (Some(said.active), Some(said.objects), Some(said.slabs)));
    }
    let caches = truth.system.slabs.len();
    let enough = alike * 3 >= caches * 2;
    out.near("caches with the same counts", enough, alike, caches);
    Ok(out)
}
