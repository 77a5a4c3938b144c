//! From a target to its monitor.

use std::time::Duration;

use vmsight_hooks::BackendKind;
use vmsight_target::Target;

use crate::agent::AgentBackend;
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
    let by_stub = || {
        gdb::open(
            target,
            gdb::GdbOptions {
                timeout: options.timeout,
            },
        )
    };
    let by_agent = || Ok(Monitor::new(Box::new(AgentBackend::of(target)?)));
    match options.backend {
        Some(BackendKind::GdbStub) => by_stub(),
        Some(BackendKind::AgentKvm) => by_agent(),
        // Where there is an agent it can do more, and costs the guest less.
        None => match by_agent() {
            Err(EventError::NoBackend { .. }) => by_stub(),
            opened => opened,
        },
        Some(other) => Err(EventError::NoBackend {
            target: target.name.clone(),
            why: format!("there is no {other} backend in this version"),
        }),
    }
}
