//! Whose a process is and what it may do: `struct cred`.

use std::sync::Arc;

use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use super::ahead::Object;
use super::layouts::{CredLayout, GroupInfoLayout};
use super::process::ProcessFields;
use crate::layout::{Buffer, Spans};
use crate::{Kernel, LinuxError};

/// NGROUPS_MAX.
const MAX_GROUPS: i32 = 65536;

/// Reads `struct cred`s.
#[derive(Debug)]
pub(crate) struct CredReader {
    kernel: Kernel,
    pub(crate) cred: Arc<CredLayout>,
    group_info: Option<Arc<GroupInfoLayout>>,
    spans: Spans,
}

impl CredReader {
    /// A reader of what `fields` ask for.
    pub(crate) fn new(kernel: &Kernel, fields: ProcessFields) -> Result<Self, LinuxError> {
        let cred: Arc<CredLayout> = kernel.layout()?;
        let ids = [
            &cred.uid,
            &cred.gid,
            &cred.suid,
            &cred.sgid,
            &cred.euid,
            &cred.egid,
            &cred.fsuid,
            &cred.fsgid,
        ];
        let capabilities = [
            &cred.cap_inheritable,
            &cred.cap_permitted,
            &cred.cap_effective,
            &cred.cap_bounding,
            &cred.cap_ambient,
        ];
        let ids = ids.map(|id| (ProcessFields::IDS, id.extent()));
        let capabilities = capabilities.map(|set| (ProcessFields::CAPABILITIES, set.extent()));
        let others = [
            (ProcessFields::GROUPS, cred.group_info.extent()),
            (ProcessFields::USER_NS, cred.user_ns.extent()),
        ];
        let extents = [ids.as_slice(), capabilities.as_slice(), others.as_slice()].concat();
        let spans = Spans::covering("cred", kernel.release(), fields.extents(&extents))?;
        let groups = fields.contains(ProcessFields::GROUPS);
        Ok(Self {
            kernel: kernel.clone(),
            cred,
            group_info: groups.then(|| kernel.layout()).transpose()?,
            spans,
        })
    }

    pub(crate) fn buffer(&self) -> Buffer {
        self.spans.buffer()
    }

    pub(crate) fn read_all<'b>(&self, objects: impl Iterator<Item = (Gva, &'b mut Object)>) {
        self.spans.read_all(self.kernel.space(), objects);
    }

    /// Sends for the credentials at `at`.
    #[inline]
    pub(crate) fn prefetch(&self, at: Gva) {
        self.spans.prefetch(self.kernel.space(), at);
    }

    /// Sends for the beginning of the supplementary groups of the credentials in `buffer`, if they are asked for.
    #[inline]
    pub(crate) fn prefetch_groups(&self, buffer: &Buffer) {
        if let Some(layout) = &self.group_info {
            let groups = self.cred.group_info.of(buffer);
            self.kernel.space().prefetch(layout.ngroups.at(groups), &[0]);
        }
    }

    /// The supplementary groups of the credentials in `buffer`, if they are asked for.
    pub(crate) fn groups(&self, buffer: &Buffer) -> Option<Result<Vec<u32>, ReadError>> {
        let layout = self.group_info.as_ref()?;
        Some(self.read_groups(layout, self.cred.group_info.of(buffer)))
    }

    fn read_groups(&self, layout: &GroupInfoLayout, at: Gva) -> Result<Vec<u32>, ReadError> {
        let space = self.kernel.space();
        let count = layout.ngroups.read(space, at)?.clamp(0, MAX_GROUPS) as usize;
        let mut bytes = vec![0u8; count * 4];
        if count > 0 {
            space.read(layout.gid.at(at), &mut bytes)?;
        }
        Ok(bytes
            .chunks_exact(4)
            .map(|b| u32::from_le_bytes(b.try_into().unwrap_or_default()))
            .collect())
    }
}
