//! Pids: a number in every pid namespace from the root down to the process's own (kernel/pid.c).

use std::sync::Arc;

use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use super::layouts::{PidLayout, UpidLayout};
use crate::layout::{Field, layout};
use crate::{Kernel, LinuxError};

/// MAX_PID_NS_LEVEL: pid namespaces nest at most so deep.
const MAX_LEVEL: u32 = 32;

layout! {
    /// `struct pid_namespace`.
    struct PidNamespaceLayout = "pid_namespace" {
        inum: Field<u32> = "ns.inum",
    }
}

/// Reads `struct pid`s.
#[derive(Debug)]
pub(crate) struct PidReader {
    kernel: Kernel,
    pid: Arc<PidLayout>,
    upid: Arc<UpidLayout>,
    namespace: Arc<PidNamespaceLayout>,
}

/// The numbers of one `struct pid`.
#[derive(Clone, Debug, Default)]
pub(crate) struct PidNumbers {
    /// Root namespace first, own namespace last: the NSpid line of /proc/PID/status.
    pub(crate) numbers: Vec<i32>,
    /// The own namespace's `pid_namespace`.
    pub(crate) namespace: Gva,
}

impl PidReader {
    pub(crate) fn new(kernel: &Kernel) -> Result<Self, LinuxError> {
        Ok(Self {
            kernel: kernel.clone(),
            pid: kernel.layout()?,
            upid: kernel.layout()?,
            namespace: kernel.layout()?,
        })
    }

    fn upid_at(&self, pid: Gva, level: u32) -> Gva {
        self.pid
            .numbers
            .at(pid)
            .wrapping_add(u64::from(level) * self.upid.size)
    }

    /// Sends for the number in the root namespace.
    #[inline]
    pub(crate) fn prefetch(&self, pid: Gva) {
        self.kernel.space().prefetch(self.upid_at(pid, 0), &[0]);
    }

    /// The number in the root namespace.
    pub(crate) fn root_number(&self, pid: Gva) -> Result<i32, ReadError> {
        self.upid.nr.read(self.kernel.space(), self.upid_at(pid, 0))
    }

    /// All numbers.
    pub(crate) fn numbers(&self, pid: Gva) -> Result<PidNumbers, ReadError> {
        let space = self.kernel.space();
        let level = self.pid.level.read(space, pid)?.min(MAX_LEVEL);
        let mut out = PidNumbers::default();
        for level in 0..=level {
            out.numbers
                .push(self.upid.nr.read(space, self.upid_at(pid, level))?);
        }
        out.namespace = self.upid.ns.read(space, self.upid_at(pid, level))?;
        Ok(out)
    }

    /// The inode number of a pid namespace, as in `pid:[4026531836]`.
    pub(crate) fn namespace_inum(&self, namespace: Gva) -> Result<u32, ReadError> {
        self.namespace.inum.read(self.kernel.space(), namespace)
    }
}
