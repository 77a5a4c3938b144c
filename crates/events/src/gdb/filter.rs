//! The stub knows no filters: they are evaluated here, while the VM stands still, on the memory that the VM has at
//! that moment.

use std::cell::RefCell;

use vmsight_arch::paging::TableMemory;
use vmsight_arch::{Gpa, Gva, Registers};
use vmsight_hooks::FilterMemory;
use vmsight_memory::GuestMemory;
use vmsight_target::gdb::Debugger;

/// The memory of the VM, as filters read it. KERNEL_GS_BASE comes with the stub's registers.
pub(super) struct Standing<'m> {
    pub(super) memory: &'m GuestMemory,
    pub(super) stub: RefCell<&'m mut Debugger>,
}

impl TableMemory for Standing<'_> {
    fn entry_u64(&self, gpa: Gpa) -> Option<u64> {
        self.memory.entry_u64(gpa)
    }

    fn entry_u32(&self, gpa: Gpa) -> Option<u32> {
        self.memory.entry_u32(gpa)
    }
}

impl FilterMemory for Standing<'_> {
    fn read_physical(&self, gpa: Gpa, out: &mut [u8]) -> bool {
        self.memory.read(gpa, out).is_ok()
    }

    /// The stub knows more (ROM, and memory that the target has no access to) and is slower: it is asked last.
    fn read_virtual(&self, registers: &Registers, gva: Gva, out: &mut [u8]) -> usize {
        let read = self.walk(registers, gva, out);
        let rest = out.get_mut(read..).filter(|rest| !rest.is_empty());
        let Some(rest) = rest else { return read };
        let Ok(mut stub) = self.stub.try_borrow_mut() else {
            return read;
        };
        match stub.read(registers.vcpu, gva.0.wrapping_add(read as u64), rest) {
            Ok(()) => out.len(),
            // Nothing is there, or the connection is gone: who goes on with it learns that.
            Err(_) => read,
        }
    }
}
