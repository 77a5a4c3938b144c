//! Through a gdb stub.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::{PauseGuard, Pauses, lock};
use crate::TargetError;
use crate::gdb::{Debugger, Gdb, GdbError};
use crate::host::process::Identity;
use crate::spec::GdbAddress;

/// What a gdb stub can be asked and told. Connecting pauses the VM, so each question is a short pause.
#[derive(Clone, Debug)]
pub(crate) struct GdbControl {
    address: GdbAddress,
    server: Option<Identity>,
    timeout: Duration,
    /// The connection of a pause, or of a target whose memory is read through it.
    stub: Arc<Mutex<Option<Gdb>>>,
    /// Who needs the connection to stay: pauses, and the target itself.
    holders: Arc<Mutex<usize>>,
}

impl GdbControl {
    /// `server` is the VM's process, where it is known.
    pub(crate) fn new(address: GdbAddress, server: Option<Identity>, timeout: Duration) -> Self {
        Self {
            address,
            server,
            timeout,
            stub: Arc::default(),
            holders: Arc::default(),
        }
    }

    /// The connection, shared with whoever reads memory through it.
    pub(crate) fn stub(&self) -> Arc<Mutex<Option<Gdb>>> {
        Arc::clone(&self.stub)
    }

    pub(crate) fn with<T>(&self, ask: impl FnOnce(&mut Gdb) -> Result<T, GdbError>) -> Result<T, GdbError> {
        let mut stub = lock(&self.stub);
        match stub.as_mut() {
            Some(stub) => ask(stub),
            None => ask(&mut self.connect()?),
        }
    }

    /// Keeps the connection, and with it the pause, until the guard is dropped.
    pub(crate) fn pause(&self) -> Result<PauseGuard, GdbError> {
        let mut holders = lock(&self.holders);
        if *holders == 0 {
            *lock(&self.stub) = Some(self.connect()?);
        }
        *holders += 1;
        Ok(PauseGuard {
            control: Pauses::Gdb(self.clone()),
        })
    }

    fn connect(&self) -> Result<Gdb, GdbError> {
        Gdb::connect(&self.address, self.server, self.timeout)
    }

    /// A connection for hooks.
    pub(crate) fn debug(&self, timeout: Duration) -> Result<Debugger, TargetError> {
        Debugger::connect(&self.address, self.server, timeout, None, None)
    }

    /// Whether the machine goes on when the pause ends.
    pub(super) fn will_resume(&self) -> bool {
        lock(&self.stub).as_ref().is_some_and(Gdb::will_resume)
    }

    pub(super) fn release(&self) {
        let mut holders = lock(&self.holders);
        *holders = holders.saturating_sub(1);
        if *holders == 0 {
            *lock(&self.stub) = None;
        }
    }
}
