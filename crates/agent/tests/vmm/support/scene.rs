//! A guest and its monitor.

use std::time::{Duration, Instant};

use vmsight_arch::Gva;
use vmsight_events::{EventError, HookGuard, Monitor, Occurrence};
use vmsight_hooks::{Detail, Hook, Verdict};

use super::guest::{GuestKind, labels};
use super::machine::{Machine, PATIENCE};

/// A guest that waits, and a monitor that is connected.
pub(crate) struct Scene {
    pub(crate) machine: Machine,
    pub(crate) monitor: Monitor,
}

impl Scene {
    /// `None` where this machine has no KVM.
    pub(crate) fn start(kind: GuestKind, vcpus: u32) -> Option<Self> {
        let machine = Machine::start(kind, vcpus)?;
        let monitor = machine.monitor();
        Some(Self { machine, monitor })
    }

    /// Where a label of the guest's code lies.
    pub(crate) fn at(&self, label: &str) -> u64 {
        labels()[label]
    }

    /// A hook on the execution of what is at a label.
    pub(crate) fn execute(&self, label: &str) -> Hook {
        Hook::execute(Gva(self.at(label)))
    }

    pub(crate) fn hook(&self, hook: &Hook) -> HookGuard {
        self.monitor.hook(hook).unwrap()
    }

    /// Arms a hook on the execution of what is at a label.
    pub(crate) fn arm(&self, label: &str) -> HookGuard {
        self.hook(&self.execute(label))
    }

    pub(crate) fn go(&self) {
        self.machine.go();
    }

    /// The next event.
    pub(crate) fn next(&self) -> Occurrence {
        self.monitor.next(PATIENCE).unwrap().expect("an event")
    }

    /// All events until the guest says that it is done.
    pub(crate) fn answer_all(&mut self, verdict: impl Fn(&Detail) -> Verdict) -> Vec<(u32, Detail)> {
        let mut events = Vec::new();
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            match self.monitor.next(Duration::from_millis(50)) {
                Ok(Some(occurrence)) => {
                    let (vcpu, detail) = (occurrence.event().vcpu, occurrence.event().detail);
                    occurrence.answer(verdict(&detail)).unwrap();
                    events.push((vcpu, detail));
                }
                Ok(None) if self.machine.is_done() => return events,
                Ok(None) => {}
                Err(EventError::Gone) => return events,
                Err(error) => panic!("{error}"),
            }
        }
        panic!("the guest did not come to its end: {} events", events.len());
    }

    /// What all vCPUs counted.
    pub(crate) fn results(&self) -> [u64; 3] {
        self.machine.results()
    }

    pub(crate) fn wait_until_done(&mut self) {
        self.machine.wait_until_done();
    }

    /// Ends the VMM in good order.
    pub(crate) fn finish(self) {
        self.machine.finish();
    }
}
