//! Memory of devices, which is none of the guest's own: what a graphics card shows may lie only there.

use std::cell::OnceCell;
use std::fmt;

use vmsight_arch::Gpa;
use vmsight_linux::Kernel;
use vmsight_memory::{GuestMemory, Region};

/// Where the memory of a guest's devices is read. A running VM's is asked for when it is first needed. A dump has it among the rest,
/// at the addresses of its devices, if whoever wrote it took it for memory, as QEMU's `dump-guest-memory` does.
pub struct DeviceMemory<'a> {
    ask: Box<dyn Fn() -> Result<GuestMemory, String> + 'a>,
    asked: OnceCell<Result<GuestMemory, String>>,
    /// What of a dump is RAM, where firmware's map of it can be read.
    ram: OnceCell<Option<Vec<Region>>>,
}

impl<'a> DeviceMemory<'a> {
    /// `ask` gives a running VM's, or says why it cannot; it is asked once at most, and for a dump never.
    pub fn new(ask: impl Fn() -> Result<GuestMemory, String> + 'a) -> Self {
        Self {
            ask: Box::new(ask),
            asked: OnceCell::new(),
            ram: OnceCell::new(),
        }
    }

    /// The memory that has a device's at `gpa`, or why there is none.
    pub(crate) fn at(&self, kernel: &Kernel, gpa: Gpa) -> Result<GuestMemory, String> {
        let memory = kernel.memory();
        if !memory.is_live() {
            return match memory.region_of(gpa) {
                Some(_) => Ok(memory.clone()),
                None => Err(format!(
                    "this dump has nothing at {gpa}: what QEMU's dump-guest-memory writes has"
                )),
            };
        }
        let given = self.asked.get_or_init(|| (self.ask)()).clone()?;
        match given.region_of(gpa) {
            Some(_) => Ok(given),
            None => Err(format!("the VM has no device with memory at {gpa}")),
        }
    }

    /// Whether the address is RAM. A dump may have more than that: of what it has, RAM is what firmware says is, where it can be asked.
    pub(crate) fn is_ram(&self, kernel: &Kernel, gpa: Gpa) -> bool {
        let memory = kernel.memory();
        if memory.region_of(gpa).is_none() || memory.is_live() {
            return memory.region_of(gpa).is_some();
        }
        let ram = self.ram.get_or_init(|| kernel.firmware_ram().ok());
        ram.as_ref()
            .is_none_or(|ram| ram.iter().any(|region| region.contains(gpa)))
    }
}

impl fmt::Debug for DeviceMemory<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceMemory")
            .field("asked", &self.asked)
            .finish_non_exhaustive()
    }
}
