//! The guest's memory, through the VMM's own mapping of it.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use vmsight_arch::paging::{PagingMode, TableMemory, resolve};
use vmsight_arch::{Gpa, Gva, Registers};

use crate::slots::Slot;

/// Virtual addresses from here on belong to kernels.
pub(crate) const UPPER_HALF: u64 = 1 << 63;

/// Slots that say where memory lies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Guest<'s> {
    slots: &'s [Slot],
}

impl<'s> Guest<'s> {
    pub(crate) fn new(slots: &'s [Slot]) -> Self {
        Self { slots }
    }

    /// The slot that all of `len` bytes from `gpa` on are in.
    pub(crate) fn slot(&self, gpa: u64, len: u64) -> Option<&'s Slot> {
        // Address space 0: what the guest sees outside of system-management mode.
        let own = |s: &&Slot| s.id >> 16 == 0 && !s.foreign && s.hva(gpa, len).is_some();
        self.slots.iter().find(own)
    }

    fn hva(&self, gpa: u64, len: u64) -> Option<usize> {
        let hva = self.slot(gpa, len)?.hva(gpa, len)?;
        usize::try_from(hva).ok().filter(|hva| *hva != 0)
    }

    /// A little-endian number of 1 to 8 bytes. Naturally aligned ones of 1, 2, 4 and 8 bytes are read in one piece.
    pub(crate) fn read(&self, gpa: u64, len: u8) -> Option<u64> {
        let at = self.hva(gpa, len.into())?;
        // SAFETY: `hva` lies in memory that the VMM gave to its guest and tells KVM before it takes it away: the caller's
        // table of slots is replaced while nobody reads through it. All `len` bytes are in the slot, and alignment is checked.
        unsafe {
            Some(match len {
                2 if at.is_multiple_of(2) => {
                    AtomicU16::from_ptr(at as *mut u16).load(Ordering::Relaxed).into()
                }
                4 if at.is_multiple_of(4) => {
                    AtomicU32::from_ptr(at as *mut u32).load(Ordering::Relaxed).into()
                }
                8 if at.is_multiple_of(8) => AtomicU64::from_ptr(at as *mut u64).load(Ordering::Relaxed),
                1..=8 => (0..usize::from(len)).fold(0, |value, i| {
                    let byte = AtomicU8::from_ptr((at + i) as *mut u8).load(Ordering::Relaxed);
                    value | u64::from(byte) << (8 * i)
                }),
                _ => return None,
            })
        }
    }

    /// Writes a little-endian number of 1 to 8 bytes, in one piece where [`Self::read`] reads in one; whether there is memory.
    pub(crate) fn write(&self, gpa: u64, len: u8, value: u64) -> bool {
        let Some(at) = self.hva(gpa, len.into()) else {
            return false;
        };
        // SAFETY: as in `read`; the guest's memory may be written as a processor of the guest would.
        unsafe {
            match len {
                2 if at.is_multiple_of(2) => {
                    AtomicU16::from_ptr(at as *mut u16).store(value as u16, Ordering::Release)
                }
                4 if at.is_multiple_of(4) => {
                    AtomicU32::from_ptr(at as *mut u32).store(value as u32, Ordering::Release)
                }
                8 if at.is_multiple_of(8) => {
                    AtomicU64::from_ptr(at as *mut u64).store(value, Ordering::Release)
                }
                1..=8 => {
                    for i in 0..usize::from(len) {
                        let byte = (value >> (8 * i)) as u8;
                        AtomicU8::from_ptr((at + i) as *mut u8).store(byte, Ordering::Release);
                    }
                }
                _ => return false,
            }
        }
        true
    }

    /// Where a virtual address lies for a vCPU with these registers; without paging, where it says.
    pub(crate) fn translate(&self, registers: &Registers, gva: u64) -> Option<u64> {
        self.translate_by(registers, registers.cr3, gva)
    }

    /// The same with other page tables.
    pub(crate) fn translate_by(&self, registers: &Registers, cr3: u64, gva: u64) -> Option<u64> {
        match PagingMode::from_registers(registers) {
            Some(mode) => resolve(mode, self, mode.dtb(cr3), Gva(gva)).map(|r| r.gpa.0),
            None => Some(gva),
        }
    }

    /// Reads virtual memory and returns how many bytes came before the first that is not there.
    pub(crate) fn read_virtual(&self, registers: &Registers, gva: u64, out: &mut [u8]) -> usize {
        for (i, to) in out.iter_mut().enumerate() {
            let Some(gpa) = self.translate(registers, gva.wrapping_add(i as u64)) else {
                return i;
            };
            let Some(byte) = self.read(gpa, 1) else { return i };
            *to = byte as u8;
        }
        out.len()
    }

    /// A number of 8 bytes in virtual memory, aligned or not, on one page.
    pub(crate) fn read_virtual_u64(&self, registers: &Registers, gva: u64) -> Option<u64> {
        if gva & 0xfff > 0xff8 {
            let mut bytes = [0; 8];
            return (self.read_virtual(registers, gva, &mut bytes) == 8).then(|| u64::from_le_bytes(bytes));
        }
        self.read(self.translate(registers, gva)?, 8)
    }
}

impl TableMemory for Guest<'_> {
    fn entry_u64(&self, gpa: Gpa) -> Option<u64> {
        self.read(gpa.0, 8)
    }

    fn entry_u32(&self, gpa: Gpa) -> Option<u32> {
        self.read(gpa.0, 4).and_then(|v| u32::try_from(v).ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_every_size_and_place() {
        let memory: Vec<u64> = vec![0; 512];
        let slot = Slot {
            id: 0,
            flags: 0,
            gpa: 0x1000,
            size: 4096,
            hva: memory.as_ptr() as u64,
            foreign: false,
        };
        let slots = [slot];
        let guest = Guest::new(&slots);
        for (at, len) in [
            (0x1000, 8),
            (0x1009, 8),
            (0x1013, 4),
            (0x1020, 2),
            (0x1025, 1),
            (0x1033, 3),
        ] {
            let value = 0x8877_6655_4433_2211 & (u64::MAX >> (64 - 8 * u32::from(len)));
            assert!(guest.write(at, len, value));
            assert_eq!(guest.read(at, len), Some(value), "{at:#x} {len}");
        }
        assert_eq!(guest.read(0x1ffc, 8), None, "half of it is outside");
        assert!(!guest.write(0x2000, 1, 0) && !guest.write(0xfff, 1, 0));
        assert_eq!(guest.read(0x1000, 9), None);
        assert_eq!(guest.read(0x1000, 0), None);
    }
}
