//! Who holds an object that a file stands for and nothing else does: BPF's, perf events.

use std::sync::Arc;

use rustc_hash::{FxHashMap, FxHashSet};
use vmsight_arch::Gva;

use super::fd::FdReader;
use super::holder::{self, Owner};
use crate::layout::{Field, layout};
use crate::warnings::Warnings;
use crate::{Kernel, LinuxError};

layout! {
    struct PrivateFileLayout = "file" {
        private: Field<Gva> = "private_data",
    }
}

/// The descriptors of the objects asked for.
#[derive(Debug, Default)]
pub(crate) struct PrivateOwners {
    owners: FxHashMap<Gva, Vec<Owner>>,
    pub(crate) warnings: Warnings,
}

impl PrivateOwners {
    /// Looks for files whose `private_data` is one of `objects`, through the descriptors of all processes.
    ///
    /// # Errors
    /// If processes cannot be listed or the kernel's types lack a member.
    pub(crate) fn read(kernel: &Kernel, objects: &FxHashSet<Gva>) -> Result<Self, LinuxError> {
        let layout: Arc<PrivateFileLayout> = kernel.layout()?;
        let mut out = Self::default();
        if objects.is_empty() {
            return Ok(out);
        }
        let (holders, warnings) = holder::all(kernel)?;
        out.warnings.extend(warnings);
        let mut fds = FdReader::new(kernel, holders.len())?;
        // Many processes share files: of each it is asked once.
        let mut files: FxHashMap<Gva, Option<Gva>> = FxHashMap::default();
        for holder in holders.iter().filter(|h| !h.files.is_null()) {
            let open = match fds.open_fds(holder.files) {
                Ok(open) => open,
                Err(error) => {
                    out.warnings.add(format!(
                        "the file descriptors of process {} cannot be read: {error}",
                        holder.pid
                    ));
                    continue;
                }
            };
            if let Some(cut) = &open.cut {
                out.warnings
                    .add(format!("file descriptors of process {}: {cut}", holder.pid));
            }
            for entry in &open.fds {
                let object = *files.entry(entry.file).or_insert_with(|| {
                    let private = layout.private.read(kernel.space(), entry.file).ok()?;
                    objects.contains(&private).then_some(private)
                });
                if let Some(object) = object {
                    out.owners.entry(object).or_default().push(Owner {
                        pid: holder.pid,
                        name: holder.comm.clone(),
                        fd: entry.fd,
                    });
                }
            }
        }
        Ok(out)
    }

    /// Who holds the object.
    pub(crate) fn of(&self, object: Gva) -> &[Owner] {
        self.owners.get(&object).map_or(&[], Vec::as_slice)
    }
}
