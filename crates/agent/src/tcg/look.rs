//! Looking into the guest's memory by QEMU's own means: for what hooks need to know of it, never to change it.

use std::ffi::c_void;
use std::ptr;

use vmsight_arch::paging::{PagingMode, TableMemory, resolve};
use vmsight_arch::{Gpa, Gva};
use vmsight_hooks::{Access, FilterMemory, Hook, HookKind, Range, Scope};

use super::api;
use super::front::Front;
use super::interrupt::{self, Handlers};
use super::shadow::{self, Shadow};

const PAGE: u64 = 4096;

thread_local! {
    /// Where QEMU says which vCPU this thread runs.
    static CURRENT: *const *mut c_void = api::current();
}

impl Front {
    /// Which vCPU's callback this is. QEMU 10 says the one for which the code was translated, where one thread runs several
    /// (`accel/tcg/plugin-gen.c`, `gen_cpu_index`).
    pub(super) fn vcpu(&self, said: u32) -> u32 {
        let current = CURRENT.with(|current| *current);
        if current.is_null() {
            return said;
        }
        // SAFETY: this thread's variable of QEMU's, which only this thread changes.
        let current = unsafe { current.read() };
        if current.is_null() || self.cpu(said) == current {
            return said;
        }
        (0..self.vcpus())
            .find(|vcpu| self.cpu(*vcpu) == current)
            .unwrap_or(said)
    }

    /// What the memory of a hook on writes holds; `None` where that is not known, or values are not told.
    pub(super) fn shadow(&self, cpu: *mut c_void, hook: &Hook) -> Option<Shadow> {
        let HookKind::Memory { range, access } = hook.kind else {
            return None;
        };
        self.values?;
        if !access.contains(Access::WRITE) || range.len() > shadow::MOST {
            return None;
        }
        let mut bytes = vec![0; usize::try_from(range.len()).ok()?];
        match (range, hook.scope) {
            (Range::Physical { start, .. }, _) => self.read_physical(start.0, &mut bytes),
            (Range::Virtual { start, .. }, Scope::All) if start.0 >> 63 != 0 => {
                // SAFETY: the buffer is as long as it says, and nothing is written to the guest.
                let read = unsafe {
                    (self.inside.read_virtual)(cpu, start.0, bytes.as_mut_ptr().cast(), bytes.len(), false)
                };
                if read < 0 {
                    return None;
                }
            }
            // Whose memory it is differs from access to access.
            (Range::Virtual { .. }, Scope::All) => return None,
            (Range::Virtual { start, .. }, Scope::Dtb(dtb)) => {
                let mode = PagingMode::from_registers(&self.registers.as_ref()?.all(0, None))?;
                let mut at = start.0;
                let mut rest = bytes.as_mut_slice();
                while !rest.is_empty() {
                    let here = usize::try_from(PAGE - at % PAGE).ok()?.min(rest.len());
                    let (page, after) = rest.split_at_mut(here);
                    let gpa = resolve(mode, self, mode.dtb(dtb.0), Gva(at))?.gpa;
                    self.read_physical(gpa.0, page);
                    at = at.wrapping_add(here as u64);
                    rest = after;
                }
            }
        }
        Some(Shadow::new(range.first(), bytes))
    }

    /// Where the handlers of all vCPUs are.
    pub(super) fn handlers(&self) -> Handlers {
        let mut handlers = Handlers::default();
        let Some(dump) = &self.dump else { return handlers };
        for vcpu in 0..self.vcpus() {
            let cpu = self.cpu(vcpu);
            if cpu.is_null() {
                continue;
            }
            let Some((base, len)) = interrupt::table(dump, cpu) else {
                continue;
            };
            let mut table = vec![0; len];
            // SAFETY: the buffer is as long as it says, and nothing is written to the guest.
            let read = unsafe {
                (self.inside.read_virtual)(cpu, base, table.as_mut_ptr().cast(), table.len(), false)
            };
            if read >= 0 {
                handlers.add(&table);
            }
        }
        handlers
    }

    /// QEMU's own of a vCPU; null where it has none.
    pub(super) fn cpu(&self, vcpu: u32) -> *mut c_void {
        let Ok(index) = i32::try_from(vcpu) else {
            return ptr::null_mut();
        };
        // SAFETY: QEMU looks its list of vCPUs through; from any thread.
        unsafe { (self.inside.cpu)(index) }
    }

    /// 8 bytes of what a vCPU has mapped, on its thread.
    pub(super) fn read_virtual_u64(&self, vcpu: u32, at: u64) -> Option<u64> {
        let cpu = self.cpu(vcpu);
        if cpu.is_null() {
            return None;
        }
        let mut bytes = [0; 8];
        // SAFETY: the buffer is as long as it says, and nothing is written to the guest.
        let read = unsafe { (self.inside.read_virtual)(cpu, at, bytes.as_mut_ptr().cast(), 8, false) };
        (read >= 0).then(|| u64::from_le_bytes(bytes))
    }

    fn read_physical(&self, gpa: u64, bytes: &mut [u8]) {
        // SAFETY: the buffer is as long as it says, and nothing is written to the guest.
        unsafe { (self.inside.physical)(gpa, bytes.as_mut_ptr().cast(), bytes.len() as u64, false) };
    }
}
/// Page tables, read where they lie.
impl TableMemory for Front {
    fn entry_u64(&self, gpa: Gpa) -> Option<u64> {
        let mut bytes = [0; 8];
        self.read_physical(gpa.0, &mut bytes);
        Some(u64::from_le_bytes(bytes))
    }

    fn entry_u32(&self, gpa: Gpa) -> Option<u32> {
        let mut bytes = [0; 4];
        self.read_physical(gpa.0, &mut bytes);
        Some(u32::from_le_bytes(bytes))
    }
}

/// The same memory, as filters read it. Where a device answers, a guest has its own device read.
impl FilterMemory for Front {
    fn read_physical(&self, gpa: Gpa, out: &mut [u8]) -> bool {
        Front::read_physical(self, gpa.0, out);
        true
    }
}
