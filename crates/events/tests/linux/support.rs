//! A guest that takes orders, and a monitor of it.

use std::time::{Duration, Instant};

use vmsight_arch::Gva;
use vmsight_events::{Monitor, Occurrence, OpenOptions, open};
use vmsight_hooks::{Delivery, Expiry, Verdict};
use vmsight_lab::{Account, Guest, Memory, Order, Spec};
use vmsight_target::{AttachOptions, Target, TargetSpec};

/// How long after the guest's answer events may still be on their way.
const SETTLING: Duration = Duration::from_millis(500);
/// What ends a test that hangs.
const DEADLINE: Duration = Duration::from_secs(240);

/// All events are held until they were read.
pub(crate) const HELD: Delivery = Delivery::Held {
    deadline: Duration::from_secs(60),
    expiry: Expiry::Open,
};

pub(crate) struct Watched {
    pub(crate) guest: Guest,
    pub(crate) kernel: vmsight_linux::Kernel,
    target: Target,
}

impl Watched {
    /// Two vCPUs, no workload.
    pub(crate) fn boot(version: vmsight_lab::Kernel, modules: bool) -> Self {
        let spec = Spec {
            memory: Memory::Memfd,
            vcpus: 2,
            ..Spec::new(version).idle().orders()
        };
        let spec = if modules { spec.modules() } else { spec };
        let guest = Guest::boot(&spec).unwrap_or_else(|e| panic!("{e:?}"));
        let spec = TargetSpec::Qmp(guest.qmp_path().unwrap());
        let options = AttachOptions {
            write: true,
            ..AttachOptions::default()
        };
        let target = vmsight_target::attach(&spec, &options).unwrap_or_else(|e| panic!("{e}"));
        let kernel = vmsight_linux::Kernel::attach(target.memory.clone(), Default::default())
            .unwrap_or_else(|e| panic!("{e}"));
        Self {
            guest,
            kernel,
            target,
        }
    }

    pub(crate) fn monitor(&self) -> Monitor {
        let options = OpenOptions {
            timeout: Duration::from_secs(30),
            ..OpenOptions::default()
        };
        open(&self.target, options).unwrap_or_else(|e| panic!("{e}"))
    }

    /// Does something that has the guest at work, and gives every event meanwhile, and shortly after, to `take`.
    pub(crate) fn during<T: Send>(
        &self,
        monitor: &Monitor,
        mut take: impl FnMut(&Occurrence) -> Verdict,
        work: impl FnOnce(&Guest) -> T + Send,
    ) -> T {
        std::thread::scope(|scope| {
            let worker = scope.spawn(|| work(&self.guest));
            let start = Instant::now();
            let mut finished = None;
            loop {
                assert!(start.elapsed() < DEADLINE, "no end");
                if let Some(occurrence) = monitor.next(Duration::from_millis(100)).unwrap() {
                    let verdict = take(&occurrence);
                    occurrence.answer(verdict).unwrap();
                } else if worker.is_finished() {
                    let since = *finished.get_or_insert_with(Instant::now);
                    if since.elapsed() > SETTLING {
                        break;
                    }
                }
            }
            worker.join().unwrap()
        })
    }

    pub(crate) fn order(&self, order: impl Into<Order>) -> Account {
        self.guest.order(order).unwrap_or_else(|e| panic!("{e:#}"))
    }

    /// The code that is hooked, as it is now. Not all of the kernel's: it patches itself where something is used for the
    /// first time.
    pub(crate) fn text(&self) -> Vec<u8> {
        let functions = [
            "entry_SYSCALL_64",
            "begin_new_exec",
            "do_exit",
            "wake_up_new_task",
        ];
        let code = functions.map(|function| {
            let mut bytes = [0; 512];
            self.kernel
                .space()
                .read(self.symbol(function), &mut bytes)
                .unwrap();
            bytes
        });
        code.concat()
    }

    pub(crate) fn symbol(&self, name: &str) -> Gva {
        self.kernel.symbol(name).unwrap_or_else(|e| panic!("{e}"))
    }
}
