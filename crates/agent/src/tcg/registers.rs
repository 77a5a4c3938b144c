//! The registers of the vCPU whose thread this is, as QEMU gives them to its debugger.

use std::cell::Cell;
use std::ffi::CStr;
use std::ptr;
use std::sync::OnceLock;

use vmsight_arch::Registers;
use vmsight_arch::registers::GPR_NAMES;

use super::api::{self, Array, RegisterDescriptor, RegisterHandle};

/// EFER.LMA: the vCPU is in long mode.
const EFER_LMA: u64 = 1 << 10;
/// Most registers that are looked through.
const MOST: usize = 1024;

thread_local! {
    /// What registers are read into: made once for each thread.
    static BYTES: Cell<*mut Array> = const { Cell::new(ptr::null_mut()) };
}

/// Which register a handle is of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Which {
    Gpr(usize),
    Rip,
    Flags,
    Cs,
    Ss,
    Ds,
    Es,
    Fs,
    Gs,
    FsBase,
    GsBase,
    KernelGsBase,
    Cr0,
    Cr2,
    Cr3,
    Cr4,
    Efer,
}

impl Which {
    /// By the name of QEMU's `gdb-xml/i386-64bit.xml`.
    fn named(name: &str) -> Option<Self> {
        if let Some(n) = GPR_NAMES.iter().position(|gpr| *gpr == name) {
            return Some(Self::Gpr(n));
        }
        Some(match name {
            "rip" => Self::Rip,
            "eflags" => Self::Flags,
            "cs" => Self::Cs,
            "ss" => Self::Ss,
            "ds" => Self::Ds,
            "es" => Self::Es,
            "fs" => Self::Fs,
            "gs" => Self::Gs,
            "fs_base" => Self::FsBase,
            "gs_base" => Self::GsBase,
            "k_gs_base" => Self::KernelGsBase,
            "cr0" => Self::Cr0,
            "cr2" => Self::Cr2,
            "cr3" => Self::Cr3,
            "cr4" => Self::Cr4,
            "efer" => Self::Efer,
            _ => return None,
        })
    }
}

/// Handles of all registers, the same for all vCPUs.
#[derive(Debug)]
struct Handles(Vec<(Which, RegisterHandle)>);

// SAFETY: numbers in the shape of pointers, which only QEMU looks into.
unsafe impl Send for Handles {}
// SAFETY: as above.
unsafe impl Sync for Handles {}

/// How registers are read.
#[derive(Debug)]
pub(super) struct Reader {
    api: api::Registers,
    handles: OnceLock<Handles>,
}

impl Reader {
    /// `None` where this QEMU gives none.
    pub(super) fn find() -> Option<Self> {
        Some(Self {
            api: api::Registers::find()?,
            handles: OnceLock::new(),
        })
    }

    /// On a vCPU's thread.
    fn handles(&self) -> &[(Which, RegisterHandle)] {
        let handles = self.handles.get_or_init(|| {
            // SAFETY: called on a vCPU's thread, as QEMU wants it.
            let list = unsafe { (self.api.list)() };
            if list.is_null() {
                return Handles(Vec::new());
            }
            let mut found = Vec::new();
            // SAFETY: an array of descriptors that QEMU made and leaves to its caller; their names live as long
            // as QEMU.
            unsafe {
                let (data, len) = ((*list).data.cast::<RegisterDescriptor>(), (*list).len as usize);
                for n in 0..len.min(MOST) {
                    let descriptor = data.add(n).read_unaligned();
                    if descriptor.name.is_null() {
                        continue;
                    }
                    let name = CStr::from_ptr(descriptor.name).to_str().unwrap_or_default();
                    if let Some(which) = Which::named(name) {
                        found.push((which, descriptor.handle));
                    }
                }
                (self.api.free_list)(list, 1);
            }
            Handles(found)
        });
        &handles.0
    }

    fn value(&self, handle: RegisterHandle) -> Option<u64> {
        let mut bytes = BYTES.get();
        if bytes.is_null() {
            // SAFETY: GLib makes one or ends the process.
            bytes = unsafe { (self.api.new_bytes)() };
            BYTES.set(bytes);
        }
        // SAFETY: this thread's own array; QEMU appends the register's bytes to it.
        unsafe {
            (self.api.set_size)(bytes, 0);
            (self.api.read)(handle, bytes);
            let (data, len) = ((*bytes).data.cast::<u8>(), (*bytes).len as usize);
            if data.is_null() || !(1..=8).contains(&len) {
                return None;
            }
            let mut value = [0; 8];
            ptr::copy_nonoverlapping(data, value.as_mut_ptr(), len);
            Some(u64::from_le_bytes(value))
        }
    }

    fn one(&self, which: Which) -> Option<u64> {
        let (_, handle) = self.handles().iter().find(|(w, _)| *w == which)?;
        self.value(*handle)
    }

    /// Where the instruction that was translated at `translated` is being executed: see [`Self::all`].
    pub(super) fn rip(&self, translated: u64) -> u64 {
        let long = self.one(Which::Efer).is_some_and(|efer| efer & EFER_LMA != 0);
        match self.one(Which::Rip) {
            Some(rip) if long => executed_at(translated, rip),
            _ => translated,
        }
    }

    /// All of them, on the thread of `vcpu`. QEMU translates the code of a page once, wherever the page is
    /// mapped, and keeps RIP only at the beginning of a block and at a few places in it: where the instruction
    /// is, is told from both.
    pub(super) fn all(&self, vcpu: u32, translated: Option<u64>) -> Registers {
        let mut registers = Registers {
            vcpu,
            ..Registers::default()
        };
        let r = &mut registers;
        for (which, handle) in self.handles() {
            let Some(value) = self.value(*handle) else {
                continue;
            };
            match which {
                Which::Gpr(n) => {
                    if let Some(gpr) = r.gprs.get_mut(*n) {
                        *gpr = value;
                    }
                }
                Which::Rip => r.rip = value,
                Which::Flags => r.rflags = value,
                Which::Cs => r.cs.selector = value as u16,
                Which::Ss => r.ss.selector = value as u16,
                Which::Ds => r.ds.selector = value as u16,
                Which::Es => r.es.selector = value as u16,
                Which::Fs => r.fs.selector = value as u16,
                Which::Gs => r.gs.selector = value as u16,
                Which::FsBase => r.fs.base = value,
                Which::GsBase => r.gs.base = value,
                Which::KernelGsBase => r.kernel_gs_base = Some(value),
                Which::Cr0 => r.cr0 = value,
                Which::Cr2 => r.cr2 = value,
                Which::Cr3 => r.cr3 = value,
                Which::Cr4 => r.cr4 = value,
                Which::Efer => r.efer = value,
            }
        }
        if let Some(translated) = translated {
            r.rip = match r.efer & EFER_LMA {
                0 => translated,
                _ => executed_at(translated, r.rip),
            };
        }
        registers
    }
}

/// Where an instruction is executed that was translated at `translated`, from a RIP of the same block that is
/// not past it: a block begins in the page in which its instructions begin.
fn executed_at(translated: u64, rip: u64) -> u64 {
    let pages = rip.wrapping_sub(translated).wrapping_add(0xfff) & !0xfff;
    translated.wrapping_add(pages)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instruction_is_where_its_page_is_mapped() {
        let kernel = 0xffff_ffff_8100_0123;
        assert_eq!(executed_at(kernel, kernel), kernel);
        assert_eq!(
            executed_at(kernel, kernel - 0x123),
            kernel,
            "the block's beginning"
        );
        // The same page at another address, lower and higher.
        assert_eq!(executed_at(0x7fff_0000_1123, 0x5555_0000_4100), 0x5555_0000_4123);
        assert_eq!(executed_at(0x5555_0000_4123, 0x7fff_0000_1123), 0x7fff_0000_1123);
        // The last byte of a page, in a block that begins with it.
        assert_eq!(executed_at(0x1fff, 0x5000), 0x5fff);
        assert_eq!(executed_at(0, u64::MAX), 0);
    }

    #[test]
    fn every_register_that_an_event_has_is_known_by_its_name() {
        for name in GPR_NAMES.iter().chain(&[
            "rip",
            "eflags",
            "cs",
            "ss",
            "ds",
            "es",
            "fs",
            "gs",
            "fs_base",
            "gs_base",
            "k_gs_base",
            "cr0",
            "cr2",
            "cr3",
            "cr4",
            "efer",
        ]) {
            assert!(Which::named(name).is_some(), "{name}");
        }
        assert_eq!(Which::named("xmm0"), None);
    }
}
