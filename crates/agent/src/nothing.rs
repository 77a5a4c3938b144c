//! For tests: a guest without memory.

use vmsight_arch::Gpa;
use vmsight_arch::paging::TableMemory;
use vmsight_hooks::FilterMemory;

pub(crate) struct Nothing;

impl TableMemory for Nothing {
    fn entry_u64(&self, _: Gpa) -> Option<u64> {
        None
    }

    fn entry_u32(&self, _: Gpa) -> Option<u32> {
        None
    }
}

impl FilterMemory for Nothing {
    fn read_physical(&self, _: Gpa, _: &mut [u8]) -> bool {
        false
    }
}
