//! The agent of one VM: what the VMM does with KVM, what is hooked, and the one lock over both.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use kvm_bindings::kvm_userspace_memory_region;
use libc::c_int;
use vmsight_channel::Refusal;
use vmsight_hooks::Expiry;

use crate::capability::Kernel;
use crate::filter::Filter;
use crate::guest::Guest;
use crate::pending::expiry;
use crate::qemu::Qemu;
use crate::session::Session;
use crate::slots::Slot;
use crate::state::State;
use crate::table::{Armed, Table};
use crate::vcpu::Vcpu;
use crate::world::{Stopped, World};
use crate::{control, kvm, signal};

/// The agent. It lives as long as the process.
#[derive(Debug)]
pub(crate) struct Agent {
    /// The VM's descriptor.
    pub(crate) vm: RawFd,
    pub(crate) kernel: Kernel,
    pub(crate) socket: PathBuf,
    run_size: usize,
    state: Mutex<State>,
    table: RwLock<Arc<Table>>,
    pub(crate) world: World,
    vcpus: RwLock<Vec<&'static Vcpu>>,
    /// In the order in which they came.
    sessions: RwLock<Vec<Arc<Session>>>,
    qemu: Option<Qemu>,
}

static AGENT: OnceLock<&'static Agent> = OnceLock::new();
/// The VM's descriptor once more, for who only wants to compare.
static VM: AtomicI32 = AtomicI32::new(-1);

/// The agent, once there is a VM.
pub(crate) fn get() -> Option<&'static Agent> {
    AGENT.get().copied()
}

/// Whether this descriptor is the VM's.
pub(crate) fn is_vm(fd: c_int) -> bool {
    fd >= 0 && fd == VM.load(Ordering::Relaxed)
}

/// The VMM made a VM. Only the first one is watched.
pub(crate) fn begin(system: RawFd, vm: RawFd) {
    let Some(socket) = std::env::var_os("VMSIGHT_AGENT") else {
        return;
    };
    let Ok(run_size) = kvm::number(system, kvm::GET_VCPU_MMAP_SIZE, 0) else {
        return;
    };
    if AGENT.get().is_some() || !signal::set_up() {
        return;
    }
    let agent: &'static Agent = Box::leak(Box::new(Agent {
        vm,
        kernel: Kernel::ask(vm),
        socket: socket.into(),
        run_size: usize::try_from(run_size).unwrap_or(0),
        state: Mutex::default(),
        table: RwLock::default(),
        world: World::default(),
        vcpus: RwLock::default(),
        sessions: RwLock::default(),
        qemu: Qemu::find(runs),
    }));
    if AGENT.set(agent).is_ok() {
        VM.store(vm, Ordering::Relaxed);
        control::start(agent);
    }
}

/// QEMU says that its owner lets the VM run.
fn runs() {
    if let Some(agent) = get() {
        agent.world.thaw();
    }
}

impl Agent {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn table(&self) -> Arc<Table> {
        Arc::clone(&self.table.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Looks into the guest's memory. The VMM does not take any away meanwhile.
    pub(crate) fn with_guest<T>(&self, look: impl FnOnce(&Guest<'_>, &Table) -> T) -> T {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        look(&Guest::new(&table.slots), &table)
    }

    pub(crate) fn publish(&self, table: Table) {
        *self.table.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(table);
    }

    pub(crate) fn vcpus(&self) -> Vec<&'static Vcpu> {
        self.vcpus.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn vcpu(&self, fd: c_int) -> Option<&'static Vcpu> {
        let vcpus = self.vcpus.read().unwrap_or_else(PoisonError::into_inner);
        vcpus.iter().find(|v| v.fd == fd).copied()
    }

    /// The VMM made a vCPU.
    pub(crate) fn add_vcpu(&self, fd: RawFd) {
        let mut vcpus = self.vcpus.write().unwrap_or_else(PoisonError::into_inner);
        let index = u32::try_from(vcpus.len()).unwrap_or(u32::MAX);
        if let Some(vcpu) = Vcpu::new(index, fd, self.run_size) {
            vcpus.push(Box::leak(Box::new(vcpu)));
        }
        for session in self.sessions() {
            session.shared.set_vcpus(index.saturating_add(1));
        }
    }

    /// Brings all vCPUs out of the guest.
    pub(crate) fn stop(&self) -> Option<Stopped<'_>> {
        self.world.stop(&self.vcpus())
    }

    pub(crate) fn sessions(&self) -> Vec<Arc<Session>> {
        self.sessions
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(crate) fn begin_session(&self, session: Arc<Session>) {
        // A vCPU that comes meanwhile waits, and finds the session.
        let vcpus = self.vcpus.read().unwrap_or_else(PoisonError::into_inner);
        let mut sessions = self.sessions.write().unwrap_or_else(PoisonError::into_inner);
        let count = u32::try_from(vcpus.len()).unwrap_or(u32::MAX);
        session.shared.set_vcpus(count);
        sessions.push(session);
    }

    /// A monitor is gone: each of its hooks comes out. Without a good-bye the VM stands still where one of them
    /// asks for that.
    pub(crate) fn end_session(&self, session: &Session, in_good_order: bool) {
        let mut sessions = self.sessions.write().unwrap_or_else(PoisonError::into_inner);
        sessions.retain(|s| s.id != session.id);
        drop(sessions);
        let closed = !in_good_order && self.state().fails_closed(session.id);
        if closed && !session.is_over() {
            self.freeze();
            self.tell_all("a monitor ended without a word, and asked for the VM to be paused then");
        }
        if session.end() {
            self.state().disarm_all(self, session.id);
            self.nudge(session);
        }
    }

    /// Wakes vCPUs that wait for a monitor's verdicts, so that they look around.
    fn nudge(&self, session: &Session) {
        for vcpu in self.vcpus() {
            if let Some(area) = session.shared.area(vcpu.index) {
                area.nudge();
            }
        }
    }

    /// Takes a hook out.
    pub(crate) fn disarm(&self, armed: &Armed) {
        self.state().disarm(self, armed.id);
        self.nudge(&armed.session);
    }

    /// No verdict came in time, or no room for the event.
    pub(crate) fn expired(&self, armed: &Armed) {
        armed.expired.fetch_add(1, Ordering::Relaxed);
        match expiry(armed) {
            Expiry::Open => {
                self.disarm(armed);
                armed.notice("no verdict came in time: the guest went on, and the hook is out");
            }
            Expiry::Closed => {
                self.freeze();
                armed.notice("no verdict came in time: the VM is paused");
            }
        }
    }

    /// Pauses the VM until its owner, or a monitor, resumes it.
    pub(crate) fn freeze(&self) {
        self.world.freeze(&self.vcpus());
        if let Some(qemu) = &self.qemu {
            qemu.pause();
        }
    }

    /// Tells all monitors what none asked for.
    pub(crate) fn tell_all(&self, text: &str) {
        for session in self.sessions() {
            session.notice(None, text);
        }
    }

    /// The VMM sets a slot: made as it asks, and cut again where pages of it are watched. What the kernel answered, as of
    /// ioctl(2).
    pub(crate) fn set_memory(
        &self,
        region: &kvm_userspace_memory_region,
        foreign: bool,
        real: impl FnOnce() -> c_int,
    ) -> c_int {
        let slot = Slot {
            id: region.slot,
            flags: region.flags,
            gpa: region.guest_phys_addr,
            size: region.memory_size,
            hva: region.userspace_addr,
            foreign,
        };
        self.state().set_memory(self, slot, real)
    }

    /// The VMM sets its own filter of MSRs.
    pub(crate) fn set_filter(&self, filter: Filter) -> Result<(), i32> {
        self.state().set_filter(self, filter)
    }

    /// The VMM asks for MSR accesses that KVM does not do itself.
    pub(crate) fn set_reasons(&self, reasons: u32) -> Result<(), i32> {
        self.state().set_reasons(self, reasons)
    }

    /// The VMM begins or ends debugging a vCPU itself; whether it may.
    pub(crate) fn vmm_debugs(&self, vcpu: &Vcpu, on: bool) -> bool {
        let state = self.state();
        if on && state.debugs() {
            return false;
        }
        vcpu.vmm_debug.store(on, Ordering::Relaxed);
        true
    }

    /// Whether the VMM debugs the guest.
    pub(crate) fn is_vmm_debugging(&self) -> bool {
        self.vcpus().iter().any(|v| v.vmm_debug.load(Ordering::Relaxed))
    }

    /// The machine is being reset: what was hooked by virtual address means nothing any more.
    pub(crate) fn machine_reset(&self) {
        let gone = self.state().machine_reset(self);
        for armed in gone {
            armed.notice("the machine was reset, and the hook is out");
        }
    }
}

/// A refusal that names what the system said.
pub(crate) fn failed(doing: &str, error: &std::io::Error) -> Refusal {
    Refusal::Failed {
        why: format!("{doing}: {error}"),
    }
}
