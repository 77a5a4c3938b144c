//! Stopping all vCPUs for a moment, and keeping them stopped.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::vcpu::Vcpu;

/// How long vCPUs may take to come out.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often one that did not come out is kicked again.
const AGAIN: Duration = Duration::from_millis(2);
/// How often who waits for long looks whether the VMM wants him.
const LOOK: Duration = Duration::from_millis(5);

/// Who may run.
#[derive(Debug, Default)]
pub(crate) struct World {
    /// Held by who stopped the others.
    one: Mutex<()>,
    stops: AtomicU32,
    frozen: AtomicBool,
    sleepers: Mutex<()>,
    wake: Condvar,
}

/// No vCPU is in the guest as long as this lives.
#[derive(Debug)]
pub(crate) struct Stopped<'w> {
    world: &'w World,
    _one: MutexGuard<'w, ()>,
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        self.world.stops.fetch_sub(1, Ordering::SeqCst);
        self.world.wake_all();
    }
}

impl World {
    /// Brings every vCPU out of the guest; `None` where one does not come.
    pub(crate) fn stop(&self, vcpus: &[&'static Vcpu]) -> Option<Stopped<'_>> {
        let one = self.one.lock().unwrap_or_else(PoisonError::into_inner);
        self.stops.fetch_add(1, Ordering::SeqCst);
        let stopped = Stopped {
            world: self,
            _one: one,
        };
        let end = Instant::now() + PATIENCE;
        for vcpu in vcpus {
            let mut kicked: Option<Instant> = None;
            while vcpu.inside.load(Ordering::SeqCst) != 0 {
                if kicked.is_none_or(|t| t.elapsed() > AGAIN) {
                    if Instant::now() > end {
                        return None;
                    }
                    vcpu.kick();
                    kicked = Some(Instant::now());
                }
                std::thread::yield_now();
            }
        }
        Some(stopped)
    }

    /// A vCPU's thread: waits until it may run, and says that it does. False where the VMM wants it back first.
    pub(crate) fn enter(&self, vcpu: &Vcpu) -> bool {
        loop {
            vcpu.inside.store(1, Ordering::SeqCst);
            if self.stops.load(Ordering::SeqCst) == 0 && !self.frozen.load(Ordering::SeqCst) {
                return true;
            }
            vcpu.inside.store(0, Ordering::SeqCst);
            if vcpu.is_interrupted() {
                return false;
            }
            let guard = self.sleepers.lock().unwrap_or_else(PoisonError::into_inner);
            let closed = |_: &mut ()| {
                let shut = self.stops.load(Ordering::SeqCst) != 0 || self.frozen.load(Ordering::SeqCst);
                shut && !vcpu.is_interrupted()
            };
            // Whatever ended the wait, the loop looks again.
            drop(self.wake.wait_timeout_while(guard, LOOK, closed));
        }
    }

    /// A vCPU's thread: it has come out.
    pub(crate) fn leave(&self, vcpu: &Vcpu) {
        vcpu.inside.store(0, Ordering::SeqCst);
    }

    /// Lets no vCPU into the guest any more.
    pub(crate) fn freeze(&self, vcpus: &[&'static Vcpu]) {
        self.frozen.store(true, Ordering::SeqCst);
        for vcpu in vcpus {
            if vcpu.inside.load(Ordering::SeqCst) != 0 {
                vcpu.kick();
            }
        }
    }

    /// Lets them in again.
    pub(crate) fn thaw(&self) {
        self.frozen.store(false, Ordering::SeqCst);
        self.wake_all();
    }

    /// Whether they are kept out.
    pub(crate) fn is_frozen(&self) -> bool {
        self.frozen.load(Ordering::SeqCst)
    }

    fn wake_all(&self) {
        drop(self.sleepers.lock().unwrap_or_else(PoisonError::into_inner));
        self.wake.notify_all();
    }
}
