//! Whose a process is and what it may do: `struct cred`.

use std::sync::Arc;

use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use super::ahead::Object;
use super::layouts::{CredLayout, GroupInfoLayout};
use crate::layout::{Buffer, Spans};
use crate::{Kernel, LinuxError};

/// NGROUPS_MAX.
const MAX_GROUPS: i32 = 65536;

/// Reads `struct cred`s.
#[derive(Debug)]
pub(crate) struct CredReader {
    kernel: Kernel,
    pub(crate) cred: Arc<CredLayout>,
    group_info: Arc<GroupInfoLayout>,
    spans: Spans,
}

impl CredReader {
    pub(crate) fn new(kernel: &Kernel) -> Result<Self, LinuxError> {
        let cred: Arc<CredLayout> = kernel.layout()?;
        let extents = [
            cred.uid.extent(),
            cred.gid.extent(),
            cred.suid.extent(),
            cred.sgid.extent(),
            cred.euid.extent(),
            cred.egid.extent(),
            cred.fsuid.extent(),
            cred.fsgid.extent(),
            cred.cap_inheritable.extent(),
            cred.cap_permitted.extent(),
            cred.cap_effective.extent(),
            cred.cap_bounding.extent(),
            cred.cap_ambient.extent(),
            cred.group_info.extent(),
            cred.user_ns.extent(),
        ];
        let spans = Spans::covering("cred", kernel.release(), extents)?;
        Ok(Self {
            kernel: kernel.clone(),
            cred,
            group_info: kernel.layout()?,
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

    /// Sends for the beginning of the supplementary groups of the credentials in `buffer`.
    #[inline]
    pub(crate) fn prefetch_groups(&self, buffer: &Buffer) {
        let groups = self.cred.group_info.of(buffer);
        self.kernel
            .space()
            .prefetch(self.group_info.ngroups.at(groups), &[0]);
    }

    /// The supplementary groups of the credentials in `buffer`.
    pub(crate) fn groups(&self, buffer: &Buffer) -> Result<Vec<u32>, ReadError> {
        let at = self.cred.group_info.of(buffer);
        let space = self.kernel.space();
        let count = self.group_info.ngroups.read(space, at)?.clamp(0, MAX_GROUPS) as usize;
        let mut bytes = vec![0u8; count * 4];
        if count > 0 {
            space.read(self.group_info.gid.at(at), &mut bytes)?;
        }
        Ok(bytes
            .chunks_exact(4)
            .map(|b| u32::from_le_bytes(b.try_into().unwrap_or_default()))
            .collect())
    }
}
