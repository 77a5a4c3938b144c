//! From a target to its monitor.

use std::time::Duration;

use vmsight_hooks::BackendKind;
use vmsight_target::Target;

use crate::{EventError, Monitor, gdb};

/// How to open a monitor.
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// Only this backend; the best that is there where `None`.
    pub backend: Option<BackendKind>,
    /// The longest wait for the VM's monitor or stub to answer.
    pub timeout: Duration,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            backend: None,
            timeout: Duration::from_secs(2),
        }
    }
}

/// A monitor of a running VM, by the best backend that reaches it.
///
/// # Errors
/// [`EventError::NoBackend`] where none does: a dump, or a VM without QMP socket and agent; [`EventError::Busy`] where
/// somebody debugs it already.
pub fn open(target: &Target, options: OpenOptions) -> Result<Monitor, EventError> {
    match options.backend {
        None | Some(BackendKind::GdbStub) => gdb::open(
            target,
            gdb::GdbOptions {
                timeout: options.timeout,
            },
        ),
        Some(other) => Err(EventError::NoBackend {
            target: target.name.clone(),
            why: format!("the {other} backend is not there"),
        }),
    }
}
