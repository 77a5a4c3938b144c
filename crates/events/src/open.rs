//! From a target to its monitor.

use std::time::Duration;

use vmsight_hooks::BackendKind;
use vmsight_target::Target;

use crate::agent::AgentBackend;
use crate::{Backend, EventError, Monitor, gdb};

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
    let by_agent = || AgentBackend::of(target);
    let monitor = |agent: AgentBackend| Monitor::new(Box::new(agent));
    match options.backend {
        Some(BackendKind::GdbStub) => by_stub(),
        Some(wanted @ (BackendKind::AgentKvm | BackendKind::AgentTcg)) => {
            let agent = by_agent()?;
            match agent.kind() {
                there if there == wanted => Ok(monitor(agent)),
                other => Err(EventError::NoBackend {
                    target: target.name.clone(),
                    why: format!("the agent in its VMM is {other}"),
                }),
            }
        }
        // Where there is an agent it can do more, and costs the guest less. Without registers most of what is made of events cannot
        // be, and the stub is better.
        None => match by_agent() {
            Err(EventError::NoBackend { .. }) => by_stub(),
            Ok(agent) if !agent.gives_registers() => match by_stub() {
                Err(_) => Ok(monitor(agent)),
                opened => opened,
            },
            opened => opened.map(monitor),
        },
        Some(other) => Err(EventError::NoBackend {
            target: target.name.clone(),
            why: format!("there is no {other} backend in this version"),
        }),
    }
}
