//! A guest that takes orders in a QEMU with the agent, and a monitor of it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use vmsight_arch::Gva;
use vmsight_events::agent::AgentBackend;
use vmsight_events::{Monitor, Occurrence};
use vmsight_hooks::{Delivery, Expiry, Overflow, Verdict};
use vmsight_lab::orders::checksum;
use vmsight_lab::{Account, Guest, Kernel, Memory, Qemu, Spec, Work};
use vmsight_target::{AttachOptions, Target, TargetSpec};

/// How long after the guest's answer events may still be on their way.
const SETTLING: Duration = Duration::from_millis(300);
/// What ends a test that hangs.
const DEADLINE: Duration = Duration::from_secs(240);
const ROUNDS: u64 = 100_000;

/// All events are held until they were read.
pub(crate) const HELD: Delivery = Delivery::Held {
    deadline: Duration::from_secs(60),
    expiry: Expiry::Open,
};
/// No event is lost.
pub(crate) const TOLD: Delivery = Delivery::Told {
    overflow: Overflow::Block,
};

pub(crate) struct Watched {
    pub(crate) guest: Guest,
    pub(crate) kernel: vmsight_linux::Kernel,
    pub(crate) target: Target,
}

impl Watched {
    /// Two vCPUs, no workload.
    pub(crate) fn boot(qemu: Qemu) -> Self {
        let spec = Spec {
            memory: Memory::Memfd,
            vcpus: 2,
            qemu,
            agent: Some(library()),
            ..Spec::new(Kernel::V6_12).idle().orders()
        };
        let guest = Guest::boot(&spec).unwrap_or_else(|e| panic!("{e:?}"));
        let spec = TargetSpec::Qmp(guest.qmp_path().unwrap());
        let target =
            vmsight_target::attach(&spec, &AttachOptions::default()).unwrap_or_else(|e| panic!("{e}"));
        let kernel = vmsight_linux::Kernel::attach(target.memory.clone(), Default::default())
            .unwrap_or_else(|e| panic!("{e}"));
        Self {
            guest,
            kernel,
            target,
        }
    }

    pub(crate) fn agent(&self) -> AgentBackend {
        let socket = self.guest.agent_path().unwrap();
        AgentBackend::open(&socket).unwrap_or_else(|e| panic!("{e}"))
    }

    pub(crate) fn monitor(&self) -> Monitor {
        Monitor::new(Box::new(self.agent()))
    }

    /// Does something that has the guest at work, and gives every event meanwhile, and shortly after, to `take`.
    pub(crate) fn during<T: Send>(
        &self,
        monitor: &Monitor,
        mut take: impl FnMut(&Occurrence),
        work: impl FnOnce(&Guest) -> T + Send,
    ) -> T {
        std::thread::scope(|scope| {
            let worker = scope.spawn(|| work(&self.guest));
            let start = Instant::now();
            let mut finished = None;
            loop {
                assert!(start.elapsed() < DEADLINE, "no end");
                if let Some(occurrence) = monitor.next(Duration::from_millis(100)).unwrap() {
                    take(&occurrence);
                    occurrence.answer(Verdict::Continue).unwrap();
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

    pub(crate) fn order(&self, work: Work) -> Account {
        self.guest.order(work).unwrap_or_else(|e| panic!("{e:#}"))
    }

    pub(crate) fn symbol(&self, name: &str) -> Gva {
        self.kernel.symbol(name).unwrap_or_else(|e| panic!("{e}"))
    }

    /// What no hook may change: code of the kernel, and what a computation comes to.
    pub(crate) fn state(&self) -> (Vec<u8>, u64) {
        let account = self.order(Work::Compute { rounds: ROUNDS });
        assert_eq!(account.checksum, Some(checksum(ROUNDS)));
        let mut text = vec![0; 4096];
        let start = self.symbol("entry_SYSCALL_64");
        self.kernel.space().read(start, &mut text).unwrap();
        (text, account.checksum.unwrap())
    }
}

/// The agent, which cargo built beside this test.
fn library() -> PathBuf {
    std::env::current_exe()
        .unwrap()
        .with_file_name("libvmsight_agent.so")
}
