//! The processors that there are, and by which ports the machine is switched off, by the firmware's tables (ACPI 6.5, 5.2.7
//! RSDT, 5.2.9 FADT and 5.2.12 MADT).

use crate::PROCESSORS;
use crate::bytes::u32_at;

const HEADER: usize = 36;
const ENABLED: u32 = 1;
const CAN_BE_ENABLED: u32 = 2;
/// Entries of the MADT: a local APIC, and one with a wide number.
const LOCAL_APIC: u8 = 0;
const LOCAL_X2APIC: u8 = 9;
/// PM1a_CNT_BLK and PM1b_CNT_BLK of the FADT.
const PM1A_CONTROL: usize = 64;
const PM1B_CONTROL: usize = 68;

/// The processors of a machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Processors {
    /// How many are enabled.
    pub enabled: u32,
    /// How many are not, but can be.
    pub later: u32,
    apics: [u32; PROCESSORS],
}

impl Processors {
    /// APIC numbers of those that are enabled, as many of them as are supported.
    pub fn apics(&self) -> impl Iterator<Item = u32> {
        self.apics.iter().copied().take(self.enabled as usize)
    }
}

/// The processors by the RSDT at `rsdt`. `memory` gives so many bytes from a physical address on. `None` where there are
/// no such tables.
pub fn processors<'a>(rsdt: u64, memory: impl Fn(u64, usize) -> Option<&'a [u8]>) -> Option<Processors> {
    let madt = find(rsdt, b"APIC", memory)?;
    let mut rest = madt.get(HEADER + 8..)?;
    let mut found = Processors::default();
    while let [kind, length, ..] = *rest {
        let (apic, flags) = match kind {
            LOCAL_APIC => (u32::from(*rest.get(3)?), u32_at(rest, 4)?),
            LOCAL_X2APIC => (u32_at(rest, 4)?, u32_at(rest, 8)?),
            _ => (0, 0),
        };
        if flags & ENABLED != 0 {
            if let Some(slot) = found.apics.get_mut(found.enabled as usize) {
                *slot = apic;
            }
            found.enabled += 1;
        } else {
            found.later += u32::from(flags & CAN_BE_ENABLED != 0);
        }
        // At least its own two bytes, or it would never end.
        rest = rest.get(usize::from(length).max(2)..)?;
    }
    Some(found)
}

/// The ports of the power management control registers, by which the system goes to sleep: two, or one and 0. Both are two
/// bytes wide. `None` where there are no such tables, or no such ports.
pub fn sleep_ports<'a>(rsdt: u64, memory: impl Fn(u64, usize) -> Option<&'a [u8]>) -> Option<[u16; 2]> {
    let fadt = find(rsdt, b"FACP", memory)?;
    let [first, second] = [PM1A_CONTROL, PM1B_CONTROL].map(|at| u32_at(fadt, at));
    let first = first.and_then(|port| u16::try_from(port).ok())?;
    let second = second.and_then(|port| u16::try_from(port).ok()).unwrap_or(0);
    (first != 0).then_some([first, second])
}

/// The table of this name.
fn find<'a>(
    rsdt: u64,
    signature: &[u8; 4],
    memory: impl Fn(u64, usize) -> Option<&'a [u8]>,
) -> Option<&'a [u8]> {
    let table = |at: u64, signature: &[u8; 4]| {
        let header = memory(at, HEADER)?;
        let length = u32_at(header, 4)? as usize;
        (header.get(..4)? == signature && length >= HEADER).then(|| memory(at, length))?
    };
    let root = table(rsdt, b"RSDT")?;
    let mut entries = root.get(HEADER..)?.chunks_exact(4).filter_map(|e| u32_at(e, 0));
    entries.find_map(|at| table(at.into(), signature))
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    fn table(signature: &[u8; 4], body: &[u8]) -> Vec<u8> {
        let mut table = signature.to_vec();
        table.extend((HEADER as u32 + body.len() as u32).to_le_bytes());
        table.resize(HEADER, 0);
        table.extend(body);
        table
    }

    /// RSDT at 0x1000, an unrelated table at 0x2000, MADT at 0x3000.
    fn memory(madt: &[u8]) -> [(u64, Vec<u8>); 3] {
        let entries: Vec<u8> = [0x2000u32, 0x3000].iter().flat_map(|e| e.to_le_bytes()).collect();
        [
            (0x1000, table(b"RSDT", &entries)),
            (0x2000, table(b"FACP", &[1; 8])),
            (0x3000, table(b"APIC", madt)),
        ]
    }

    fn found(madt: &[u8]) -> Option<Processors> {
        let memory = memory(madt);
        processors(0x1000, |at, length| {
            let (_, bytes) = memory.iter().find(|(start, _)| *start == at)?;
            bytes.get(..length)
        })
    }

    #[test]
    fn processors_are_found() {
        let mut madt = std::vec![0; 8];
        madt.extend([LOCAL_APIC, 8, 0, 7, 1, 0, 0, 0]);
        madt.extend([1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        madt.extend([LOCAL_APIC, 8, 1, 1, 0, 0, 0, 0]);
        madt.extend([LOCAL_APIC, 8, 1, 2, 2, 0, 0, 0]);
        madt.extend([LOCAL_X2APIC, 16, 0, 0, 5, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        let all = found(&madt).unwrap();
        assert_eq!((all.enabled, all.later), (2, 1));
        assert_eq!(all.apics().collect::<Vec<_>>(), [7, 0x105]);
        for length in 0..madt.len() {
            assert!(found(&madt[..length]).is_none_or(|p| p.enabled <= 2));
        }
        // More than there is room for are counted, and that is all.
        let many: Vec<u8> = madt[..8]
            .iter()
            .copied()
            .chain([LOCAL_APIC, 8, 0, 7, 1, 0, 0, 0].repeat(PROCESSORS + 1))
            .collect();
        let all = found(&many).unwrap();
        assert_eq!(
            (all.enabled as usize, all.apics().count()),
            (PROCESSORS + 1, PROCESSORS)
        );
    }

    #[test]
    fn the_ports_of_the_switch_are_found() {
        let mut fadt = std::vec![0; 0x50];
        let mut ports = |first: u32, second: u32| {
            fadt[PM1A_CONTROL - HEADER..][..4].copy_from_slice(&first.to_le_bytes());
            fadt[PM1B_CONTROL - HEADER..][..4].copy_from_slice(&second.to_le_bytes());
            let tables = [
                (0x1000u64, table(b"RSDT", &0x2000u32.to_le_bytes())),
                (0x2000, table(b"FACP", &fadt)),
            ];
            sleep_ports(0x1000, |at, length| {
                tables.iter().find(|(start, _)| *start == at)?.1.get(..length)
            })
        };
        assert_eq!(ports(0xb004, 0), Some([0xb004, 0]));
        assert_eq!(ports(0xb004, 0xb014), Some([0xb004, 0xb014]));
        assert_eq!(ports(0, 0), None);
        assert_eq!(ports(0x1_b004, 0), None);
        // The tables above have one of eight bytes.
        let short = memory(&[]);
        assert_eq!(
            sleep_ports(0x1000, |at, length| {
                short.iter().find(|(start, _)| *start == at)?.1.get(..length)
            }),
            None
        );
    }

    #[test]
    fn entries_without_length_end() {
        let madt = [0; 64];
        assert_eq!(found(&madt), None);
        assert_eq!(processors(0, |_, _| None), None);
    }
}
