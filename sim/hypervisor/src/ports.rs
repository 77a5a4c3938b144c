//! I/O ports that leave the guest: which, and what an access was.

use core::ops::Range;

use crate::ept::{ENTRIES, Table};

/// The second serial port, which is the hypervisor's own line to the host.
pub const CHANNEL: Range<u16> = 0x2f8..0x300;
/// Of a power management control register: go to the sleep state that is set (ACPI 6.5, 4.8.3.2.1).
pub const SLEEP_ENABLE: u32 = 1 << 13;

/// An access, as the exit's qualification has it (SDM vol. 3, table 28-5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// The first port.
    pub port: u16,
    /// Bytes: 1, 2 or 4.
    pub size: u8,
    /// IN rather than OUT.
    pub is_in: bool,
    /// INS or OUTS, whose data is in memory.
    pub is_string: bool,
}

impl Access {
    /// Reads the qualification.
    pub fn new(qualification: u64) -> Self {
        Self {
            port: (qualification >> 16) as u16,
            size: (qualification & 7) as u8 + 1,
            is_in: qualification & 8 != 0,
            is_string: qualification & 16 != 0,
        }
    }

    /// Whether any of its ports is among `ports`.
    pub fn touches(self, ports: &Range<u16>) -> bool {
        u32::from(self.port) < u32::from(ports.end)
            && u32::from(ports.start) < u32::from(self.port) + u32::from(self.size)
    }

    /// What RAX is after an IN that gave `value`: 32 bits clear the upper half, fewer leave the rest.
    pub fn result(self, rax: u64, value: u32) -> u64 {
        match self.size {
            1 => rax & !0xff | u64::from(value & 0xff),
            2 => rax & !0xffff | u64::from(value & 0xffff),
            _ => value.into(),
        }
    }
}

/// Has accesses to `ports` leave the guest, by the VMCS's bitmaps: the lower half of the ports, and the upper.
pub fn intercept(bitmaps: &mut [Table; 2], ports: Range<u16>) {
    const WORDS: usize = ENTRIES;
    for port in ports.map(usize::from) {
        let table = bitmaps.get_mut(port / 64 / WORDS);
        if let Some(word) = table.and_then(|t| t.0.get_mut(port / 64 % WORDS)) {
            *word |= 1 << (port % 64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_access_is_read() {
        // IN AX, 0x2f7, and OUTSB to 0x2f8.
        let word = Access::new(0x2f7 << 16 | 8 | 1);
        assert_eq!(
            (word.port, word.size, word.is_in, word.is_string),
            (0x2f7, 2, true, false)
        );
        assert!(word.touches(&CHANNEL));
        let byte = Access::new(0x2f8 << 16 | 16);
        assert_eq!((byte.size, byte.is_in, byte.is_string), (1, false, true));
        assert!(
            !Access::new(0x2f7 << 16).touches(&CHANNEL) && !Access::new(0x300 << 16 | 3).touches(&CHANNEL)
        );
        assert!(!Access::new(0xffff << 16 | 3).touches(&CHANNEL));
    }

    #[test]
    fn the_rest_of_rax_is_left() {
        let rax = 0x1122_3344_5566_7788;
        let result = |size: u64| Access::new(size - 1).result(rax, 0xaabb_ccdd);
        assert_eq!(
            [1, 2, 4].map(result),
            [0x1122_3344_5566_77dd, 0x1122_3344_5566_ccdd, 0xaabb_ccdd]
        );
    }

    #[test]
    fn what_is_intercepted_is_in_the_bitmaps() {
        let mut bitmaps = [Table::EMPTY, Table::EMPTY];
        intercept(&mut bitmaps, CHANNEL);
        intercept(&mut bitmaps, 0xb004..0xb006);
        let set = |port: usize| bitmaps[port / 0x8000].0[port % 0x8000 / 64] >> (port % 64) & 1 != 0;
        assert!(set(0x2f8) && set(0x2ff) && !set(0x2f7) && !set(0x300));
        assert!(set(0xb004) && set(0xb005) && !set(0xb006));
    }
}
