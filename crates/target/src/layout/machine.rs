//! How much of a machine's memory lies below 4 GiB: the rules of each VMM.

use crate::Vmm;

const GIB: u64 = 1 << 30;
/// Where the rest begins (AMD machines with about a tebibyte move it, see [`splits`]).
pub(crate) const ABOVE_4G: u64 = 4 * GIB;

/// One way to lay out `total` bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Split {
    /// Guest-physical address of the first byte: 0 but on AArch64.
    pub(crate) start: u64,
    /// Bytes that lie from `start` on.
    pub(crate) below: u64,
    /// Where the others lie.
    pub(crate) above_start: u64,
}

/// The layouts that `total` bytes can have in such a machine, the likeliest first, each only once.
///
/// `machine` is QEMU's machine type. The rules are those of hw/i386/pc_piix.c, pc_q35.c and microvm.c (QEMU),
/// `arch/src/x86_64/layout.rs` (Firecracker, Cloud Hypervisor) and `x86_64/src/lib.rs` (crosvm). All x86 rules
/// are candidates for every machine, as versions and forks differ; the machine's own come first.
pub(crate) fn splits(
    vmm: Vmm,
    machine: Option<&str>,
    arm: bool,
    max_below: Option<u64>,
    total: u64,
) -> Vec<Split> {
    if arm {
        // hw/arm/virt.c: all memory from 1 GiB on.
        return vec![Split {
            start: GIB,
            below: total,
            above_start: u64::MAX,
        }];
    }
    let machine = machine.unwrap_or("pc");
    let mut limits = Vec::new();
    match vmm {
        Vmm::Qemu if machine.contains("q35") => {
            let low = if total >= 0xb000_0000 {
                0x8000_0000
            } else {
                0xb000_0000
            };
            limits.push(max_below.map_or(low, |m| m.min(low)));
        }
        Vmm::Qemu => {
            // pc and microvm
            let limit = max_below.unwrap_or(0xe000_0000);
            // Machine types before pc-i440fx-2.0 do not round down to a gibibyte.
            let rounded = if total >= limit {
                limit.min(0xc000_0000)
            } else {
                limit
            };
            limits.extend([rounded, limit]);
        }
        Vmm::Firecracker => limits.extend([0xd000_0000, 0xc000_0000]),
        Vmm::CloudHypervisor => limits.push(0xc000_0000),
        Vmm::Crosvm => limits.extend([0xd000_0000, 0xc000_0000, 0x8000_0000]),
        Vmm::Other => {}
    }
    limits.extend([0xc000_0000, 0x8000_0000, 0xd000_0000, 0xe000_0000, 0xb000_0000]);
    let mut all = Vec::new();
    let mut add = |split: Split| {
        if !all.contains(&split) {
            all.push(split);
        }
    };
    for limit in limits {
        if limit == 0 {
            continue;
        }
        let below = total.min(limit);
        let above_start = if below == total { u64::MAX } else { ABOVE_4G };
        add(Split {
            start: 0,
            below,
            above_start,
        });
        // Above about 1 TiB an AMD machine keeps clear of the HyperTransport range (pc_set_amd_above_4g_mem_start).
        if total > 1000 * GIB && below < total {
            add(Split {
                start: 0,
                below,
                above_start: 1 << 40,
            });
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(vmm: Vmm, machine: &str, total: u64) -> (u64, u64) {
        let all = splits(vmm, Some(machine), false, None, total);
        (all[0].below, all[0].above_start)
    }

    #[test]
    fn the_rules_of_each_machine_come_first() {
        // Seen with `info mtree -f` on QEMU 7.2 and 10.0.
        assert_eq!(
            first(Vmm::Qemu, "pc-i440fx-7.2", 5 * GIB),
            (0xc000_0000, ABOVE_4G)
        );
        assert_eq!(first(Vmm::Qemu, "pc", 3500 << 20), (3500 << 20, u64::MAX));
        assert_eq!(first(Vmm::Qemu, "pc-q35-7.2", 5 * GIB), (0x8000_0000, ABOVE_4G));
        assert_eq!(first(Vmm::Qemu, "q35", 0xaff0_0000), (0xaff0_0000, u64::MAX));
        assert_eq!(first(Vmm::Qemu, "q35", 0xb000_0000), (0x8000_0000, ABOVE_4G));
        assert_eq!(first(Vmm::Qemu, "microvm", 5 * GIB), (0xc000_0000, ABOVE_4G));
        assert_eq!(first(Vmm::Firecracker, "", 4 * GIB), (0xd000_0000, ABOVE_4G));
        assert_eq!(first(Vmm::CloudHypervisor, "", 4 * GIB), (0xc000_0000, ABOVE_4G));
    }

    #[test]
    fn small_machines_have_one_layout() {
        assert_eq!(splits(Vmm::Qemu, None, false, None, 512 << 20).len(), 1);
        assert_eq!(splits(Vmm::Other, None, false, None, 2 * GIB).len(), 1);
        assert!(splits(Vmm::Qemu, None, false, None, 3 * GIB).len() > 1);
    }

    #[test]
    fn the_owners_limit_counts() {
        let all = splits(Vmm::Qemu, Some("q35"), false, Some(GIB), 4 * GIB);
        assert_eq!((all[0].below, all[0].above_start), (GIB, ABOVE_4G));
        let all = splits(Vmm::Qemu, Some("pc"), false, Some(GIB), 4 * GIB);
        assert_eq!(all[0].below, GIB);
        assert!(
            splits(Vmm::Qemu, Some("pc"), false, Some(0), 4 * GIB)
                .iter()
                .all(|s| s.below > 0)
        );
    }

    #[test]
    fn arm_starts_at_one_gibibyte() {
        assert_eq!(splits(Vmm::Qemu, Some("virt"), true, None, GIB)[0].start, GIB);
    }
}
